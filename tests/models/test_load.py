"""Where models come from, what a user who names a wrong one is told, and which draft models fit a
target."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig

from specdec.drafters.small_llama import SmallLlama
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from tests.decoding import loaded
from tests.models.tiny import (
    FLOAT32_ROUNDING,
    SIZES,
    VOCABULARY,
    error,
    own_attention,
    paged_and_own,
    save,
    tiny,
)


def load(path: str) -> PagedLM:
    return load_model(path, setting="drafter.path")


def refusal_of(path: str) -> str:
    """What a user is told: one line that begins with the setting."""
    with pytest.raises(ValueError, match=r"drafter\.path=") as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"drafter.path={path}: ")
    assert "\n" not in message
    return message


def test_zoo_name_and_its_folder_are_the_same_model() -> None:
    by_name, by_folder = load("zoo:draft"), load(str(zoo_path("draft")))
    assert by_name.config.hidden_size == 192
    assert by_name.dtype == torch.float32
    assert by_name.vocab_size == len(by_name.tokenizer) == 8192
    mine, theirs = by_name.model.state_dict(), by_folder.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)


def test_saved_folder_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny("llama")
    own = own_attention(model)
    lm = load(str(save(model, tmp_path)))
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal_of(str(tmp_path / "nowhere"))
    assert "no such folder" in refusal_of("./nowhere")


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "cannot be loaded as a causal LM" in refusal_of(str(tmp_path))


def test_folder_without_weights(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    assert "cannot be loaded as a causal LM" in refusal_of(str(tmp_path))


def test_unknown_built_in_name() -> None:
    message = refusal_of("zoo:targets")
    assert "draft" in message
    assert "target" in message


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in refusal_of("nobody-at-all/no-such-model")


@pytest.mark.parametrize(
    ("kind", "settings", "architecture", "reason"),
    [
        ("t5", {"d_kv": 8}, "T5ForConditionalGeneration", "it is an encoder-decoder model"),
        ("bloom", {}, "BloomForCausalLM", "it biases attention by distance (ALiBi)"),
        ("mamba2", {"num_heads": 8, "head_dim": 8}, "Mamba2ForCausalLM", "linear_attention"),
        ("llama4_text", {}, "Llama4ForCausalLM", "layers of type chunked_attention"),
    ],
)
def test_what_the_configuration_tells_is_refused_before_weights_are_read(
    kind: str, settings: dict[str, Any], architecture: str, reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind, **SIZES | settings)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)  # and no weights
    message = refusal_of(str(tmp_path))
    assert message.startswith(f"drafter.path={tmp_path}: {architecture} cannot run")
    assert reason in message


# --- vocabularies


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    return {
        "target": save(tiny("llama"), root / "target"),
        "same": save(tiny("llama", num_hidden_layers=1), root / "same"),
        "smaller": save(tiny("llama", vocab_size=VOCABULARY - 6), root / "smaller"),
        "other words": save(tiny("llama"), root / "other", word="v"),
    }


def test_draft_of_another_vocabulary_is_refused(folders: dict[str, Path]) -> None:
    target, other = load(str(folders["target"])), folders["other words"]
    with pytest.raises(ValueError, match="its vocabulary is not the target's") as refusal:
        loaded(SmallLlama(path=str(other)), target)
    message = str(refusal.value)
    assert message.startswith(f"drafter.path={other}: ")
    assert "192 entries differ" in message
    assert "\n" not in message


@pytest.mark.parametrize(("draft", "tokens"), [("same", VOCABULARY), ("smaller", VOCABULARY - 6)])
def test_draft_of_the_same_tokens_is_taken(
    folders: dict[str, Path], draft: str, tokens: int
) -> None:
    target = load(str(folders["target"]))
    drafter = loaded(SmallLlama(path=str(folders[draft])), target)
    assert drafter.vocab_size == tokens


def test_sizes_are_compared_where_a_tokenizer_is_missing(folders: dict[str, Path]) -> None:
    target = PagedLM(tiny("llama"))
    loaded(SmallLlama(path=str(folders["other words"])), target)
    with pytest.raises(ValueError, match="90 and 96 tokens"):
        loaded(SmallLlama(path=str(folders["smaller"])), target)

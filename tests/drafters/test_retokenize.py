"""experiments/tools/retokenize.py: the same network with fewer tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.experiments.tools import retokenize as script
from specdec.models.load import zoo_path
from tests.drafters.retokenized import KEPT, STORIES


def test_a_kept_token_is_encoded_as_before(drafts: dict[int, str], renamed: dict) -> None:
    before, after = (AutoTokenizer.from_pretrained(p) for p in (zoo_path("draft"), drafts[KEPT]))
    assert len(after) == KEPT == len(renamed)
    assert sorted(renamed.values()) == list(range(KEPT))
    assert sum(a == b for a, b in renamed.items()) < 10  # the ids are others
    whole = partly = 0
    for line in (Path(__file__).parents[2] / "README.md").read_text().splitlines():
        old, new = before(line).input_ids, after(line).input_ids
        assert after.decode(new) == line
        if all(token in renamed for token in old):
            assert new == [renamed[token] for token in old]
            whole += 1
        else:
            assert len(new) > len(old)
            partly += 1
    assert min(whole, partly) > 20
    assert after.eos_token == before.eos_token


def test_the_retokenized_model_is_the_same_network(drafts: dict[int, str], renamed: dict) -> None:
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (zoo_path("draft"), drafts[KEPT])
    )
    old = torch.tensor(sorted(renamed))[torch.arange(40) * 101 % KEPT]
    new = torch.tensor([renamed[i] for i in old.tolist()])
    with torch.inference_mode():
        expected, found = before(old[None]).logits[0], after(new[None]).logits[0]
    kept = sorted(renamed)
    torch.testing.assert_close(found[:, [renamed[i] for i in kept]], expected[:, kept])
    assert after.config.eos_token_id == renamed[before.config.eos_token_id]
    assert after.get_input_embeddings().weight is after.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keep=100"], "source=zoo:draft: keep=100: must be from 272"),
        (["keep=9000"], "bytes and added tokens, to 8192"),
        (["keep=400", "source=zoo:nothing"], "source=zoo:nothing: no such"),
        (["keep=400", "source=./nothing"], "source=./nothing: cannot be loaded"),
        (["keep=400", f"source={STORIES}"], "not a byte-level BPE"),
    ],
)
def test_mistakes_of_retokenize_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if f"source={STORIES}" in arguments and not STORIES.is_dir():
        pytest.skip(f"no model in {STORIES}")
    assert script.main([*arguments, f"out={tmp_path / 'm'}"]) == 2
    assert message in capsys.readouterr().err


def test_retokenize_overwrites_no_model(
    drafts: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["keep=400", f"out={drafts[KEPT]}"]) == 2
    assert "holds a model" in capsys.readouterr().err

"""Files of models that are broken, or not those of the model: one line names the file and the
tensor, and nothing is made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.models.load import load_model
from specdec.models.placement import Placement
from tests.models.tiny import save, tiny

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny("llama", num_hidden_layers=2, tie_word_embeddings=False)
    return save(model, tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal_of(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(ValueError, match=r"^drafter\.path=") as refusal:
        load_model(str(folder), Placement(dtype=dtype), setting="drafter.path")
    message = str(refusal.value)
    assert message.startswith(f"drafter.path={folder}: ")
    assert "\n" not in message
    return message.removeprefix(f"drafter.path={folder}: ")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- files that are not what their names say

NOT_THERE = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 9\n", "git lfs"),
    "empty": (b"", "is empty"),
    "page": (b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
    "other": (b"\x08\x00\x00\x00\x00\x00\x00\x00no json", "download it again"),
}


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", NOT_THERE)
def test_file_that_is_something_else(name: str, kind: str, folder: Path) -> None:
    content, reason = NOT_THERE[kind]
    (folder / name).write_bytes(content)
    message = refusal_of(folder)
    assert message.startswith(f"{name} ")
    assert reason in message


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_weights_that_are_cut(kept: int, folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal_of(folder).startswith(f"{WEIGHTS} is cut")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ['{"a": ', "[1]", '{"a": "\udcff"}'])
def test_json_that_is_none(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content, errors="surrogateescape")
    assert refusal_of(folder).startswith(f"{name} is ")


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_no_tokenizer(left: tuple[str, ...], folder: Path) -> None:
    for file in folder.glob("*token*"):
        if file.name not in left:
            file.unlink()
    assert "tokenizer.json" in refusal_of(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    load_model(str(folder))  # beside the others they do not matter
    (folder / WEIGHTS).unlink()
    assert "pickles" in refusal_of(folder)


def sharded(folder: Path) -> None:
    """The same weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    places = {key: f"part-{'layers.1' in key:d}.safetensors" for key in tensors}
    for file in set(places.values()):
        part = {key: tensor for key, tensor in tensors.items() if places[key] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_shards(folder: Path) -> None:
    sharded(folder)
    load_model(str(folder))
    shard = folder / "part-1.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert refusal_of(folder).startswith("part-1.safetensors is cut")
    shard.unlink()
    assert refusal_of(folder).startswith("part-1.safetensors is missing")
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert refusal_of(folder).startswith(f"{WEIGHTS}.index.json has no metadata")


def test_files_of_the_hub_are_looked_at_as_well(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    there = cache / "models--some--model"
    (there / "refs").mkdir(parents=True)
    (there / "refs/main").write_text("abc")
    (there / "snapshots").mkdir()
    (folder / WEIGHTS).write_bytes(b"")
    folder.rename(there / "snapshots/abc")
    with pytest.raises(ValueError, match=r"target\.path=some/model: model\.safetensors is empty"):
        load_model("some/model", setting="target.path")


# --- tensors that are not the model's


def test_more_and_fewer_layers_than_the_file_has(folder: Path) -> None:
    configure(folder, num_hidden_layers=3)
    message = refusal_of(folder)
    assert message.startswith(f"{WEIGHTS} has no model.layers.2.")
    assert "(and 8 more)" in message
    configure(folder, num_hidden_layers=1)
    message = refusal_of(folder)
    assert message.startswith(f"{WEIGHTS} holds model.layers.1.")
    assert "(and 8 more)" in message


def test_missing_renamed_and_misshapen_tensors(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.other.weight": tensors.pop(UP)}))
    message = refusal_of(folder)
    assert message.startswith(f"{WEIGHTS} has no {UP}, ")
    assert "model.other.weight instead" in message
    rewrite(folder, lambda tensors: tensors.pop("model.other.weight"))
    assert refusal_of(folder).startswith(f"{WEIGHTS} has no {UP}, ")
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(40, 32)}))
    message = refusal_of(folder)
    assert message.startswith(f"{WEIGHTS} holds {UP} with shape [40, 32]")
    assert "[48, 32]" in message


def test_tensor_is_named_with_its_shard(folder: Path) -> None:
    sharded(folder)
    configure(folder, num_hidden_layers=1)
    assert refusal_of(folder).startswith("part-1.safetensors holds model.layers.1.")


def test_tied_and_ignored_tensors_may_be_missing_or_more(tmp_path: Path) -> None:
    save(tiny("llama", num_hidden_layers=1, tie_word_embeddings=True), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": UP_ROW}))
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    load_model(str(tmp_path))
    configure(tmp_path, tie_word_embeddings=False)
    assert refusal_of(tmp_path).startswith(f"{WEIGHTS} has no lm_head.weight")


UP_ROW = torch.ones(4)


# --- numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, folder: Path) -> None:
    sharded(folder)
    tensors = load_file(folder / "part-1.safetensors")
    tensors[UP][7, 3] = value
    save_file(tensors, folder / "part-1.safetensors", {"format": "pt"})
    message = refusal_of(folder)
    assert message.startswith(f"part-1.safetensors gives {UP} values that are NaN or infinite")


def test_weights_too_large_for_the_type(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[UP][7, 3:4].fill_(1e5))
    load_model(str(folder))
    assert f"{UP} values that are NaN or infinite in float16" in refusal_of(folder, torch.float16)

"""Medusa heads in the layouts that are published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.heads.formats import load_head
from specdec.models.paged import PagedLM
from tests.heads import made, oracle
from tests.models.tiny import VOCABULARY, tiny

H, HEADS, TOLERANCE = made.D, 3, 1e-5


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama"), name="target.path=tiny")


def own_layout(blocks: int, *, last: bool, shared: bool = False) -> dict[str, Tensor]:
    random, found = made.Random(), {}
    for head in range(HEADS):
        for block in range(blocks):
            weight, bias = random.matrix(H, H), 3 * random.matrix(H)
            if shared and block:
                weight, bias = (found[f"{head}.0.linear.{p}"] for p in ("weight", "bias"))
            found |= {f"{head}.{block}.linear.weight": weight}
            found |= {f"{head}.{block}.linear.bias": bias}
        if last:
            found[f"{head}.{blocks}.weight"] = 6 * random.matrix(VOCABULARY, H)
    return found


def layout_of_vllm(rows: int, *, bias: bool) -> dict[str, Tensor]:
    random, found = made.Random(), {}
    for head in range(HEADS):
        found[f"blocks.{head}.layers.0.weight"] = random.matrix(H, H)
        if bias:
            found[f"blocks.{head}.layers.0.bias"] = 3 * random.matrix(H)
        found[f"lm_heads.{head}.weight"] = random.matrix(rows, H)
    return found


def check(
    folder: Path, target: PagedLM, tensors: dict[str, Tensor], names: str, last: str, blocks: int
) -> Any:
    """`names` of a block, `last` of an output matrix, with places for numbers."""
    loaded: Any = load_head(str(folder), target, kinds=("medusa",))
    states = torch.randn(5, H, generator=torch.Generator().manual_seed(2))
    ours = loaded.logits(states).double().softmax(-1)
    w, output = made.doubled(tensors), target.model.lm_head.weight.detach().double()
    for head in range(HEADS):
        parts = tuple(names.format(head, block) for block in range(blocks))
        for row, state in enumerate(states):
            logits = oracle.medusa(w, state, output, parts, last.format(head))
            if loaded.names is not None and len(logits) > len(loaded.names):
                logits = logits[loaded.names]
            assert (ours[row, head] - logits.softmax(-1)).abs().max() < TOLERANCE
    assert loaded.config.taps == ("normal",)
    assert loaded.config.heads == HEADS
    return loaded


@pytest.mark.parametrize(
    ("blocks", "last", "file"),
    [
        (1, True, "medusa_lm_head.pt"),
        (2, True, "medusa_lm_head.pt"),
        (1, False, "medusa_lm_head.pt"),
        (1, False, "medusa_lm_head.safetensors"),
        (2, True, "medusa_lm_head.safetensors"),
    ],
)
def test_medusa_heads_are_what_their_files_say(
    blocks: int, last: bool, file: str, target: PagedLM, tmp_path: Path
) -> None:
    tensors = own_layout(blocks, last=last)
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1}  # they do not say how many there are
    made.write(tmp_path, config, tensors, file)
    loaded = check(tmp_path, target, tensors, "{}.{}.linear", f"{{}}.{blocks}.weight", blocks)
    assert loaded.config.tied == (not last)
    assert loaded.description.startswith("Medusa: 3 heads of ")
    if not last:
        assert loaded.lm_head.weight.data_ptr() == target.model.lm_head.weight.data_ptr()


def test_blocks_that_are_one_module_are_kept_once(target: PagedLM, tmp_path: Path) -> None:
    tensors = own_layout(3, last=True, shared=True)
    made.write(tmp_path, {}, tensors, "medusa_lm_head.pt")
    loaded = check(tmp_path, target, tensors, "{}.{}.linear", "{}.3.weight", 3)
    assert loaded.config.shared
    assert [len(blocks) for blocks in loaded.blocks] == [1, 1, 1]


def test_heads_beside_their_target_are_found(target: PagedLM, tmp_path: Path) -> None:
    tensors = own_layout(1, last=True)
    whole = {f"medusa_head.{key}": value for key, value in tensors.items()}
    whole |= {key: value.clone() for key, value in target.model.state_dict().items()}
    made.write(tmp_path, {"model_type": "medusa"}, whole, "pytorch_model.bin")
    loaded = check(tmp_path, target, tensors, "{}.{}.linear", "{}.1.weight", 1)
    assert loaded.description.startswith("Medusa, beside its target: 3 heads of 1 block, states")


@pytest.mark.parametrize("bias", [False, True])
def test_vllms_form_is_read(bias: bool, target: PagedLM, tmp_path: Path) -> None:
    tensors = layout_of_vllm(VOCABULARY, bias=bias)
    config = {"hidden_size": H, "num_heads": HEADS, "medusa_fc_bias": bias}
    made.write(tmp_path, config, tensors, "model.safetensors")
    check(tmp_path, target, tensors, "blocks.{}.layers.{}", "lm_heads.{}.weight", 1)


@pytest.mark.parametrize("whole", [False, True])
def test_vllms_map_of_tokens_may_be_in_any_order(
    whole: bool, target: PagedLM, tmp_path: Path
) -> None:
    tensors = layout_of_vllm(VOCABULARY if whole else 20, bias=False)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[:20]
    prefixed = {f"medusa_heads.{key}": value for key, value in tensors.items()}
    config = {"hidden_size": H, "vocab_size": VOCABULARY, "truncated_vocab_size": 20}
    made.write(tmp_path, config, prefixed | {"token_map": order}, "model.safetensors")
    in_order = dict(tensors)
    if not whole:  # the oracle's rows in the order of ids
        in_order |= {k: v[order.argsort()] for k, v in tensors.items() if k.startswith("lm")}
    loaded = check(tmp_path, target, in_order, "blocks.{}.layers.{}", "lm_heads.{}.weight", 1)
    assert loaded.names.tolist() == sorted(order.tolist())
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_one_output_matrix_for_all_heads(target: PagedLM, tmp_path: Path) -> None:
    tensors = layout_of_vllm(VOCABULARY, bias=False)
    config = {"hidden_size": H, "original_lm_head": True}
    made.write(tmp_path, config, tensors, "model.safetensors")
    loaded = check(tmp_path, target, tensors, "blocks.{}.layers.{}", "lm_heads.0.weight", 1)
    assert len(loaded.lm_heads) == 0

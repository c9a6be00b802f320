"""`drafter.quantize=fp8`: heads draft what the restatement says of weights that were rounded to
float8, texts stay the target's, and what is read is less."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.eagle import Eagle3
from specdec.drafters.mtp import MTP
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.static import Static
from specdec.heads import formats
from specdec.kernels.layout import Fp8Weight
from specdec.models.paged import PagedLM
from specdec.models.quantised import Fp8Linear, quantise_layer
from tests.decoding import decoder_of, loaded, outputs_of
from tests.heads import blocks, made, oracle
from tests.heads.mtp import mtp
from tests.heads.test_drafts import TOLERANCE, N, watched
from tests.heads.test_narrow import KINDS
from tests.heads.test_widened_runs import HEADS, assert_same_drafts, drafts_of, large  # noqa: F401
from tests.models.fp8_files import rounded
from tests.models.tiny import texts, tiny

OWN_OUTPUT = ("eagle3", "eagle3, all tokens", "peagle", "medusa", "dflash, trimmed")
CASES = {
    **KINDS,
    "mtp, gated": (MTP, partial(mtp, layout="qwen"), oracle.mtp),
    "dspark, gated": (
        DSpark,
        partial(blocks.dflash, layout="speculators", named=40, markov="gated"),
        oracle.dspark,
    ),
    "dflash, biases": (DFlash, partial(blocks.dflash, bias="qkvo"), oracle.dflash),
}
DIFFERENT = (  # in what of them is quantised, or by which code
    "eagle3",
    "mtp, two layers",
    "mtp, gated",
    "medusa",
    "dflash, trimmed",
    "dspark, gated",
)
OF_LAYERS = ("_proj.weight", ".linear.weight", ".1.weight")  # the last two of Medusa


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N), name="target.path=tiny")


def narrowed(facts: Any, own: bool) -> Any:
    """Facts of the weights that `quantize=fp8` makes."""
    parts = tuple(f"{layer}.{part}." for layer in facts.layers for part in ("self_attn", "mlp"))
    tensors = {
        name: rounded(weight).double()
        if (name.startswith(parts) and name.endswith("_proj.weight"))
        or name.endswith(OF_LAYERS[1:])
        else weight
        for name, weight in facts.tensors.items()
    }
    output = rounded(facts.output).double() if own else facts.output
    return replace(facts, tensors=tensors, output=output)


@pytest.mark.parametrize(
    "case",
    [one if one in DIFFERENT else pytest.param(one, marks=pytest.mark.slow) for one in CASES],
)
def test_a_draft_is_the_law_of_rounded_weights(case: str, target: PagedLM, tmp_path: Path) -> None:
    kind, write, restate = CASES[case]
    facts = write(tmp_path, target.model)
    own = case in OWN_OUTPUT or case == "dspark, gated"
    few = narrowed(facts, own)
    drafter = kind(path=str(tmp_path), quantize="fp8")
    watcher = watched(target, drafter, few, partial(restate, few), "static", shortest=2)
    assert watcher.worst < TOLERANCE
    other = kind(path=str(tmp_path))
    plain = watched(target, other, few, partial(restate, few), "static", shortest=2)
    assert plain.worst > 20 * TOLERANCE  # it is another head
    said = drafter.notes["drafter.path"]
    assert f"layers{' and output' * own} in fp8, " in said
    assert "fp8" not in other.notes["drafter.path"]


def bytes_of(drafter: Any) -> tuple[float, str]:
    """Of the first line, and all before them."""
    before, _, last = drafter.notes["drafter.path"].rpartition(" parameters, ")
    size, prefix, *_ = (
        last.removeprefix("layers in fp8, ").removeprefix("layers and output in fp8, ").split()
    )
    return float(size) * {"B": 1, "kB": 1e3, "MB": 1e6}[prefix], before


@pytest.mark.parametrize("case", ["eagle3", "eagle", "mtp, two layers", "dflash, trimmed"])
def test_the_bytes_of_a_level_are_those_that_are_read(
    case: str, target: PagedLM, tmp_path: Path
) -> None:
    """Of a quantised matrix a byte for each number and four for each row, in place of four for
    each number."""
    kind, write, _ = KINDS[case]
    facts = write(tmp_path, target.model)
    plain, less = (loaded(kind(path=str(tmp_path), quantize=q), target) for q in ("none", "fp8"))
    parts = tuple(f"{layer}.{part}." for layer in facts.layers for part in ("self_attn", "mlp"))
    matrices = [w for k, w in facts.tensors.items() if k.startswith(parts) and w.dim() == 2]
    matrices += [facts.output] if case in OWN_OUTPUT else []
    saved = sum(3 * w.numel() - 4 * len(w) for w in matrices)
    (before, first), (after, second) = bytes_of(plain), bytes_of(less)
    assert math.isclose(before - after, saved, rel_tol=0.02)
    assert first == second  # as many parameters
    if case == "mtp, two layers":  # and nothing twice
        read = sum(w.numel() for w in facts.tensors.values()) + facts.output.numel()
        assert math.isclose(before, 4 * read, rel_tol=0.01)
    held = [m for m in less.head.modules() if isinstance(m, Fp8Linear)]
    assert {type(one.weight) for one in held} == {Fp8Weight}
    assert all(one.values.dtype == torch.float8_e4m3fn for one in held)


@pytest.mark.parametrize("case", ["eagle", "dspark, rnn"])
def test_texts_are_those_of_plain_decoding(case: str, target: PagedLM, tmp_path: Path) -> None:
    kind, write, _ = KINDS[case]
    write(tmp_path, target.model)
    both = PagedLM(tiny("llama", num_hidden_layers=N))
    for layer in both.model.model.layers:
        quantise_layer(layer)
    for one in (target, PagedLM(both.model)):  # whose own weights are float8, too
        plain = outputs_of(decoder_of(one, NoDrafter()), texts(), 12)
        for tree in (Static(widths=[3, 2, 1]), Static(widths=[3, 1], children="sample")):
            drafter = kind(path=str(tmp_path), quantize="fp8")
            assert outputs_of(decoder_of(one, drafter, tree), texts(), 12) == plain


def test_the_targets_own_matrix_stays_and_rows_of_it_do_not(
    target: PagedLM, tmp_path: Path
) -> None:
    mtp(tmp_path, target.model, layers=2)
    output = target.model.lm_head.weight
    make: Callable[..., Any] = partial(MTP, path=str(tmp_path), quantize="fp8")
    for vocabulary in (None, 40):
        head = loaded(make(vocabulary=vocabulary), target).head
        assert head.lm_head.weight.data_ptr() == output.data_ptr()
    (tmp_path / "ids.json").write_text("[3, 1, 90]")
    head = loaded(make(vocabulary=str(tmp_path / "ids.json")), target).head
    chosen = head.lm_head.weight.dequantised(torch.float32)
    assert torch.equal(chosen, rounded(output.detach()[[1, 3, 90]]))
    assert head.later[0].lm_head is head.lm_head
    copy = Eagle3(path=str(tmp_path / "copy"), quantize="fp8")
    facts = made.eagle3(tmp_path / "copy", target.model, named=None)
    assert facts.output.shape == output.shape
    assert isinstance(loaded(copy, target).head.lm_head, Fp8Linear)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", HEADS)
def test_a_stand_in_drafts_with_what_was_widened_first(
    name: str,
    large: PagedLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, write, sampled = HEADS[name]
    write(tmp_path, tiny("llama", num_hidden_layers=8))
    drafter = kind(path=str(tmp_path), quantize="fp8")
    found = drafts_of(large, drafter, sampled=sampled)

    def by_hand(head: Any, _: Any) -> str:
        own = name.startswith(("eagle3", "peagle")) or name.endswith("trimmed")
        for key, weight in head.named_parameters():
            of_layer = re.search(r"(self_attn|mlp)\.\w+_proj\.weight$|^blocks.*weight$", key)
            if of_layer or (own and key == "lm_head.weight"):
                weight.data = rounded(weight.data).to(weight.dtype)
        return ""

    monkeypatch.setattr(formats, "quantise_head", by_hand)
    other = kind(path=str(tmp_path), quantize="fp8")
    assert_same_drafts(found, drafts_of(large, other, sampled=sampled))
    assert not any(isinstance(module, Fp8Linear) for module in other.head.modules())


def test_other_values_are_refused(specdec: Any, tmp_path: Path) -> None:
    words = ("target=zoo", "drafter=eagle3", "drafter.quantize=int4", f"out={tmp_path / 'run'}")
    code, _, err = specdec(*words)
    assert code == 2
    assert err == "error: drafter.quantize=int4: must be 'none' or 'fp8'\n"

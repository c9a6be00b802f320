"""A stand-in with a widened head drafts the trees that the small target drafts with the small
head, and decodes what it decodes: by the whole loop, from files. In float64, because what a random
head feeds back to itself grows, and its rounding with it."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.eagle import Eagle1, Eagle3, PEagle
from specdec.drafters.medusa import Medusa
from specdec.drafters.mtp import MTP
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.models.paged import PagedLM
from specdec.models.standin import Shape, Widening, standin
from specdec.protocols import Drafter
from specdec.verifier.synthetic import Synthetic
from tests.decoding import decoder_of, loaded, requests_of
from tests.heads import blocks, made
from tests.heads.mtp import mtp
from tests.models.tiny import save, texts, tiny

NEW = 12
SHAPE = Shape(
    hidden_size=72,
    intermediate_size=96,
    num_hidden_layers=11,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=120,
)
Write = Callable[[Path, Any], Any]


def all_flags(folder: Path, model: Any) -> None:
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    made.eagle3(folder, model, layout="speculators", flags=flags)


def scaled_block(folder: Path, model: Any) -> None:
    inner = {"input_embedding_scale": 1.5}
    blocks.dflash(folder, model, own_mask="dict", inner=inner, sliding=(1,), bias="qkvo")


def trimmed_block(folder: Path, model: Any) -> None:
    blocks.dflash(folder, model, layout="speculators", named=40, taps=(2, 7))


def recurrent_spark(folder: Path, model: Any) -> None:
    blocks.dflash(folder, model, layout="deepspec", markov="rnn", confidence="both")


def gated_spark(folder: Path, model: Any) -> None:
    blocks.dflash(folder, model, layout="speculators", named=40, markov="gated", taps=(2, 7))


def parallel(folder: Path, model: Any) -> None:
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    made.eagle3(folder, model, layout="speculators", flags=flags, mask=7, layers=2)


def second_block(folder: Path, model: Any) -> None:
    blocks.dflash(folder, model, choices=9, own_mask="dict", bias="qkvo", taps=(2, 7))


HEADS: dict[str, tuple[Any, Write, bool]] = {
    "eagle3": (Eagle3, made.eagle3, False),
    "eagle3, all flags, sampled": (Eagle3, all_flags, True),
    "peagle, sampled": (PEagle, parallel, True),
    "eagle": (Eagle1, made.eagle, False),
    "mtp, sampled": (MTP, mtp, True),
    "mtp, two layers": (MTP, partial(mtp, layers=2), False),
    "medusa, sampled": (Medusa, made.medusa, True),
    "dflash": (DFlash, blocks.dflash, False),
    "dflash, scaled, sampled": (DFlash, scaled_block, True),
    "dspark, rnn, sampled": (DSpark, recurrent_spark, True),
    "dspark, gated, trimmed": (DSpark, gated_spark, False),
    "dspark, confidence": (partial(DSpark, confidence=True), recurrent_spark, False),
    "dflash 2, sampled": (DFlash, second_block, True),
    "dflash, trimmed": (DFlash, trimmed_block, False),
}


@pytest.fixture(scope="module")
def small() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8).double())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> PagedLM:
    model = tiny("llama", num_hidden_layers=8)
    folder = save(model, tmp_path_factory.mktemp("small"))
    wide = standin(folder, SHAPE, device="cpu", dtype=torch.float64)
    return PagedLM(wide, standin=Widening(small=model.config, shape=SHAPE))


def drafts_of(target: PagedLM, drafter: Drafter, *, sampled: bool) -> Any:
    """Outputs, and of each request's steps tokens, parents, ids and probabilities."""
    tree = Static(widths=[2, 2, 1], children="sample") if sampled else Dynamic(budget=10)
    decoder = decoder_of(
        target, drafter, tree, Synthetic(), temperature=float(sampled), rows=2, share=False
    )
    trees: dict[int, list[Any]] = defaultdict(list)
    accept = decoder.rule.accept

    def noting(context: Any, drafted: Any, logits: Tensor) -> Any:
        for place, sequence in enumerate(context.sequences):
            size, found = int(drafted.size[place]), drafted.proposal
            parts = drafted.tokens, drafted.parents, found.ids, found.probs
            trees[sequence.request.id].append([part[place, :size] for part in parts])
        return accept(context, drafted, logits)

    decoder.rule.accept = noting  # type: ignore[method-assign]
    prompts = [*texts(), texts()[0][:1]]
    done = {s.request.id: s.output_ids for s in decoder.run(requests_of(prompts, NEW))}
    return done, trees


def assert_same_drafts(
    found: Any, wanted: Any, *, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Two of `drafts_of` are equal, probabilities as nearly as this."""
    assert found[0] == wanted[0]
    for request, steps in wanted[1].items():
        for mine, theirs in zip(found[1][request], steps, strict=True):
            assert all(torch.equal(*both) for both in zip(mine[:3], theirs[:3], strict=True))
            torch.testing.assert_close(mine[3], theirs[3], rtol=rtol, atol=atol)


@pytest.mark.some(7)
@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_the_large_pair_drafts_what_the_small_one_drafts(
    name: str, widen: bool, small: PagedLM, large: PagedLM, tmp_path: Path
) -> None:
    kind, write, sampled = HEADS[name]
    write(tmp_path, tiny("llama", num_hidden_layers=8))
    mine, theirs = kind(path=str(tmp_path), widen=widen), kind(path=str(tmp_path))
    found, wanted = (
        drafts_of(*pair, sampled=sampled) for pair in ((large, mine), (small, theirs))
    )
    assert_same_drafts(found, wanted, rtol=1e-6, atol=1e-9)
    head = mine.head
    note = mine.notes["drafter.path"]
    assert head.width == (SHAPE.hidden_size if widen else 32)
    assert ("widened from 32" if widen else "not widened") in note
    assert "of 11" in note


def test_a_head_of_another_target_is_still_refused(large: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, tiny("llama", num_hidden_layers=8, hidden_size=48, head_dim=12))
    with pytest.raises(ValueError, match=r"^drafter\.path=.*belongs to another target"):
        loaded(Eagle3(path=str(tmp_path)), large)


@pytest.mark.parametrize("kind", [Eagle3, Medusa])
def test_only_a_small_models_head_can_be_left_small(
    kind: type[Any], small: PagedLM, tmp_path: Path
) -> None:
    write = made.medusa if kind is Medusa else made.eagle3
    write(tmp_path, small.model)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"^drafter\.widen=false: .* no head of the small model"):
        loaded(kind(path=str(tmp_path), widen=False), small)

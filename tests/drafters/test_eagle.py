"""Recurrent heads as drafters: lossless on every tree, in batches, with refill and in company, and
the same whatever stands beside them. Their numbers are held against a restatement in
tests/heads."""

from typing import Any

import pytest
import torch

from specdec.drafters.compose import Compose
from specdec.drafters.eagle import Eagle3
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.growth import GrowingDrafter
from specdec.drafters.mtp import MTP
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, TreePolicy
from specdec.request import CacheSettings
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.synthetic import Synthetic
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.drafters.told import decoded, told
from tests.heads.made import eagle3
from tests.models.tiny import texts, tiny

NEW = 12
TREES = {
    "chain": Chain(budget=4),
    "static": Static(widths=[3, 2, 1]),
    "dynamic": Dynamic(budget=12),
    "sampled": Static(widths=[2, 2], children="sample"),
}


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8))


@pytest.fixture(scope="module")
def head(target: PagedLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("head")
    eagle3(folder, target.model)
    return str(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    first, second = texts()
    return [first, second[:1], [*first[:9], *second[:4]], second]


@pytest.fixture(scope="module")
def plain(target: PagedLM, prompts: list[list[int]]) -> list[list[int]]:
    return outputs_of(decoder_of(target, NoDrafter(), rows=2), prompts, NEW)


@pytest.mark.some(4)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tree", TREES)
def test_outputs_are_those_of_plain_decoding(
    target: PagedLM, head: str, prompts: list[list[int]], plain: Any, tree: str, rows: int
) -> None:
    texts = [prompt + new for prompt, new in zip(prompts, plain, strict=True)]
    decoder = decoder_of(target, told(Eagle3(path=head), texts), TREES[tree], rows=rows)
    outputs, most = decoded(decoder, prompts, NEW)
    assert outputs == plain
    assert most > 2
    decoder.drafter.model.cache.check()
    assert decoder.drafter.model.cache.free_pages == decoder.drafter.model.cache.pages


def trees_of(target: PagedLM, drafter: Drafter, prompts: Any, rows: int, **more: Any) -> Any:
    """What is drafted for each prompt, step by step, and what comes of it."""
    decoder = decoder_of(
        target,
        drafter,
        more.pop("tree", TREES["sampled"]),
        more.pop("rule", Synthetic()),
        temperature=1.0,
        rows=rows,
        trees=NEW,
        chunk=more.pop("chunk", 512),
    )
    trees: dict[int, list[Any]] = {}
    steps: list[Any] = []
    done = {
        s.request.id: s.output_ids
        for s in decoder.run(requests_of(prompts, NEW), on_step=steps.append)
    }
    for step in steps:
        for tree in step.trees:
            trees.setdefault(tree.request, []).append((tree.tokens, tree.parents))
    return done, trees


@pytest.mark.parametrize("rows", [2, 3])
def test_trees_do_not_depend_on_the_batch_or_on_how_prompts_are_cut(
    target: PagedLM, head: str, prompts: list[list[int]], rows: int
) -> None:
    alone = trees_of(target, Eagle3(path=head), prompts, 1)
    together = trees_of(target, Eagle3(path=head), prompts, rows, chunk=5)
    assert alone == together
    assert len(alone[1]) == len(prompts)


def test_a_prompt_of_one_token_has_the_same_trees_in_a_row_that_was_used(
    target: PagedLM, head: str, prompts: list[list[int]]
) -> None:
    tree = TREES["static"]
    _, alone = trees_of(target, Eagle3(path=head), [prompts[1]], 1, tree=tree)
    _, after = trees_of(target, Eagle3(path=head), prompts[:2], 1, tree=tree)
    assert alone[0][0] == after[1][0]


@pytest.mark.parametrize("mode", ["union", "cascade"])
def test_it_drafts_in_company(
    target: PagedLM, head: str, prompts: list[list[int]], plain: Any, mode: str
) -> None:
    parts = {"ngram": NGram(), "head": Eagle3(path=head)}
    drafter = Compose(parts=parts, mode=mode, **({} if mode == "union" else {"min_match": 1}))
    decoder = decoder_of(target, drafter, TREES["dynamic"], rows=2)
    assert outputs_of(decoder, prompts, NEW) == plain
    assert drafter.reads_states
    assert drafter.observes == parts["head"].observes
    (name,) = drafter.notes
    assert name == "drafter.parts.head.path"


def test_layers_that_are_not_run_again_have_no_states(target: PagedLM, head: str) -> None:
    exit_ = EarlyExit(exit_layer=4)
    drafter = Compose(parts={"exit": exit_, "head": Eagle3(path=head)}, mode="union")
    with pytest.raises(ValueError, match="first 4 layers, which are not run again, and another"):
        loaded(drafter, target)
    exit_.exit_layer = 2  # the state after layer 2 is what it hands on
    decoder = decoder_of(target, drafter, TREES["dynamic"], rows=2)
    prompt = texts()[0]
    alone = outputs_of(decoder_of(target, NoDrafter()), [prompt], NEW)
    assert outputs_of(decoder, [prompt], NEW) == alone


@pytest.mark.parametrize("tree", [Chain(budget=0), Dynamic(budget=5)], ids=["none", "small"])
def test_small_budgets(
    target: PagedLM, head: str, prompts: list[list[int]], plain: Any, tree: TreePolicy
) -> None:
    decoder = decoder_of(target, Eagle3(path=head), tree, rows=2)
    assert outputs_of(decoder, prompts, NEW) == plain


def test_sampled_children_come_with_their_probabilities(target: PagedLM, head: str) -> None:
    drafter = Eagle3(path=head, candidates=5)
    assert isinstance(drafter, GrowingDrafter)
    decoder = decoder_of(target, drafter, TREES["sampled"], RecursiveRejection(), temperature=1.0)
    proposals = []
    accept = decoder.rule.accept

    def noting(context: Any, tree: Any, logits: torch.Tensor) -> Any:
        proposals.append(tree.proposal)
        return accept(context, tree, logits)

    decoder.rule.accept = noting  # type: ignore[method-assign]
    outputs_of(decoder, [texts()[0]], NEW)
    for one in proposals:
        sums = one.probs.sum(-1)
        assert ((sums - 1).abs() < 1e-5)[one.probs.any(-1)].all()
        assert one.ids.shape[-1] == 5


def test_what_it_reads_is_said(target: PagedLM, head: str) -> None:
    drafter = loaded(Eagle3(path=head), target)
    assert "2 4 5" in drafter.notes["drafter.path"]
    assert "drafts worse" not in drafter.notes["drafter.path"]
    decoder_of(target, drafter, TREES["chain"], max_tokens=100)
    assert drafter.notes["drafter.path"].endswith(
        "it knows 64 positions and drafts worse past them"
    )
    with pytest.raises(ValueError, match=r"^drafter\.path=/nowhere: "):
        Eagle3(path="/nowhere").find()
    Eagle3(path=head).find()
    with pytest.raises(ValueError, match=r"of kind eagle3 .*, and mtp is asked for; use drafter="):
        MTP(path=head).find()  # before a target is loaded


def test_a_run_with_states_shares_no_pages_unless_it_is_told_to() -> None:
    device, settings = torch.device("cpu"), CacheSettings()
    assert settings.capacity(rows=1, max_tokens=8, device=device).share
    assert not settings.capacity(rows=1, max_tokens=8, device=device, states=True).share
    assert CacheSettings(share=True).shares(states=True)

"""Medusa heads as a drafter: lossless, the same whatever stands beside, and held against a
restatement in float64 over states that transformers computes of the finished texts."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.drafters.compose import Compose
from specdec.drafters.medusa import Medusa
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.heads.medusa import MedusaConfig, MedusaHeads
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, TreePolicy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.synthetic import Synthetic
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.drafters.told import decoded, told
from tests.heads import made
from tests.models.tiny import texts, tiny

NEW, HEADS = 12, 3
TREES = {
    "chain": Chain(budget=5),
    "static": Static(widths=[3, 2, 1]),
    "dynamic": Dynamic(budget=12),
    "sampled": Static(widths=[2, 2], children="sample"),
    "replaced": Static(widths=[2, 2], children="sample_with_replacement"),
}


class Handmade(Medusa):
    """Heads that are not read from files."""

    def __init__(self, heads: MedusaHeads, **settings: Any) -> None:
        super().__init__(path="made", **settings)
        self._made = heads

    def load(self, target: PagedLM, models: Models) -> None:
        self._use(self._made, target)


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama"))


@pytest.fixture(scope="module")
def heads(target: PagedLM) -> MedusaHeads:
    config = MedusaConfig(
        heads=HEADS,
        blocks=1,
        state_size=target.config.hidden_size,
        vocab_size=target.vocab_size - 3,
    )
    made, random = MedusaHeads(config), torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3, generator=random)
    # Not all tokens have a name of the same number.
    made.names = torch.arange(3, target.vocab_size)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    first, second = texts()
    return [first, second[:1], [*first[:9], *second[:4]], second]


@pytest.fixture(scope="module")
def plain(target: PagedLM, prompts: list[list[int]]) -> list[list[int]]:
    return outputs_of(decoder_of(target, NoDrafter(), rows=2), prompts, NEW)


@pytest.mark.some(5)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tree", TREES)
def test_outputs_are_those_of_plain_decoding(
    target: PagedLM, heads: MedusaHeads, prompts: Any, plain: Any, tree: str, rows: int
) -> None:
    texts = [prompt + new for prompt, new in zip(prompts, plain, strict=True)]
    decoder = decoder_of(target, told(Handmade(heads), texts), TREES[tree], rows=rows, share=False)
    outputs, most = decoded(decoder, prompts, NEW)
    assert outputs == plain
    assert most > 2


@pytest.mark.parametrize("tree", [Chain(budget=0), Dynamic(budget=2)], ids=["none", "small"])
def test_small_budgets(
    target: PagedLM, heads: MedusaHeads, prompts: Any, plain: Any, tree: TreePolicy
) -> None:
    decoder = decoder_of(target, Handmade(heads), tree, rows=2, share=False)
    assert outputs_of(decoder, prompts, NEW) == plain


def drafts_of(
    target: PagedLM, drafter: Drafter, prompts: Any, tree: str, rows: int, chunk: int = 512
) -> tuple[dict[int, list[Any]], dict[int, list[list[int]]]]:
    """By request: of each step the tree's row of tokens, parents, ids and probabilities of the
    proposal; and the tokens there were when it was drafted."""
    how: dict[str, Any] = {"rows": rows, "share": False, "chunk": chunk}
    decoder = decoder_of(target, drafter, TREES[tree], Synthetic(), temperature=1.0, **how)
    trees: dict[int, list[Any]] = defaultdict(list)
    accept = decoder.rule.accept

    def noting(context: Any, made: Any, logits: Tensor) -> Any:
        for place, sequence in enumerate(context.sequences):
            size, found = int(made.size[place]), made.proposal
            parts = made.tokens, made.parents, found.ids, found.probs
            trees[sequence.request.id].append([part[place, :size] for part in parts])
        return accept(context, made, logits)

    decoder.rule.accept = noting  # type: ignore[method-assign]
    before = {}
    for sequence in decoder.run(requests_of(prompts, NEW)):
        ends = np.cumsum([0, *sequence.accepted_lengths[:-1]]) + len(sequence.request.prompt_ids)
        before[sequence.request.id] = [sequence.tokens[:end] for end in ends]
    return trees, before


@torch.no_grad()
def law(heads: MedusaHeads, target: PagedLM, tokens: list[int]) -> Tensor:
    """[heads, V] what each says after these tokens, of which the target has read all but one."""
    state = torch.zeros(1, target.config.hidden_size, dtype=torch.float64)
    if len(tokens) > 1:
        read = torch.tensor([tokens[:-1]])
        state = tiny("llama").double().model(read).last_hidden_state[:, -1]
    every = []
    for head in range(HEADS):
        block = heads.blocks[head][0]
        y = state @ block.weight.double().T + block.bias.double()
        x = state + y * torch.sigmoid(y)
        every.append((x @ heads.lm_heads[head].weight.double().T).softmax(-1)[0])
    return torch.stack(every)


@pytest.mark.parametrize(("tree", "rows"), [("static", 3), ("sampled", 1), ("dynamic", 2)])
def test_children_are_the_formulas(
    target: PagedLM, heads: MedusaHeads, prompts: Any, tree: str, rows: int
) -> None:
    trees, before = drafts_of(target, Handmade(heads, candidates=6), prompts, tree, rows, chunk=7)
    longest = 0
    for request, steps in before.items():
        longest = max(longest, *np.diff([len(text) for text in steps]))
        for text, (tokens, parents, ids, probs) in zip(steps, trees[request], strict=False):
            assert int(tokens[0]) == text[-1]
            expected, depths = law(heads, target, text), [0]
            for parent in parents[1:].tolist():
                depths.append(depths[parent] + 1)
            for node, depth in enumerate(depths):
                if not probs[node].any():  # not expanded
                    continue
                own = expected[depth]
                best = own.topk(ids.shape[1]).indices
                kept = probs[node] > 0
                assert set((best + 3).tolist()) >= set(ids[node][kept].tolist())
                share = own[ids[node] - 3]
                if TREES[tree].children == "sample":
                    share = share / own[best].sum()
                torch.testing.assert_close(
                    probs[node].double()[kept], share[kept], rtol=1e-4, atol=1e-6
                )
    assert longest > 1  # a path was kept


def test_trees_do_not_depend_on_the_batch_or_on_how_prompts_are_cut(
    target: PagedLM, heads: MedusaHeads, prompts: Any
) -> None:
    alone, _ = drafts_of(target, Handmade(heads), prompts, "sampled", 1)
    together, _ = drafts_of(target, Handmade(heads), prompts, "sampled", 3, chunk=5)
    for request, steps in alone.items():
        for mine, theirs in zip(steps, together[request], strict=False):
            assert torch.equal(mine[0], theirs[0])


def test_all_nodes_of_a_level_draw_from_the_same(target: PagedLM, heads: MedusaHeads) -> None:
    trees, _ = drafts_of(target, Handmade(heads), [texts()[0]], "sampled", 1)
    differing = 0
    for tokens, parents, ids, probs in trees[0]:
        inner = [node for node in range(1, len(tokens)) if probs[node].any()]
        assert all(torch.equal(ids[node], ids[inner[0]]) for node in inner)
        assert all(torch.equal(probs[node], probs[inner[0]]) for node in inner)
        drawn = [tokens[parents == node].tolist() for node in inner]
        differing += len(drawn) > 1 and drawn[0] != drawn[1]
    assert differing  # each node its own


@pytest.mark.parametrize("mode", ["union", "cascade"])
def test_it_drafts_in_company(
    target: PagedLM, heads: MedusaHeads, prompts: Any, plain: Any, mode: str
) -> None:
    parts = {"ngram": NGram(), "heads": Handmade(heads)}
    drafter = Compose(parts=parts, mode=mode)
    tree = Dynamic(budget=12, depth=5)  # deeper than there are heads
    decoder = decoder_of(target, drafter, tree, rows=2, share=False)
    assert outputs_of(decoder, prompts, NEW) == plain
    assert drafter.reads_states
    assert drafter.observes == parts["heads"].observes


def test_sampled_children_of_a_composition_keep_the_law(
    target: PagedLM, heads: MedusaHeads, prompts: Any
) -> None:
    """Each sum of probabilities is one, so that a rule can rely on them."""
    parts = {"ngram": NGram(), "heads": Handmade(heads)}
    drafter = Compose(parts=parts, mode="union")
    trees, _ = drafts_of(target, drafter, prompts, "sampled", 2)
    sums = torch.cat([step[3].sum(-1) for steps in trees.values() for step in steps])
    assert ((sums == 0) | ((sums - 1).abs() < 1e-5)).all()
    decoder = decoder_of(
        target, drafter, TREES["sampled"], RecursiveRejection(), temperature=1.0, share=False
    )
    assert len(outputs_of(decoder, prompts, NEW)) == len(prompts)


def test_trees_deeper_than_there_are_heads_are_refused(
    target: PagedLM, heads: MedusaHeads
) -> None:
    with pytest.raises(ValueError, match=r"^drafter\.depth=4: drafter\.path=made has 3 heads"):
        loaded(Handmade(heads, depth=4), target)
    deep = Static(widths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"^drafter\.path=made: has 3 heads, .* has 4 levels"):
        decoder_of(target, Handmade(heads), deep)
    with pytest.raises(ValueError, match=r"^drafter\.depth=2: tree\.widths"):
        decoder_of(target, Handmade(heads, depth=2), Static(widths=[1, 1, 1]))
    drafter = Handmade(heads)
    decoder_of(target, drafter, Chain(budget=8))
    assert drafter.levels == HEADS


def test_a_folder_is_looked_at_before_a_model_is_loaded(target: PagedLM, tmp_path: Path) -> None:
    made.medusa(tmp_path, target.model, heads=HEADS)
    drafter = Medusa(path=str(tmp_path))
    drafter.check(Static(widths=[1, 1, 1, 1]))  # nothing is known of the heads
    with pytest.raises(ValueError, match=r"^drafter\.path=.*: has 3 heads, .* has 4 levels"):
        drafter.find()
    with pytest.raises(ValueError, match=r"^drafter\.depth=4: .* has 3 heads"):
        Medusa(path=str(tmp_path), depth=4).find()
    drafter = Medusa(path=str(tmp_path))
    drafter.check(Chain(budget=9))
    drafter.find()
    assert drafter.depth == HEADS
    assert "3 heads of 1 block" in loaded(drafter, target).notes["drafter.path"]


def test_a_path_to_nothing_is_refused(target: PagedLM) -> None:
    with pytest.raises(ValueError, match=r"^drafter\.path=/nowhere: "):
        Medusa(path="/nowhere").find()
    with pytest.raises(ValueError, match=r"^drafter\.path=zoo:draft: "):
        loaded(Medusa(path="zoo:draft"), target)

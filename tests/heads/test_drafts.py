"""What drafters with heads draft in a real decode: at every node of every tree, candidates and
their probabilities are those of the restatement, which knows the tokens alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.compose import Compose
from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.eagle import Eagle, Eagle1, Eagle3, PEagle
from specdec.drafters.medusa import Medusa
from specdec.drafters.ngram import NGram
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.models.paged import PagedLM
from specdec.verifier.synthetic import Synthetic
from tests.decoding import decoder_of, requests_of
from tests.heads import blocks, made, oracle
from tests.heads.test_formats import states_of
from tests.heads.test_medusa_files import own_layout
from tests.models.tiny import VOCABULARY, own_attention, texts, tiny

N, ROWS, NEW, TOLERANCE = 8, 3, 7, 1e-5
Restated = Callable[[list[Tensor], list[int], list[int]], Tensor]
TREES = {
    "static": lambda: Static(widths=[3, 2, 1]),
    "dynamic": lambda: Dynamic(budget=10, width=3, depth=4),
    "sampled": lambda: Static(widths=[2, 2, 1], children="sample"),
}


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N))


class Eager(Synthetic):
    """Accepts a child that the head gives p with the cube root of p, so that paths are long."""

    def accept(self, context: Any, tree: Any, logits: Tensor) -> Any:
        small = replace(context, uniforms=lambda *given: context.uniforms(*given) ** 3)
        return super().accept(small, tree, logits)


class Watcher:
    """Looks at each step of a decode, before it is committed.

    Attributes:
        worst: largest difference of a probability so far.
        longest: most tokens that a step gained.
        nodes: how many were looked at.
    """

    def __init__(self, decoder: Any, target: PagedLM, facts: oracle.Facts, restated: Restated):
        self.own, self.facts, self.restated = own_attention(target.model), facts, restated
        self.texts: dict[int, list[int]] = {}  # by row
        self.worst, self.longest, self.nodes = 0.0, 0, 0
        self.start, self.accept = decoder.drafter.start, decoder.rule.accept
        decoder.drafter.start, decoder.rule.accept = self.starting, self.accepting

    def starting(self, sequences: Any) -> Any:
        for sequence in sequences:
            self.texts[sequence.row] = list(sequence.tokens)
        return self.start(sequences)

    def accepting(self, context: Any, tree: Any, logits: Tensor) -> Any:
        found = self.accept(context, tree, logits)
        for place, row in enumerate(context.rows.tolist()):
            if not tree.size[place]:
                continue
            text = self.texts[row]
            assert tree.tokens[place, 0] == text[-1]
            if len(text) > 1:  # before there is a state a draft is arbitrary
                self.look(text, tree, place)
            gained = int(found.length[place])
            self.longest = max(self.longest, gained)
            text += found.new_tokens(tree)[place, :gained].tolist()
        return found

    def look(self, text: list[int], tree: Any, place: int) -> None:
        states = states_of(self.own, text, self.facts.taps)
        parents, tokens = tree.parents[place].tolist(), tree.tokens[place].tolist()
        ids, probs = tree.proposal.ids[place], tree.proposal.probs[place].double()
        for node in range(int(tree.size[place])):
            if not probs[node].any():
                continue
            path, at = [], node
            while at:
                path.insert(0, tokens[at])
                at = parents[at]
            logits = self.restated(states, text, path)
            expected = torch.zeros(VOCABULARY).double()
            expected[self.facts.ids] = logits.softmax(-1)
            best = expected.topk(int((probs[node] > 0).sum())).values
            if tree.proposal.children != "top_k":
                expected, best = expected / best.sum(), best / best.sum()
            there = probs[node] > 0
            off = [(probs[node] - expected[ids[node]])[there], probs[node][there] - best]
            self.worst = max(self.worst, *(float(one.abs().max()) for one in off))
            self.nodes += 1


def watched(
    target: PagedLM,
    drafter: Any,
    facts: oracle.Facts,
    restated: Restated,
    tree: str,
    shortest: int = 1,
) -> Watcher:
    """A decode of more prompts than rows, from one token to many, in which paths are accepted by
    the head's own probabilities."""
    first, second = texts()
    prompts = [first[:13], second[:shortest], second[:7], [*first[:4], *second[:4]]]
    how: dict[str, Any] = {"temperature": 1.0, "rows": ROWS, "chunk": 10}
    decoder = decoder_of(target, drafter, TREES[tree](), Eager(), **how)
    watcher = Watcher(decoder, target, facts, restated)
    list(decoder.run(requests_of(prompts, NEW)))
    assert watcher.nodes > 40
    assert watcher.longest > 2
    return watcher


EVERY = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
CASES: dict[str, tuple[type[Eagle], dict[str, Any]]] = {
    "safeailab": (Eagle3, {}),
    "all tokens": (Eagle3, {"named": None, "rope": ({"rope_theta": 50.0}, {"theta": 50.0})}),
    "three layers": (Eagle3, {"layout": "sglang", "layers": 3}),
    "pairs in two layers": (Eagle3, {"layout": "deepspec", "layers": 2}),
    "biases": (Eagle3, {"layout": "speculators", "layers": 2, "bias": "qkvo"}),
    "flags": (Eagle3, {"layout": "speculators", "flags": EVERY}),
    "fc_norm": (Eagle3, {"layout": "speculators", "flags": ("fc_norm",), "head_dim": 16}),
    "window": (Eagle3, {"layout": "speculators", "layers": 2, "window": 5}),
    "eagle": (Eagle1, {}),
    "eagle, window": (Eagle1, {"window": 5}),
    "eagle, layers": (Eagle1, {"layers": 2, "bias": "qkv", "fc_bias": False}),
    "hass": (Eagle1, {"norms": ("embedding_layernorm", "hidden_states_layernorm")}),
    "norms": (
        Eagle1,
        {
            "layout": "speculators",
            "norms": (
                "embedding_layernorm",
                "pre_lm_head_layernorm",
                "transformer.input_layernorm",
            ),
        },
    ),
}


@pytest.mark.some(7)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("case", CASES)
def test_every_node_of_every_tree_is_as_restated(
    case: str, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    kind, options = CASES[case]
    make, restate = (made.eagle3, oracle.eagle3) if kind is Eagle3 else (made.eagle, oracle.eagle)
    facts = make(tmp_path, target.model, **options)
    watcher = watched(target, kind(path=str(tmp_path)), facts, partial(restate, facts), tree)
    assert watcher.worst < TOLERANCE


PARALLEL: dict[str, dict[str, Any]] = {
    "specforge": {"layout": "specforge", "layers": 3},
    "speculators": {"layout": "speculators", "own_embedding": True, "named": None},
    "window": {"layout": "speculators", "window": 5},
    "flags": {"layout": "speculators", "flags": EVERY, "layers": 2, "bias": "qkvo"},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("case", PARALLEL)
def test_so_are_those_of_one_pass(case: str, tree: str, target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle3(tmp_path, target.model, mask=7, **PARALLEL[case])
    drafter = PEagle(path=str(tmp_path))
    watcher = watched(target, drafter, facts, partial(oracle.peagle, facts), tree)
    assert watcher.worst < TOLERANCE
    assert drafter.notes["drafter.path"].startswith("P-EAGLE of ")


@pytest.mark.parametrize("trap", ["shifted", "mask", "hidden", "places"])
def test_the_traps_of_one_pass_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle3(tmp_path, target.model, mask=7, layout="specforge", layers=2)
    drafter: Any = (ShiftedParallel if trap == "shifted" else PEagle)(path=str(tmp_path))
    load = drafter.load

    def spoilt(*given: Any) -> None:
        load(*given)
        head, model = drafter.head, drafter.model
        if trap == "mask":
            head.config = replace(head.config, mask=8)
        if trap == "hidden":
            head.mask_hidden.mul_(-1)
        if trap == "places":  # masked pairs stand one place too late
            forward = model.forward

            def late(rows: Tensor, x: Tensor, y: Tensor, offsets: Tensor, **rest: Any) -> Any:
                masks = offsets.shape[1] - drafter.levels + 1
                moved = offsets.clone()
                moved[:, masks:] += 1
                return forward(rows, x, y, moved if "ancestors" in rest else offsets, **rest)

            model.forward = late

    drafter.load = spoilt
    watcher = watched(target, drafter, facts, partial(oracle.peagle, facts), "static")
    assert watcher.worst > 1000 * TOLERANCE


@pytest.mark.parametrize("tree", ["static", "sampled"])
def test_so_are_medusa_s(tree: str, target: PagedLM, tmp_path: Path) -> None:
    tensors = own_layout(1, last=True)
    made.write(tmp_path, {}, tensors, "medusa_lm_head.safetensors")
    doubled = made.doubled(tensors)

    def restated(states: list[Tensor], text: list[int], path: list[int]) -> Tensor:
        block, last = f"{len(path)}.0.linear", f"{len(path)}.1.weight"
        return oracle.medusa(doubled, states[0][len(text) - 2], torch.zeros(0), (block,), last)

    facts = oracle.Facts(
        tensors=doubled,
        layers=(),
        embedding=torch.zeros(0),
        output=torch.zeros(0),
        heads=(1, 1),
        eps=0.0,
        taps=("normal",),
        ids=torch.arange(VOCABULARY),
    )
    watcher = watched(target, Medusa(path=str(tmp_path)), facts, restated, tree)
    assert watcher.worst < TOLERANCE


CAPPED = {"output_multiplier": 0.7, "final_logit_softcapping": 3.0, "input_embedding_scale": 1.5}
HOW = {"multiplier": 0.7, "softcap": 3.0, "scale": 1.5}
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "z-lab": ({}, {}),
    "one layer, rope": ({"layers": 1, "rope": ({"rope_theta": 50.0}, {"theta": 50.0})}, {}),
    "windows": ({"layers": 3, "sliding": (0, 2), "prefix": "model."}, {}),
    "windows, both ways": (
        {"sliding": (1,), "config": {"is_causal": False}},
        {"causal": [False, False]},
    ),
    "capped, own mask": ({"inner": CAPPED, "own_mask": "dict"}, HOW),
    "biases": ({"bias": "qkvo", "own_mask": "tensor"}, {}),
    "jetspec": ({"layout": "jetspec"}, {}),
    "deepspec": ({"layout": "deepspec"}, {}),
    "speculators": ({"layout": "speculators", "named": 40, "sliding": (0,)}, {}),
    "speculators, from the anchor": (
        {"layout": "speculators", "config": {"sample_from_anchor": True}},
        {"shifted": True},
    ),
    "speculators, both ways": (
        {
            "layout": "speculators",
            "sliding": (0, 1),
            "config": {"sliding_window_non_causal": True},
        },
        {"causal": [False, False]},
    ),
}


SPARKS: dict[str, dict[str, Any]] = {
    "deepspec": {"layout": "deepspec", "markov": "vanilla"},
    "deepspec, gated": {"layout": "deepspec", "markov": "gated", "confidence": "both"},
    "deepspec, rnn": {"layout": "deepspec", "markov": "rnn", "slots": 4},
    "specforge": {"markov": "gated", "confidence": "slot"},
    "speculators, rnn": {"layout": "speculators", "named": 40, "markov": "rnn"},
}


def block_facts(folder: Path, target: PagedLM, case: str) -> oracle.Facts:
    """Of a DFlash head that is written."""
    options, how = BLOCKS[case]
    facts = blocks.dflash(folder, target.model, **options)
    flags = facts.flags | ({"shifted"} if how.get("shifted") else set())
    return replace(facts, block={**facts.block, **how}, flags=flags)


@pytest.mark.some(8)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("case", BLOCKS)
def test_so_are_those_of_blocks(case: str, tree: str, target: PagedLM, tmp_path: Path) -> None:
    facts = block_facts(tmp_path, target, case)
    drafter = DFlash(path=str(tmp_path))
    watcher = watched(target, drafter, facts, partial(oracle.dflash, facts), tree)
    assert watcher.worst < TOLERANCE
    assert drafter.head.config.taps == facts.taps


@pytest.mark.some(5)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("case", SPARKS)
def test_so_are_those_that_parents_correct(
    case: str, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    facts = blocks.dflash(tmp_path, target.model, **SPARKS[case])
    drafter = DSpark(path=str(tmp_path))
    watcher = watched(target, drafter, facts, partial(oracle.dspark, facts), tree)
    assert watcher.worst < TOLERANCE
    assert drafter.notes["drafter.path"].startswith("DSpark of ")


SELECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "z-lab": ({"inner": CAPPED, "own_mask": "dict"}, HOW),
    "windows, both ways": (
        {"sliding": (0, 1), "config": {"is_causal": False}, "bias": "qkvo", "choices": 4},
        {"causal": [False, False]},
    ),
    "speculators": ({"layout": "speculators", "sliding": (1,)}, {"causal": [False, False]}),
    "jetspec": ({"layout": "jetspec"}, {}),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("case", SELECTED)
def test_so_are_those_that_a_selector_scores(
    case: str, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    options, how = SELECTED[case]
    facts = blocks.dflash(tmp_path, target.model, **{"choices": 9} | options)
    facts = replace(facts, block={**facts.block, **how})
    drafter = DFlash(path=str(tmp_path))
    watcher = watched(target, drafter, facts, partial(oracle.dflash2, facts), tree)
    assert watcher.worst < TOLERANCE
    assert drafter.notes["drafter.path"].startswith("DFlash 2 of ")


@pytest.mark.parametrize("kind", [DFlash, Eagle3, PEagle])
def test_what_others_drafted_is_read_too(kind: Any, target: PagedLM, tmp_path: Path) -> None:
    """In a cascade whole steps go by without a draft of the head."""
    make, restate = {
        DFlash: (blocks.dflash, oracle.dflash),
        Eagle3: (made.eagle3, oracle.eagle3),
        PEagle: (partial(made.eagle3, mask=7), oracle.peagle),
    }[kind]
    facts = make(tmp_path, target.model)
    parts = {"ngram": NGram(), "head": kind(path=str(tmp_path))}
    drafter = Compose(parts=parts, mode="cascade", min_match=1)
    decoder = decoder_of(target, drafter, TREES["static"](), Eager(), temperature=1.0, share=False)
    watcher = Watcher(decoder, target, facts, partial(restate, facts))
    look, used = watcher.look, []

    def of_head(*given: Any) -> None:
        used.append(drafter._used)
        if used[-1] == (1,):
            look(*given)

    watcher.look = of_head  # type: ignore[method-assign]
    list(decoder.run(requests_of([texts()[0][:13]], 24)))
    assert {((0,), (1,)), ((1,), (0,))} <= set(pairwise(used))
    assert watcher.worst < TOLERANCE


class Late(DFlash):
    """Each state stands one token later than it should."""

    def note(self, context: Any, tree: Any, acceptance: Any, seen: Any) -> None:
        path = acceptance.path.clone()
        path[:, 1:] = acceptance.path[:, :-1]
        super().note(context, tree, replace(acceptance, path=path), seen)


class Shifted(Eagle3):
    """Pairs each token with the state of the token before the one it should."""

    def note(self, context: Any, tree: Any, acceptance: Any, seen: Any) -> None:
        path = acceptance.path.clone()
        path[:, 1:] = acceptance.path[:, :-1]
        super().note(context, tree, replace(acceptance, path=path), seen)


class ShiftedParallel(PEagle):
    """The same of P-EAGLE."""

    def note(self, context: Any, tree: Any, acceptance: Any, seen: Any) -> None:
        path = acceptance.path.clone()
        path[:, 1:] = acceptance.path[:, :-1]
        super().note(context, tree, replace(acceptance, path=path), seen)


class Unread(Eagle3):
    """Keeps the pairs of drafted nodes instead of reading them with the target's states."""

    def note(self, context: Any, tree: Any, acceptance: Any, seen: Any) -> None:
        super().note(context, tree, acceptance, seen)
        self._states[context.rows, 1:] = 0


@pytest.mark.some(3)
@pytest.mark.parametrize("trap", ["late", "layer", "norm", "mask", "slot", "one way", "row"])
def test_the_traps_of_blocks_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    facts = block_facts(tmp_path, target, "capped, own mask")
    if trap == "row":
        (tmp_path / "mask_embedding.pt").unlink()
    kind = Late if trap == "late" else DFlash
    drafter = kind(path=str(tmp_path), taps=[3, 5, 7] if trap == "layer" else None)
    load = drafter.load

    def spoilt(*given: Any) -> None:
        load(*given)
        head = drafter.head
        changed = {"slot": {"shifted": True}, "one way": {"causal": (True, True)}}
        head.config = replace(head.config, **changed.get(trap, {}))
        if trap == "norm":
            head.hidden_norm.weight.fill_(1)
        if trap == "mask":
            head.mask_embedding.mul_(-1)

    drafter.load = spoilt  # type: ignore[method-assign]
    watcher = watched(target, drafter, facts, partial(oracle.dflash, facts), "static")
    assert watcher.worst > 1000 * TOLERANCE


@pytest.mark.parametrize("trap", ["shifted", "unread", "layer", "norm", "absolute"])
def test_the_traps_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    """None of these crashes; each moves a probability by a thousand times what is allowed."""
    facts = made.eagle3(tmp_path, target.model)
    kind = {"shifted": Shifted, "unread": Unread}.get(trap, Eagle3)
    drafter = kind(path=str(tmp_path), taps=[3, 5, 6] if trap == "layer" else None)
    load = drafter.load

    def spoilt(*given: Any) -> None:
        load(*given)
        if trap == "norm":
            drafter.head.layers[0].hidden_norm.weight.fill_(1)
        if trap == "absolute":
            assert drafter.head.names is not None
            drafter.head.names.sub_(torch.arange(made.NAMED))

    drafter.load = spoilt  # type: ignore[method-assign]
    watcher = watched(target, drafter, facts, partial(oracle.eagle3, facts), "static")
    assert watcher.worst > 1000 * TOLERANCE

"""What every drafter owes: one test for each promise, over every file of `configs/drafter`."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.experiments.studies.rule_laws import (
    DrawnTree,
    emitted_law,
    ordered_draws,
    token_trees,
)
from specdec.experiments.tools import build_datastore
from specdec.lab.build import method_of
from specdec.lab.settings import CONFIGS, settings_of
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, DraftError, StepContext, TreePolicy
from specdec.sampling import DRAFT_STREAM, race
from specdec.tree import TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.synthetic import Synthetic
from specdec.verifier.target_only import TargetOnly
from tests.decoding import decoder_of, requests_of

pytestmark = pytest.mark.usefixtures("load_once")

NAMES = sorted(path.stem for path in Path(CONFIGS, "drafter").glob("*.yaml"))
DRAFTING = [name for name in NAMES if name != "none"]
UNDRAWN = ("lookahead", "synthetic")  # refuse sampled children
LOSSLESS = [name for name in DRAFTING if name != "synthetic"]
CODE = "".join(f"def add_{i}(a, b):\n    return a + b\n\n\n" for i in range(4))
TEXTS = (
    CODE + "def add_",
    "It was a dark night, and the old captain stood at the",
    "def fibonacci(n):\n    ",
    "The old man and the sea. The old man and the",
)
NEW = 20
TREES = {
    "chain": lambda children: Chain(budget=3, children=children),
    "static": lambda children: Static(widths=[2, 2, 1], children=children),
    "dynamic": lambda children: Dynamic(budget=8, width=3, depth=4, children=children),
}


def echo(tokens: list[int]) -> Iterable[Sequence[int]]:
    """drafter=user: the last tokens come again."""
    yield tokens[-4:]
    yield tokens[-8:-4]


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datastore")
    (folder / "text.txt").write_text(CODE * 3 + "It was a dark night, and the sea was calm.\n")
    out = folder / "built"
    build_datastore.main(["--tokenizer", "zoo:target", "--out", str(out), f"{folder}/text.txt"])
    return out


class Recording:
    """Keeps a copy of every tree a drafter makes, checked."""

    def __init__(self, drafter: Drafter, tree: TreePolicy) -> None:
        self.trees: list[TokenTree] = []
        self.contexts: list[StepContext] = []
        draft = drafter.draft

        def recorded(context: StepContext) -> TokenTree:
            made = draft(context)
            made.check()
            assert int(made.size.max()) - 1 <= tree.budget
            assert made.tokens[:, 0].equal(context.roots)
            self.trees.append(made.to(torch.device("cpu")))
            self.contexts.append(context)
            return made

        drafter.draft = recorded  # type: ignore[method-assign]

    def lists(self) -> list[Any]:
        return [(tree.tokens.tolist(), tree.parents.tolist()) for tree in self.trees]


@cache
def settings_for(name: str, datastore: Path) -> dict[str, Any]:
    """What the command line makes of `drafter=name`."""
    words = [f"drafter={name}", "tree=chain"]
    if name == "rest":
        words.append(f"drafter.datastore={datastore}")
    if name == "user":
        words.append(f"drafter._target_={__name__}.echo")
    return settings_of(words)


def build(name: str, datastore: Path, **settings: Any) -> Drafter:
    """As the command line does."""
    found = settings_for(name, datastore)
    return method_of({**found, "drafter": found["drafter"] | settings}).drafter


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None,
    *,
    batch_size: int,
    temperature: float = 0.0,
    rule: Any,
    warm_up: bool = False,
) -> list[list[int]]:
    decoder = decoder_of(target, drafter, tree, rule, temperature=temperature, rows=batch_size)
    prompts = [target.tokenizer(text).input_ids for text in TEXTS]
    if warm_up:
        decoder.warm_up(prompts[0])
    done = {s.request.id: s.output_ids for s in decoder.run(requests_of(prompts, NEW, "abab"))}
    return [done[i] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def plain(target: PagedLM) -> list[list[int]]:
    return decode(target, NoDrafter(), None, batch_size=1, rule=Greedy())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", LOSSLESS)
def test_greedy_outputs_are_those_of_plain_decoding_and_trees_are_valid(
    target: PagedLM,
    plain: list[list[int]],
    datastore: Path,
    name: str,
    tree: str,
    batch_size: int,
) -> None:
    policy = TREES[tree]("top_k")
    drafter = build(name, datastore)
    recording = Recording(drafter, policy)
    assert decode(target, drafter, policy, batch_size=batch_size, rule=Greedy()) == plain
    assert any(tree.nodes > 1 for tree in recording.trees)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_nothing_drafts_nothing(
    target: PagedLM, plain: list[list[int]], datastore: Path, name: str
) -> None:
    policy = Chain(budget=0)
    drafter = build(name, datastore)
    recording = Recording(drafter, policy)
    rule = Synthetic() if name == "synthetic" else Greedy()
    assert decode(target, drafter, policy, batch_size=2, rule=rule) == plain
    assert all(tree.nodes == 1 for tree in recording.trees)


def sampled_policy(name: str, tree: str, datastore: Path) -> TreePolicy | None:
    """A tree of sampled children, None if the drafter has none."""
    policy = TREES[tree]("sample")
    if name in UNDRAWN:
        with pytest.raises(ValueError, match=r"tree\.children=sample"):
            build(name, datastore).check(policy)
        return None
    return policy


@pytest.mark.parametrize("name", DRAFTING)
def test_the_same_seed_gives_the_same_trees(target: PagedLM, datastore: Path, name: str) -> None:
    policy = sampled_policy(name, "dynamic", datastore)
    rule: Any = Synthetic() if name == "synthetic" else RecursiveRejection()
    if policy is None:
        policy = TREES["dynamic"]("top_k")
        rule = rule if name == "synthetic" else TargetOnly()
    seen = []
    for batch_size in (3, 3):
        drafter = build(name, datastore)
        recording = Recording(drafter, policy)
        outputs = decode(
            target, drafter, policy, batch_size=batch_size, temperature=1.0, rule=rule
        )
        seen.append((outputs, recording.lists()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", DRAFTING)
def test_nothing_leaks_from_one_run_into_the_next(
    target: PagedLM, datastore: Path, name: str
) -> None:
    policy = TREES["static"]("top_k")
    drafter = build(name, datastore)
    rule: Any = Synthetic() if name == "synthetic" else Greedy()
    recording = Recording(drafter, policy)
    outputs = decode(target, drafter, policy, batch_size=2, rule=rule)
    first = recording.lists()
    recording.trees.clear()
    assert decode(target, drafter, policy, batch_size=2, rule=rule, warm_up=True) == outputs
    assert recording.lists()[-len(first) :] == first


@pytest.mark.parametrize("name", [*DRAFTING, "compose union"])
def test_the_law_of_what_comes_out_of_sampled_trees_is_the_target_s(
    target: PagedLM, datastore: Path, name: str
) -> None:
    """Children are the draws that the proposal says; and over all draws and all coins, the first
    token follows the target."""
    width = 2
    policy = Static(widths=[width], children="sample")
    if sampled_policy(name.split()[0], "static", datastore) is None:
        return
    name, _, mode = name.partition(" ")
    known = settings_for(name, datastore)["drafter"]
    settings = {key: 4 for key in ("candidates", "successors") if key in known}
    drafter = build(name, datastore, **settings, **({"mode": mode} if mode else {}))
    for part in getattr(drafter, "parts", ()):
        part.candidates = 4
    recording = Recording(drafter, policy)
    decode(target, drafter, policy, batch_size=2, temperature=1.0, rule=RecursiveRejection())
    checked = 0
    for tree, context in zip(recording.trees, recording.contexts, strict=True):
        proposal = tree.proposal
        if proposal is None:
            continue
        uniform = context.uniforms(DRAFT_STREAM, proposal.ids.shape[2])
        for row in range(len(tree.tokens)):
            ids, probs = proposal.ids[row, 0], proposal.probs[row, 0].double()
            support = int((probs > 0).sum())
            if not support:
                continue
            assert float(probs.sum()) == pytest.approx(1.0, abs=1e-6)
            order = race(probs, uniform[row]).argsort()[: min(width, support)]
            assert tree.tokens[row, 1 : int(tree.size[row])].tolist() == ids[order].tolist()
            if checked < 4 and support > 1:
                checked += 1
                assert_law(target.vocab_size, ids, probs / probs.sum(), width, seed=checked)
    if name not in ("pld", "user"):  # theirs have one candidate, or few
        assert checked


def assert_law(vocab: int, ids: torch.Tensor, probs: torch.Tensor, width: int, seed: int) -> None:
    draft = np.zeros(vocab)
    draft[ids[probs > 0].numpy()] = probs[probs > 0].numpy()
    wanted = np.random.default_rng(seed).dirichlet(np.full(vocab, 0.05))
    wanted = 0.5 * wanted + 0.5 * draft[np.random.default_rng(seed).permutation(vocab)]
    wanted[ids.numpy()] += np.random.default_rng(seed).random(len(ids))
    wanted /= wanted.sum()
    trees = [
        DrawnTree(1.0).with_children(0, tokens, probability)
        for tokens, probability in ordered_draws(draft, width, replacement=False)
    ]
    tree = token_trees(trees, lambda context: draft, compact=True)
    law = np.zeros(vocab)
    for tokens, probability in emitted_law(
        RecursiveRejection(), trees, tree, lambda context: wanted
    ).items():
        law[tokens[0]] += probability
    assert np.abs(law - wanted).max() < 1e-9


@pytest.mark.parametrize("name", DRAFTING)
def test_a_failing_drafter_is_named_with_what_it_drafted_for(
    target: PagedLM, datastore: Path, name: str
) -> None:
    policy, drafter = TREES["chain"]("top_k"), build(name, datastore)
    draft, calls = drafter.draft, itertools.count()

    def failing(context: StepContext) -> TokenTree:
        if next(calls) == 3:
            raise IndexError("out of luck")
        return draft(context)

    drafter.draft = failing  # type: ignore[method-assign]
    rule: Any = Synthetic() if name == "synthetic" else Greedy()
    with pytest.raises(DraftError, match=rf"^{name}.* failed on request 0: IndexError"):
        decode(target, drafter, policy, batch_size=1, rule=rule)

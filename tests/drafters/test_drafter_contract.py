"""What every drafter owes (`experiments/tools/contract.py`), over every file of
`configs/drafter`."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec.experiments.studies.rule_laws import (
    DrawnTree,
    emitted_law,
    ordered_draws,
    token_trees,
)
from specdec.experiments.tools import build_datastore, contract
from specdec.lab.method import Method
from specdec.lab.settings import CONFIGS
from specdec.models.load import Models
from specdec.models.placement import Placement
from specdec.protocols import StepContext
from specdec.reasons import DraftError
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.mtp import MTP
from specdec.tree import TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.heads.blocks import dflash
from tests.heads.made import begun, eagle3, medusa

NAMES = sorted(path.stem for path in Path(CONFIGS, "drafter").glob("*.yaml"))
DRAFTING = [name for name in NAMES if name != "none"]
UNDRAWN = ("lookahead", "synthetic")  # refuse sampled children
MANY = {  # with many candidates; so few of them that all draws of two can be enumerated
    "compose": (),
    "compose union": (),
    "token_recycling": ("drafter.successors=4",),
    **dict.fromkeys(
        (
            "dflash",
            "dspark",
            "early_exit",
            "eagle",
            "eagle3",
            "medusa",
            "mtp",
            "ngram",
            "own_cache",
            "peagle",
            "rest",
            "retriever",
            "small_llama",
            "suffix_decoding",
            "translated",
        ),
        ("drafter.candidates=4",),
    ),
}


def echo(tokens: list[int]) -> Iterable[Sequence[int]]:
    """drafter=user: the last tokens come again."""
    yield tokens[-4:]
    yield tokens[-8:-4]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Fewer tokens than a user's drafter decodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "NEW", 12)
        yield


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(Placement())


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    return contract.plain_outputs(models)


@pytest.fixture(scope="module")
def datastore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datastore")
    text = contract.CODE * 3 + "It was a dark night, and the sea was calm.\n"
    (folder / "text.txt").write_text(text)
    out = folder / "built"
    build_datastore.main(["tokenizer=zoo:target", f"out={out}", f"{folder}/text.txt"])
    return out


@pytest.fixture(scope="module")
def heads(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    target = models.load(contract.TARGET)
    medusa(folder / "medusa", target.model, heads=4)
    dflash(folder / "dflash", target.model, layout="speculators")
    dflash(folder / "dspark", target.model, layout="speculators", markov="rnn")
    begun(folder / "eagle", target, Eagle())
    begun(folder / "mtp", target, MTP())
    size = {"target_hidden_size": 384}
    eagle3(
        folder / "peagle", target.model, layout="speculators", taps=(1, 3, 5), mask=7, config=size
    )
    return folder


@pytest.fixture
def make(name: str, datastore: Path, heads: Path) -> contract.Make:
    """As the command line does."""
    name, _, mode = name.partition(" ")
    words = [f"drafter={name}"]
    if mode:
        words.append(f"drafter.mode={mode}")
    if name == "rest":
        words.append(f"drafter.datastore={datastore}")
    if name in ("dflash", "dspark", "eagle", "medusa", "mtp", "peagle"):
        words.append(f"drafter.path={heads / name}")
    if name == "user":
        words.append(f"drafter._target_={__name__}.echo")
    if name == "own_cache":
        words.append("drafter.window=16")  # less than the texts have

    def made(*more: str) -> Method:
        return contract.method_for(words, *more)

    return made


@pytest.mark.parametrize("name", NAMES)
def test_what_it_declares_is_so(make: contract.Make) -> None:
    contract.check_declared(make("tree=chain").drafter)


@pytest.mark.some(5)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tree", contract.TREES)
@pytest.mark.parametrize("name", DRAFTING)
def test_greedy_outputs_are_those_of_plain_decoding_and_trees_are_valid(
    make: contract.Make, models: Models, plain: list[list[int]], tree: str, rows: int
) -> None:
    contract.check_greedy(make, models, plain, tree, rows)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_nothing_drafts_nothing(
    make: contract.Make, models: Models, plain: list[list[int]]
) -> None:
    contract.check_no_budget(make, models, plain)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", DRAFTING)
def test_the_same_seed_gives_the_same_trees(make: contract.Make, models: Models) -> None:
    contract.check_seed(make, models)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", DRAFTING)
def test_nothing_leaks_from_one_run_into_the_next(make: contract.Make, models: Models) -> None:
    contract.check_forgets(make, models)


@pytest.mark.some(2)
@pytest.mark.parametrize("name", [*DRAFTING, "compose union"])
def test_the_law_of_what_comes_out_of_sampled_trees_is_the_target_s(
    make: contract.Make, models: Models, name: str
) -> None:
    """Children are the draws that the proposal says; and over all draws and all coins, the first
    token follows the target."""
    method = contract.sampled(make, "tree=static", "tree.widths=[2]", *MANY.get(name, ()))
    assert (method is None) == (name in UNDRAWN)
    if method is None:
        return
    for part in getattr(method.drafter, "parts", ()):
        part.candidates = 4
    checked = 0
    vocab = models.load(contract.TARGET).vocab_size
    for ids, probs in contract.check_draws(method, models):
        if checked < 4 and int((probs > 0).sum()) > 1:
            checked += 1
            assert_law(vocab, ids, probs / probs.sum(), width=2, seed=checked)
    assert checked or name not in MANY


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


@pytest.mark.some(3)
@pytest.mark.parametrize("name", DRAFTING)
def test_a_failing_drafter_is_named_with_what_it_drafted_for(
    make: contract.Make, models: Models, name: str
) -> None:
    method = contract.ready(make(*contract.TREES["chain"]), models)
    draft, calls = method.drafter.draft, itertools.count()

    def failing(context: StepContext) -> TokenTree:
        if next(calls) == 2:
            raise IndexError("out of luck")
        return draft(context)

    method.drafter.draft = failing  # type: ignore[method-assign]
    with pytest.raises(DraftError, match=rf"^{name}.* failed on request 0: IndexError"):
        contract.decode(method, models, rows=1)

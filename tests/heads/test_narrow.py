"""`drafter.vocabulary`: heads that name fewer tokens draft what the restatement says of those
alone, texts stay the target's, and what is read is less."""

import json
from collections.abc import Callable
from dataclasses import replace
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
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.heads.narrow import ids_of
from specdec.models.paged import PagedLM
from tests.decoding import decoder_of, loaded, outputs_of
from tests.heads import blocks, made, oracle
from tests.heads.mtp import mtp
from tests.heads.test_drafts import TOLERANCE, N, watched
from tests.heads.test_medusa_files import own_layout
from tests.heads.test_widened_runs import HEADS, assert_same_drafts, drafts_of, large  # noqa: F401
from tests.models.tiny import VOCABULARY, texts, tiny

FEW = 40
LISTED = [90, *range(1, 60, 3), 61]  # in no order
Write = Callable[..., oracle.Facts]


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N), name="target.path=tiny")


def medusa(folder: Path, model: Any) -> oracle.Facts:
    tensors = own_layout(1, last=True)
    made.write(folder, {}, tensors, "medusa_lm_head.safetensors")
    facts = made.eagle3(folder / "other", model)  # for what every head has
    doubled, ids = made.doubled(tensors), torch.arange(VOCABULARY)
    return replace(facts, tensors=doubled, taps=("normal",), ids=ids)


def of_medusa(facts: Any, states: list[Tensor], text: list[int], path: list[int]) -> Tensor:
    block, last = f"{len(path)}.0.linear", f"{len(path)}.1.weight"
    state = states[0][len(text) - 2]
    return oracle.medusa(facts.tensors, state, torch.zeros(0), (block,), last)


KINDS: dict[str, tuple[Any, Write, Any]] = {
    "eagle3": (Eagle3, made.eagle3, oracle.eagle3),
    "eagle3, all tokens": (Eagle3, partial(made.eagle3, named=None), oracle.eagle3),
    "peagle": (PEagle, partial(made.eagle3, mask=7, layout="specforge"), oracle.peagle),
    "eagle": (Eagle1, made.eagle, oracle.eagle),
    "mtp": (MTP, mtp, oracle.mtp),
    "mtp, two layers": (MTP, partial(mtp, layers=2), oracle.mtp),
    "medusa": (Medusa, medusa, of_medusa),
    "dflash": (DFlash, blocks.dflash, oracle.dflash),
    "dflash, trimmed": (
        DFlash,
        partial(blocks.dflash, layout="speculators", named=48),
        oracle.dflash,
    ),
    "dflash 2": (DFlash, partial(blocks.dflash, choices=9), oracle.dflash2),
    "dspark, rnn": (
        DSpark,
        partial(blocks.dflash, layout="deepspec", markov="rnn"),
        oracle.dspark,
    ),
}


def vocabulary_of(which: str, folder: Path) -> tuple[int | str, list[int]]:
    """The setting, and the tokens that it names."""
    if which == "number":
        return FEW, list(range(FEW))
    (folder / "ids.json").write_text(json.dumps(LISTED))
    return str(folder / "ids.json"), LISTED


@pytest.mark.parametrize(
    ("which", "tree"),
    [("list", "sampled"), pytest.param("number", "static", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", KINDS)
def test_a_draft_is_the_law_over_what_may_be_named(
    case: str, which: str, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    kind, write, restate = KINDS[case]
    facts = write(tmp_path, target.model)
    vocabulary, ids = vocabulary_of(which, tmp_path)
    columns = torch.isin(facts.ids, torch.tensor(ids)).nonzero()[:, 0]
    few = replace(facts, ids=facts.ids[columns])
    if case == "dflash 2":  # the best of what may be named are scored anew
        codebook = "candidate_selector.successor_codebook"
        tensors = {**facts.tensors, codebook: facts.tensors[codebook][columns]}
        few = replace(few, output=facts.output[columns], tensors=tensors)
        restated: Any = partial(restate, few)
    else:

        def restated(*given: Any) -> Tensor:
            every: Tensor = restate(facts, *given)
            return every[columns]

    drafter = kind(path=str(tmp_path), vocabulary=vocabulary)
    drafter.find()
    watcher = watched(target, drafter, few, restated, tree, shortest=2)
    assert watcher.worst < TOLERANCE
    assert f"{len(columns)} of {VOCABULARY} tokens" in drafter.notes["drafter.path"]
    for name, weight in drafter.head.state_dict().items():
        if "lm_head" in name or name.endswith(("markov_w2.weight", "successor_codebook")):
            assert len(weight) == len(columns)
            assert weight.is_contiguous()


@pytest.mark.parametrize("case", ["eagle", "dspark, rnn"])
@pytest.mark.parametrize("vocabulary", [2, FEW])
def test_texts_are_those_of_plain_decoding(
    case: str, vocabulary: int, target: PagedLM, tmp_path: Path
) -> None:
    """Where fewer tokens can be named than a node has children, too."""
    kind, write, _ = KINDS[case]
    write(tmp_path, target.model)
    plain = outputs_of(decoder_of(target, NoDrafter()), texts(), 12)
    for tree in (
        Static(widths=[3, 2, 1]),
        Dynamic(budget=10, width=3, depth=4),
        Static(widths=[3, 1], children="sample"),
    ):
        drafter = kind(path=str(tmp_path), vocabulary=vocabulary)
        assert outputs_of(decoder_of(target, drafter, tree), texts(), 12) == plain


def test_a_number_copies_nothing_of_the_target_and_a_list_its_rows_alone(
    target: PagedLM, tmp_path: Path
) -> None:
    output = target.model.lm_head.weight
    for layers in (1, 2):
        mtp(tmp_path, target.model, layers=layers)
        head = loaded(MTP(path=str(tmp_path), vocabulary=FEW), target).head
        for one in (head, *head.later):
            assert one.lm_head.weight.data_ptr() == output.data_ptr()
            assert one.lm_head.weight.shape == (FEW, made.D)
        assert head.names is None
        vocabulary, ids = vocabulary_of("list", tmp_path)
        head = loaded(MTP(path=str(tmp_path), vocabulary=vocabulary), target).head
        assert head.names.tolist() == sorted(ids)
        for one in (head, *head.later):
            assert torch.equal(one.lm_head.weight, output[sorted(ids)])
    assert output.shape == (VOCABULARY, made.D)


@pytest.mark.some(4)
@pytest.mark.parametrize("name", HEADS)
def test_a_stand_in_drafts_the_same_with_fewer_rows(
    name: str,
    large: PagedLM,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of 120 tokens the first 96 are the small model's, and the others are never drafted."""
    kind, write, sampled = HEADS[name]
    write(tmp_path, tiny("llama", num_hidden_layers=8))
    most, rows = kind(path=str(tmp_path)), kind(path=str(tmp_path), vocabulary=100)
    assert_same_drafts(*(drafts_of(large, one, sampled=sampled) for one in (rows, most)))
    assert "100 of 120 tokens" in rows.notes["drafter.path"]
    assert rows.head.drafts == most.head.drafts
    sizes = [len(w) for k, w in rows.head.state_dict().items() if "lm_head" in k]
    assert set(sizes) == {100}


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (0, "must be at least 1, or null"),
    "no file": ("some", r"is no number of tokens and no \.json file; give"),
    "missing": ("ids.json", "cannot be read, No such file or directory; give"),
    "no JSON": ("[1, 2", r"is not JSON \(.*; give"),
    "no list": ({"ids": [1]}, "holds no list of token ids; give"),
    "empty": ([], "holds no list of token ids; give"),
    "no id": ([1, "two"], 'holds "two", which is no id; give'),
    "true": ([True], "holds true, which is no id"),
    "negative": ([3, -1], "holds -1, which is no id"),
    "twice": ([7, 3, 7], "names token 7 twice; name each once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_no_tokens_is_refused_before_a_model_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, said = REFUSED[case]
    vocabulary = value
    if case not in ("none", "no file", "missing"):
        text = value if isinstance(value, str) else json.dumps(value)
        Path(vocabulary := "held.json").write_text(text)
    message = rf"^drafter\.vocabulary={vocabulary}: {said}"
    with pytest.raises(ValueError, match=message):
        Eagle3(path="zoo:eagle3", vocabulary=vocabulary).find()
    with pytest.raises(ValueError, match=message):
        MTP(vocabulary=vocabulary).find()


def test_tokens_that_target_or_head_do_not_have_are_refused(
    target: PagedLM, tmp_path: Path
) -> None:
    ids = made.eagle3(tmp_path, target.model).ids
    assert int(ids[0]) > 0 or int(ids[1]) > 1
    other = next(one for one in range(VOCABULARY) if one not in ids)

    def refused(vocabulary: Any, said: str) -> None:
        if isinstance(vocabulary, list):
            (tmp_path / "ids.json").write_text(json.dumps(vocabulary))
            vocabulary = str(tmp_path / "ids.json")
        with pytest.raises(ValueError, match=rf"^drafter\.vocabulary=\S+: {said}") as error:
            loaded(Eagle3(path=str(tmp_path), vocabulary=vocabulary), target)
        assert "\n" not in str(error.value)

    refused(97, "target.path=tiny has 96 tokens; choose fewer, or null")
    refused([3, 96], "names token 96, and target.path=tiny has 96 tokens; leave it out")
    refused([other], r"names none of the 48 tokens that drafter\.path=\S+ can; choose others")
    assert ids_of(VOCABULARY)[-1] == VOCABULARY - 1
    assert loaded(Eagle3(path=str(tmp_path), vocabulary=VOCABULARY), target).head.drafts == 48

"""Two processes that share a target over gloo, in float32: what they decode is what one process
decodes, token for token, on both."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specdec.calibration import about as costs_about
from specdec.calibration import unlike
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.medusa import Medusa
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.kernels.choose import Kernels
from specdec.lab.led import led
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.models.quantised import Quantize
from specdec.models.shards import check_split, cuts_unevenly, whole
from specdec.protocols import Drafter
from specdec.ranks import ALONE, Ranks
from specdec.rates import AcceptanceRates
from tests.decoding import decoder_of, outputs_of
from tests.heads import made
from tests.models.standins import BASE, build
from tests.models.tiny import disturbed, save, tiny
from tests.ranks import together, tokens

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3], [2, 3, 8, 4, 6]]
NEW = 12
TREES = {"chain": Chain(budget=4), "tree": Static(widths=[2, 2, 1])}
GRID = list(product(["small_llama", "early_exit", "ngram", "medusa"], TREES, [0.0, 1.0], [1, 3]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    target = tiny("llama")
    save(target, folder / "target")
    save(disturbed(target, 0.1), folder / "draft")
    made.medusa(folder / "medusa", target)
    return folder


def drafter_of(kind: str, models: Path) -> Drafter:
    return {
        "small_llama": partial(SmallLlama, path=str(models / "draft")),
        "early_exit": partial(EarlyExit, exit_layer=2),
        "ngram": NGram,
        "medusa": partial(Medusa, path=str(models / "medusa")),
        "none": NoDrafter,
    }[kind]()


def decoded(
    models: Path, kind: str, tree: str, temperature: float, rows: int, ranks: Ranks
) -> list[list[int]]:
    target = load_model(str(models / "target"), ranks=ranks)
    assert target._direct is not None
    drafter = led(drafter_of(kind, models))
    shape = TREES[tree] if kind != "none" else None
    decoder = decoder_of(target, drafter, shape, temperature=temperature, rows=rows)
    return outputs_of(decoder, PROMPTS, NEW)


@pytest.mark.some(1)
@pytest.mark.parametrize(("kind", "tree", "temperature", "rows"), GRID)
def test_two_ranks_decode_what_one_process_does(
    models: Path, tmp_path: Path, kind: str, tree: str, temperature: float, rows: int
) -> None:
    work = partial(decoded, models, kind, tree, temperature, rows)
    alone = work(ALONE)
    assert together(tmp_path, work) == [alone, alone]
    assert alone == decoded(models, "none", tree, temperature, rows, ALONE) or temperature


def origins(models: Path, about: dict[str, Any], ranks: Ranks) -> tuple[str, dict[str, Any], str]:
    """Where rates that were measured with some models come from, what costs are true of here, and
    in which respects those are of something else."""
    target = load_model(str(models / "target"), ranks=ranks)
    run: Any = SimpleNamespace(
        target=target, drafter=SimpleNamespace(name="ngram", own_model=None)
    )
    rates = {"path": "some", "drafter": "ngram", "target": "x", "models": about["models"]}
    said = AcceptanceRates(values=[[0.5]], about=rates).origin(run)
    table: Any = SimpleNamespace(about=about)
    return said, costs_about(target, None), unlike(table, run)


def test_ranks_know_a_model_that_one_process_has_measured(models: Path, tmp_path: Path) -> None:
    """But their passes take other times."""
    alone = costs_about(load_model(str(models / "target")), None)
    for said, about, other in together(tmp_path, partial(origins, models, alone)):
        assert said == "some, measured with these models"
        assert about == {**alone, "ranks": 2, "machine": about["machine"]}
        assert other == "of other ranks"


def ways(folder: Path, ranks: Ranks) -> list[Any]:
    """What plain decoding yields the direct way and the general one, and the weights."""
    target = load_model(str(folder), ranks=ranks)
    found: list[Any] = []
    for direct in (target._direct, None):
        target._direct = direct
        found.append(outputs_of(decoder_of(target, NoDrafter(), rows=2), PROMPTS, NEW))
    return [*found, {name: whole(weight) for name, weight in target.model.named_parameters()}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])  # with biases, with norms of heads
@pytest.mark.parametrize("size", [2, 4])
def test_other_families_and_the_general_way(tmp_path: Path, kind: str, size: int) -> None:
    own = tiny(kind, num_key_value_heads=4, vocab_size=tokens(95 + size % 4))
    save(own, tmp_path / "model")
    expected, same, _ = ways(tmp_path / "model", ALONE)
    assert expected == same
    for found in together(tmp_path / "ranks", partial(ways, tmp_path / "model"), size=size):
        direct, general, weights = found
        assert direct == general == expected
        for name, weight in own.named_parameters():  # all of them, though joined in between
            assert torch.equal(weights[name], weight), name


def standin_of(shape: Any, ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[int], bool]:
    model = build(shape, ranks=ranks)
    weights = {name: whole(weight).clone() for name, weight in model.named_parameters()}
    target = PagedLM(model, ranks=ranks)
    decoder = decoder_of(target, NoDrafter())
    return weights, outputs_of(decoder, PROMPTS[:1], 6)[0], target._direct is not None


@pytest.mark.slow
def test_standins_made_in_parts_have_the_weights_of_whole_ones(tmp_path: Path) -> None:
    shape = replace(BASE, vocab_size=tokens(BASE.vocab_size))
    weights, text, direct = standin_of(shape, ALONE)
    assert direct
    for found, theirs, also in together(tmp_path, partial(standin_of, shape)):
        assert also
        assert theirs == text
        for name, weight in weights.items():
            assert torch.equal(found[name], weight), name


def exactly(folder: Path, quantize: Quantize, ranks: Ranks) -> tuple[list[list[list[int]]], bool]:
    """Texts of batches of one and of three in exact mode, and whether states of a prompt have the
    same bits on all ranks."""
    placement = Placement(dtype=torch.bfloat16, kernels=Kernels(impl="triton", exact=True))
    target = load_model(str(folder), placement, quantize=quantize, ranks=ranks)
    texts = []
    for rows in (1, 3):
        decoder = decoder_of(target, EarlyExit(exit_layer=2), Chain(budget=2), rows=rows)
        texts.append(outputs_of(decoder, PROMPTS[:3], 3))
    cache = target.new_cache(rows=1, pages=4, page_size=16, max_tokens=32)
    cache.open(0, tokens=32)
    states: list[torch.Tensor] = []
    see = partial(keep, states)
    target.prefill(cache, [0], PROMPTS[:1], see=see, logits=False, taps=["normal"])
    every = ranks.gather(states[0].view(torch.int16))
    return texts, all(torch.equal(one, every[0]) for one in every)


def keep(states: list[torch.Tensor], *seen: Any) -> None:
    """The last hidden states: logits are gathered, so that all ranks have the same of them."""
    states.append(seen[-1]["normal"])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_exact_mode_has_the_same_bits_on_all_ranks_and_texts_in_all_batches(
    models: Path, tmp_path: Path, quantize: Quantize
) -> None:
    work = partial(exactly, models / "target", quantize)
    first, second = together(tmp_path, work, wait=100.0)
    assert first == second
    (alone, batched), equal = first
    assert alone == batched
    assert equal


@pytest.mark.parametrize(
    ("heads", "size", "said"),
    [
        ((4, 1), 2, "target.tp=2: 1 key-value head of x cannot be split; use target.tp=1"),
        ((8, 8), 3, "target.tp=3: 8 key-value heads of x cannot be split; must divide them: 2, 4"),
        ((6, 4), 4, "target.tp=4: 6 query heads of x cannot be split; must divide them: 2, 3, 6"),
    ],
)
def test_heads_that_cannot_be_split(heads: tuple[int, int], size: int, said: str) -> None:
    config = tiny("llama").config
    config.num_attention_heads, config.num_key_value_heads = heads
    with pytest.raises(ValueError, match="cannot be split") as refused:
        check_split(config, size, "x")
    assert str(refused.value).startswith(said)


def test_a_family_that_transformers_cannot_cut() -> None:
    said = "target.tp=2: transformers has no plan of how to cut x, a model of type gpt2; use "
    with pytest.raises(ValueError, match=rf"^{said}target\.tp=1$"):
        check_split(AutoConfig.for_model("gpt2"), 2, "x")


def test_a_vocabulary_that_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where transformers is 5.17."""
    config = tiny("llama", vocab_size=97).config
    if cuts_unevenly():
        check_split(config, 2, "x")
        monkeypatch.setattr("specdec.models.shards.cuts_unevenly", lambda: False)
    check_split(config, 1, "x")
    with pytest.raises(ValueError, match=r"^target\.tp=2: does not divide the 97 tokens of x, "):
        check_split(config, 2, "x")

"""Two processes that share a target in float8: their weights, joined, are those that the file
stands for, and what they decode is what one process decodes."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.lab.witness import own_logits
from specdec.models.fingerprint import fingerprint
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.quantised import Fp8Linear, Quantize
from specdec.models.shards import whole
from specdec.models.standin import Shape
from specdec.ranks import ALONE, Ranks
from tests.decoding import decoder_of, outputs_of
from tests.models.fp8_files import BLOCKED, STORED, WEIGHTS, peak_of, rounded, write
from tests.models.standins import BASE, build
from tests.models.tiny import FLOAT32_ROUNDING, disturbed, error, own_attention, save, tiny
from tests.ranks import together, tokens

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [9, 2, 6], [5, 3, 5, 8, 9, 7]]
NEW = 12
TEXT = [7, 3, 11, 2, 60, 5]
BLOCKS: dict[str, Any] = BLOCKED | {"num_key_value_heads": 4}  # which fill what ranks have
TREES = {"chain": Chain(budget=4), "tree": Static(widths=[2, 2, 1])}
GRID = list(product(TREES, [0.0, 1.0], [1, 3]))


def parts_of(lm: PagedLM) -> dict[str, Tensor]:
    """This rank's weights, dequantised; of those that are not cut in this way all."""
    found = {name: whole(weight).clone() for name, weight in lm.model.named_parameters()}
    for name, module in lm.model.named_modules():
        if isinstance(module, Fp8Linear):
            found[f"{name}.weight"] = module.weight.dequantised(torch.float64)
    return found


def read(
    folder: Path, quantize: Quantize, ranks: Ranks
) -> tuple[dict[str, Tensor], Tensor, Any, str]:
    """Weights; logits of a text by the pass that checks runs; texts the direct way and the other,
    and the fingerprint."""
    lm = load_model(str(folder), quantize=quantize, ranks=ranks)
    assert lm.quantised == "fp8"
    assert all("lm_head.weight is dequantised" in note for note in lm.notes)
    direct = lm._direct
    assert direct is not None
    weights = parts_of(lm)
    (logits,) = own_logits(lm, TEXT[:3], TEXT[3:])
    texts = []
    for lm._direct in (direct, None):
        texts.append(outputs_of(decoder_of(lm, NoDrafter(), rows=2), PROMPTS, NEW))
    return weights, logits, texts, fingerprint(lm)


def joined(name: str, parts: list[Tensor]) -> Tensor:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return torch.cat(parts, 1)
    if "_proj." in name and not name.endswith(("o_proj.bias", "down_proj.bias")):
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "biases": ("qwen2", {"tie_word_embeddings": False}),
    "every bias": ("llama", {"attention_bias": True}),
    "norms of heads": ("qwen3", {"head_dim": 8}),
    **{stored: ("llama", {"tie_word_embeddings": False, **BLOCKS}) for stored in STORED},
}


@pytest.mark.parametrize(
    "case", [one if one == "llama" else pytest.param(one, marks=pytest.mark.slow) for one in CASES]
)
def test_joined_weights_are_those_of_the_file(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    meant = tiny(kind, **settings)
    for name, weight in meant.named_parameters():
        if case == "llama" and name.endswith(("o_proj.weight", "down_proj.weight")):
            # Scales are powers of two: of parts they would change small numbers alone.
            weight.data[:, weight.shape[1] // 2 :] *= 2.0**-14
    if case in STORED:
        meant = write(meant, tmp_path / "model", case, head=case == "channel")
    else:
        save(meant, tmp_path / "model")
        for name, weight in meant.named_parameters():
            if name.endswith("_proj.weight"):
                weight.data = rounded(weight.data)
    work = partial(read, tmp_path / "model", "none" if case in STORED else "fp8")
    _, _, expected, mark = work(ALONE)
    found = together(tmp_path / "ranks", work)
    known = dict(meant.named_parameters())
    assert found[0][0].keys() >= known.keys()
    for name, weight in known.items():
        every = joined(name, [weights[name] for weights, *_ in found])
        assert torch.equal(every.to(weight), weight), name
    own = own_attention(meant)(torch.tensor([TEXT[:-1]])).logits[0, 2:].detach()
    for _, logits, texts, same in found:
        assert error(logits, own.double()) < FLOAT32_ROUNDING
        assert texts == expected
        assert texts[0] == texts[1]
        assert (same == mark) == (case != "channel")  # whose head ranks dequantise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    target = tiny("llama")
    save(target, folder / "target")
    save(disturbed(target, 0.1), folder / "draft")
    return folder


def decoded(
    models: Path, tree: str, temperature: float, rows: int, ranks: Ranks
) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Texts, and the weights of the draft."""
    target = load_model(str(models / "target"), quantize="fp8", ranks=ranks)
    drafter = SmallLlama(path=str(models / "draft"), quantize="fp8")
    decoder = decoder_of(target, drafter, TREES[tree], temperature=temperature, rows=rows)
    texts = outputs_of(decoder, PROMPTS, NEW)
    assert drafter.own_model is not None
    return texts, parts_of(drafter.own_model)


@pytest.mark.some(1)
@pytest.mark.parametrize(("tree", "temperature", "rows"), GRID)
def test_two_ranks_decode_what_one_process_does(
    models: Path, tmp_path: Path, tree: str, temperature: float, rows: int
) -> None:
    """With a draft in float8 as well, of which each has all."""
    work = partial(decoded, models, tree, temperature, rows)
    texts, draft = work(ALONE)
    for theirs, also in together(tmp_path, work):
        assert theirs == texts
        assert all(torch.equal(also[name], weight) for name, weight in draft.items())


def standin_of(shape: Shape, ranks: Ranks) -> tuple[dict[str, Tensor], list[int], int, int]:
    """Weights, a text, and bytes: at most while it was made, and in the end."""
    most, model = peak_of(lambda: build(shape, quantize="fp8", ranks=ranks))
    there = sum(w.nbytes for w in model.buffers()) + 2 * model.lm_head.weight.nbytes // ranks.size
    lm = PagedLM(model, ranks=ranks)
    assert lm._direct is not None
    weights = parts_of(lm)
    return weights, outputs_of(decoder_of(lm, NoDrafter()), PROMPTS[:1], 6)[0], most, there


@pytest.mark.slow
def test_standins_in_parts_have_the_weights_of_whole_ones(tmp_path: Path) -> None:
    """And nothing but a layer, and the ends, is ever whole."""
    shape = replace(BASE, vocab_size=tokens(BASE.vocab_size))
    weights, text, _, _ = standin_of(shape, ALONE)
    found = together(tmp_path, partial(standin_of, shape))
    layer = sum(w.nbytes for name, w in weights.items() if ".layers.0." in name) // 2  # float64
    ends = 2 * weights["lm_head.weight"].nbytes
    source = 4 * 14_100_000  # the small model, in float32
    for _, theirs, most, there in found:
        assert theirs == text
        assert there < most < there + layer + ends + source
    for name, weight in weights.items():
        assert torch.equal(joined(name, [parts[name] for parts, *_ in found]), weight), name


def refused(folder: Path, ranks: Ranks) -> str:
    with pytest.raises(ValueError, match="model") as refusal:
        load_model(str(folder), setting="target.path", ranks=ranks)
    return str(refusal.value)


def test_blocks_that_ranks_would_cut_are_refused_in_one_line(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False, **BLOCKED | {"num_hidden_layers": 1})
    write(model, tmp_path / "model", "finegrained")
    said = (
        f"target.path={tmp_path / 'model'}: {WEIGHTS}: model.layers.0.self_attn.k_proj.weight: "
        "parts of 64 rows would cut through blocks of 128 x 128, which have a scale together; "
        "lower target.tp"
    )
    assert together(tmp_path / "ranks", partial(refused, tmp_path / "model")) == [said] * 2

"""Stand-ins in float8: their function is that of the small model with the same weights in float8,
and they are made layer by layer."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.models.load import zoo_path
from specdec.models.paged import PagedLM
from specdec.models.quantised import projections, quantised_bytes
from specdec.models.standin import SHAPES, Shape, standin
from tests.models.fp8_files import peak_of, rounded
from tests.models.standins import BASE, build
from tests.models.tiny import error

FLOAT32_ROUNDING = 2e-5


@torch.no_grad()
def test_it_computes_what_the_small_model_in_float8_does() -> None:
    small: Any = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32)
    tokens = torch.randint(8192, (2, 30), generator=torch.Generator().manual_seed(1))
    plain = small(tokens).logits.double()
    for layer in small.model.layers:
        for part, name in projections(layer):
            weight = getattr(part, name).weight
            weight.data = rounded(weight.data)
    expected = small(tokens).logits.double()
    lm = PagedLM(build(BASE, quantize="fp8"))
    assert lm.quantised == "fp8"
    assert lm._direct is not None
    cache = lm.new_cache(rows=2, pages=8, page_size=16, max_tokens=40)
    for row in (0, 1):
        cache.open(row, tokens=40)
    places = torch.arange(30).expand(2, -1)
    logits = lm.forward(cache, [0, 1], tokens, places)
    assert logits is not None
    known = logits[..., :8192]
    assert error(known, expected) < FLOAT32_ROUNDING
    assert error(expected, plain) > 100 * FLOAT32_ROUNDING
    assert float(logits[..., 8192:].max()) < float(known.min())


def test_no_more_than_a_layer_is_ever_in_another_type() -> None:
    deep = Shape(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=9001,
    )
    most, made = peak_of(lambda: build(deep, quantize="fp8"))
    small = sum(tensor.nbytes for tensor in made.state_dict().values())
    layer = 4 * sum(
        m.values.numel() for m in made.model.layers[0].modules() if hasattr(m, "scale")
    )
    source = 4 * 14_100_000  # the small model, in float32
    ends = 2 * made.lm_head.weight.nbytes
    assert small < most < small + layer + ends + source


def test_how_large_it_will_be_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(BASE, quantize="fp8")
    plain = build(BASE)
    there = [t for name, t in made.state_dict().items() if "rotary" not in name]
    assert quantised_bytes(plain, "fp8") == sum(tensor.nbytes for tensor in there)
    room = 80 * 2**30
    monkeypatch.setattr("specdec.models.standin.free_memory", lambda device: room)
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=r"131.4 GiB does not fit .* a smaller one, quantize=fp8"):
        standin(zoo_path("target"), "llama3_70b", **options)
    room = 60 * 2**30
    with pytest.raises(ValueError, match=r"6\d\.\d GiB does not fit .* choose a smaller one or"):
        standin(zoo_path("target"), "llama3_70b", **options, quantize="fp8")
    assert SHAPES["llama3_70b"].num_hidden_layers == 80

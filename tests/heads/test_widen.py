"""Heads widened onto a stand-in say what the small ones say of the small target: in float64, by
the modules' own forward over states that transformers computes.

What is left is the float32 in transformers' norms. The controls leave out one rule each and must
be seen.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from specdec.heads.formats import load_head
from specdec.heads.layered import LayeredHead
from specdec.heads.medusa import MedusaConfig, MedusaHeads
from specdec.heads.recurrent import (
    Eagle3Config,
    Eagle3Head,
    EagleConfig,
    EagleHead,
    MTPConfig,
    MTPHead,
)
from specdec.heads.widen import widen
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.standin import SHAPES, Shape, Widening
from tests.models.standins import build

SHAPE = Shape(
    hidden_size=640,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    vocab_size=9000,
)
SMALL, WIDTH, VOCABULARY = 384, SHAPE.hidden_size, 8192
STEPS = 4  # drafted after the pairs of the prompt
FLOAT32_ROUNDING = 1e-6  # relative, of the norms
LLAMA: dict[str, Any] = {
    "hidden_size": SMALL,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
COMMON: dict[str, Any] = {
    "layer": LlamaConfig(**LLAMA),
    "taps": (1, 3, 5),
    "state_size": SMALL,
    "target_vocab": VOCABULARY,
    "vocab_size": 512,
}
EAGLE3 = Eagle3Config(**COMMON)
EAGLE = EagleConfig(**COMMON | {"taps": ("normal",), "vocab_size": VOCABULARY})


@dataclass(frozen=True)
class Target:
    """A target, and the states [T, H] of its text, by the number of layers passed."""

    lm: PagedLM
    states: dict[Any, Tensor]
    tokens: Tensor  # [T]


def target_of(model: Any, standin: Widening | None) -> Target:
    """States come first: PagedLM takes the model's attention over."""
    tokens = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        *states, normal = model.model(tokens[None], output_hidden_states=True).hidden_states
    by_tap: dict[Any, Tensor] = {k: state[0] for k, state in enumerate(states)}
    return Target(PagedLM(model, standin=standin), by_tap | {"normal": normal[0]}, tokens)


@pytest.fixture(scope="module")
def small() -> Target:
    model = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float64).eval()
    return target_of(model, None)


@pytest.fixture(scope="module")
def large() -> Target:
    config = AutoConfig.from_pretrained(zoo_path("target"))
    standin = Widening(small=config, shape=SHAPE)
    return target_of(build(SHAPE, dtype=torch.float64), standin)


def fill(head: Any, target: Target) -> Any:
    """Random numbers large enough that a mistake does not vanish, and the target's embedding."""
    random = torch.Generator().manual_seed(2)
    head = head.double().eval().requires_grad_(False)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=random))
        else:
            parameter.uniform_(-0.09, 0.09, generator=random)
    embedding = target.lm.model.model.embed_tokens.weight
    if isinstance(head, LayeredHead) and head.embed_tokens.weight.shape == embedding.shape:
        head.embed_tokens.weight.copy_(embedding)
    if isinstance(head, EagleHead):
        head.lm_head.weight.copy_(target.lm.model.lm_head.weight)
    return head


@torch.no_grad()
def drafted(head: LayeredHead, target: Target) -> Tensor:
    """[T - 1 + STEPS, drafts] logits: after each pair of the text, then of a chain that goes on
    from the last with the head's own features."""
    kept: list[list[Tensor]] = [[] for _ in head.layers]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept[layer].append(torch.stack([key, value]))
        keys, values = torch.cat(kept[layer], dim=3)
        count, new = keys.shape[2], query.shape[2]
        mask = torch.ones(new, count, dtype=torch.bool).tril(count - new)
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=True
        )

    def run(tokens: Tensor, feature: Tensor, first: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + len(tokens))[None]
        angles = head.rotary(feature, position_ids=positions)
        made, normal = head.forward(head.embed(tokens)[None], feature[None], angles, attend)
        return made[0], head.lm_head(normal[0])[:, : head.drafts]

    states = torch.cat([target.states[tap] for tap in head.config.taps], dim=-1)
    feature, logits = run(target.tokens[1:], head.fuse(states[:-1]), 0)
    every = [logits]
    for step in range(STEPS):
        token = target.tokens[step : step + 1]
        feature, logits = run(token, feature[-1:], len(states) - 1 + step)
        every.append(logits)
    return torch.cat(every)


def share(found: Tensor, want: Tensor) -> float:
    """How much of what is wanted is missed."""
    return float((found - want).norm() / want.norm())


def missed(head: LayeredHead, small: Target, wide: LayeredHead, large: Target) -> float:
    """The same of logits, of the head on the small target and the widened one on the large."""
    want, found = drafted(head, small), drafted(wide, large)
    assert torch.equal(found.argmax(-1), want.argmax(-1)) or share(found, want) > FLOAT32_ROUNDING
    return share(found, want)


EAGLE3_FORMS = {
    "plain": EAGLE3,
    "norm_before_residual": replace(EAGLE3, norm_before_residual=True),
    "norm_output": replace(EAGLE3, norm_output=True),
    "norm_before_fc": replace(EAGLE3, norm_before_fc=True),
    "fc_norm": replace(EAGLE3, fc_norm=True),
    "all of them": replace(
        EAGLE3, fc_norm=True, norm_before_fc=True, norm_before_residual=True, norm_output=True
    ),
    "fc_norm, of the normed state and the embedding": replace(
        EAGLE3, fc_norm=True, taps=(0, 4, "normal")
    ),
    "norm_before_fc, of the normed state": replace(EAGLE3, norm_before_fc=True, taps=("normal",)),
    "of the normed state": replace(EAGLE3, taps=(2, "normal"), fc_bias=True),
    "no fc": replace(EAGLE3, fc=False, taps=("normal",), norm_output=True),
    "no fc, of a layer": replace(EAGLE3, fc=False, taps=(3,)),
    "two layers": replace(EAGLE3, layer=LlamaConfig(**LLAMA | {"num_hidden_layers": 2})),
    "two of pairs": replace(
        EAGLE3, layer=LlamaConfig(**LLAMA | {"num_hidden_layers": 2}), pairs=2, fc_norm=True
    ),
    "of Qwen3": replace(EAGLE3, layer=Qwen3Config(**LLAMA | {"attention_bias": True})),
    "biases": replace(EAGLE3, layer=LlamaConfig(**LLAMA | {"attention_bias": True})),
    "an embedding of its own, narrower": replace(
        EAGLE3, layer=LlamaConfig(**LLAMA | {"hidden_size": 256}), fc_norm=True
    ),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("config", EAGLE3_FORMS.values(), ids=EAGLE3_FORMS)
def test_eagle3_says_the_same(config: Eagle3Config, small: Target, large: Target) -> None:
    head = fill(Eagle3Head(config), small)
    assert missed(head, small, widen(head, large.lm), large) <= FLOAT32_ROUNDING


EAGLE_FORMS = {
    "plain": EAGLE,
    "no bias": replace(EAGLE, bias=False),
    "norms": replace(EAGLE, norms=True),
    "all norms": replace(EAGLE, norms=True, input_norm=True, output_norm=True),
    "two layers": replace(EAGLE, layer=LlamaConfig(**LLAMA | {"num_hidden_layers": 2})),
}


MTP = MTPConfig(**COMMON | {"taps": ("normal",), "vocab_size": VOCABULARY})
MTP_FORMS = {
    "mtp": MTP,
    "mtp of a layer, unnormed": replace(MTP, taps=(5,), norm_output=False),
    "mtp of Qwen3.5": replace(MTP, layer=Qwen3Config(**LLAMA), gated=True, turned=32),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("config", MTP_FORMS.values(), ids=MTP_FORMS)
def test_mtp_layers_say_the_same(config: MTPConfig, small: Target, large: Target) -> None:
    head = fill(MTPHead(config), small)
    wide = widen(head, large.lm)
    assert missed(head, small, wide, large) <= FLOAT32_ROUNDING
    wide.blind = None
    assert missed(head, small, wide, large) > (1e-2 if "normal" in config.taps else 0)


@pytest.mark.some(2)
@pytest.mark.parametrize("config", EAGLE_FORMS.values(), ids=EAGLE_FORMS)
def test_eagle_says_the_same(config: EagleConfig, small: Target, large: Target) -> None:
    head = fill(EagleHead(config), small)
    assert missed(head, small, widen(head, large.lm), large) <= FLOAT32_ROUNDING


MEDUSA = MedusaConfig(heads=2, blocks=2, state_size=SMALL, vocab_size=VOCABULARY)
MEDUSA_FORMS = {
    "own matrices": MEDUSA,
    "tied": replace(MEDUSA, tied=True),
    "one block, twice": replace(MEDUSA, shared=True, bias=False),
    "of a layer": replace(MEDUSA, taps=(3,)),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("config", MEDUSA_FORMS.values(), ids=MEDUSA_FORMS)
@torch.no_grad()
def test_medusa_says_the_same(config: MedusaConfig, small: Target, large: Target) -> None:
    heads = fill(MedusaHeads(config), small)
    if config.tied:
        heads.lm_head.weight.copy_(small.lm.model.lm_head.weight)
    wide = widen(heads, large.lm)
    (tap,), (other,) = heads.config.taps, wide.config.taps
    want, found = heads.logits(small.states[tap]), wide.logits(large.states[other])
    assert found.shape[-1] == SHAPE.vocab_size
    assert share(found[..., :VOCABULARY], want) <= FLOAT32_ROUNDING


# --- what must not be left out


def of_all(wide: LayeredHead, small: LayeredHead) -> None:
    """Each norm's epsilon is the small one's."""
    for name, norm in small.named_modules():
        if hasattr(norm, "variance_epsilon"):
            mine: Any = wide.get_submodule(name)
            mine.variance_epsilon = norm.variance_epsilon


def of_constant(wide: LayeredHead, small: LayeredHead) -> None:
    """The norm of the embedding forgets the constant."""
    wide.layers[0].input_layernorm.variance_epsilon = 1e-5 * SMALL / WIDTH


def of_width(wide: LayeredHead, small: LayeredHead) -> None:
    """The last norm's weights are the small one's."""
    norm: Any = wide.norm
    norm.weight[:SMALL] = small.norm.weight  # type: ignore[union-attr]


def of_states(wide: LayeredHead, small: LayeredHead) -> None:
    """The dimension that has another meaning in normed states is seen."""
    wide.blind = None


NORMAL = EAGLE3_FORMS["fc_norm, of the normed state and the embedding"]


@pytest.mark.parametrize(
    ("config", "leave_out", "least"),
    [
        (EAGLE3, of_all, 1e-5),
        (EAGLE3, of_constant, 5e-6),
        (EAGLE3, of_width, 1e-2),
        (NORMAL, of_states, 1e-2),
    ],
)
def test_no_rule_is_without_effect(
    config: Eagle3Config, leave_out: Any, least: float, small: Target, large: Target
) -> None:
    head = fill(Eagle3Head(config), small)
    wide = widen(head, large.lm)
    assert missed(head, small, wide, large) <= FLOAT32_ROUNDING
    leave_out(wide, head)
    assert missed(head, small, wide, large) > least


# --- the cost


def test_a_widened_head_has_the_published_sizes(small: Target, large: Target) -> None:
    wide = widen(fill(Eagle3Head(EAGLE3), small), large.lm)
    heads = SHAPE.num_attention_heads + 2 * SHAPE.num_key_value_heads
    size, inner = SHAPE.head_dim, SHAPE.intermediate_size
    matrices = [
        3 * WIDTH * WIDTH,
        2 * WIDTH * heads * size,
        SHAPE.num_attention_heads * size * WIDTH,
        3 * inner * WIDTH,
        min(32_000, SHAPE.vocab_size) * WIDTH,
        SHAPE.vocab_size * WIDTH,
    ]
    norms = 4 * WIDTH
    assert sum(parameter.numel() for parameter in wide.parameters()) == sum(matrices) + norms
    assert wide.config.taps == (1, 4, 6)
    assert wide.drafts == 512


def test_what_is_the_small_models_becomes_the_large_ones(small: Target, large: Target) -> None:
    model = large.lm.model
    wide = widen(fill(EagleHead(EAGLE), small), large.lm)
    assert wide.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert wide.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert wide.drafts == VOCABULARY
    assert model.lm_head.weight.requires_grad


def test_nothing_that_is_read_is_empty(small: Target, large: Target) -> None:
    wide = widen(fill(Eagle3Head(EAGLE3), small), large.lm)
    layer = wide.layers[0]
    parts = (
        (layer.self_attn, ("q_proj", "k_proj", "v_proj")),
        (layer.mlp, ("gate_proj", "up_proj")),
    )
    weights = [getattr(part, name).weight for part, names in parts for name in names]
    for weight in (*weights, wide.lm_head.weight):
        assert (weight.norm(dim=1) > 0).all()


@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_the_small_head(small: Target, large: Target) -> None:
    head = fill(Eagle3Head(EAGLE3), small)
    want = drafted(head, small)
    model = build(SHAPE, dtype=torch.bfloat16)
    wide = widen(head.bfloat16(), PagedLM(model, standin=large.lm.standin))
    short = [
        replace(target, states={tap: state.bfloat16() for tap, state in target.states.items()})
        for target in (small, large)
    ]
    theirs, mine = (share(drafted(h, t), want) for h, t in zip((head, wide), short, strict=True))
    assert 0 < mine <= 2 * theirs


# --- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(EAGLE3, state_size=512), "reads states of 512, and model is no stand-in"),
        (
            replace(EAGLE3, layer=LlamaConfig(**LLAMA | {"head_dim": 64})),
            "head_dim=64 of the head",
        ),
        (
            replace(EAGLE3, layer=LlamaConfig(**LLAMA | {"intermediate_size": 1537})),
            "intermediate_size=1537 of the head: must be at most the target's 1536",
        ),
        (
            replace(EAGLE3, layer=LlamaConfig(**LLAMA | {"num_key_value_heads": 4})),
            "num_key_value_heads=2: 4 query heads in groups of 1 need 4 groups of 4",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    config: Eagle3Config, message: str, large: Target
) -> None:
    with torch.device("meta"):
        head = Eagle3Head(config)
    with pytest.raises(ValueError, match=f"^drafter.path: .*{message}"):
        widen(head, large.lm)


def test_a_target_that_is_no_stand_in_is_refused(small: Target) -> None:
    with pytest.raises(ValueError, match="states of 384, and model is no stand-in"):
        widen(MedusaHeads(MEDUSA), small.lm)


def test_a_head_that_has_no_room_is_refused(
    small: Target, large: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.models.standin.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"^drafter\.path: a head of 0\.\d GiB does not fit the"):
        widen(fill(MedusaHeads(MEDUSA), small), large.lm)


@pytest.mark.usefixtures("large")
def test_a_stand_in_knows_how_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama3_8b", SHAPE)
    assert load_model("zoo:draft").standin is None
    made = load_model("standin:llama3_8b").standin
    assert made is not None
    assert (made.shape, made.small.hidden_size) == (SHAPE, SMALL)
    assert [made.tap(tap) for tap in (0, 1, 5, 6, "normal")] == [0, 1, 6, 8, "normal"]


def test_states_of_its_heads_are_those_of_the_small_model() -> None:
    """Eight layers of the stand-in are six of the small model, whose the refusal says they are."""
    standin = Widening(small=AutoConfig.from_pretrained(zoo_path("target")), shape=SHAPE)
    large = PagedLM(build(SHAPE), name="target.path=standin:base", standin=standin)
    said = r"state 7, and those of the small model of target\.path=standin:base are 0 to 6 and"
    with pytest.raises(ValueError, match=said):
        load_head("zoo:eagle3", large, kinds=["eagle3"], taps=[1, 7])

"""Stand-ins: models that cost what a large Llama costs and say what a small trained one says.

A trained Llama is laid into one of a larger shape so that the function stays the same. Tokens,
probabilities and acceptance rates are those of the small model, up to rounding; memory, reads
and products are those of the large shape. Nothing is downloaded.

- *Width.* The small model's hidden state takes the first dimensions of the large one. An RMS norm
  there sees a smaller mean square, which its weights and its epsilon make up for.
- *Heads and neurons* of the small model take the place of some of the large one's. The others
  compute on random weights, and zero columns of `o_proj` and `down_proj` drop what they find.
- *Depth.* The layers in between add zero to the hidden state: `placed_layers` says which.
- *Vocabulary.* One dimension of the hidden state is a constant that no layer reads or changes,
  counted in the epsilon of the norms. The output head weighs it for the tokens the small model
  does not have, so that their logits lie far below all others, after any layer.

Function-preserving growth is known from Net2Net (Chen et al. 2016); there it begins a training.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.models.placement import free_memory
from specdec.models.quantised import Quantize, quantise_layer, quantised_bytes
from specdec.models.shards import check_split, cut, keep_part, local, part_of, replace
from specdec.observation import Tap
from specdec.ranks import ALONE, Ranks

MAX_POSITIONS = 131_072  # rotary angles are the small model's; it was trained on shorter contexts
RANDOM_STD = 0.02
FAR_BELOW = 2.0**15  # logit of a padded token: minus this over the RMS of the small hidden state


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama, by the names of its configuration.

    Raises:
        ValueError: a size below 1, or query heads that key-value heads cannot share equally.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 128_256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )


# The published sizes, but that all have the vocabulary of Llama 3, so that any two can be a pair.
SHAPES = {
    "llama3_8b": Shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama3_70b": Shape(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama3_1b": Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "llama_160m": Shape(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=64,
    ),
}
ZOO_BY_HEAD_DIM = {128: "target", 64: "draft"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Widening:
    """How a stand-in was made, for what was trained on its small model.

    Args:
        small: configuration of the small model.
        shape: sizes of the large one.
    """

    small: Any
    shape: Shape

    @property
    def constant(self) -> float:
        """What hidden states hold in their dimension number `small.hidden_size`."""
        return _constant(self.small)

    def tap(self, tap: Tap) -> Tap:
        """Where the large model has a state of the small one."""
        if isinstance(tap, str):
            return tap
        return tap * self.shape.num_hidden_layers // int(self.small.num_hidden_layers)


def named_shape(name: str, setting: str = "path") -> tuple[Shape, str]:
    """What `standin:NAME` means: a shape, and the name of the zoo model that fills it.

    Args:
        setting: the option that gave the name, for error messages.

    Raises:
        ValueError: no stand-in of that name.
    """
    if name not in SHAPES:
        names = ", ".join(sorted(SHAPES))
        raise ValueError(f"{setting}=standin:{name}: no such stand-in; there are {names}")
    shape = SHAPES[name]
    return shape, ZOO_BY_HEAD_DIM[shape.head_dim]


def placed_layers(small: int, large: int) -> list[int]:
    """Which of `large` layers hold the `small` ones, in order; the others change nothing.

    Each layer ends its share of the depth: leaving the large model after
    `placed_layers(small, large)[k - 1] + 1 = k * large // small` layers leaves the small one
    after k. Both then have the same hidden state, in the first dimensions of the large one.

    Raises:
        ValueError: fewer large layers than small ones.
    """
    if not 1 <= small <= large:
        raise ValueError(f"num_hidden_layers={large}: must be at least the source's {small}")
    return [k * large // small - 1 for k in range(1, small + 1)]


def placed_heads(
    small: tuple[int, int], large: tuple[int, int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Where attention heads go, so that each query head meets its own keys and values.

    A small group fills the beginning of a large one. If large groups are smaller, it takes
    several of them, each with a copy of its key-value head.

    Args:
        small, large: query heads and key-value heads of each model.

    Returns:
        For each small query head, its place; and pairs of a key-value head's place and the small
        one that goes there.

    Raises:
        ValueError: too few key-value heads in the large model.
    """
    group, room = small[0] // small[1], large[0] // large[1]
    copies = -(-group // room)
    if small[1] * copies > large[1]:
        raise ValueError(
            f"num_key_value_heads={large[1]}: {small[0]} query heads in groups of {group} need "
            f"{small[1] * copies} groups of {room}"
        )
    queries = []
    for head in range(small[0]):
        kv_head, member = divmod(head, group)
        part, slot = divmod(member, room)
        queries.append((kv_head * copies + part) * room + slot)
    return queries, [(place, place // copies) for place in range(small[1] * copies)]


def standin_config(source: Any, shape: Shape) -> Any:
    """The `LlamaConfig` of a stand-in.

    With d of D dimensions, the norms take (sum x^2 + c^2) / D + epsilon for what the source takes
    as (mean x^2 + its epsilon) d / D: the constant c of the hidden state is part of its epsilon.

    Args:
        source: configuration of the small model.

    Raises:
        ValueError: the source is not a Llama without biases, or does not fit into the shape.
    """
    if source.model_type != "llama" or source.attention_bias or source.mlp_bias:
        raise ValueError(f"source of type {source.model_type}: must be a Llama without biases")
    if shape.head_dim != source.head_dim:
        raise ValueError(f"head_dim={shape.head_dim}: must be the source's {source.head_dim}")
    if shape.hidden_size <= source.hidden_size:
        raise ValueError(
            f"hidden_size={shape.hidden_size}: must be more than the source's {source.hidden_size}"
        )
    for name in ("intermediate_size", "vocab_size"):
        mine, least = getattr(shape, name), getattr(source, name)
        if mine < least:
            raise ValueError(f"{name}={mine}: must be at least the source's {least}")
    config = copy.deepcopy(source)
    config.update(asdict(shape))
    rest = source.hidden_size * source.rms_norm_eps - _constant(source) ** 2
    config.update(
        {
            "rms_norm_eps": rest / shape.hidden_size,
            "tie_word_embeddings": False,
            "max_position_embeddings": MAX_POSITIONS,
        }
    )
    return config


@torch.no_grad()
def standin(
    source: str | Path,
    shape: str | Shape,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Any:
    """A `LlamaForCausalLM` of a shape that computes the function of a smaller one. (Long by
    what is to be said of it.)

    Its parameters are made in place, on the device and in their type, layer by layer: memory for
    one model of the shape, and for a layer that is being quantised, is all it takes. Weights in
    bfloat16 or float16 are those of the source, except that norm weights are rounded once more.
    Quantised ones are the source's, quantised: a row has no larger numbers than the source's.

    Args:
        source: folder of a Llama without biases, such as `zoo_path("target")`.
        shape: the sizes, or their name in `SHAPES`.
        quantize: fp8 quantises the weights of the layers.
        seed: of the random weights, whose results are dropped.
        ranks: who shares it: each makes one whole layer after the other, and keeps its part.

    Returns:
        The model, in evaluation mode, with the source's generation settings. Of its hidden state,
        the first d dimensions are the source's, the next is a constant, the others are zero.

    Raises:
        ValueError: no such folder or name, or a source that does not fit into the shape.
    """
    if isinstance(shape, str):
        shape, _ = named_shape(shape, "shape")
    if not Path(source).is_dir():
        raise ValueError(f"source={source}: no such model folder")
    config = standin_config(AutoConfig.from_pretrained(source), shape)
    exact = torch.promote_types(dtype, torch.float32)
    small = AutoModelForCausalLM.from_pretrained(source, dtype=exact).to(device)
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(config, dtype=dtype)
    check_split(config, ranks.size, "the stand-in")
    layer = copy.deepcopy(large.model.layers[0]) if ranks.size > 1 else None
    large = cut(large, ranks.size)
    check_memory(large, "a stand-in", torch.device(device), quantize)
    # Its frequencies are no parameters: they would have stayed empty.
    large.model.rotary_emb = small.model.rotary_emb
    large.generation_config = copy.deepcopy(small.generation_config)
    random = torch.Generator(device).manual_seed(seed)
    _fill_layers(large, small, layer, random, quantize, ranks)
    for part in (large.model.embed_tokens, large.model.norm, large.lm_head):
        part.to_empty(device=device)
    _place_ends(large, small, ranks)
    return large.eval()


@torch.no_grad()
def _fill_layers(
    large: Any, small: Any, whole: Any, random: torch.Generator, quantize: Quantize, ranks: Ranks
) -> None:
    """Make the layers one after the other, those that hold a small one's among them.

    Args:
        whole: a layer to make them in, if the model is cut; None: where they are.
    """
    own, shape = small.config, large.config
    places = placed_layers(own.num_hidden_layers, shape.num_hidden_layers)
    placed = dict(zip(places, small.model.layers, strict=True))
    heads = placed_heads(
        (own.num_attention_heads, own.num_key_value_heads),
        (shape.num_attention_heads, shape.num_key_value_heads),
    )
    for place, layer in enumerate(large.model.layers):
        made = (layer if whole is None else whole).to_empty(device=random.device)
        _fill_identity(made, random)
        if place in placed:
            _place_layer(made, placed[place], heads)
        if quantize == "fp8":
            quantise_layer(layer, made, ranks)
        if whole is None:
            continue
        for name, weight in [*layer.named_parameters()]:  # and none of Fp8Linear
            path, _, last = name.rpartition(".")
            mine = part_of(weight, made.get_parameter(name), ranks)
            replace(layer.get_submodule(path), last, mine.clone())


@torch.no_grad()
def _place_ends(large: Any, small: Any, ranks: Ranks) -> None:
    """The small model's embedding, last norm and output head into the large one, and what keeps
    padded vocabulary away."""
    own = small.config
    _place_norm(large.model.norm, small.model.norm)
    width, vocabulary, constant = own.hidden_size, own.vocab_size, _constant(own)
    with _whole(large.model.embed_tokens.weight, ranks) as embedding:
        _place(embedding, small.model.embed_tokens.weight)
        embedding[:, width] = constant
    gain = math.sqrt(FAR_BELOW / constant * math.sqrt(width / large.config.hidden_size))
    large.model.norm.weight[width] = gain
    with _whole(large.lm_head.weight, ranks) as output:
        _place(output, small.lm_head.weight)
        output[vocabulary:, width] = -gain


@contextmanager
def _whole(weight: Tensor, ranks: Ranks) -> Iterator[Tensor]:
    """All of a weight, to be filled; of one that is cut this rank keeps its part."""
    part = local(weight)
    if part is weight:
        yield weight
        return
    every = part.new_empty(weight.shape)
    yield every
    keep_part(weight, every, ranks)


def _constant(source: Any) -> float:
    """About half of what epsilon adds to the sum of squares, as every type can hold it."""
    half = math.sqrt(source.hidden_size * source.rms_norm_eps / 2)
    return float(torch.tensor(half, dtype=torch.bfloat16))


def check_memory(
    model: nn.Module, what: str, device: torch.device, quantize: Quantize | None = None
) -> None:
    """Raise ValueError if the weights have no room there: a CPU would find out too late.

    Args:
        quantize: what becomes of them, if anything can.
    """
    needed, free = quantised_bytes(model, quantize), free_memory(device)
    if needed > free:
        also = ", quantize=fp8" if quantize == "none" else ""
        raise ValueError(
            f"{what} of {needed / 2**30:.1f} GiB does not fit the {free / 2**30:.1f} GiB of "
            f"device={device}; choose a smaller one{also} or a 16-bit dtype"
        )


def _fill_identity(layer: Any, random: torch.Generator) -> None:
    """Random weights that cost their time and add nothing to the hidden state."""
    attention, mlp = layer.self_attn, layer.mlp
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        part.weight.normal_(std=RANDOM_STD, generator=random)
    for part in (attention.o_proj, mlp.down_proj):
        part.weight.zero_()
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.fill_(1.0)


def _place_layer(
    large: Any, small: Any, heads: tuple[Sequence[int], Sequence[tuple[int, int]]]
) -> None:
    """Make an identity layer compute what the small layer does."""
    queries, kv_pairs = heads
    mine, theirs = large.self_attn, small.self_attn
    size, width = mine.head_dim, theirs.q_proj.in_features

    def by_head(part: nn.Linear) -> Tensor:
        return part.weight.view(-1, size, part.in_features)  # [H, D, in]

    # What is beyond `width` meets zeros of the hidden state, but would count in scales of rows.
    to, of = by_head(mine.q_proj), by_head(theirs.q_proj)
    to[list(queries)] = 0.0
    to[list(queries), :, :width] = of.to(to)
    for name in ("k_proj", "v_proj"):
        to, of = by_head(getattr(mine, name)), by_head(getattr(theirs, name))
        for place, head in kv_pairs:
            to[place] = 0.0
            to[place, :, :width] = of[head]
    to = mine.o_proj.weight.view(mine.o_proj.out_features, -1, size)  # [out, H, D]
    of = theirs.o_proj.weight.view(width, -1, size)
    to[:width, list(queries)] = of.to(to)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight, to = getattr(small.mlp, name).weight, getattr(large.mlp, name).weight
        to[: weight.shape[0]] = 0.0
        to[: weight.shape[0], : weight.shape[1]] = weight
    _place_norm(large.input_layernorm, small.input_layernorm)
    _place_norm(large.post_attention_layernorm, small.post_attention_layernorm)


def _place_norm(large: Any, small: Any) -> None:
    """The small norm's result from a mean square that is smaller by d / D; zero elsewhere."""
    width = small.weight.shape[0]
    large.weight.zero_()
    large.weight[:width] = small.weight * math.sqrt(width / large.weight.shape[0])


def _place(large: Tensor, small: Tensor) -> None:
    """The small matrix in the first rows and columns, zero elsewhere."""
    large.zero_()
    large[: small.shape[0], : small.shape[1]] = small

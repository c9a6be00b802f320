"""Heads of a small model, laid into its stand-in: they say what they said, at the size that
published heads have there.

A head reads the states of the target it was trained on. A stand-in (`specdec/models/standin.py`)
has these in the first d of its D dimensions, beside a constant in dimension d and zeros in the
rest, and after other layers. So a head can be laid into a larger one in the same way:

- *What it reads.* Columns of the first d dimensions of each state are placed, and all others of
  products that write to the head's own stream are zero; so is that of the constant, wherever no
  norm stands between. What is left there is random, and meets zeros.
- *Norms.* An RMS norm sees a mean square that is smaller by d / D, which its weight and its
  epsilon make up for; where the constant is in its input, that is part of the epsilon. Hence each
  norm has an epsilon of its own. In the state after the final norm the dimension of the constant
  is none: a head that norms this state again is made blind to it.
- *Heads and neurons* go where the stand-in's do; `o_proj` and `down_proj` drop the others.
- *Vocabulary.* The output head has as many rows as published ones. Those added are random, and
  never drafted: products are computed over all, candidates looked for in the first.

Legend: d and D the width of the small target and the large one.
"""

import copy
import math
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from specdec.heads.block import BlockHead
from specdec.heads.flash2 import Flash2Head
from specdec.heads.layered import LayeredHead
from specdec.heads.medusa import MedusaHeads
from specdec.heads.parallel import ParallelHead
from specdec.heads.placing import (
    beginning,
    fill,
    fill_norm,
    linear_of,
    place,
    ranges,
    side_by_side,
)
from specdec.heads.recurrent import Eagle3Head, EagleHead, MTPHead
from specdec.heads.spark import SparkHead
from specdec.models.paged import PagedLM
from specdec.models.shards import whole
from specdec.models.standin import Widening, check_memory, placed_heads

DRAFT_VOCABULARY = 32_000  # tokens that EAGLE-3's published heads can name
Head = TypeVar("Head", bound=nn.Module)


@torch.no_grad()
def widen(head: Head, target: PagedLM, *, setting: str = "drafter.path", seed: int = 0) -> Head:
    """A head of the same class for a stand-in, of one for its small model. Its parameters are made
    in place, on the target's device and in its type; an embedding or output matrix that is the
    small model's becomes the target's own.

    Args:
        setting: what gave the head, for error messages.
        seed: of the random weights, whose results are dropped.

    Raises:
        ValueError: a target that is none of its small model's stand-ins, a head that does not fit
            into the shape, or no room for it.
    """
    standin = target.standin
    states = int(head.config.state_size)  # type: ignore[arg-type, union-attr]
    if standin is None or states != standin.small.hidden_size:
        raise ValueError(
            f"{setting}: the head reads states of {states}, and {target.name} is no stand-in of a "
            f"model that has such; choose the head's own target"
        )
    random = torch.Generator(target.device).manual_seed(seed)
    try:
        if isinstance(head, LayeredHead):
            _check_sizes(head, standin)
            wide: Any = _layered(head, target, standin, random)
        else:
            assert isinstance(head, MedusaHeads)
            wide = _medusa(head, target, standin, random)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    if isinstance(head, MTPHead):
        wide.later.extend(widen(one, target, setting=setting, seed=seed) for one in head.later)
    wide.kernels, wide.drafts, wide.names = head.kernels, head.drafts, head.names
    made: Head = wide.eval().requires_grad_(False)
    return made


@torch.no_grad()
def moved(head: Head, target: PagedLM) -> Head:
    """A head of the small model as it is, for a stand-in: a lower limit of what heads cost there.
    It is to be given the first numbers of each state, as many as it reads."""
    standin, wide = target.standin, cast(Any, head)
    assert standin is not None
    for one in getattr(wide, "later", ()):
        moved(one, target)
    taps = tuple(standin.tap(tap) for tap in wide.config.taps)
    wide.config = replace(wide.config, taps=taps)
    embedding, _ = _weights(target)
    if isinstance(head, LayeredHead) and _is_small(head.embed_tokens.weight, embedding):
        # Of all tokens of the large model, though none beyond the small one's is ever drafted.
        every = embedding[:, : head.width].contiguous()
        wide.config = replace(wide.config, target_vocab=len(every))
        wide.embed_tokens = nn.Embedding.from_pretrained(every)
    for module in (wide.lm_head, *getattr(wide, "lm_heads", ())):
        if module is not None:  # it may be a part of the target's
            module.weight = nn.Parameter(module.weight.contiguous(), requires_grad=False)
    return head


# Heads with layers


def _layered(
    head: LayeredHead, target: PagedLM, standin: Widening, random: torch.Generator
) -> LayeredHead:
    embedding, output = _weights(target)
    own = _is_small(head.embed_tokens.weight, embedding)
    tied = isinstance(head, EagleHead | BlockHead) and _is_small(head.lm_head.weight, output)
    rows = target.vocab_size if tied else _vocabulary(head.config.vocab_size, target)
    with torch.device("meta"):
        wide: Any = type(head)(_wide_config(head, target, standin, rows)).to(target.dtype)
    if own:
        del wide.embed_tokens
    if tied:
        del wide.lm_head
    check_memory(wide, "a head", target.device)
    wide.to_empty(device=target.device)
    wide.rotary = head.rotary  # of so many numbers per head, and no parameter
    if own:
        wide.embed_tokens = nn.Embedding.from_pretrained(embedding)
    else:
        place(wide.embed_tokens.weight, head.embed_tokens.weight)
    if tied:
        wide.lm_head = linear_of(output)
    else:
        fill(wide.lm_head, head.lm_head, random=random)
    carried = standin.constant**2 if own else 0.0  # by embeddings, in sum of squares
    kept = 0.0  # the same of the stream that layers hand on
    if isinstance(head, BlockHead):
        carried *= head.config.scale**2
        kept = carried
    for large, small in zip(wide.layers, head.layers, strict=True):
        _fill_layer(large, small, standin, random, kept)
    if isinstance(head, BlockHead):
        _fill_block(wide, head, standin, carried)
    elif isinstance(head, Eagle3Head):
        _fill_eagle3(wide, head, standin, carried)
    elif isinstance(head, EagleHead):
        _fill_eagle(wide, head, standin, carried)
    made: LayeredHead = wide
    return made


def _check_sizes(head: LayeredHead, standin: Widening) -> None:
    """Raise ValueError unless it fits into the shape."""
    layer, shape = head.config.layer, standin.shape
    size = head.layers[0].self_attn.head_dim
    for name, mine, most in (
        ("hidden_size", layer.hidden_size, shape.hidden_size),
        ("intermediate_size", layer.intermediate_size, shape.intermediate_size),
    ):
        if mine > most:
            raise ValueError(f"{name}={mine} of the head: must be at most the target's {most}")
    if size != shape.head_dim:
        raise ValueError(f"head_dim={size} of the head: must be the target's {shape.head_dim}")
    _heads(layer, standin)


def _heads(layer: Any, standin: Widening) -> tuple[list[int], list[tuple[int, int]]]:
    shape = standin.shape
    return placed_heads(
        (layer.num_attention_heads, layer.num_key_value_heads),
        (shape.num_attention_heads, shape.num_key_value_heads),
    )


def _wide_config(head: LayeredHead, target: PagedLM, standin: Widening, rows: int) -> Any:
    """Of an output head of so many rows."""
    config, shape = head.config, standin.shape
    layer = copy.deepcopy(config.layer)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    layer.update({name: getattr(shape, name) for name in (*names, "head_dim")})
    return replace(
        config,
        layer=layer,
        taps=tuple(standin.tap(tap) for tap in config.taps),
        state_size=shape.hidden_size,
        target_vocab=target.vocab_size,
        vocab_size=rows,
    )


def _fill_layer(
    large: Any, small: Any, standin: Widening, random: torch.Generator, kept: float
) -> None:
    """All but the norms before the attention, which depend on what is read.

    Args:
        kept: sum of squares of what the stream has beside the small one's.
    """
    mine, theirs = large.self_attn, small.self_attn
    size, width = theirs.head_dim, theirs.config.hidden_size
    queries, pairs = _heads(theirs.config, standin)
    count = theirs.q_proj.in_features // width  # vectors side by side
    columns = side_by_side(count, width, standin.shape.hidden_size)
    of_queries = ranges(((to * size, of * size) for of, to in enumerate(queries)), size)
    of_keys = ranges(((to * size, of * size) for to, of in pairs), size)
    fill(mine.q_proj, theirs.q_proj, of_queries, columns, random)
    fill(mine.k_proj, theirs.k_proj, of_keys, columns, random)
    fill(mine.v_proj, theirs.v_proj, of_keys, columns, random)
    fill(mine.o_proj, theirs.o_proj, None, of_queries)
    if hasattr(theirs, "gate_proj"):
        fill(mine.gate_proj, theirs.gate_proj, of_queries, columns, random)
    for name in ("q_norm", "k_norm"):
        if hasattr(theirs, name):
            fill_norm(getattr(mine, name), getattr(theirs, name))
    fill(large.mlp.gate_proj, small.mlp.gate_proj, random=random)
    fill(large.mlp.up_proj, small.mlp.up_proj, random=random)
    fill(large.mlp.down_proj, small.mlp.down_proj)
    fill_norm(large.post_attention_layernorm, small.post_attention_layernorm, kept)


def _fill_eagle3(wide: Eagle3Head, head: Eagle3Head, standin: Widening, carried: float) -> None:
    config, square = head.config, standin.constant**2
    normed = config.fc_norm or config.norm_before_fc
    if not config.fc or (normed and "normal" in config.taps):
        wide.blind = config.state_size
        square = 0.0
    states = side_by_side(len(config.taps), config.state_size, standin.shape.hidden_size)
    if config.fc:
        fill(wide.fc, head.fc, None, states)
    constants = [0.0 if tap == "normal" else square for tap in config.taps]
    if config.fc_norm:
        for mine, theirs, constant in zip(wide.fc_norm, head.fc_norm, constants, strict=True):
            fill_norm(mine, theirs, constant)
    if config.norm_before_fc:
        fill_norm(wide.input_norm, head.input_norm, sum(constants), states)
    if isinstance(wide, ParallelHead) and isinstance(head, ParallelHead):  # as if it were states
        hidden = wide.mask_hidden.view(-1, 1)
        place(hidden, head.mask_hidden.view(-1, 1), states)
        for index, constant in enumerate(constants):
            at = index * standin.shape.hidden_size + config.state_size
            hidden[at] = math.sqrt(constant)
    for index, (large, small) in enumerate(zip(wide.layers, head.layers, strict=True)):
        pair = index < config.pairs
        fill_norm(large.input_layernorm, small.input_layernorm, carried if pair else 0.0)
        if pair:
            fill_norm(large.hidden_norm, small.hidden_norm)
    fill_norm(wide.norm, head.norm)


def _fill_eagle(wide: Any, head: EagleHead, standin: Widening, carried: float) -> None:
    wide.one.fill_(1)
    columns = side_by_side(2, head.width, standin.shape.hidden_size)
    fill(wide.fc, head.fc, None, columns)
    if head.embedding_layernorm is not None:
        fill_norm(wide.embedding_layernorm, head.embedding_layernorm, carried)
    if head.hidden_states_layernorm is not None:
        wide.blind = head.config.state_size  # it reads the head's own states too: nothing there
        fill_norm(wide.hidden_states_layernorm, head.hidden_states_layernorm)
    for index, (large, small) in enumerate(zip(wide.layers, head.layers, strict=True)):
        if index or head.config.input_norm:
            fill_norm(large.input_layernorm, small.input_layernorm)
    if head.norm is not None:
        fill_norm(wide.norm, head.norm)


def _fill_block(wide: Any, head: BlockHead, standin: Widening, carried: float) -> None:
    """Its stream begins with embeddings, and keeps their constant."""
    config = head.config
    fill(
        wide.fc,
        head.fc,
        None,
        side_by_side(len(config.taps), config.state_size, standin.shape.hidden_size),
    )
    fill_norm(wide.hidden_norm, head.hidden_norm)
    for large, small in zip(wide.layers, head.layers, strict=True):
        fill_norm(large.input_layernorm, small.input_layernorm, carried)
    fill_norm(wide.norm, head.norm, carried)
    if isinstance(head, SparkHead):
        _fill_spark(wide, head)
    if isinstance(head, Flash2Head):
        _fill_flash2(wide, head)
    if head.mask_embedding is not None:
        place(wide.mask_embedding[:, None], head.mask_embedding[:, None])
        if carried:
            wide.mask_embedding[head.width] = standin.constant


def _fill_spark(wide: Any, head: SparkHead) -> None:
    """What corrects logits: of the large model's further tokens nothing is known, or drafted."""
    rank, inner, outer = head.config.rank, head.width, wide.width
    slot_first = ranges([(0, 0)], inner)  # the slot, then the token's embedding
    to, of = slot_first
    both = torch.cat([to, outer + torch.arange(rank)]), torch.cat([of, inner + torch.arange(rank)])
    if head.markov_head is not None:
        large, small = wide.markov_head, head.markov_head
        place(large.markov_w1.weight, small.markov_w1.weight)
        fill(large.markov_w2, small.markov_w2)
        if head.config.markov == "gated":
            fill(large.gate_proj, small.gate_proj, None, both)
        if head.config.markov == "rnn":  # state and embedding come first
            fill(large.joint_proj, small.joint_proj, None, beginning(2 * rank + inner))
    if head.confidence_head is not None:
        columns = both if head.config.confidence_markov else slot_first
        fill(wide.confidence_head.proj, head.confidence_head.proj, None, columns)


def _fill_flash2(wide: Any, head: Flash2Head) -> None:
    """Convolutions, of which what is added finds zeros, and the selector."""
    inner, outer, group = head.width, wide.width, head.config.channels
    rows = side_by_side(2 * head.config.taps_of_convolution, inner // group, outer // group)
    for large, small in zip(wide.layers, head.layers, strict=True):
        for name in ("attention_conv", "mlp_conv"):
            mine, theirs = getattr(large, name), getattr(small, name)
            mine.base_kernel.zero_()
            mine.base_kernel[..., :inner] = theirs.base_kernel
            fill(mine.kernel_projection, theirs.kernel_projection, rows)
    for name in ("predecessor_codebook", "successor_codebook"):
        place(getattr(wide.candidate_selector, name), getattr(head.candidate_selector, name))
    fill(wide.candidate_selector.hidden_projection, head.candidate_selector.hidden_projection)


# Medusa


def _medusa(
    heads: MedusaHeads, target: PagedLM, standin: Widening, random: torch.Generator
) -> MedusaHeads:
    config, (_, output) = heads.config, _weights(target)
    shared = heads.lm_head is not None and _is_small(heads.lm_head.weight, output)
    trimmed = heads.names is not None
    rows = _vocabulary(config.vocab_size, target) if trimmed else target.vocab_size
    wide_config = replace(
        config,
        state_size=standin.shape.hidden_size,
        vocab_size=rows,
        taps=tuple(standin.tap(tap) for tap in config.taps),
    )
    with torch.device("meta"):
        wide: Any = MedusaHeads(wide_config).to(target.dtype)
    if shared:
        del wide.lm_head
    check_memory(wide, "a head", target.device)
    wide.to_empty(device=target.device)
    for mine, theirs in zip(wide.blocks, heads.blocks, strict=True):
        for large, small in zip(mine, theirs, strict=True):
            fill(large, small)
    outputs = list(zip(wide.lm_heads, heads.lm_heads, strict=True))
    if shared:
        wide.lm_head = linear_of(output)
    elif heads.lm_head is not None:
        outputs = [(wide.lm_head, heads.lm_head)]
    for large, small in outputs:
        fill(large, small, random=random)
        large.weight[:, config.state_size] = 0  # the blocks let the state's pass
    made: MedusaHeads = wide
    return made


# Parts of both


def _weights(target: PagedLM) -> tuple[Tensor, Tensor]:
    """The target's embedding and its output matrix."""
    embedding = target.model.get_input_embeddings().weight
    output = target.model.get_output_embeddings().weight
    return whole(embedding.detach()), whole(output.detach())


def _is_small(small: Tensor, large: Tensor) -> bool:
    """Whether a matrix is the one that was laid into a large one."""
    rows, columns = small.shape
    if rows > large.shape[0] or columns > large.shape[1]:
        return False
    return torch.equal(large[:rows, :columns], small.to(large))


def _vocabulary(small: int, target: PagedLM) -> int:
    """Rows of a published draft vocabulary."""
    return max(small, min(DRAFT_VOCABULARY, target.vocab_size))

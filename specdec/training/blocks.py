"""Blocks of a block head at many places of a sequence at once (DFlash, Chen et al. 2026), and what
P-EAGLE drafts at many.

Slot t of a sequence holds the pair of the state at token t with token t + 1, as everywhere in
training. A block that is anchored there has token t + 1 for its root and sees the states of tokens
0 .. t; what it says of level d is about the token that slot t + d - 1 is about. No block sees
another, so each is as if it were drafted alone.

Legend: B sequences, T slots, A anchors, N slots of a block, L levels, D width of the head, r rank
of the correction of DSpark.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from specdec.heads.block import BlockHead
from specdec.heads.parallel import ParallelHead
from specdec.heads.spark import SparkHead
from specdec.training.batches import Seen

SPREAD = 0.6180339887498949  # whose multiples, without their whole parts, are spread evenly


def anchors_of(mask: Tensor, tokens: Tensor, count: int, salt: Tensor | float = 0.0) -> Tensor:
    """[B, A], slots that blocks begin at: spread over those that count, one in each of equal
    parts. Where in its part follows from tokens and salt alone, so that a training that is
    continued takes the same.

    Args:
        mask: [B, T] bool; of a sequence without any slot that counts they are arbitrary.
        tokens: [B, any] int64.
        salt: a number that is another one when the same sequence comes again.
    """
    ranks = mask.cumsum(1)
    place = torch.arange(count, device=mask.device)
    within = ((tokens.sum(1, keepdim=True).double() + place) * SPREAD + salt) % 1
    wanted = ((place + within) * ranks[:, -1:] / count).long() + 1  # the how manieth of them
    found = torch.searchsorted(ranks, wanted)
    return found.clamp(max=mask.shape[1] - 1)


def drafted(head: BlockHead, states: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
    """[B, A, L, D], what the output head reads for every level of blocks at these slots.

    Args:
        states: [B, T, taps * H] of the target, at tokens 0 .. T - 1.
        tokens: [B, T] int64, the tokens after them.
        anchors: [B, A].
    """
    config, context = head.config, head.fuse(states)
    slots, count = config.block, anchors.shape[1]
    embedded = head.blocks(tokens.gather(1, anchors), slots).flatten(1, 2)  # [B, A * N, D]
    known = torch.arange(context.shape[1], device=anchors.device)
    places = (anchors[..., None] + 1 + torch.arange(slots, device=anchors.device)).flatten(1)
    of_context = head.rotary(context, known[None].expand(len(anchors), -1))
    masks = [
        visible(anchors, known, places, causal=causal, window=window)
        for causal, window in zip(config.causal, config.windows, strict=True)
    ]

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = head.entries(index, context, of_context)
        return nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys.to(key.dtype), key], dim=2),
            torch.cat([values.to(value.dtype), value], dim=2),
            attn_mask=masks[index],
            enable_gqa=True,
        )

    _, read = head(embedded, embedded, head.rotary(embedded, places), attend)
    first = 0 if config.shifted else 1
    each: Tensor = read.unflatten(1, (count, slots))[:, :, first : first + config.levels]
    return each


def corrected(head: SparkHead, states: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
    """[B, A, L, D + r], what `drafted` returns, and behind it what the token before each level
    adds to the logits there by the head's last matrix: that of the text, at every level."""
    read, state, parts = drafted(head, states, tokens, anchors), None, []
    for level, before in enumerate(parents(tokens, anchors, head.config.levels).unbind(2)):
        latent, state = head.latent(read[:, :, level], before, state)
        parts.append(latent)
    return torch.cat([read, torch.stack(parts, dim=2)], dim=-1)


def rolled(
    head: ParallelHead, states: Tensor, tokens: Tensor, anchors: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """What the output head of P-EAGLE reads at every slot [B, T, D], and at all levels of drafts
    that begin at some [B, A, L, D]: level 0 is that of their slot, the others are masked pairs,
    which see the pairs up to there and each other backwards. Arguments as of `drafted`."""
    slots, count, further = tokens.shape[1], anchors.shape[1], levels - 1
    masked = [x.expand(len(tokens), count * further, -1) for x in head.masked()]
    embedded = torch.cat([head.embed(tokens), masked[0]], dim=1)
    feature = torch.cat([head.fuse(states), masked[1]], dim=1)
    known = torch.arange(slots, device=anchors.device)
    places = anchors[..., None] + 1 + torch.arange(further, device=anchors.device)
    every = torch.cat([known.expand(len(tokens), -1), places.flatten(1)], dim=1)
    window = head.windows[0]  # the same in all layers that are trained
    of_pairs = known[None, :] <= known[:, None]  # [T, T]
    if window is not None:
        of_pairs &= known[None, :] > known[:, None] - window
    mask = of_pairs.expand(len(tokens), 1, -1, -1)
    if further:
        behind = visible(anchors, known, places.flatten(1), causal=True, window=window)
        mask = torch.cat([nn.functional.pad(mask, (0, count * further)), behind], dim=2)

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )

    _, read = head(embedded, feature, head.rotary(feature, every), attend)
    at = anchors[..., None].expand(-1, -1, read.shape[2])
    first, rest = read[:, :slots], read[:, slots:].unflatten(1, (count, further))
    return first, torch.cat([first.gather(1, at)[:, :, None], rest], dim=2)


def parents(tokens: Tensor, anchors: Tensor, levels: int) -> Tensor:
    """[B, A, L], the tokens [B, T] that levels of blocks come after; past the end the last."""
    places = anchors[..., None] + torch.arange(levels, device=anchors.device)
    places = places.clamp(max=tokens.shape[1] - 1).flatten(1)
    return tokens.gather(1, places).unflatten(1, (anchors.shape[1], levels))


def visible(
    anchors: Tensor, known: Tensor, places: Tensor, *, causal: bool, window: int | None
) -> Tensor:
    """[B, 1, A * N, T + A * N] bool, which keys of context and blocks each slot of them sees.

    Args:
        anchors: [B, A], last tokens whose states are seen.
        known: [T], positions of the context.
        places: [B, A * N], positions of the slots.
    """
    slots = places.shape[1] // anchors.shape[1]
    last = anchors.repeat_interleave(slots, 1)[..., None]  # [B, A * N, 1]
    block = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(slots)
    own = (block[:, None] == block).expand(len(anchors), -1, -1)
    if causal:
        own = own & (places[:, None] <= places[..., None])
    seen = torch.cat([known <= last, own], dim=2)
    if window is not None:
        keys = torch.cat([known.expand(len(anchors), -1), places], dim=1)
        seen = seen & (keys[:, None] > places[..., None] - window)
    return seen[:, None]


def levels_at(
    seen: Seen, anchors: Tensor, outputs: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each level what the output head reads [B, A, D], the target's logits, the tokens, and
    which blocks have come so far in slots that count.

    Args:
        outputs: [B, A, L, D].
    """
    parts, inside = [], torch.ones_like(anchors, dtype=torch.bool)
    for level in range(outputs.shape[2]):
        place = anchors + level
        inside = inside & (place < seen.mask.shape[1])
        place = place.clamp(max=seen.mask.shape[1] - 1)
        inside = inside & seen.mask.gather(1, place)
        wanted = seen.logits.gather(1, place[..., None].expand(-1, -1, seen.logits.shape[2]))
        parts.append((outputs[:, :, level], wanted, seen.labels.gather(1, place), inside))
    return parts


def chains_of(
    seen: Seen,
    depth: int,
    reads: Callable[[Tensor], Tensor],
    chances: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """As `Trainee.chains`, of blocks at every slot.

    Args:
        reads: of anchors [B, A] what the output head reads [B, A, L, D].
        chances: as `Judge.chances`, without the output head.
        at_once: blocks of a sequence.
    """
    slots = seen.mask.shape[1]
    found = seen.logits.new_zeros(2, depth, *seen.mask.shape, dtype=torch.float32)
    whole = replace(seen, mask=torch.ones_like(seen.mask))  # what counts is asked elsewhere
    for start in range(0, slots, at_once):
        some = torch.arange(start, min(start + at_once, slots), device=seen.mask.device)
        anchors = some.expand(len(seen.mask), -1)
        outputs = reads(anchors)[:, :, :depth]
        for level, part in enumerate(levels_at(whole, anchors, outputs)):
            output, wanted, labels, inside = part
            for kind, one in enumerate(chances(output, wanted, labels)):
                found[kind, level, :, some] = one.float() * inside
    return found[0], found[1]

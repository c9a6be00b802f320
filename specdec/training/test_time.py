"""The training-time test of EAGLE-3 (Li et al. 2025, section 3.2): a recurrent head is trained on
its own outputs, as it will read them when it drafts.

Slot t holds the pair (state after token t, token t + 1) and predicts token t + 2. Step 0 reads the
target's states. Step j reads what step j - 1 made of the slot before, beside the same tokens; that
is depth j of a chain whose root is token t - j + 1. Its query sees the keys of step 0 up to slot
t - j, which is the true history, and one key of each later step i: that of slot t - j + i, its own
chain. Every step turns slot t to position t. So all chains of a sequence are run at once, and each
as if it were decoded token by token; gradients go back through the states that were handed on.

Legend: B sequences, T slots, D width of the head, HQ and HKV its heads, d their size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specdec.heads.layered import LayeredHead

Entries = list[tuple[Tensor, Tensor]]  # keys and values [B, HKV, T, d] of a layer, by step


def unroll(head: LayeredHead, states: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
    """What the output head reads at every slot, for each step.

    Args:
        states: [B, T, taps * H] of the target, at tokens 0 .. T - 1.
        tokens: [B, T] int64, the tokens after them, 1 .. T.

    Returns:
        `steps` tensors [B, T, D]; slots before j of step j have no chain and mean nothing.
    """
    embedded, feature = head.embed(tokens), head.fuse(states)
    slots = torch.arange(tokens.shape[1], device=tokens.device)
    angles = head.rotary(feature, slots[None].expand_as(tokens))
    entries: list[Entries] = [[] for _ in head.layers]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        entries[layer].append((key, value))
        return chain_attention(query, entries[layer], head.windows[layer])

    outputs = []
    for step in range(steps):
        if step:
            feature = later(feature, 1, dim=1)
        feature, read = head(embedded, feature, angles, attend)
        outputs.append(read)
    return outputs


def later(x: Tensor, slots: int, dim: int) -> Tensor:
    """Everything so many slots later along a dimension, zeros before it."""
    if not slots:
        return x
    kept = x.narrow(dim, 0, max(x.shape[dim] - slots, 0))
    gone = x.shape[dim] - kept.shape[dim]
    ahead = x.narrow(dim, 0, gone).new_zeros([*x.shape[:dim], gone, *x.shape[dim + 1 :]])
    return torch.cat([ahead, kept], dim=dim)


def chain_attention(
    query: Tensor, entries: Sequence[tuple[Tensor, Tensor]], window: int | None = None
) -> Tensor:
    """What the queries [B, HQ, T, d] of the last step see: keys of step 0 so many slots back as
    there are later steps, and of each later step the one key of their own chain.

    Args:
        window: how many slots they reach back over, themselves among them; None is all.

    Returns:
        [B, HQ, T, d]
    """
    step = len(entries) - 1
    (key, value), *chain = entries
    groups = query.shape[1] // key.shape[1]
    slots = torch.arange(query.shape[2], device=query.device)
    seen = slots[None, :] <= slots[:, None] - step
    if window is not None:
        chain = chain[-window:]
        seen &= slots[None, :] > slots[:, None] - window
    if not step:
        mask = None if window is None else seen
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1
        )
    query = query * query.shape[-1] ** -0.5
    wide = query.unflatten(1, (-1, groups))  # [B, HKV, G, T, d]
    scores = wide @ key.unsqueeze(2).transpose(-1, -2)  # [B, HKV, G, T, T]
    scores = scores.masked_fill(~seen, -torch.inf)
    own = [
        (later(k, ago, dim=2).unsqueeze(2), later(v, ago, dim=2).unsqueeze(2))
        for ago, (k, v) in zip(reversed(range(len(chain))), chain, strict=True)
    ]
    singles = [(wide * k).sum(-1, keepdim=True) for k, _ in own]
    weights = torch.cat([scores, *singles], dim=-1).float().softmax(-1).to(value.dtype)
    found = weights[..., : -len(own)] @ value.unsqueeze(2)
    for i, (_, v) in enumerate(own):
        at = weights.shape[-1] - len(own) + i
        found = found + weights[..., at : at + 1] * v
    return found.flatten(1, 2)

"""Heads restated: what they draft after a path, in float64, from scratch and from the tensors of
their files, without a cache, trees or batches. Nothing here is shared with what loads or runs
heads.

Legend: T tokens that are there, of which the last has no state yet, D width of the head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a test knows of a head that it wrote.

    Args:
        tensors: of the files, by published names, float64.
        layers: beginnings of their names, in order.
        embedding: the target's, or the head's own; output likewise.
        heads: query heads, key-value heads.
        taps: which states, numbered as in ARCHITECTURE.
        rope: theta, and type and values of a scaling.
        ids: the target's id of each token of the head.
        block: of a block head: slots, the mask's embedding, causal and windows of its layers, and
            what it does to embeddings and logits; of P-EAGLE its mask.
        window: places that attention of all layers of a recurrent head reaches back over.
    """

    tensors: Mapping[str, Tensor]
    layers: tuple[str, ...]
    embedding: Tensor
    output: Tensor
    heads: tuple[int, int]
    eps: float
    taps: tuple[Any, ...]
    ids: Tensor
    rope: Mapping[str, Any] = field(default_factory=lambda: {"theta": 10_000.0})
    flags: frozenset[str] = frozenset()
    block: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(rope: Mapping[str, Any], size: int, length: int) -> tuple[Tensor, float]:
    """[size / 2] radians per position, and what cosine and sine are multiplied by."""
    theta, kind, factor = rope["theta"], rope.get("kind", "default"), rope.get("factor", 1.0)
    places = torch.arange(0, size, 2).double() / size
    plain, gain = theta**-places, 1.0
    trained = rope.get("trained", 0)
    if kind == "linear":
        plain = plain / factor
    elif kind == "dynamic" and length > trained:
        grown = factor * length / trained - (factor - 1)
        plain = (theta * grown ** (size / (size - 2))) ** -places
    elif kind == "llama3":
        waves = 2 * math.pi / plain
        share = ((trained / waves - rope["low"]) / (rope["high"] - rope["low"])).clamp(0, 1)
        plain = share * plain + (1 - share) * plain / factor
    elif kind == "yarn":

        def dimension(turns: float) -> float:
            return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = math.floor(dimension(32)), math.ceil(dimension(1))
        low, high = max(low, 0), min(high, size - 1)
        ramp = ((torch.arange(size // 2).double() - low) / (high - low)).clamp(0, 1)
        plain, gain = plain / factor * ramp + plain * (1 - ramp), 0.1 * math.log(factor) + 1
    return plain, gain


def turned(x: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """[heads, T, size], each at its place in the sequence; of `turned` numbers alone, if the rope
    says so."""
    x, rest = x.tensor_split([rope.get("turned", x.shape[-1])], dim=-1)
    half = x.shape[-1] // 2
    per_place, gain = frequencies(rope, x.shape[-1], x.shape[1])
    angles = torch.arange(x.shape[1]).double()[:, None] * per_place
    cos, sin = angles.cos() * gain, angles.sin() * gain
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attention(facts: Facts, layer: str, x: Tensor) -> Tensor:
    """What self-attention makes of [T, any], before o_proj's sum with the residual. With gates
    (Qwen3-Next), those of an attention head come after its query."""
    w, (queries, keys) = facts.tensors, facts.heads
    size = len(w[f"{layer}.self_attn.k_proj.weight"]) // keys

    def project(name: str, count: int) -> Tensor:
        made = x @ w[f"{layer}.self_attn.{name}_proj.weight"].T
        made = made + w.get(f"{layer}.self_attn.{name}_proj.bias", 0.0)
        split = made.view(len(x), count, -1)[..., :size].transpose(0, 1)
        norm = w.get(f"{layer}.self_attn.{name}_norm.weight")
        return split if norm is None else rms(split, norm, facts.eps)

    q = turned(project("q", queries), facts.rope)
    k = turned(project("k", keys), facts.rope).repeat_interleave(queries // keys, 0)
    v = project("v", keys).repeat_interleave(queries // keys, 0)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    unseen = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    if facts.window is not None:
        unseen |= torch.ones_like(unseen).tril(-facts.window)
    seen = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v
    out = seen.transpose(0, 1).reshape(len(x), -1)
    if "gated" in facts.flags:
        both = x @ w[f"{layer}.self_attn.q_proj.weight"].T
        out = out * both.view(len(x), queries, 2, size)[:, :, 1].sigmoid().flatten(1)
    out = out @ w[f"{layer}.self_attn.o_proj.weight"].T
    return out + w.get(f"{layer}.self_attn.o_proj.bias", 0.0)


def mlp(facts: Facts, layer: str, x: Tensor) -> Tensor:
    w = facts.tensors
    return swiglu(facts, layer, rms(x, w[f"{layer}.post_attention_layernorm.weight"], facts.eps))


def swiglu(facts: Facts, layer: str, x: Tensor) -> Tensor:
    w = facts.tensors
    gate, up = (x @ w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate * gate.sigmoid() * up) @ w[f"{layer}.mlp.down_proj.weight"].T


def eagle3(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, of EAGLE-3.

    Args:
        states: [T - 1 or more, H], one for each tap.
    """
    features = fused(facts, [state[: len(tokens) - 1].double() for state in states])
    for drafted in range(len(path) + 1):
        embedded = facts.embedding[torch.tensor(tokens[1:] + path[:drafted])]
        fed, normal = eagle3_layers(facts, features, embedded)
        features = torch.cat([features, fed[-1:]])
    return normal[-1] @ facts.output.T


def peagle(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, of which P-EAGLE knows the length."""
    pairs, mask, hidden = len(tokens) - 1, facts.block["mask"], facts.tensors["mask_hidden"]
    pieces = [state[:pairs].double() for state in states]
    masks = hidden[0, 0].expand(len(path), -1).split([x.shape[1] for x in pieces], dim=-1)
    joined = [torch.cat(both) for both in zip(pieces, masks, strict=True)]
    embedded = facts.embedding[torch.tensor(tokens[1:] + [mask] * len(path))]
    _, normal = eagle3_layers(facts, fused(facts, joined), embedded)
    return normal[-1] @ facts.output.T


def fused(facts: Facts, pieces: Sequence[Tensor]) -> Tensor:
    """The features of states [T, H] of each tap."""
    w, eps, flags = facts.tensors, facts.eps, facts.flags
    if "fc_norm" in flags:
        pieces = [rms(x, w[f"fc_norm.{i}.weight"], eps) for i, x in enumerate(pieces)]
    joined = torch.cat(pieces, dim=-1)
    if "norm_before_fc" in flags:
        joined = rms(joined, w["input_norm.weight"], eps)
    return joined if "no_fc" in flags else joined @ w["fc.weight"].T + w.get("fc.bias", 0.0)


def eagle3_layers(facts: Facts, y: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """What is fed back after pairs [T, D], and what the output head reads."""
    w, eps, flags = facts.tensors, facts.eps, facts.flags
    for index, layer in enumerate(facts.layers):
        if index and "pairs" not in flags:
            name = "hidden_norm" if "sglang" in flags else "input_layernorm"
            y = y + attention(facts, layer, rms(y, w[f"{layer}.{name}.weight"], eps))
        else:
            e = rms(embedded, w[f"{layer}.input_layernorm.weight"], eps)
            f = rms(y, w[f"{layer}.hidden_norm.weight"], eps)
            stream = f if "norm_before_residual" in flags and not index else y
            y = stream + attention(facts, layer, torch.cat([e, f], dim=-1))
        y = y + mlp(facts, layer, y)
    normal = rms(y, w["norm.weight"], eps)
    return (normal if "norm_output" in flags else y), normal


def eagle(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[V] logits after the path, of EAGLE-1 and its variants."""
    w, eps = facts.tensors, facts.eps

    def normed(x: Tensor, *names: str) -> Tensor:
        """By the first of these norms that there is, if there is one."""
        found = next((w[f"{name}.weight"] for name in names if f"{name}.weight" in w), None)
        return x if found is None else rms(x, found, eps)

    fc = "fusion_fc" if "fusion_fc.weight" in w else "fc"
    features = states[0][: len(tokens) - 1].double()
    for drafted in range(len(path) + 1):
        embedded = facts.embedding[torch.tensor(tokens[1:] + path[:drafted])]
        e = normed(embedded, "embedding_layernorm", "enorm")
        f = normed(features, "hidden_states_layernorm", "hnorm")
        y = torch.cat([e, f], dim=-1) @ w[f"{fc}.weight"].T + w.get(f"{fc}.bias", 0.0)
        for layer in facts.layers:
            y = y + attention(facts, layer, normed(y, f"{layer}.input_layernorm"))
            y = y + mlp(facts, layer, y)
        features = torch.cat([features, y[-1:]])
    return normed(y[-1], "pre_lm_head_layernorm", "norm") @ facts.output.T


def mtp(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[V] logits after the path, of MTP layers, each over the states that the one above made of
    all tokens; the last is used again. Norms are those that they multiply by."""
    every, last = tokens + path, min(len(path), len(facts.layers) - 1)
    features = states[0][: len(tokens) - 1].double()
    for depth in range(last + 1):
        given = features
        features, normal = mtp_layer(facts, depth, given, every[1 + depth :])
    for _ in range(last, len(path)):
        given = torch.cat([given, features[-1:]])
        features, normal = mtp_layer(facts, last, given, every[1 + last :])
    return normal[-1] @ facts.output.T


def mtp_layer(
    facts: Facts, depth: int, features: Tensor, tokens: list[int]
) -> tuple[Tensor, Tensor]:
    """[T, D] of pairs of [T, D] states with as many of the tokens: what is handed on, and what is
    read at the output head."""
    w, eps, layer = facts.tensors, facts.eps, facts.layers[depth]
    names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
    if "mtp.fc.weight" not in w:
        own = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
        names = tuple(f"{layer}.{name}" for name in own)  # type: ignore[assignment]
    of_token, of_state, fc, last = (w[f"{name}.weight"] for name in names)
    embedded = facts.embedding[torch.tensor(tokens[: len(features)])]
    both = [rms(embedded, of_token, eps), rms(features, of_state, eps)]
    if "hidden first" in facts.flags:
        both.reverse()
    y = torch.cat(both, dim=-1) @ fc.T
    y = y + attention(facts, layer, rms(y, w[f"{layer}.input_layernorm.weight"], eps))
    y = y + mlp(facts, layer, y)
    normal = rms(y, last, eps)
    return (y if "hidden" in facts.flags else normal), normal


def among(facts: Facts, layer: str, context: Tensor, x: Tensor, index: int) -> Tensor:
    """What attention makes of a block [N, D] behind a context [T, D], before the residual."""
    w, (queries, keys), past = facts.tensors, facts.heads, len(context)
    every = torch.cat([context, x])

    def project(name: str, rows: Tensor, count: int) -> Tensor:
        made = rows @ w[f"{layer}.self_attn.{name}_proj.weight"].T
        made = made + w.get(f"{layer}.self_attn.{name}_proj.bias", 0.0)
        split = made.view(len(rows), count, -1).transpose(0, 1)
        norm = w.get(f"{layer}.self_attn.{name}_norm.weight")
        return split if norm is None else rms(split, norm, facts.eps)

    q = turned(project("q", every, queries), facts.rope)[:, past:]
    k = turned(project("k", every, keys), facts.rope).repeat_interleave(queries // keys, 0)
    v = project("v", every, keys).repeat_interleave(queries // keys, 0)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    window = facts.block["windows"][index]
    for row in range(len(x)):
        for column in range(len(every)):
            later = column > past + row and facts.block["causal"][index]
            if later or (window is not None and past + row - column >= window):
                scores[:, row, column] = -torch.inf
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
    out = out @ w[f"{layer}.self_attn.o_proj.weight"].T
    return out + w.get(f"{layer}.self_attn.o_proj.bias", 0.0)


def block(facts: Facts, states: Sequence[Tensor], tokens: list[int]) -> Tensor:
    """[N, D], what the output head of DFlash reads at every slot of a block that begins with the
    last of the tokens."""
    w, eps, how = facts.tensors, facts.eps, facts.block
    joined = torch.cat([state[: len(tokens) - 1].double() for state in states], dim=-1)
    context = rms(joined @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    root = facts.embedding[tokens[-1]][None]
    y = torch.cat([root, how["mask"].expand(how["slots"] - 1, -1)]) * how.get("scale", 1.0)
    for index, layer in enumerate(facts.layers):
        x = rms(y, w[f"{layer}.input_layernorm.weight"], eps)
        if f"{layer}.attention_conv.base_kernel" not in w:
            y = y + among(facts, layer, context, x, index)
            y = y + mlp(facts, layer, y)
            continue
        made = among(
            facts, layer, context, mixed(facts, f"{layer}.attention_conv", 0, x, x), index
        )
        y = y + mixed(facts, f"{layer}.attention_conv", 1, x, made)
        x = rms(y, w[f"{layer}.post_attention_layernorm.weight"], eps)
        made = swiglu(facts, layer, mixed(facts, f"{layer}.mlp_conv", 0, x, x))
        y = y + mixed(facts, f"{layer}.mlp_conv", 1, x, made)
    return rms(y, w["norm.weight"], eps)


def mixed(facts: Facts, name: str, side: int, inputs: Tensor, x: Tensor) -> Tensor:
    """What a convolution of DFlash 2 makes of a block [N, D], before (0) or after (1) a sublayer
    that has these inputs."""
    base = facts.tensors[f"{name}.base_kernel"][side]  # [K, D]
    own = inputs @ facts.tensors[f"{name}.kernel_projection.weight"].T
    taps, width = base.shape
    groups = own.shape[1] // (2 * taps)
    out = torch.zeros_like(x)
    for slot in range(len(x)):
        for tap in range(min(taps, slot + 1)):
            first = (side * taps + tap) * groups
            share = base[tap] + own[slot, first + torch.arange(width) * groups // width]
            out[slot] += share * x[slot - tap]
    return out


def dflash2(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[V] logits after the path, of DFlash 2: -inf but of the best of the level."""
    w, name, how = facts.tensors, "candidate_selector", facts.block
    read = block(facts, states, tokens)[len(path) + 1]
    alone = dflash(facts, states, tokens, path)
    latent = w[f"{name}.predecessor_codebook"][[*tokens, *path][-1]]
    latent = latent * (w[f"{name}.hidden_projection.weight"] @ read)
    among = alone.topk(how["choices"]).indices
    scores = torch.full_like(alone, -torch.inf)
    for token in among.tolist():
        scores[token] = alone[token] + latent @ w[f"{name}.successor_codebook"][token]
    return scores


def dflash(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, of which DFlash knows the length."""
    how = facts.block
    slot = len(path) if "shifted" in facts.flags else len(path) + 1
    logits = block(facts, states, tokens)[slot] @ facts.output.T * how.get("multiplier", 1.0)
    cap = how.get("softcap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dspark(facts: Facts, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, of DSpark, whose every token corrects what follows it."""
    w, name = facts.tensors, "markov_head"
    slots = block(facts, states, tokens)
    if "shifted" not in facts.flags:
        slots = slots[1:]
    state = torch.zeros(w[f"{name}.markov_w1.weight"].shape[1]).double()
    for place, token in enumerate([tokens[-1], *path]):
        e, h = w[f"{name}.markov_w1.weight"][token], slots[place]
        if f"{name}.gate_proj.weight" in w:
            z = w[f"{name}.gate_proj.weight"] @ torch.cat([h, e]) + w[f"{name}.gate_proj.bias"]
            e = z.sigmoid() * e
        if f"{name}.joint_proj.weight" in w:
            z = w[f"{name}.joint_proj.weight"] @ torch.cat([state, e, h])
            gate, new, out = (z + w[f"{name}.joint_proj.bias"]).chunk(3)
            state = gate.sigmoid() * state + (1 - gate.sigmoid()) * new.tanh()
            e = out.tanh()
    return facts.output @ slots[len(path)] + w[f"{name}.markov_w2.weight"] @ e


def medusa(
    w: Mapping[str, Tensor], state: Tensor, output: Tensor, blocks: tuple[str, ...], last: str
) -> Tensor:
    """[VD] logits of one of Medusa's heads.

    Args:
        state: [H], after the final norm.
        output: [V, H], the target's.
        blocks: beginnings of the names of its blocks.
        last: name of its output matrix, if it has one.
    """
    x = state.double()
    for block in blocks:
        z = w[f"{block}.weight"] @ x + w.get(f"{block}.bias", 0.0)
        x = x + z * z.sigmoid()
    return w.get(last, output) @ x

"""A shorter way through the models whose structure is known: the same function in fewer
operations.

A small model on a CPU, or any model at batch 1, spends much of a step between the operations. Here
the query, key and value projections are one product, gate and up projections another, and what
stands between products is one operation each, of `specdec.kernels`. The general way, `model(...)`,
stays for every other architecture.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.cache import PagedKVCache
from specdec.kernels.layout import Weight
from specdec.models.forward import ForwardPass
from specdec.models.quantised import Fp8Linear, join, joinable
from specdec.models.shards import Shared, local, replace, replicate, rows_of
from specdec.models.states import States
from specdec.ranks import ALONE, Ranks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
POSITIONS_AT_ONCE = 4096  # of the tables of angles, which grow by as many
Logits = Literal["all", "none"]
Turns = tuple[Tensor, Tensor]
"""Cosine and sine [B, N, D] of the rotary angles of nodes."""


def known(config: Any) -> bool:
    """Whether models of a configuration have layers as they are run here."""
    biased = getattr(config, "mlp_bias", False)
    return config.model_type in FAMILIES and config.hidden_act == "silu" and not biased


def can_run_directly(model: Any, ranks: Ranks = ALONE) -> bool:
    """Whether the model is of a known family and made of plain linear layers, or of ours in
    float8: no adapters, and weights that are plain tensors, or cut for these ranks into such, and
    not quantised otherwise."""
    if not known(model.config):
        return False
    layers = model.base_model.layers
    parts = (part for layer in layers for part in (layer.self_attn, layer.mlp))
    projections = [
        child for part in parts for name, child in part.named_children() if name.endswith("_proj")
    ]
    # Quantised and sharded weights are tensors of classes of their own in a plain nn.Linear.
    plain = local if ranks.size > 1 else Tensor.detach
    return (
        all(type(child) in (nn.Linear, Fp8Linear) for child in projections)
        and all(type(plain(parameter.data)) is Tensor for parameter in model.parameters())
        and all(joinable(group) for layer in layers for group in _groups(layer))
    )


def _groups(layer: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Projections of a layer that read the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)


class DirectModel:
    """A causal LM of one of the `FAMILIES`, run operation by operation.

    The weights of joined projections move into one tensor, and the model's own parameters become
    views of it: no memory is needed twice, and `model(...)` still works.

    Args:
        model: the transformers model.
        windows: sliding window of each layer, None for full attention.
        positions: how many the model has.
        kernels: the module that computes, `specdec.kernels.reference` or `gpu`.
        ranks: who shares the model's weights, which are then cut.
    """

    def __init__(
        self,
        model: Any,
        windows: Sequence[int | None],
        positions: int,
        kernels: ModuleType,
        ranks: Ranks = ALONE,
    ) -> None:
        base = model.base_model
        self.kernels = kernels
        head = model.lm_head.weight
        self.together: ModuleType | Shared = kernels
        if ranks.size > 1:
            self.together = Shared(kernels, ranks, len(head), head.device)
            head = rows_of(head, ranks)
            replicate(base.embed_tokens)
        self.head: Weight = head
        self.embedding: Tensor = local(base.embed_tokens.weight)
        self.norm: Tensor = base.norm.weight
        self.eps: float = base.norm.variance_epsilon
        self.layers = [
            Layer(layer, window, kernels, self.together)
            for layer, window in zip(base.layers, windows, strict=True)
        ]
        self.angles = Angles(base.rotary_emb, positions, self.embedding)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        paged: ForwardPass,
        logits: Logits | Tensor,
        states: States | None = None,
    ) -> Tensor | None:
        """What `model(...)` computes.

        Args:
            tokens, positions: [B, N] int64.
            paged: keys, values and attention.
            logits: of all nodes, of none, or of the nodes [B] int64.
            states: what is to be kept on the way.

        Returns:
            [B, N, V], None or [B, V].
        """
        _, normal = self.through(tokens, positions, paged, range(len(self.layers)), states)
        return self.logits(normal, logits)

    def through(
        self,
        nodes: Tensor,
        positions: Tensor,
        paged: ForwardPass,
        layers: range,
        states: States | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Some layers, one after the other.

        Args:
            nodes: [B, N] int64 tokens, or [B, N, H] hidden states after the layers before.
            positions: [B, N] int64.
            states: as in `__call__`.

        Returns:
            [B, N, H] hidden states, and what the final norm makes of them.
        """
        angles = self.angles.at(positions)
        if not nodes.is_floating_point():
            nodes = nn.functional.embedding(nodes, self.embedding)
        hidden = nodes.flatten(0, 1)  # [B * N, H]
        states = states or States()
        parts, bias = None, None
        for index in layers:
            layer = self.layers[index]
            hidden, normal = layer.enter(hidden, parts, bias)
            states.keep(index, hidden, nodes)
            hidden, parts = layer(index, hidden, normal, angles, paged)
            bias = layer.down_bias
        hidden, normal = self.together.add_norm(hidden, parts, self.norm, self.eps, bias)
        states.keep(layers.stop, hidden, nodes)
        states.keep("normal", normal, nodes)
        return hidden.view_as(nodes), normal.view_as(nodes)

    def logits(self, normal: Tensor, which: Logits | Tensor) -> Tensor | None:
        """The output head on normalised hidden states [B, N, H], as in `__call__`."""
        if isinstance(which, str) and which == "none":
            return None
        batch, nodes, _ = normal.shape
        rows = normal.flatten(0, 1)
        if isinstance(which, Tensor):
            first = torch.arange(0, batch * nodes, nodes, device=which.device)
            chosen: Tensor = self.together.project(rows[first + which], self.head)
            return chosen
        every: Tensor = self.together.project(rows, self.head)
        return every.view(batch, nodes, -1)


class Layer:
    """A decoder layer of transformers' Llama kind, whose projections of one input are joined.

    Args:
        layer: with or without a norm of its input.
        window: of its attention, None for all.
        kernels: the module that computes.
        together: what computes products whose results are sums over ranks, and adds them up;
            `kernels` where there are none.
    """

    def __init__(
        self,
        layer: Any,
        window: int | None,
        kernels: ModuleType,
        together: ModuleType | Shared | None = None,
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kernels, self.window, self.together = kernels, window, together or kernels
        self.scale: float = attention.scaling
        self.query_heads = _weight(attention.q_proj).shape[0] // attention.head_dim
        qkv, gate_up = _groups(layer)
        self.qkv, self.qkv_bias = _join(*qkv)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.query_norm, self.key_norm = (getattr(norm, "weight", None) for norm in norms)
        self.head_eps: float = getattr(norms[0], "variance_epsilon", 0.0)
        gate = getattr(attention, "gate_proj", None)  # of attention, in MTP layers alone
        self.gate: Weight | None = None if gate is None else gate.weight
        self.output: Weight = _weight(attention.o_proj)
        self.output_bias: Tensor | None = _bias(attention.o_proj)
        self.gate_up, _ = _join(*gate_up)
        self.down: Weight = _weight(mlp.down_proj)
        self.down_bias: Tensor | None = _bias(mlp.down_proj)
        self.input_norm, self.inner_norm = layer.input_layernorm, layer.post_attention_layernorm

    def enter(
        self, hidden: Tensor, parts: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the layer before has left, as in `reference.add_norm`: the residual stream
        [B * N, H], and what attention reads."""
        norm = self.input_norm
        entered: tuple[Tensor, Tensor] = self.together.add_norm(
            hidden, parts, norm.weight, norm.variance_epsilon, bias
        )
        return entered

    def __call__(
        self, index: int, hidden: Tensor, inputs: Tensor, angles: Turns, paged: ForwardPass
    ) -> tuple[Tensor, Tensor]:
        """Attention and MLP.

        Args:
            hidden: [B * N, H], the residual stream.
            inputs: [B * N, I], what attention reads.

        Returns:
            (residual stream; what is still to be added to it, parts [S, B * N, H], with
            `down_bias` [H].)
        """
        norm, parts = self.inner_norm, self.attend(index, inputs, angles, paged)
        hidden, normal = self.together.add_norm(
            hidden, parts, norm.weight, norm.variance_epsilon, self.output_bias
        )
        return hidden, self.mlp(normal)

    def attend(self, index: int, inputs: Tensor, angles: Turns, paged: ForwardPass) -> Tensor:
        """What attention adds to the stream, parts [S, B * N, H], with `output_bias`."""
        do = self.kernels
        keys, values, first = paged.scratch(index)
        query = do.rotate_and_write(
            do.linear(inputs, self.qkv),
            *angles,
            keys,
            values,
            first,
            query_heads=self.query_heads,
            bias=self.qkv_bias,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            eps=self.head_eps,
            stored=paged.stored,
        )
        seen = paged.attend(
            index, query, scale=self.scale, window=self.window, softcap=None, sinks=None
        )
        seen = seen.flatten(0, 1).flatten(1)
        if self.gate is not None:
            seen = seen * do.project(inputs, self.gate).sigmoid()
        parts: Tensor = self.together.linear(seen, self.output)
        return parts

    def mlp(self, normal: Tensor) -> Tensor:
        """What the MLP adds likewise, with `down_bias`."""
        inner = self.kernels.gated_linear(normal, self.gate_up)
        parts: Tensor = self.together.linear(inner, self.down)
        return parts


class Angles:
    """Cosine and sine of rotary angles, by position.

    Args:
        rotary: the model's own module that computes them.
        positions: how many the model has; `reach` says how many of them are used.
        like: of the type and on the device that they are needed in.
    """

    def __init__(self, rotary: Any, positions: int, like: Tensor) -> None:
        self._rotary, self._positions, self._like = rotary, positions, like
        self.cos = self.sin = like.new_empty(0, 0)  # [positions so far, D]
        self._outgrown: list[Tensor] = []

    def reach(self, positions: int) -> None:
        """Make the tables long enough for so many positions, or all the model has: a configuration
        may state millions, and a run needs those of its longest sequence.

        Tables that were too short are kept on a GPU: graphs captured over them go on using them.
        """
        have, wanted = len(self.cos), min(positions, self._positions)
        if have >= wanted:
            return
        if have and self.cos.is_cuda:
            self._outgrown += [self.cos, self.sin]
        end = min(-(-wanted // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE, self._positions)
        tables = []
        for start in range(0, end, POSITIONS_AT_ONCE):
            stop = min(start + POSITIONS_AT_ONCE, end)
            chosen = torch.arange(start, stop, device=self._like.device)
            tables.append(self._rotary(self._like, position_ids=chosen[None]))
        self.cos, self.sin = (torch.cat(part, dim=1)[0] for part in zip(*tables, strict=True))

    def cover(self, cache: PagedKVCache, nodes: int) -> None:
        """As `reach`, for the longest sequence of a cache and so many nodes after it."""
        self.reach(cache.pages_for(cache.max_tokens) * cache.page_size + nodes)

    def at(self, positions: Tensor) -> Turns:
        """[B, N, D] each."""
        return self.cos[positions], self.sin[positions]


@torch.inference_mode(False)
@torch.no_grad()
def _join(*projections: Any) -> tuple[Weight, Tensor | None]:
    """Weight and bias of projections of the same input as one; theirs become views of it.

    Not in inference mode: the model is the caller's, and autograd cannot use inference tensors.
    """
    weight: Weight
    if isinstance(projections[0], Fp8Linear):
        weight = join(projections)
    else:
        parts = [local(projection.weight).data for projection in projections]
        weight = torch.cat(parts)
        for projection, part in zip(
            projections, weight.split([len(p) for p in parts]), strict=True
        ):
            replace(projection, "weight", part)
    biases = [bias for bias in map(_bias, projections) if bias is not None]
    return weight, torch.cat([bias.data for bias in biases]) if biases else None


def _weight(projection: Any) -> Weight:
    """This rank's."""
    weight: Weight = projection.weight
    return local(weight) if isinstance(weight, Tensor) else weight


def _bias(projection: Any) -> Tensor | None:
    return None if projection.bias is None else local(projection.bias)

"""Models whose products read weights in float8 e4m3: their layers hold `Fp8Linear` where those of
transformers hold `nn.Linear`. Embedding and norms stay in the type of the model, and so does the
output head but where a checkpoint has it in float8.

The direct way hands the weights to our own product kernels. `model(...)`, which checks a run, and
which other architectures go by, dequantises each of them when it comes to it: slow, but of the
same weights, and never more than one of them at a time.

Where ranks share a model a weight is quantised first and cut then, so that each number has the
scale that it has in one process.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight
from specdec.kernels.reference import quantise_weight
from specdec.models.shards import cut_along, local, part_of
from specdec.ranks import ALONE, Ranks

Quantize = Literal["none", "fp8"]
SCALE_BYTES = 4
W = TypeVar("W", Tensor, Fp8Weight)


class Fp8Linear(nn.Module):
    """A linear layer that computes in the type of its input, by dequantised weights.

    Args:
        weight: [N, K].
        bias: [N], in the type of the model.
        dim: along which ranks have parts of the weight; None if each has all of it.
        ranks: who has the others.
    """

    def __init__(
        self,
        weight: Fp8Weight,
        bias: Tensor | None = None,
        dim: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.dim, self._ranks = dim, ranks
        self.values: Tensor
        self.scale: Tensor
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Fp8Weight:
        return Fp8Weight(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        weight = self.weight.dequantised(x.dtype)
        if self.dim != 1:
            return nn.functional.linear(x, weight, self.bias)
        every = self._ranks.gather(nn.functional.linear(x, weight))  # equal bits, when added up
        return every.sum(0) if self.bias is None else every.sum(0) + self.bias


def projections(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The linear layers of a decoder layer of the Llama kind, each as its parent and its name."""
    for part in (layer.self_attn, layer.mlp):
        assert isinstance(part, nn.Module)
        for name, child in part.named_children():
            if isinstance(child, nn.Linear | Fp8Linear):
                yield part, name


def put(
    part: nn.Module, name: str, weight: Fp8Weight, bias: Tensor | None, ranks: Ranks = ALONE
) -> None:
    """Put `Fp8Linear` in the place of a linear layer.

    Args:
        part, name: of which module the layer is a child, and which.
        weight, bias: all of them, of which this rank keeps its part.
        ranks: who shares the layer, if it is cut.

    Raises:
        ValueError: parts of `weight` that cannot have scales of their own.
    """
    linear = getattr(part, name)
    dim = cut_along(linear.weight)
    if dim is not None:
        weight = weight.part(dim, ranks.size, ranks.rank)
        bias = None if bias is None else part_of(linear.bias, bias, ranks).clone()
    setattr(part, name, Fp8Linear(weight, bias, dim, ranks))


@torch.no_grad()
def quantise_layer(layer: nn.Module, made: nn.Module | None = None, ranks: Ranks = ALONE) -> None:
    """Put `Fp8Linear` in the place of the linear layers of a decoder layer, one after the other.

    Args:
        made: a layer with all of the weights, where `ranks` share this one; None: itself.

    Raises:
        ValueError: a weight that is not finite.
    """
    for (part, name), (whole, _) in zip(
        projections(layer), projections(made or layer), strict=True
    ):
        linear = getattr(whole, name)
        if isinstance(linear, nn.Linear):
            bias = None if linear.bias is None else linear.bias.data
            put(part, name, quantise_weight(linear.weight.data), bias, ranks)


def quantised_bytes(model: Any, quantize: Quantize | None) -> int:
    """Of the weights of a model that may not be made yet, once they are quantised."""
    total = sum(local(parameter).nbytes for parameter in model.parameters())
    if quantize == "fp8":
        for layer in model.base_model.layers:
            for part, name in projections(layer):
                weight = local(getattr(part, name).weight)
                total -= weight.nbytes - weight.numel() - SCALE_BYTES * len(weight)
    return total


def output_of(model: Any) -> Tensor:
    """The matrix [V, H] of a model's output head; of one in float8 a dequantised copy."""
    weight = model.get_output_embeddings().weight
    return weight.dequantised(model.dtype) if isinstance(weight, Fp8Weight) else weight


def quantisation_of(model: Any) -> str | None:
    """What the weights of a model are quantised to or by; None if they are not."""
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        return "fp8"
    stated = getattr(model.config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    found = method or getattr(stated, "quant_method", None)
    return None if found is None else str(getattr(found, "value", found))


def slow(model: Any, quantised: str) -> str:
    """What to say of a quantised model that does not go the direct way."""
    return (
        f"quantised by {quantised}, {type(model).__name__} is not run by our own "
        f"products but by transformers', which is slow: good for studies of what is said, not of "
        f"speed"
    )


def joinable(linears: Sequence[Any]) -> bool:
    """Whether weights that read the same input can be one."""
    kinds = {type(linear) for linear in linears}
    if kinds != {Fp8Linear}:
        return kinds == {nn.Linear}
    weights = [linear.weight for linear in linears]
    if not any(weight.blocked for weight in weights):
        return True
    whole = all(weight.shape[0] % SCALED_BLOCK == 0 for weight in weights[:-1])
    return whole and all(weight.blocked for weight in weights)


@torch.no_grad()
def stacked(weights: Sequence[W]) -> W:
    """Weights of one kind, one below the other, in memory of their own."""
    made: Any
    if isinstance(weights[0], Tensor):
        made = torch.cat(list(weights))
    else:
        values = torch.cat([one.values.view(torch.uint8) for one in weights])  # any torch can
        scale = torch.cat([one.scale for one in weights])
        made = Fp8Weight(values.view(torch.float8_e4m3fn), scale)
    same: W = made
    return same


def join(linears: Sequence[Fp8Linear]) -> Fp8Weight:
    """Their weights, one below the other; theirs become views of it."""
    joined = stacked([linear.weight for linear in linears])
    row = first = 0
    for linear in linears:
        linear.values = joined.values[row : row + len(linear.values)]
        linear.scale = joined.scale[first : first + len(linear.scale)]
        row, first = row + len(linear.values), first + len(linear.scale)
    return joined

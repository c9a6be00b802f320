"""Shards: a model whose weights lie in parts on several ranks. Transformers cuts and loads them,
by the plan that comes with its configuration; here is what the rest asks of such a model.

Columns of a product are shared as in Megatron-LM (Shoeybi et al. 2019, section 3): queries, keys,
values, gate and up projections by rows of the weight, output and down projections by its columns,
whose results are sums over all ranks.
"""

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from specdec.kernels.layout import Weight
from specdec.ranks import Ranks

NEEDED = ("accelerate", "pip install 'specdec-lab[tp]'")


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight; all of one that is not cut."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.inference_mode(False)
@torch.no_grad()
def whole(weight: Tensor) -> Tensor:
    """All of a weight; of one that is cut a copy, which all ranks must ask for together.

    Not of the parameter itself, nor in inference mode: torch 2.11 gathers neither.
    """
    if not isinstance(weight, DTensor):
        return weight
    plain: Any = weight.detach()
    found: Tensor = local(plain) if plain.placements == (Replicate(),) else plain.full_tensor()
    return found


@torch.inference_mode(False)
@torch.no_grad()
def replace(module: nn.Module, name: str, part: Tensor) -> None:
    """Let this rank's part of a parameter be this tensor: of the same numbers, or the first.

    Not in inference mode: the model is the caller's, and autograd cannot use inference tensors.
    """
    before = module.get_parameter(name)
    if not isinstance(before, DTensor):
        if before.is_meta:  # which takes no numbers
            module._parameters[name] = nn.Parameter(part, requires_grad=before.requires_grad)
        else:
            before.data = part
        return
    after = DTensor.from_local(
        part,
        before.device_mesh,
        before.placements,
        run_check=False,
        shape=before.shape,
        stride=before.stride(),
    )
    module._parameters[name] = nn.Parameter(after, requires_grad=before.requires_grad)


@torch.inference_mode(False)
@torch.no_grad()
def replicate(embedding: nn.Module) -> None:
    """Give every rank all rows of an embedding: the sum over ranks that cut ones need takes longer
    than what it saves is worth."""
    before = embedding.get_parameter("weight")
    if isinstance(before, DTensor):
        rows = DTensor.from_local(
            whole(before), before.device_mesh, [Replicate()], run_check=False
        )
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=before.requires_grad)


def check_split(config: Any, size: int, name: str) -> None:
    """Raise ValueError, in one line, unless so many ranks can share a model of this configuration,
    and what cuts it is installed."""
    if size == 1:
        return
    text = config.get_text_config()
    for what in ("key_value", "attention"):
        heads = getattr(text, f"num_{what}_heads", None)
        if heads is not None and heads % size:
            kind = {"key_value": "key-value", "attention": "query"}[what]
            said = f"{heads} {kind} head{'s' * (heads > 1)} of {name}"
            may = [n for n in range(2, heads + 1) if heads % n == 0]
            mend = f"must divide them: {', '.join(map(str, may))}" if may else "use target.tp=1"
            raise ValueError(f"target.tp={size}: {said} cannot be split; {mend}")
    if importlib.util.find_spec(NEEDED[0]) is None:
        raise ValueError(
            f"target.tp={size}: transformers needs the package {NEEDED[0]} to load a model in "
            f"parts; {NEEDED[1]} brings it"
        )
    if importlib.util.find_spec("transformers.distributed.tensor_parallel") is None:
        raise ValueError(f"target.tp={size}: needs transformers 5.17 or newer; {NEEDED[1]}")
    if not getattr(text, "base_model_tp_plan", None):
        raise ValueError(
            f"target.tp={size}: transformers has no plan of how to cut {name}, a model of type "
            f"{text.model_type}; use target.tp=1"
        )
    vocabulary = getattr(text, "vocab_size", 0)
    if vocabulary % size and not cuts_unevenly():
        raise ValueError(
            f"target.tp={size}: does not divide the {vocabulary} tokens of {name}, which "
            f"transformers {transformers.__version__} needs; use a newer one, or target.tp=1"
        )


def cuts_unevenly() -> bool:
    """Whether transformers can give ranks parts of an output head that differ in size: 5.17 looks
    at it, and refuses."""
    from transformers.distributed.tensor_parallel import ColwiseParallel

    return "validate_param" not in vars(ColwiseParallel)


def plan_of(size: int) -> dict[str, Any]:
    """What `from_pretrained` is told besides, for a model that ranks share."""
    if size == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=size)}


def cut(model: Any, size: int) -> Any:
    """A model of transformers, whose weights have no memory yet, to be shared among so many ranks
    as one that is loaded."""
    if size == 1:
        return model
    if model.config.tie_word_embeddings:  # what is tied has one name, and a plan asks for both
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    given = plan_of(size)["distributed_config"]
    kind = type(model)
    config, _, mesh = kind.prepare_distribute_model(given)
    return kind.maybe_distribute_model(model, config, mesh)


def cut_along(weight: Tensor) -> int | None:
    """The dimension along which ranks have parts of a weight; None if each has all of it."""
    if isinstance(weight, DTensor):
        (how,) = weight.placements
        if isinstance(how, Shard):
            return how.dim % weight.dim()
    return None


def part_of(weight: Tensor, every: Tensor, ranks: Ranks) -> Tensor:
    """Of all numbers of a weight those that this rank has; a view."""
    dim = cut_along(weight)
    return every if dim is None else every.chunk(ranks.size, dim)[ranks.rank]


def shape_of(part: Tensor, dim: int | None, ranks: Ranks) -> list[int]:
    """Of all of a weight that is cut along a dimension, if it is; all ranks ask together."""
    shape = list(part.shape)
    if dim is not None:
        shape[dim] = int(ranks.gather(torch.tensor([shape[dim]])).sum())
    return shape


def numbers_of(
    part: Tensor, dim: int | None, shape: Sequence[int], places: Tensor, ranks: Ranks
) -> Tensor:
    """[n] of all numbers of such a weight, one after the other, those at these places; all ranks
    ask together."""
    at = list(torch.unravel_index(places.to(part.device), tuple(shape)))
    if dim is None:
        return part[tuple(at)]
    rows = -(-shape[dim] // ranks.size)  # of each part but the last, as `Tensor.chunk` cuts
    owner, at[dim] = at[dim] // rows, (at[dim] % rows).clamp(max=part.shape[dim] - 1)
    return ranks.gather(part[tuple(at)])[owner, torch.arange(len(owner), device=part.device)]


def keep_part(weight: Tensor, every: Tensor, ranks: Ranks) -> None:
    """Fill this rank's part of a weight from all of it."""
    local(weight).copy_(part_of(weight, every, ranks))


class Shared:
    """What ranks compute together, in place of functions of the same names of `kernels`.

    Args:
        kernels: the module that computes what a rank does by itself.
        ranks: who shares the weights.
        vocab: tokens that the output head has rows for, all ranks taken together.
        device: where they compute. On a GPU the parts of few rows stay where they are made, and
            `add_norm` reads them there.
    """

    def __init__(
        self, kernels: ModuleType, ranks: Ranks, vocab: int, device: torch.device
    ) -> None:
        self.kernels, self.ranks, self.vocab = kernels, ranks, vocab
        self._parts: Any = None  # memory that all ranks read, on a GPU
        if device.type == "cuda" and not kernels.LOOKS:
            from specdec.kernels.gpu.shared import SharedParts

            self._parts = SharedParts(device)
            ranks.least(0)  # all have made theirs before one writes to it

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """As `reference.linear`, with a weight whose columns the ranks share.

        Args:
            x: [M, K / W], the columns of this rank.

        Returns:
            [W * S, M, N], the parts of rank 0 first: all ranks add up the same numbers in the same
            order, so that their sums have equal bits. Or [S, M, N] in memory that all ranks read.
        """
        if self._parts is not None and self._parts.fits(len(x), weight.shape[0]):
            near: Tensor = self.kernels.linear(x, weight, shared=self._parts)
            return near
        return self.ranks.gather(self.kernels.linear(x, weight)).flatten(0, 1)

    def add_norm(
        self,
        residual: Tensor,
        parts: Tensor | None,
        weight: Tensor,
        eps: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `reference.add_norm`, of the parts of `linear`."""
        everyone = None if self._parts is None else self._parts.of(parts)
        how = {} if everyone is None else {"everyone": everyone}
        added: tuple[Tensor, Tensor]
        added = self.kernels.add_norm(residual, parts, weight, eps, bias, **how)
        return added

    def project(self, x: Tensor, weight: Weight) -> Tensor:
        """As `reference.project`, with a weight whose rows the ranks share: [M, V] on each.

        Args:
            weight: [ceil(V / W), K], as `rows_of` gives them.
        """
        every = self.ranks.gather(self.kernels.project(x, weight))  # [W, M, ceil(V / W)]
        return every.transpose(0, 1).flatten(1)[:, : self.vocab].contiguous()


def rows_of(weight: Tensor, ranks: Ranks) -> Tensor:
    """This rank's rows of an output head [V, K], as many on all: zeros follow where there are
    fewer."""
    mine = local(weight)
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        mine = weight.chunk(ranks.size)[ranks.rank]
    lacking = -(-weight.shape[0] // ranks.size) - len(mine)
    return nn.functional.pad(mine, (0, 0, 0, lacking)) if lacking else mine

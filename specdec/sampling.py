"""From logits to probabilities, and from seeds to uniforms. Nothing here knows about trees.

Randomness is a pure function of (seed, sequence, step, stream, index): a sequence draws the same
numbers whatever else is in its batch, in whatever order sequences finish, and after a resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from specdec.kernels.reference import over

ACCEPT_STREAM, TOKEN_STREAM = 0, 1  # a rule's coins, and its draw of the next token
DRAFT_STREAM = 2  # level i of a draft uses stream DRAFT_STREAM + i
SEEDS = 2**64  # that differ: a seed of any size counts modulo this


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The filters apply in this order, each renormalising what is left.

    Args:
        temperature: 0 is greedy decoding, 1 the model's own distribution.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p (nucleus
            sampling, Holtzman et al. 2020); None keeps all.
        min_p: keep tokens at least min_p times as probable as the most probable one; None keeps
            all.
        processors: what else is done to logits beforehand: "model" is what the model's own
            generation settings ask for (`specdec.processors`), "none" nothing.
        seed: every random number of a run follows from it, modulo 2**64.

    Raises:
        ValueError: a value out of range, naming the setting.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    processors: Literal["model", "none"] = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"sampling.temperature={self.temperature}: must be 0 (greedy) or positive"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"sampling.top_k={self.top_k}: must be at least 1, or null for no limit"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"sampling.top_p={self.top_p}: must be in (0, 1], or null for no limit"
            )
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(
                f"sampling.min_p={self.min_p}: must be in [0, 1], or null for no limit"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))


def sound(logits: Tensor) -> Tensor:
    """[...] bool: whether logits [..., V] make a distribution, without NaN or plus infinity, and
    not minus infinity all of them. The largest is finite then, and only then."""
    return logits.amax(-1).isfinite()


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution tokens are drawn from under `params`.

    Args:
        logits: [..., V].

    Returns:
        [..., V] float32 (float64 for float64 logits), rows sum to 1; greedy gives one-hot rows.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if params.greedy:
        return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
    return filtered(scores, params).softmax(-1)


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Scores whose softmax is the distribution tokens are drawn from under `params`.

    Args:
        logits: [..., V].
        params: with a temperature above 0.

    Returns:
        [..., V] float32 (float64 for float64 logits), -inf for tokens that are filtered out.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if params.temperature != 1.0:
        scores = over(scores, params.temperature)
    if params.top_k is not None and params.top_k < scores.shape[-1]:
        kth = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if params.top_p is not None and params.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass >= params.top_p  # the mass before a token already suffices
        beyond[..., 0] = False
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    if params.min_p:
        probs = scores.softmax(-1)
        rare = probs < params.min_p * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(rare, float("-inf"))
    return scores


def uniforms(
    seed: int, sequences: Sequence[int], steps: Sequence[int], stream: int, count: int
) -> Tensor:
    """[B, count] float64 in [0, 1), a pure function of the arguments (Philox, Salmon et al. 2011).

    Args:
        sequences, steps: [B] each; the row's sequence number and its decoding step.
        stream: keeps draws for different purposes within a step apart.
    """
    rows = np.empty((len(sequences), count))
    for i, (sequence, step) in enumerate(zip(sequences, steps, strict=True)):
        bits = np.random.Philox(
            key=np.array([seed % SEEDS, sequence], np.uint64), counter=[0, 0, stream, step]
        )
        np.random.Generator(bits).random(out=rows[i])
    return torch.from_numpy(rows)


def random_keys(
    seed: int, sequences: Sequence[int], steps: Sequence[int], device: torch.device
) -> Tensor:
    """[B, 3] int64 on the device: the bits of seed, sequence and step, for kernels that make the
    numbers of `uniforms` themselves. Nothing waits for the copy."""
    keys = np.array(
        [(seed % SEEDS, *row) for row in zip(sequences, steps, strict=True)], np.uint64
    ).reshape(-1, 3)
    host = torch.from_numpy(keys.view(np.int64))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def race(weights: Tensor, uniform: Tensor) -> Tensor:
    """Arrival times of an exponential race: the first to arrive is a draw from the weights, the
    first k are k draws without replacement (Gumbel top-k, Kool et al. 2019). A rounding error in a
    weight changes the outcome only if it swaps two arrivals, unlike inverting a cumulative sum,
    where it moves every boundary.

    Args:
        weights: [..., V], non-negative, unnormalised.
        uniform: [..., V] in [0, 1).

    Returns:
        [..., V] float64; infinite where the weight is zero.
    """
    wide = weights.double()
    return torch.where(wide > 0, -torch.log1p(-uniform) / wide, float("inf"))


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """[...] int64: one index drawn from each row of weights [..., V], given uniforms [..., V]."""
    return race(weights, uniform).argmin(-1)

"""The portable acceptance profile of NVIDIA's Model-Optimizer (pull request 2247, schema 1.0),
which simulators read: conditional rates (Dynamo), marginal ones (vLLM), both means, a check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdec.lab.files import read_object

VERSION = "1.0"
TOLERANCE = 0.02  # of the mean, as the schema has it
DIGITS = 6
WITHHELD = "paths are judged as wholes, which gives no longest-prefix rates; see the histogram"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Of steps of one method.

    Args:
        marginal: of the first i + 1 drafted tokens all being kept, never rising.
        mean: tokens of a step.
        mean_per_request: the mean over requests of their means; None if it is not known.
        histogram: steps by their tokens, as far as they are known.
        per_category: the mean of each category.
    """

    marginal: tuple[float, ...]
    mean: float
    mean_per_request: float | None = None
    histogram: Mapping[int, float] = field(default_factory=dict)
    per_category: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_steps(
        cls,
        histogram: Mapping[int, float],
        *,
        mean_per_request: float | None,
        per_category: Mapping[str, float],
    ) -> "Profile":
        """Of numbers of steps by their tokens."""
        steps = sum(histogram.values())
        most = max(histogram, default=1)
        return cls(
            marginal=tuple(
                sum(count for tokens, count in histogram.items() if tokens > depth) / steps
                for depth in range(1, most)
            ),
            mean=sum(tokens * count for tokens, count in histogram.items()) / steps,
            mean_per_request=mean_per_request,
            histogram=histogram,
            per_category=per_category,
        )

    @property
    def conditional(self) -> tuple[float, ...]:
        """Of drafted token i + 1 being kept if all before it are; 0 where none is."""
        pairs = pairwise((1.0, *self.marginal))
        return tuple(after / before if before > 0 else 0.0 for before, after in pairs)

    @property
    def implied(self) -> float:
        """The mean that the rates say."""
        return 1.0 + sum(self.marginal)

    def write(
        self,
        *,
        method: str,
        target: str,
        draft: str | None,
        tree: bool,
        blockwise: bool,
        conditions: Any,
    ) -> dict[str, Any]:
        """As the schema has it.

        Args:
            tree: a node may have several children, so that rates at another number of tokens do
                not follow from these.
            blockwise: what is kept is decided of whole paths, not node by node; then the schema
                withholds rates by position, which the histogram still has.
        """
        tokens = len(self.marginal)
        return {
            "schema_version": VERSION,
            "measured": True,
            "method": method,
            "draft_checkpoint": None if draft is None else {"id": draft},
            "target_model": {"id": target},
            "num_speculative_tokens": tokens,
            "block_size": None,
            "max_supported_k": tokens,
            "verification_method": "block" if blockwise else "longest_prefix",
            **self._vectors(blockwise),
            "mean_accept_length": round(self.mean, DIGITS),
            "mean_accept_length_per_request": (
                None if self.mean_per_request is None else round(self.mean_per_request, DIGITS)
            ),
            "accept_length_model": "measured_per_k" if tree or blockwise else "chain_analytic",
            "accept_length_by_k": {str(tokens): round(self.mean, DIGITS)},
            "acceptance_length_histogram": {
                str(length): round(count, DIGITS) for length, count in self.histogram.items()
            }
            or None,
            "per_category": {
                name: {"mean_accept_length": round(mean, DIGITS)}
                for name, mean in self.per_category.items()
            }
            or None,
            "measurement_conditions": conditions,
            "validation": self._validation(),
        }

    def _vectors(self, blockwise: bool) -> dict[str, Any]:
        """Rates by position, or why there are none."""
        if blockwise:
            none = dict.fromkeys(("conditional_accept_rates", "marginal_accept_rates"))
            return {**none, "vectors_unavailable_reason": WITHHELD}
        return {
            "conditional_accept_rates": _rounded(self.conditional),
            "marginal_accept_rates": _rounded(self.marginal),
        }

    def _validation(self) -> dict[str, Any]:
        """The schema's check of itself."""
        rises = [
            {"position": i, "value": self.marginal[i], "previous": self.marginal[i - 1]}
            for i in range(1, len(self.marginal))
            if self.marginal[i] > self.marginal[i - 1] + 1e-9
        ]
        gap = abs(self.implied - self.mean)
        return {
            "mean_consistency": {
                "implied_mean_accept_length": round(self.implied, DIGITS),
                "reported_mean_accept_length": round(self.mean, DIGITS),
                "abs_delta": round(gap, DIGITS),
                "tolerance": TOLERANCE,
                "passed": gap <= TOLERANCE,
            },
            "marginal_monotonicity": {"passed": not rises, "violations": rises},
        }


def read_profile(path: Path) -> Profile:
    """Of a file; its own check is made again.

    Raises:
        ValueError: no such profile, an unmeasured one, or one that contradicts itself.
    """
    data = read_object(path)
    if data is None or str(data.get("schema_version", "")).split(".")[0] != "1":
        raise ValueError(f"profile={path}: must be a speculation_profile.json of schema 1")
    if data.get("measured") is not True:
        raise ValueError(f"profile={path}: measured={data.get('measured')}, it holds no rates")
    mean = data.get("mean_accept_length")
    if not isinstance(mean, int | float):
        raise ValueError(f"profile={path}: mean_accept_length={mean} must be a number")
    own = data.get("mean_accept_length_per_request")
    steps = _histogram(path, data)
    if data.get("marginal_accept_rates") is None and steps:
        found = Profile.of_steps(steps, mean_per_request=own, per_category={})
        conditional, found = found.conditional, replace(found, mean=float(mean))
    else:
        marginal, conditional = (_rates(path, data, f"{kind}_accept_rates") for kind in KINDS)
        found = Profile(marginal=marginal, mean=float(mean), mean_per_request=own, histogram=steps)
    marginal = found.marginal
    if max((b - a for a, b in pairwise(marginal)), default=0.0) > 1e-6:
        raise ValueError(f"profile={path}: marginal_accept_rates rise; they must not")
    far = [abs(a - b) for a, b in zip(found.conditional, conditional, strict=True)]
    if max(far, default=0.0) > 1e-3 or abs(found.implied - found.mean) > TOLERANCE:
        raise ValueError(
            f"profile={path}: its rates say {found.implied:.4f} tokens a step, and "
            f"mean_accept_length is {found.mean:.4f}; it contradicts itself"
        )
    return found


KINDS = ("marginal", "conditional")


def _histogram(path: Path, data: Mapping[str, Any]) -> dict[int, float]:
    given = data.get("acceptance_length_histogram") or {}
    try:
        found = {int(tokens): float(count) for tokens, count in given.items()}
    except (AttributeError, TypeError, ValueError):
        found = {0: 0.0}
    if any(tokens < 1 or count < 0 for tokens, count in found.items()):
        raise ValueError(
            f"profile={path}: acceptance_length_histogram must have steps by tokens of a step"
        )
    return found


def _rates(path: Path, data: Mapping[str, Any], name: str) -> tuple[float, ...]:
    rates = data.get(name)
    count = data.get("num_speculative_tokens")
    good = isinstance(rates, list) and len(rates) == count
    if not good or not all(isinstance(r, int | float) and 0 <= r <= 1 for r in rates or []):
        raise ValueError(
            f"profile={path}: {name} must be {count} numbers from 0 to 1, as "
            f"num_speculative_tokens says"
        )
    return tuple(float(rate) for rate in rates or [])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]

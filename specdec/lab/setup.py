"""What a run has beside its method, from its settings: target, tracker, and what belongs to no
group."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from specdec.lab.build import Settings, build, group_of, imported, ungrouped
from specdec.lab.records import RecordSettings
from specdec.lab.tracking import Tracker
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.ranks import ALONE, WAIT, here


@dataclass(frozen=True, kw_only=True)
class General:
    """Settings without a group.

    Raises:
        ValueError: one out of range.
    """

    max_new_tokens: int
    ignore_eos: bool
    batch_size: int
    seed: int
    dtype: str
    device: str
    baseline: bool
    resume: bool | str
    out: str
    stop_strings: list[Annotated[str, Field(min_length=1)]] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the target comes from, what becomes of its weights, and how many GPUs share it, which
    wait for each other for so many seconds.

    Raises:
        ValueError: from nowhere, or fewer than one GPU, or no time.
    """

    path: str
    quantize: Quantize = "none"
    tp: int = 1
    tp_wait: float = 2 * WAIT

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("target.path=: must be given")
        if self.tp < 1:
            raise ValueError(f"target.tp={self.tp}: must be at least 1")
        if not 1.0 <= self.tp_wait < math.inf:
            raise ValueError(f"target.tp_wait={self.tp_wait:g}: must be at least 1 second")

    def load(self, models: Models, setting: str = "target.path") -> PagedLM:
        """The target; messages name it by the setting.

        Raises:
            ValueError: as `load_model`.
        """
        if self.tp != here().size:
            raise ValueError(
                f"target.tp={self.tp}: is done by python -m specdec.run, each run in processes of "
                f"its own; use target.tp=1 here"
            )
        ranks = here() if self.tp > 1 else ALONE
        return models.load(self.path, setting=setting, quantize=self.quantize, ranks=ranks)


GROUPS = (
    *("target", "drafter", "tree", "acceptance", "sampling"),
    *("prompts", "tracker", "cache", "kernels", "record"),
)


def general_of(settings: Settings) -> General:
    """As `ungrouped`."""
    general: General = ungrouped(General, settings, GROUPS)
    return general


def target_of(settings: Settings) -> Source:
    """The target, which is not loaded yet."""
    source: Source = build(Source, "target", group_of(settings, "target"))
    return source


def tracker_of(settings: Settings) -> Tracker:
    group = group_of(settings, "tracker")
    kind = imported("tracker", group.get("_target_"))
    if not isinstance(kind, type) or not issubclass(kind, Tracker) or kind is Tracker:
        raise ValueError(
            f"tracker._target_={group['_target_']}: must be a class with the methods of a "
            f"Tracker; derive it from specdec.lab.tracking.NoTracker"
        )
    tracker: Tracker = build(kind, "tracker", group)
    return tracker


def record_of(settings: Settings) -> RecordSettings:
    """What is recorded besides texts and steps."""
    record: RecordSettings = build(RecordSettings, "record", group_of(settings, "record"))
    return record

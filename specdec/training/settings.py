"""Settings of a training, from words to objects."""

from dataclasses import dataclass
from typing import Any

from specdec.lab.build import Settings, build, group_of, imported, ungrouped
from specdec.training.corpus import CorpusSettings, listed
from specdec.training.measure import MeasureSettings
from specdec.training.own_text import OwnTextSettings
from specdec.training.trainee import TrainingMethod

GROUPS = ("target", "method", "tracker", "corpus", "own_text", "measure")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of a training without a group.

    Args:
        data: files, folders or python.
        minutes: of training; None if it ends by tokens.
        tokens: of training; None if it ends by the clock.
        length: tokens of a sequence.
        batch: sequences; None is 128 on a GPU, else 4.
        chunk: positions whose logits are held at a time.
        seed: of every random number.
        dtype: of the target.
        compile: auto, True or False.
        resume: False, True or auto.

    Raises:
        ValueError: one out of range.
    """

    data: str | list[str]
    minutes: float | None
    tokens: float | None
    length: int
    batch: int | None
    chunk: int
    seed: int
    dtype: str
    device: str
    compile: bool | str
    resume: bool | str
    out: str

    def __post_init__(self) -> None:
        for name, least in (("minutes", 0), ("tokens", 0), ("batch", 1), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and (value < least or value == 0):
                raise ValueError(f"{name}={value}: must be above 0")
        if self.length < 8:
            raise ValueError(f"length={self.length}: must be at least 8 tokens")
        if self.minutes is None and self.tokens is None:
            raise ValueError("minutes=null: give minutes or tokens, after which it ends")
        if not self.sources:
            raise ValueError(f"data={self.data}: must be files, folders or python")
        for name in ("compile", "resume"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{name}={value}: must be true, false or auto")

    @property
    def sources(self) -> list[str]:
        return [source for source in listed(self.data) if source]


def plan_of(settings: Settings) -> Plan:
    """As `ungrouped`."""
    plan: Plan = ungrouped(Plan, settings, GROUPS, "train")
    return plan


def method_of_training(settings: Settings) -> TrainingMethod:
    """What is trained and how.

    Raises:
        ValueError: a setting that cannot be used.
    """
    group = group_of(settings, "method")
    kind = imported("method", group.get("_target_"))
    if not isinstance(kind, type) or not issubclass(kind, TrainingMethod):
        raise ValueError(
            f"method._target_={group['_target_']}: must be a class derived from TrainingMethod of "
            f"specdec.training.trainee"
        )
    method: TrainingMethod = build(kind, "method", group)
    return method


def parts_of(settings: Settings) -> tuple[CorpusSettings, "OwnTextSettings", MeasureSettings]:
    """How text is come by, and how what is trained is measured.

    Raises:
        ValueError: a setting that cannot be used.
    """
    kinds: dict[str, Any] = {
        "corpus": CorpusSettings,
        "own_text": OwnTextSettings,
        "measure": MeasureSettings,
    }
    corpus, own, measure = (
        build(kind, name, group_of(settings, name)) for name, kind in kinds.items()
    )
    return corpus, own, measure

"""Which records of a set are asked: by category, by name, so many of each, shuffled.

A prompt keeps its place in the whole set, from which its random numbers follow: what is selected
is decoded as it would be among all others.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.lab.options import nearest

Names = str | int | float | list[str | int | float]
NAMED = 12  # categories that a message lists


class Label(NamedTuple):
    """What a record is selected by."""

    id: str
    category: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which prompts of a set, and in which order.

    Args:
        category: those of this category, or of these.
        ids: those of this name, or of these.
        shuffle: the order is drawn with this seed; None keeps that of the set. A part of the set
            is in the order that it has in the shuffled whole.
        per_category: in that order, the first so many of each category.
        limit: of what is left, the first so many.

    Raises:
        ValueError: a number below 1, or a list without anything in it.
    """

    category: Names | None = None
    ids: Names | None = None
    shuffle: int | None = None
    per_category: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("per_category", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"prompts.{name}={value}: must be at least 1; use null to ask all"
                )
        for name in ("category", "ids"):
            if getattr(self, name) == []:
                raise ValueError(f"prompts.{name}=[]: names nothing; use null to ask all")

    @property
    def beginning(self) -> int | None:
        """How many records of a set have to be read, None for all."""
        others = self.category, self.ids, self.shuffle, self.per_category
        return self.limit if all(one is None for one in others) else None

    def places(self, labels: Sequence[Label], shown: str) -> list[int]:
        """Places of the records that are asked, in the order of asking.

        Args:
            labels: of all records of the set.
            shown: the set, for error messages.

        Raises:
            ValueError: the set has no such category or name, or nothing that is both.
        """
        categories = _known("category", self.category, [label.category for label in labels], shown)
        ids = _known("ids", self.ids, [label.id for label in labels], shown)
        order = list(range(len(labels)))
        if self.shuffle is not None:
            order.sort(key=lambda place: _drawn(self.shuffle, place))
        found, counts = [], Counter[str | None]()
        for place in order:
            label = labels[place]
            if (categories and label.category not in categories) or (ids and label.id not in ids):
                continue
            counts[label.category] += 1
            if self.per_category is None or counts[label.category] <= self.per_category:
                found.append(place)
        if labels and not found:
            raise ValueError(
                f"prompts.ids={self.ids}: none of them is of prompts.category={self.category}; "
                "leave out one of the two"
            )
        return found[: self.limit]


def _drawn(seed: int | None, place: int) -> bytes:
    """A key that puts places into an order that depends on nothing but the seed."""
    return hashlib.sha256(f"{seed} {place}".encode()).digest()


def _known(
    setting: str, wanted: Names | None, known: Sequence[str | None], shown: str
) -> set[str | None]:
    """What a setting names, all of which the set has."""
    if wanted is None:
        return set()
    there = list(dict.fromkeys(one for one in known if one is not None))
    for name in map(str, wanted if isinstance(wanted, list) else [wanted]):
        if name in there:
            continue
        what = "category" if setting == "category" else "id"
        if not there:
            raise ValueError(
                f"prompts.{setting}={name}: the records of prompts.path={shown} have none; use "
                "null"
            )
        more = ", ..." if len(there) > NAMED else ""
        raise ValueError(
            f"prompts.{setting}={name}: prompts.path={shown} has no such {what}"
            f"{nearest(name, there)}; there are {', '.join(there[:NAMED])}{more}"
        )
    return set(map(str, wanted if isinstance(wanted, list) else [wanted]))

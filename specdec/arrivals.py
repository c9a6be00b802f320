"""Arrivals: what waits to be decoded, and prompts that are being read beside rows that decode."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.request import PREFILL_CHUNK, Decoding, Request


class Intake(Protocol):
    """Sequences that a verifier is taking in, pass by pass."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to read; those that were never returned found no room."""

    def read(self, *, beside: bool = False) -> Sequence[Decoding]:
        """Read some more of their prompts.

        Args:
            beside: other sequences decode meanwhile and should not wait long; it may then be that
                nothing is read this time.

        Returns:
            Those whose prompts are read now: they can be decoded.
        """


Start = Callable[[list[Decoding]], Intake]
# What a verifier is given to take sequences in, as in `Verifier.start`.
Join = Callable[[list[Decoding]], Sequence[Decoding]]
Prefill = Callable[[Sequence[Decoding], int], Sequence[Decoding]]
Shareable = Callable[[Sequence[int]], int | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Coming:
    """Sequences that were given rows, and what reads their prompts."""

    asked: list[Decoding]
    intake: Intake
    left: list[Decoding]  # of those asked


class Arrivals:
    """Gives free rows to waiting requests, in order.

    Where nothing decodes, prompts are read whole. Else every step makes a pass over what has just
    been given rows, and one over those before, in turns; what is read joins the batch. So a long
    prompt holds neither the rows that decode nor requests that come after it.

    Args:
        rows: of the caches.

    Attributes:
        waiting: requests without a row.
    """

    def __init__(self, rows: int) -> None:
        self.waiting: deque[Request] = deque()
        self._free = list(range(rows))
        self._coming: deque[_Coming] = deque()
        self._full = False  # a request waits for another to end

    def __bool__(self) -> bool:
        """Whether anything is still to be decoded."""
        return bool(self.waiting or self._coming)

    def wants(self, *, beside: bool) -> bool:
        """Whether `admit` has something to do."""
        return bool(self._coming) or self._may_ask(beside=beside)

    def _may_ask(self, *, beside: bool) -> bool:
        return bool(self._free and self.waiting) and not (self._full and beside)

    def admit(self, start: Start, *, beside: bool) -> list[Decoding]:
        """The sequences that can be decoded from now on.

        Args:
            start: begins to take sequences in.
            beside: others are decoding.

        Raises:
            ValueError: a request that the empty caches cannot hold.
        """
        fresh, found = self._ask(start, beside=beside), list[Decoding]()
        if fresh is not None and beside:  # a short one is read at once
            found += self._read(fresh, beside=True)
        if self._coming and beside:
            found += self._read(self._coming[0], beside=True)
            self._coming.rotate(-1)
        if fresh is not None:
            self._coming.append(fresh)
        if not beside:
            for coming in self._coming:
                while not coming.intake.done:
                    found += self._read(coming, beside=False)
            place = {one: i for coming in self._coming for i, one in enumerate(coming.asked)}
            found.sort(key=place.__getitem__)
        for coming in [coming for coming in self._coming if coming.intake.done]:
            self._coming.remove(coming)
            self._full |= bool(coming.left)
            self.waiting.extendleft(sequence.request for sequence in reversed(coming.left))
            self._free += [sequence.row for sequence in reversed(coming.left)]
        if fresh is not None and not (found or beside):
            raise ValueError(
                f"request {fresh.asked[0].request.id}: the caches have no room for it"
            )
        return found

    def leave(self, sequence: Decoding) -> None:
        """This one has ended."""
        self._free.append(sequence.row)
        self._full = False

    def _ask(self, start: Start, *, beside: bool) -> _Coming | None:
        """Begin with those there are rows for."""
        if not self._may_ask(beside=beside):
            return None
        asked = [
            Decoding(request, row, list(request.prompt_ids))
            for request, row in zip(self.waiting, reversed(self._free), strict=False)
        ]
        intake = start(asked)  # if that fails they go on waiting
        for sequence in asked:
            self.waiting.remove(sequence.request)
            self._free.remove(sequence.row)
        return _Coming(asked, intake, list(asked))

    def _read(self, coming: _Coming, *, beside: bool) -> list[Decoding]:
        """A pass; those that are read by it."""
        if coming.intake.done:
            return []
        found = list(coming.intake.read(beside=beside))
        for sequence in found:
            coming.left.remove(sequence)
        return found


class Unread:
    """The intake of a verifier that reads no prompts.

    Args:
        sequences: those there is room for.
        prefill: as in `Verifier.start`.
    """

    def __init__(self, sequences: Sequence[Decoding], prefill: Prefill) -> None:
        self._left, self._prefill = list(sequences), prefill

    @property
    def done(self) -> bool:
        return not self._left

    def read(self, *, beside: bool = False) -> list[Decoding]:
        read = self._prefill(self._left, PREFILL_CHUNK)
        found = [sequence for sequence in self._left if sequence in read]
        self._left = [sequence for sequence in self._left if sequence not in read]
        return found

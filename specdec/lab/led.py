"""A drafter that works on the host, where ranks share a target: it drafts on rank 0 alone, and the
others get its trees. It may then do whatever it likes: draw numbers, ask the clock or the network.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from specdec.observation import Observation
from specdec.protocols import Drafter, StepContext
from specdec.ranks import here
from specdec.request import Decoding
from specdec.tree import Acceptance, TokenTree


def led(drafter: Drafter) -> Drafter:
    """The drafter, led by rank 0 if it works on the host; itself if this process is alone."""
    if here().size == 1 or drafter.on_device:
        return drafter
    return cast(Drafter, Led(drafter))


class Led:
    """A drafter of which rank 0 alone is asked, for all ranks; else as the one that it stands
    for."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._ranks = drafter, here()
        self._leads = self._ranks.rank == 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def start(self, sequences: Sequence[Decoding]) -> Sequence[Decoding] | None:
        return self._told(sequences, self._drafter.start(sequences) if self._leads else None)

    def prefill(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding] | None:
        read = self._drafter.prefill(sequences, tokens) if self._leads else None
        return self._told(sequences, read)

    def _told(
        self, sequences: Sequence[Decoding], some: Sequence[Decoding] | None
    ) -> Sequence[Decoding] | None:
        """Those of them that rank 0 has named."""
        all_of_them = some is None
        places = [] if some is None else [sequences.index(sequence) for sequence in some]
        all_of_them, places = self._ranks.first((all_of_them, places))
        return None if all_of_them else [sequences[place] for place in places]

    def draft(self, context: StepContext) -> TokenTree:
        tree = self._ranks.first(self._drafter.draft(context) if self._leads else None)
        assert tree is not None
        return tree

    def read(self, rows: Tensor, tokens: Tensor, length: Tensor, seen: Observation) -> None:
        if self._leads:
            self._drafter.read(rows, tokens, length, seen)

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        if self._leads:
            self._drafter.commit(context, acceptance, seen)

    def finish(self, sequence: Decoding) -> None:
        if self._leads:
            self._drafter.finish(sequence)

    def forget(self) -> None:
        if self._leads:
            self._drafter.forget()

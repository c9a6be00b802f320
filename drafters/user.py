"""drafter=user: any Python function from tokens to continuations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index

from specdec.drafters.host import HostDrafter
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.request import Decoding

Function = Callable[[list[int]], Iterable[Sequence[int]]]
"""From the ids of prompt and output so far to continuations, the best first."""
HALVINGS = 100  # weights beyond that would be lost in float32


class UserFunction(HostDrafter):
    """Merges the continuations a function returns into a tree.

    Each weighs half as much as the one before it, so it outweighs all that come after it
    together: its tokens stand before theirs among siblings, and a budget (`tree=dynamic`) is
    spent on the first continuation, then on the next. (After the first hundred all weigh the
    same.) A continuation is cut where the tree ends.

    Args:
        function: called once for each sequence and step; no continuation at all is a legal answer.
        depth: longest continuation; None leaves it to the policy.
        candidates: children considered per node when they are sampled.

    Raises:
        ValueError: a setting out of range; while drafting, an answer that is not made of token ids
            of the target.
    """

    def __init__(
        self,
        *,
        function: Function,
        depth: int | None = None,
        candidates: int = 16,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        self.function = function
        self.vocab_size = 0
        self._read: dict[int, int] = {}  # tokens behind the last answer, by row

    def load(self, target: PagedLM, models: Models) -> None:
        self.vocab_size = target.vocab_size

    def match_length(self, sequence: Decoding) -> int:
        return self._read.get(sequence.row, 0)

    def propose(self, sequence: Decoding, levels: int) -> Iterator[tuple[Sequence[int], float]]:
        self._read[sequence.row] = 0
        paths = self.function(list(sequence.tokens))
        if not isinstance(paths, Iterable):
            raise self._wrong(paths, "must be continuations, [] for none")
        for place, path in enumerate(paths):
            ids = self._ids(path)
            if ids:
                self._read[sequence.row] = len(sequence.tokens)
                yield ids[:levels], 2.0 ** -min(place, HALVINGS)

    def _ids(self, path: Sequence[int]) -> list[int]:
        try:
            ids = [index(token) for token in path]
        except TypeError:
            raise self._wrong(path, "a continuation must be a sequence of token ids") from None
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise self._wrong(token, f"token ids must be from 0 to {self.vocab_size - 1}")
        return ids

    def _wrong(self, value: object, reason: str) -> ValueError:
        name = getattr(self.function, "__qualname__", None) or type(self.function).__qualname__
        return ValueError(f"{name} returned {value!r:.80}; {reason}")

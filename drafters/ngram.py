"""drafter=ngram: what followed the last time the text ended like this."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from specdec.drafters.host import HostDrafter
from specdec.drafters.matches import check_matches, reach, weight
from specdec.request import Decoding


class NGram(HostDrafter):
    """Longest suffix match over prompt and output, several matches merged into one tree.

    Every earlier place where the last `min_match` tokens stood is a match; the `matches` best of
    the most recent `SCANNED`, longer ones first, then later ones, give their continuations (Prompt
    Lookup Decoding, Saxena 2023, keeps one). A match counts twice as much as one a token shorter.

    Args:
        depth: longest continuation; None leaves it to the policy.
        min_match, max_match: shortest match that counts, and the length after which longer does
            not matter.
        matches: continuations merged into a tree.
        max_spec_factor: a match of n tokens is continued for at most `max_spec_factor` * n tokens:
            the longer the match, the further it can be trusted (SuffixDecoding, Oliaro et al.
            2025).
        candidates: children considered per node when they are sampled.

    Raises:
        ValueError: a setting out of range.
    """

    SCANNED = 64

    def __init__(
        self,
        *,
        depth: int | None = None,
        min_match: int = 1,
        max_match: int = 8,
        matches: int = 8,
        max_spec_factor: float = 2.0,
        candidates: int = 16,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        check_matches(min_match, max_match, max_spec_factor)
        if matches < 1:
            raise ValueError(f"drafter.matches={matches}: must be at least 1")
        self.min_match, self.max_match, self.matches = min_match, max_match, matches
        self.max_spec_factor = max_spec_factor
        self._index: dict[int, _Index] = {}  # by row

    def start(self, sequences: Sequence[Decoding]) -> None:
        for sequence in sequences:
            self._index[sequence.row] = _Index(self.min_match)

    def finish(self, sequence: Decoding) -> None:
        del self._index[sequence.row]

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        tokens = sequence.tokens
        ends = self._index[sequence.row].find(tokens)[-self.SCANNED :]
        found = [(self._match_length(tokens, end), end) for end in ends]
        self._index[sequence.row].matched = max(found, default=(0, 0))[0]
        for length, end in sorted(found, reverse=True)[: self.matches]:
            path = tokens[end : end + reach(length, levels, self.max_spec_factor)]
            yield path, weight(length)

    def match_length(self, sequence: Decoding) -> int:
        return self._index[sequence.row].matched

    def _match_length(self, tokens: Sequence[int], end: int) -> int:
        """How many tokens before `end` equal the last ones, up to `max_match`."""
        length = self.min_match
        while (
            length < min(self.max_match, end) and tokens[end - length - 1] == tokens[-length - 1]
        ):
            length += 1
        return length


class _Index:
    """Where each n-gram of a growing text ended."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self.indexed = n - 1  # n-grams that end up to here are in `ends`
        self.matched = 0  # the longest match of the last look-up

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Ends of the earlier places of the last n tokens, ascending; the text may have grown
        since the last call."""
        for end in range(self.indexed + 1, len(tokens)):
            self.ends[tuple(tokens[end - self.n : end])].append(end)
        self.indexed = max(self.indexed, len(tokens) - 1)
        return self.ends.get(tuple(tokens[-self.n :]), [])

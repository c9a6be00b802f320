"""A suffix automaton over a growing text, with counts of what followed."""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest

ROOT = 0
NO_STATE = -1
END = -1  # a token that is none: between two texts, and no continuation goes past it


class Automaton:
    """Every substring of a text leads to a state; substrings that end at the same places share
    one (Blumer et al. 1985). At most two states for each token. Several texts may follow one
    another, each closed by `END`.

    A state knows which tokens followed its substrings, how often, and where the text went on the
    last time. What ends the text has not been followed by anything yet: so the text's own end is
    never taken for an earlier occurrence of itself.

    Attributes:
        text: all tokens so far.
    """

    COUNTED = 64  # suffixes whose counts a new token brings up to date, longest first

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.text: list[int] = []
        self._end = ROOT  # state of the whole text
        # By state: the longest substring's length, the state of the longest shorter suffix that
        # ends at more places, the states and counts of what follows, where it last went on.
        self._length = [0]
        self._link = [NO_STATE]
        self._next: list[dict[int, int]] = [{}]
        self._times: list[dict[int, int]] = [{}]
        self._recent = [0]
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        here = len(self.text)
        new = self._new_state(here + 1, {}, {}, here + 1)
        state = self._end
        while state != NO_STATE and token not in self._next[state]:
            self._next[state][token] = new
            self._times[state][token] = 1
            if token != END:
                self._recent[state] = here
            state = self._link[state]
        # In a text that repeats one token every suffix has a state of its own, and bringing all of
        # them up to date for each token would take quadratic time: there the short ones lag
        # behind. In other texts there are a few.
        suffix = state
        for _ in range(self.COUNTED):
            if suffix == NO_STATE:
                break
            self._times[suffix][token] += 1
            if token != END:
                self._recent[suffix] = here
            suffix = self._link[suffix]
        self._link[new] = ROOT if state == NO_STATE else self._split(state, token)
        self.text.append(token)
        self._end = new

    def _split(self, state: int, token: int) -> int:
        """The state of the longest substring of `state`, followed by `token`: those that are
        longer, and now end at fewer places, keep the old one."""
        old, length = self._next[state][token], self._length[state] + 1
        if self._length[old] == length:
            return old
        copy = self._new_state(
            length, dict(self._next[old]), dict(self._times[old]), self._recent[old]
        )
        self._link[copy], self._link[old] = self._link[old], copy
        while state != NO_STATE and self._next[state].get(token) == old:
            self._next[state][token] = copy
            state = self._link[state]
        return copy

    def _new_state(
        self, length: int, following: dict[int, int], times: dict[int, int], recent: int
    ) -> int:
        self._length.append(length)
        self._link.append(ROOT)
        self._next.append(following)
        self._times.append(times)
        self._recent.append(recent)
        return len(self._length) - 1

    def match(self, context: Sequence[int], most: int) -> tuple[int, int]:
        """(state, length) of the longest suffix of `context`, up to `most` tokens, after which
        the text has gone on before; length 0 if there is none."""
        state, length = ROOT, 0
        for token in context[-most:]:
            while token not in self._next[state] and state != ROOT:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state = self._next[state][token]
                length += 1
        while state != ROOT and self._next[state].keys() <= {END}:
            state = self._link[state]
            length = self._length[state]
        return state, length

    def recent(self, state: int, reach: int) -> list[int]:
        """Up to `reach` tokens that followed a state's substrings the last time."""
        start = self._recent[state]
        path = self.text[start : start + reach]
        return path[: path.index(END)] if END in path else path

    def followed(self, state: int, reach: int, most: int) -> Iterator[tuple[list[int], int]]:
        """What followed a state's substrings: disjoint continuations and how often each came.

        The most frequent are followed first, of equals the latest, and up to `reach` tokens. At
        most `most` branchings are looked into, and as many continuations given beside what a
        branching leaves over. Where nothing is left out, every token of a trie of them has its
        exact count.
        """
        waiting: list[tuple[int, int, int, list[int]]] = [(0, 0, state, [])]  # ascending
        branchings = given = 0
        while waiting and given < most:
            left, _, state, path = waiting.pop()
            if left == 1:  # from here on there is nothing to choose
                given += 1
                path += self.recent(state, reach - len(path))
            elif len(path) < reach and branchings < most:
                branchings += 1
                times, following = self._times[state], self._next[state]
                # As many as may still be given; those that came up latest first.
                for token in nlargest(most - given, reversed(times), key=times.__getitem__):
                    target = following[token]
                    place = times[token], self._recent[target], target, [*path, token]
                    full = len(waiting) == most - given
                    if full and place < waiting[0]:
                        break
                    if token != END:
                        left -= times[token]
                        insort(waiting, place)
                        del waiting[: int(full)]
            else:
                given += 1
            if path and left > 0:  # ends of texts, and what was not looked into
                yield path, left

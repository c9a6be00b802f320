"""drafter=retriever: what followed where the text ended like this before: in itself, in earlier
outputs, in a datastore."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Literal

from specdec.drafters.automaton import END, Automaton
from specdec.drafters.datastore import Datastore, find_datastore
from specdec.drafters.host import HostDrafter
from specdec.drafters.matches import check_matches, reach, weight
from specdec.drafters.state import Memory, Reset, check_reset
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.request import Decoding

Found = list[tuple[Sequence[int], int]]
"""Continuations, and how often each was met."""


class Retriever(HostDrafter):
    """Looks for the longest suffix of the text in up to three sources and drafts what followed
    there.

    Settings make it the published methods, as far as what is looked for goes:

    - Prompt Lookup Decoding (Saxena 2023), `drafter=pld`: prompt and output, one continuation of
      the longest match. The latest one; public code takes the first in the text.
    - REST (He et al., NAACL 2024), `drafter=rest`: a datastore, continuations by frequency.
    - SuffixDecoding (Oliaro et al. 2025), `drafter=suffix_decoding`: prompt and output, and the
      outputs of earlier requests; by frequency, and further the longer the match.

    All sources meet in one trie. A continuation weighs its share of the source's, times two for
    each token of the source's match.

    Args:
        depth: longest continuation; None leaves it to the policy.
        min_match, max_match: shortest match that counts, and the length that is looked for at
            most.
        own_text: look in prompt and output.
        datastore: folder of a datastore to look in, of the target's tokenizer; None for none.
        reset: after what the outputs of earlier requests are forgotten, as in
            `drafters/state.py`; "prompt" keeps none.
        order: "frequency" drafts all continuations of a match, "recent" only the latest of each
            text. A datastore has no latest.
        samples: continuations of a match in a datastore, branchings looked into in a text.
        max_spec_factor: a match of n tokens is continued for at most `max_spec_factor` * n
            tokens; None for as many as the tree takes.
        candidates: children considered per node when they are sampled.

    Raises:
        ValueError: a setting out of range, no source at all, or a datastore that cannot be used.
    """

    def __init__(
        self,
        *,
        depth: int | None = None,
        min_match: int = 1,
        max_match: int = 16,
        own_text: bool = True,
        datastore: str | None = None,
        reset: Reset = "prompt",
        order: Literal["frequency", "recent"] = "frequency",
        samples: int = 32,
        max_spec_factor: float | None = 2.0,
        candidates: int = 16,
    ) -> None:
        super().__init__(depth=depth, candidates=candidates)
        check_matches(min_match, max_match, max_spec_factor)
        check_reset(reset)
        if order not in ("frequency", "recent"):
            raise ValueError(f"drafter.order={order}: must be frequency or recent")
        if samples < 1:
            raise ValueError(f"drafter.samples={samples}: must be at least 1")
        if not own_text and datastore is None and reset == "prompt":
            raise ValueError(
                "drafter.own_text=false: nowhere to look; give drafter.datastore or "
                "drafter.reset=never"
            )
        self.min_match, self.max_match, self.samples = min_match, max_match, samples
        self.own_text, self.order, self.max_spec_factor = own_text, order, max_spec_factor
        self.reset = reset
        self.folder = datastore
        self.datastore: Datastore | None = None
        self.vocab_size = 0
        self._history: Memory[Automaton] = Memory(reset, Automaton)
        self._own: dict[int, Automaton] = {}  # by row
        self._matched: dict[int, int] = {}  # by row

    def find(self) -> None:
        if self.folder is not None:
            find_datastore(self.folder)

    def load(self, target: PagedLM, models: Models) -> None:
        self.vocab_size = target.vocab_size
        if self.folder is not None:
            self.datastore = Datastore.open(self.folder, tokenizer=target.tokenizer)

    def start(self, sequences: Sequence[Decoding]) -> None:
        for sequence in sequences:
            self._own[sequence.row] = Automaton()

    def finish(self, sequence: Decoding) -> None:
        del self._own[sequence.row]
        self._matched.pop(sequence.row, None)
        if self.reset != "prompt" and sequence.output_ids:
            self._history.of(sequence).extend([*sequence.output_ids, END])

    def forget(self) -> None:
        self._history.clear()

    def match_length(self, sequence: Decoding) -> int:
        return self._matched.get(sequence.row, 0)

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        self._matched[sequence.row] = 0
        for length, found in self._found(sequence, levels):
            share = weight(length) / max(1, sum(count for _, count in found))
            for path, count in found:
                self._matched[sequence.row] = max(self._matched[sequence.row], length)
                yield path, share * count

    def _found(self, sequence: Decoding, levels: int) -> Iterator[tuple[int, Found]]:
        """For each source that has a match: its length, and what followed how often."""
        context = sequence.tokens[-self.max_match :]
        for text in self._texts(sequence):
            state, length = text.match(context, self.max_match)
            if length >= self.min_match:
                most = reach(length, levels, self.max_spec_factor)
                if self.order == "recent":
                    yield length, [(text.recent(state, most), 1)]
                else:
                    yield length, list(text.followed(state, most, self.samples))
        if self.datastore is not None:
            match = self.datastore.find(context, self.min_match, self.max_match)
            if match is not None:
                most = reach(match.length, levels, self.max_spec_factor)
                paths = self.datastore.continuations(match, most, self.samples)
                # Its tokenizer may have tokens that the target has no row for.
                known = (tuple(takewhile(self.vocab_size.__gt__, path)) for path in paths)
                yield match.length, [(path, 1) for path in known if path]

    def _texts(self, sequence: Decoding) -> Iterator[Automaton]:
        if self.own_text:
            own = self._own[sequence.row]
            own.extend(sequence.tokens[len(own.text) :])
            yield own
        if self.reset != "prompt":
            yield self._history.of(sequence)

"""Lane: the way of one method through the prompts of a run."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from specdec.evidence import evidence_line
from specdec.flight import Step
from specdec.lab.conversations import Conversations, number_of
from specdec.lab.energy import Meter
from specdec.lab.lines import tell
from specdec.lab.method import Method
from specdec.lab.progress import Live
from specdec.lab.prompts import Prompt, encode
from specdec.lab.records import Record, step_record
from specdec.lab.runs import Side
from specdec.lab.session import OurSession
from specdec.prefixes import Prefixes
from specdec.reasons import DraftError, LogitsError

if TYPE_CHECKING:
    from specdec.lab.experiment import Experiment

WARM_UP_TOKENS = 8


def ignore(step: Step) -> None:
    """What becomes of a step that nobody follows."""


class Lane:
    """Decodes prompts with one method, as far as its side of the folder does not hold them, and
    records what comes of it.

    The session is made for the first prompt that is decoded, and lasts until `close`: its caches
    take much memory.
    """

    def __init__(
        self,
        experiment: "Experiment",
        method: Method,
        side: Side,
        live: Live,
        on_step: Callable[[Step], None] = ignore,
    ) -> None:
        self.method, self.side, self.live = method, side, live
        self.notes: Record = {}  # of the session that is closed
        self.prefixes: Prefixes | None = None  # shared with lanes that it takes turns with
        self.unmeasured: str | None = None  # why its energy was not measured
        self._experiment, self._on_step = experiment, on_step
        self._session: OurSession | None = None
        self._meter: Meter | None = None
        self._before = 0  # steps of the side when the session was made

    def left(self, prompts: Sequence[Prompt]) -> Conversations:
        """What is still to be decoded of these prompts."""
        of = self._experiment
        return Conversations(
            of.target.tokenizer,
            prompts,
            vocab_size=of.target.vocab_size,
            samples=of.samples,
            chat=of.chat,
            max_new_tokens=of.max_new_tokens,
            finished=self.side.generations.records,
            marks=self.method.marks,
        )

    def decode(self, prompts: Sequence[Prompt]) -> None:
        """Decode what is left of these prompts.

        Raises:
            DraftError, LogitsError, ValueError: as `Decoder.run`.
        """
        queue = self.left(prompts)
        if not queue.open:
            return
        decoder, side = self.ready().decoder, self.side

        def record(step: Step) -> None:
            for tree in step.trees:
                side.trees.append(asdict(tree), flush=False)
            side.steps.append(step_record(step), flush=False)
            self._on_step(step)
            self.live.step(step)

        for generation in queue.begin(decoder):
            side.generations.append(generation)
        with self._meter.running() if self._meter else nullcontext():
            for sequence in decoder.run(on_step=record):
                if sequence.evidence:
                    side.evidence.append(evidence_line(sequence), flush=False)
                side.flush()
                for generation in queue.finish(decoder, sequence):
                    side.generations.append(generation)
                self.live.finished(len(sequence.output_ids))

    def close(self) -> None:
        """Give up the session, and note what it has used."""
        if self._session is not None:
            self.notes, self._session = self._session.notes(), None
        if self._meter is not None:
            decoded = self.side.steps.records[self._before :]
            used = self._meter.close(tokens=sum(sum(step["tokens"]) for step in decoded))
            self.unmeasured, self._meter = self._meter.reason, None
            if used is not None:
                self.side.energy.append(asdict(used))

    def ready(self) -> OurSession:
        """The session, which has decoded a few tokens that are not recorded, so that the first
        prompt does not pay for lazy set-up."""
        if self._session is not None:
            return self._session
        of = self._experiment
        session = of.session(self.method, prefixes=self.prefixes)
        for name, note in self.method.notes.items():
            tell(self.live.console, f"{name}: {note}")
        first = of.prompts[0]
        ids = encode(of.target.tokenizer, first, chat=of.chat)
        try:
            session.warm_up(ids, min(WARM_UP_TOKENS, of.max_new_tokens))
        except (DraftError, LogitsError) as error:
            error.requests = [number_of(first.index, 0, 0)]
            error.reason += ", while warming up"
            raise
        if of.record.energy:
            self._meter = Meter(of.target.device)
            self._meter.rest()
        self._session, self._before = session, len(self.side.steps.records)
        return session

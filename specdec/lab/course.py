"""Course: an experiment on its way, from the first prompt to the summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

import torch

from specdec.lab.baselines import Anchor, SharedBaseline
from specdec.lab.conversations import prompt_of
from specdec.lab.energy import energy_of, obstacle
from specdec.lab.lane import Lane
from specdec.lab.lines import tell
from specdec.lab.method import mark_of
from specdec.lab.progress import Live
from specdec.lab.records import Record
from specdec.lab.runs import RunFolder, Side, of_requests
from specdec.lab.tracking import Tracker, replay
from specdec.ranks import RanksError
from specdec.reasons import DraftError, FailedError, LogitsError, full

if TYPE_CHECKING:
    from specdec.lab.experiment import Experiment


class Course:
    """Decodes what the folder of a run does not hold yet, and writes its summary.

    Args:
        shared: plain decoding of the sweep it belongs to; None: it has its own.
    """

    def __init__(
        self,
        experiment: "Experiment",
        folder: RunFolder,
        tracker: Tracker,
        live: Live,
        shared: SharedBaseline | None = None,
    ) -> None:
        self.experiment, self.folder = experiment, folder
        self.main = Lane(experiment, experiment.method, folder.main, live, tracker.step)
        self._tracker, self._live = tracker, live
        self._own: Lane | None = None
        if experiment.baseline is not None and folder.baseline is not None:
            self._own = Lane(experiment, experiment.baseline, folder.baseline, live)
        self._shared = shared if self._own is not None else None
        self._anchor: tuple[Anchor, float] | None = None  # and its pace at the beginning
        self._decoded = False  # whether the shared one was decoded on its way, all of it
        self._facts: Record = {}  # of the baseline, for the summary
        self._resumed = False

    def run(self) -> Record:
        """All of it, one side after the other; see `Experiment.run`."""
        self.begin()
        with self.guarded():
            self._plain()
            self._decode(self.main, f"{mark_of(self.main.method.marks)} speculative".strip())
            self._settle()
        return self.finish()

    def in_turns(self, *, shared: bool) -> list[Lane]:
        """Its lanes, if others decode between its prompts.

        Args:
            shared: whether plain decoding that it shares with them is one of these.
        """
        self._facts["in_turns"] = True
        if self._own is None:
            return [self.main]
        if shared and self._shared is not None:
            self._facts["baseline_from"] = self._shared.seen_from(self.folder.path)
            return [self.main]
        if not self._own.side.generations.records:
            self._own.side.begin()
        return [self._own, self.main]

    def add_shared_prefill(self, tokens: int, seconds: float) -> None:
        """So much of its prompts was read for all that take turns, on no side's time."""
        known = self._facts.setdefault("shared_prefill", {"tokens": 0, "seconds": 0.0})
        known["tokens"] += tokens
        known["seconds"] += seconds

    def begin(self) -> None:
        """Write the settings, and say what is to be known of what goes on."""
        self.folder.begin()
        for what, own in self.experiment.own.items():
            if own:
                said = f"{', '.join(own)} {'is' if len(own) == 1 else 'are'}"
                self._tell(f"sampling: the model's own {said} {what.replace('_', ' ')}")
        finished = len(self.folder.main.generations.records)
        self._resumed = any(side.generations.records for side in self.folder.sides)
        reset = self.experiment.method.drafter.reset
        if finished and reset not in (None, "prompt"):
            self._tell(
                f"resumed: what the {finished} finished texts taught the drafter "
                f"(drafter.reset={reset}) is missing"
            )
        for note in self.folder.notes:
            self._tell(f"resumed: {note}")
        if self.experiment.record.energy and (why := obstacle(self.experiment.target.device)):
            self._tell(f"record.energy=true: energy is not measured, {why}")
        replay(self.folder.main.steps.records, self._tracker)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever ends it within, what is finished gets its summary.

        Raises:
            FailedError: the drafter failed, ranks have parted, or the memory of the GPU is full.
            ValueError: the target's logits are NaN.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.finish(interrupted=True)
            raise
        except RanksError as error:
            self.finish(interrupted=True)
            raise FailedError(f"{error}; {self._left}") from error
        except torch.OutOfMemoryError as error:
            self.finish(interrupted=True)
            own = self.experiment
            mend = f"lower batch_size={own.batch_size}, max_new_tokens={own.max_new_tokens}"
            mend += f" or trees of up to {own.method.tree.budget} nodes"
            raise full(error, f"{mend}; {self._left}") from error
        except (DraftError, LogitsError) as error:
            path = self.folder.write_error(error)
            self.finish(interrupted=True)
            said = f"{self._blame(error)}; the traceback is in {path}, and "
            if isinstance(error, LogitsError):  # it would fail again
                raise ValueError(said + self._left) from error
            said += f"resume=true out={self.folder.path} continues"
            raise FailedError(said) from error

    @property
    def _left(self) -> str:
        if not self.folder.finished:
            return "no text is finished"
        return f"{self.folder.finished} finished texts are in {self.folder.path}"

    def finish(self, *, interrupted: bool = False) -> Record:
        """The summary, written."""
        self.main.close()
        mine, folder = self.experiment, self.folder
        plain = self._plain_records()
        summary = mine.summarise(folder.main, plain)
        summary |= {"resumed": self._resumed, "interrupted": interrupted}
        summary |= self.main.notes | self._facts
        self._add_energy(summary)
        folder.write_summary(summary)  # whatever becomes of the check, which takes passes
        said = [] if (side := self._plain_side()) is None else side.evidence.records
        summary["lossless"] = mine.check(folder.main, plain, said, interrupted=interrupted)
        if not interrupted:
            summary["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
        folder.write_summary(summary)
        self._tracker.finish(summary, folder.main.generations.records)
        return summary

    def _add_energy(self, summary: Record) -> None:
        if not self.experiment.record.energy:
            return
        summary |= energy_of(self.folder.main.energy.records, self.main.unmeasured)
        if (plain := self._plain_side()) is not None and self._own is not None:
            why = self._own.unmeasured or self.main.unmeasured
            summary["baseline"] |= energy_of(plain.energy.records, why)

    def _plain_side(self) -> Side | None:
        """Where plain decoding is recorded."""
        if self._own is None:
            return None
        shared = self._shared if "baseline_from" in self._facts else None
        return self._own.side if shared is None else shared.side

    def _plain_records(self) -> tuple[list[Record], list[Record]] | None:
        """Generations and steps of plain decoding, of the same prompts."""
        side = self._plain_side()
        if side is None or self._own is None:
            return None
        if side is self._own.side:
            return side.generations.records, side.steps.records
        known = {record["prompt"] for record in self.folder.main.generations.records}
        known |= {prompt.index for prompt in self.experiment.prompts}
        kept = [one for one in side.generations.records if one["prompt"] in known]
        return kept, of_requests(side.steps.records, {one["request"] for one in kept})

    def _tell(self, text: str) -> None:
        tell(self._live.console, text)

    def _blame(self, error: DraftError | LogitsError) -> str:
        """What failed on which prompts, and why, in one line."""
        target = self.experiment.target
        ids = {prompt.index: prompt.id for prompt in self.experiment.prompts}
        failed = dict.fromkeys(ids[prompt_of(request)[0]] for request in error.requests)
        which, reason = ", ".join(failed), " ".join(error.reason.split())
        if isinstance(error, LogitsError):
            return f"{target.name}: prompt {which}, {reason}: {target.not_finite}"
        prompts = "prompt" if len(failed) == 1 else "one of prompts"
        return f"drafter={error.drafter} failed on {prompts} {which}: {reason}"

    def _decode(self, lane: Lane, title: str) -> None:
        prompts, most = self.experiment.prompts, self.experiment.max_new_tokens
        longest = max(prompt.max_new_tokens or most for prompt in prompts)
        turns = lane.left(prompts).turns
        if turns:
            try:
                lane.ready()
                with self._live.side(title, turns, longest):
                    lane.decode(prompts)
            finally:
                lane.close()

    # Plain decoding: its own, or that of the sweep

    def _plain(self) -> None:
        if self._own is None:
            return
        if self._shared is None or self._own.side.generations.records or not self._share():
            self._decode_own()

    def _decode_own(self) -> None:
        assert self._own is not None
        if not self._own.side.generations.records:  # else the folder has begun it
            self._own.side.begin()
        self._decode(self._own, "baseline")

    def _share(self) -> bool:
        """Whether the sweep's plain decoding serves; decodes what is missing of it."""
        assert self._shared is not None
        assert self.experiment.baseline is not None
        shared, anchor = self._shared, Anchor(self.experiment)
        pace = anchor.measure()
        with shared.held(self._tell) as alone:
            if not alone:
                self._tell(
                    "baseline: another host decodes that of the sweep; this run has its own"
                )
                return False
            lane = Lane(self.experiment, self.experiment.baseline, shared.side, self._live)
            if lane.left(self.experiment.prompts).open:
                before = shared.reference
                if before is None and shared.side.generations.records:
                    return self._other("was not measured in a process of its own")
                if before is not None and not before.fits(anchor, pace):
                    return self._other("was decoded at another pace")
                shared.side.begin()
                self._decode(lane, "baseline")
                shared.measured(before, anchor, pace)
                self._decoded = before is None  # as a run without a sweep does
            reference = shared.reference
        fits = reference is not None and reference.fits(anchor, pace)
        if not (fits or self._decoded):
            return self._other("was decoded at another pace, or on another machine")
        self._anchor = anchor, pace
        self._facts["baseline_from"] = shared.seen_from(self.folder.path)
        return True

    def _other(self, reason: str) -> bool:
        self._tell(f"baseline: that of the sweep {reason}; this run decodes its own")
        self._facts["anchor"] = {"used": False, "reason": reason}
        return False

    def _settle(self) -> None:
        """Whether the sweep's plain decoding has kept its pace to the end."""
        if self._anchor is None or self._shared is None:
            return
        anchor, before = self._anchor
        after, reference = anchor.measure(), self._shared.reference
        assert reference is not None
        kept = self._decoded or reference.fits(anchor, before, after)
        self._facts["anchor"] = {
            "used": kept,
            "seconds": [before, after],
            "reference": reference.seconds,
            **({} if kept else {"reason": "the pace has changed meanwhile"}),
        }
        if not kept:
            del self._facts["baseline_from"]
            self._tell(
                "baseline: the machine's pace has changed meanwhile; this run decodes its own"
            )
            self._decode_own()

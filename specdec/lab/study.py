"""Study: methods decode the same prompts, in turns or one after the other, and what they take is
written as they go.

    shop = Workshop("target=zoo", "sampling.temperature=0")
    study = Study(entries=result["methods"], batches=batches, turn=spend(new=64),
                  target=shop.target, save=partial(write, path, result))
    study.in_turns({name_of(w): shop.way(w, rows=1, longest=512) for w in METHODS})
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich.progress import track

from specdec.lab.fingerprints import digest
from specdec.lab.lossless import compare
from specdec.lab.metrics import by_source
from specdec.lab.prompts import Asked
from specdec.lab.records import step_record
from specdec.lab.session import Decoded, Session
from specdec.lab.witness import Witness
from specdec.lab.workshop import Way
from specdec.models.paged import PagedLM
from specdec.reasons import full

Entry = dict[str, Any]  # what a result file has of a method
Turn = Callable[[Session, Sequence[Asked], Entry], Decoded]

SEEDS_APART = 1000  # of the repeats of a prompt
NOTHING_COMPARED: Entry = {"checked": 0, "left_out": 0, "identical": 0, "divergences": []}


def spend(new: int) -> Turn:
    """A turn that decodes and writes what each prompt took: tokens, a hash of them, steps and the
    seconds of all steps, prefill left out; and verbs and sources of all prompts."""

    def turn(session: Session, batch: Sequence[Asked], entry: Entry) -> Decoded:
        done = session.decode(batch, new)
        prompts, verbs, sources = (
            entry.setdefault(name, {}) for name in ("prompts", "verbs", "sources")
        )
        entry.setdefault("agreement", copy.deepcopy(NOTHING_COMPARED))
        spent = sum(seconds for verb, seconds in done.verbs.items() if verb != "prefill")
        for asked, output, steps in zip(batch, done.outputs, done.passes, strict=True):
            seconds = spent / len(batch)
            prompts[asked.name] = {
                "tokens": len(output),
                "text": digest(output),
                "steps": steps,
                "seconds": seconds,
            }
        add(verbs, done.verbs)
        for name, total in by_source(map(step_record, done.steps)).items():
            drafted, accepted = sources.get(name, (0, 0))
            sources[name] = [drafted + total["drafted"], accepted + total["accepted"]]
        return done

    return turn


def add(total: Entry, more: Mapping[str, Any]) -> None:
    """Add up, name by name."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def give_up(entry: Entry, fault: Exception) -> None:
    """What becomes of a fault if a study says nothing else: the study ends."""
    if isinstance(fault, torch.OutOfMemoryError):
        mend = "those that take turns are held together: lower batch, or name fewer at a time"
        raise full(fault, mend) from fault
    raise fault


@dataclass(kw_only=True)
class Study:
    """Prompts that methods decode, and what comes of it.

    What an entry of an earlier run holds stays, if it is of the same settings and prompts.

    Args:
        entries: of a result file, by method. Beside what the turns write each has `rounds`, how
            many it has taken, `mark`, a hash of its settings and prompts, and the notes of its
            session.
        batches: what is decoded together.
        turn: what a method does with a batch, and writes of it.
        target: the target model.
        save: called after every round.
        repeats: of all batches, each with random numbers of its own.
        plain: the method whose outputs those of the others are compared to, in the first repeat;
            none if empty.
        fault: may note what a method has raised, which is then left out; or raise it.
        warm: whether sessions are warmed up, as is due where times are of interest.
    """

    entries: dict[str, Entry]
    batches: Sequence[Sequence[Asked]]
    turn: Turn
    target: PagedLM
    save: Callable[[], None]
    repeats: int = 1
    plain: str = ""
    fault: Callable[[Entry, Exception], None] = give_up
    warm: bool = True
    _outputs: dict[str, list[int]] = field(default_factory=dict, init=False)  # of plain, by prompt

    def in_turns(self, ways: Mapping[str, Way]) -> None:
        """Measure batch by batch, the methods in turns, of which none is always the first.

        They go on where they stopped, all together, or begin again if one is new, has changed or
        learns from prompt to prompt.
        """
        if list(self.entries) != list(ways):
            self.entries.clear()
        self._take_turns(ways)

    def one_by_one(self, ways: Mapping[str, Way]) -> None:
        """Measure one method after the other; those of equal settings once."""
        missing = [
            name
            for name, way in ways.items()
            if not self._finished(self.entries.get(name, {}), way)
        ]
        if missing and self.plain in ways:
            self.entries[self.plain] = {}  # its outputs are in no file
            missing = list(dict.fromkeys([self.plain, *missing]))
        for name in track(missing, description="methods"):
            way = ways[name]
            twin = next((one for one in self.entries.values() if self._finished(one, way)), None)
            if twin is None:
                self._take_turns({name: way})
            else:
                self.entries[name] = copy.deepcopy({**twin, **way.entry})
                self.save()

    def _finished(self, entry: Entry, way: Way) -> bool:
        return entry.get("mark") == self._mark(way) and entry["rounds"] == len(self._rounds)

    @property
    def _rounds(self) -> list[tuple[int, Sequence[Asked]]]:
        return [(repeat, batch) for repeat in range(self.repeats) for batch in self.batches]

    def _take_turns(self, ways: Mapping[str, Way]) -> None:
        first, rounds = self._begin(ways), self._rounds
        sessions = self._sessions(ways) if first < len(rounds) else {}
        for number, (repeat, batch) in enumerate(rounds[first:], first):
            asked = [one._replace(id=one.id + SEEDS_APART * repeat) for one in batch]
            names = list(sessions)
            start = number % max(1, len(names))
            done: dict[str, Decoded] = {}
            for name in names[start:] + names[:start]:
                try:
                    done[name] = self.turn(sessions[name], asked, self.entries[name])
                except Exception as fault:
                    self.fault(self.entries[name], fault)
                    del sessions[name]
            if repeat == 0:
                self._compare(batch, done)
            for name, session in sessions.items():
                self.entries[name].update(session.notes(), rounds=number + 1)
            self.save()

    def _begin(self, ways: Mapping[str, Way]) -> int:
        """How many rounds have been taken; entries of methods that begin again are empty."""
        known = [self.entries.get(name, {}) for name in ways]
        marks = {name: self._mark(way) for name, way in ways.items()}
        first: int = max((entry.get("rounds", 0) for entry in known), default=0)
        same = [entry.get("mark") for entry in known] == list(marks.values())
        remembers = any(way.state not in (None, "prompt") for way in ways.values())
        if same and (first >= len(self._rounds) or not remembers):
            return first
        for name, way in ways.items():
            self.entries[name] = {**copy.deepcopy(way.entry), "mark": marks[name], "rounds": 0}
        return 0

    def _sessions(self, ways: Mapping[str, Way]) -> dict[str, Session]:
        """Warmed up, without those that have failed."""
        longest = max((asked.tokens for batch in self.batches for asked in batch), key=len)
        sessions = {}
        for name, way in ways.items():
            entry = self.entries[name]
            if "fault" in entry:
                continue
            begun = time.perf_counter()
            try:
                session = way.make()
                if self.warm:
                    session.warm_up(longest)
            except Exception as fault:
                self.fault(entry, fault)
                continue
            sessions[name] = session
            entry["warm_up_seconds"] = time.perf_counter() - begun
        return sessions

    def _compare(self, batch: Sequence[Asked], done: Mapping[str, Decoded]) -> None:
        """Outputs with those of plain decoding."""

        def records(outputs: Iterable[list[int]]) -> list[Entry]:
            return [
                {"prompt": a.name, "sample": 0, "turn": 0, "prompt_ids": a.tokens, "output_ids": o}
                for a, o in zip(batch, outputs, strict=True)
            ]

        if self.plain in done:
            outputs = done[self.plain].outputs
            self._outputs.update(zip((one.name for one in batch), outputs, strict=True))
        if not all(one.name in self._outputs for one in batch):
            return
        plain = records(self._outputs[one.name] for one in batch)
        for name in done.keys() - {self.plain}:
            total = self.entries[name].setdefault("agreement", copy.deepcopy(NOTHING_COMPARED))
            add(total, compare(records(done[name].outputs), plain, Witness(self.target)))

    def _mark(self, way: Way) -> str:
        return digest([way.settings, self._prompts])

    @cached_property
    def _prompts(self) -> str:
        return digest(self.batches)

"""Plain decoding that the jobs of a sweep share: its texts always, its times as long as the
machine keeps its pace."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.lab.environment import describe_environment
from specdec.lab.files import read_object, replace_file, to_json
from specdec.lab.fingerprints import digest
from specdec.lab.identity import Identity
from specdec.lab.lock import Lock, TakenError
from specdec.lab.prompts import Asked, encode
from specdec.lab.runs import Side
from specdec.lab.statistics import PACE

if TYPE_CHECKING:
    from specdec.lab.experiment import Experiment

FOLDER = "baselines"  # in that of the sweep
PROMPTS, PROMPT_TOKENS, TOKENS = 3, 512, 32  # of an anchor; of each prompt the first so many
PAUSE = 0.5  # seconds between two looks whether another job is done


class Anchor:
    """A little plain decoding at the batch size of a run. Its pace tells whether times of another
    hour, or of another process, are those of this one."""

    def __init__(self, experiment: "Experiment") -> None:
        assert experiment.baseline is not None
        count = max(PROMPTS, experiment.batch_size)
        prompts = [experiment.prompts[i % len(experiment.prompts)] for i in range(count)]
        tokenizer, chat = experiment.target.tokenizer, experiment.chat
        self._asked = [
            Asked(i, prompt.id, encode(tokenizer, prompt, chat=chat)[:PROMPT_TOKENS])
            for i, prompt in enumerate(prompts)
        ]
        room = experiment.target.max_context - max(len(one.tokens) for one in self._asked)
        self._new = min(TOKENS, room)
        longest = max(len(one.tokens) for one in self._asked) + self._new
        self._session = experiment.session(experiment.baseline, longest=longest, stops=False)
        self._session.warm_up(self._asked[0].tokens, 2)
        environment = describe_environment(experiment.target.device)
        self.state = {
            "hardware": environment["hardware"],
            "versions": environment["versions"],
            "work": digest([experiment.batch_size, self._new, self._asked]),
        }

    def measure(self) -> float:
        """Seconds of a step: the median, prefill left out."""
        steps = self._session.decode(self._asked, self._new).steps
        return statistics.median(
            sum(seconds for verb, seconds in step.seconds.items() if verb != "prefill")
            for step in steps
        )


def steady(*seconds: float) -> bool:
    """Whether all of these are the same pace."""
    return max(seconds) <= min(seconds) * (1 + PACE)


@dataclass(slots=True, kw_only=True)
class Reference:
    """The pace at which a shared baseline was decoded.

    Args:
        seconds: of a step of the anchor, before and after.
        state: hardware, versions and work that it was measured with.
    """

    seconds: list[float]
    state: dict[str, Any]

    def fits(self, anchor: Anchor, *seconds: float) -> bool:
        """Whether an anchor goes at that pace."""
        return self.state == anchor.state and steady(*self.seconds, *seconds)


class SharedBaseline:
    """The records of plain decoding in `FOLDER` of a sweep, named by `Identity.baseline`.

    Args:
        sweep: the sweep's folder.
        identity: of any of the runs that share it.
    """

    def __init__(self, sweep: Path, identity: Identity) -> None:
        self.folder = sweep / FOLDER / identity.baseline
        self.side = Side(self.folder)

    def seen_from(self, run: Path) -> str:
        """Where it is, from the folder of a run."""
        return os.path.relpath(self.folder, run)

    @contextmanager
    def held(self, tell: Callable[[str], None]) -> Iterator[bool]:
        """Read it, and be the only one to go on with it meanwhile; waits for a job that is at it.
        Yields False if another host may be at it, which cannot be waited for."""
        lock, told = None, False
        while lock is None:
            try:
                lock = Lock(self.folder / "lock", f"out={self.folder}")
            except TakenError as error:
                if not error.sure:
                    break
                if not told:
                    tell(f"waits for the baseline: {error}")
                told = True
                time.sleep(PAUSE)
        try:
            if lock is not None:
                self.side.read()
            yield lock is not None
        finally:
            self.side.close()
            if lock is not None:
                lock.release()

    @property
    def reference(self) -> Reference | None:
        """None: nothing was measured, as in turns, or it cannot be read."""
        found = read_object(self.folder / "anchor.json") or {}
        seconds, state = found.get("seconds"), found.get("state")
        if not isinstance(seconds, list) or not isinstance(state, dict):
            return None
        if not all(isinstance(one, int | float) for one in seconds):
            return None
        return Reference(seconds=seconds, state=state)

    def measured(self, before: Reference | None, anchor: Anchor, pace: float) -> None:
        """Note the pace at which it was decoded: that of the anchor until then, and now."""
        seconds = [*(before.seconds if before else ()), pace, anchor.measure()]
        record = {"seconds": seconds, "state": anchor.state}
        replace_file(self.folder / "anchor.json", to_json(record, indent=1) + "\n")

"""Texts of a finished run, to be recorded instead of decoding some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.compare.read import METHOD, Run, group_of, is_run, read
from specdec.compare.sums import lines_of
from specdec.compare.words import words_of
from specdec.lab.conversations import number_of
from specdec.lab.files import read_object
from specdec.lab.identity import IDENTITY, Identity
from specdec.lab.prompts import Prompt

# What may be otherwise: it changes neither the law of texts nor what is asked.
FREE = (*METHOD, "seed", "kernels", "cache", "batch_size", "device")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run whose texts follow the target's law.

    Args:
        texts: tokens by request.
    """

    run: Run
    texts: dict[int, list[int]]

    @classmethod
    def read(cls, folder: Path) -> "Finished":
        """Raise ValueError for a folder without such a run."""
        if not is_run(folder):
            raise ValueError(f"run={folder}: holds no run; name the folder of a finished one")
        run = read(folder, str(folder), None, {})
        if run.unverified or not run.summary:
            raise ValueError(f"run={folder}: is not finished; continue it with resume=true")
        if run.mark:
            raise ValueError(
                f"run={folder}: is {run.mark}, so that its texts are not the target's; record "
                f"without run"
            )
        names = ("request", "output_ids")
        lines = lines_of(folder / "generations.jsonl", names)
        return cls(run=run, texts={one["request"]: one["output_ids"] for one in lines})

    def words(self, given: Sequence[str]) -> list[str]:
        """Settings of the run, less its tree and rule and what is given anew, then those given."""
        anew = {word.partition("=")[0] for word in given} | set(METHOD[1:])
        own = [w for w in words_of(self.run) if w.partition("=")[0].partition(".")[0] not in anew]
        return [*own, *given]

    def check(self, identity: Identity, prompts: Sequence[Prompt], samples: int) -> None:
        """Raise ValueError for settings of other texts than these, or prompts without one."""
        parts = (read_object(self.run.folder / IDENTITY) or {})["parts"]
        names = [
            name
            for name in identity.differences({**parts, "code": identity.code})
            if group_of(name.removeprefix("contents of ")) not in FREE
        ]
        if names:
            raise ValueError(
                f"run={self.run.folder}: differs in {', '.join(names)}; leave that as it was, or "
                f"record without run"
            )
        asked = [
            number_of(prompt.index, sample, turn)
            for prompt in prompts
            for sample in range(samples)
            for turn in range(len(prompt.turns))
        ]
        missing = sum(number not in self.texts for number in asked)
        if missing:
            raise ValueError(
                f"run={self.run.folder}: {missing} of {len(asked)} texts are missing; continue it "
                f"with resume=true, or lower prompts.limit"
            )

"""Records on disk: lines of JSON that are complete or not there."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError, field_validator

from specdec.evidence import numbers_in
from specdec.flight import Step
from specdec.lab.files import replace_file, to_json, writing
from specdec.reasons import first_line
from specdec.tree_records import TreeRecord

Record = dict[str, Any]
TRACKING = "tracking.json"  # by what trackers know a run


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """What a run records besides texts and steps.

    Args:
        trees: of the first so many steps of each text, the tree.
        energy: what the GPU uses.
        evidence: what the verifying pass said where each token was chosen.

    Raises:
        ValueError: a setting out of range.
    """

    trees: int = 0
    energy: bool = False
    evidence: bool = False

    def __post_init__(self) -> None:
        if self.trees < 0:
            raise ValueError(f"record.trees={self.trees}: must be 0 (none) or a number of steps")


class GenerationLine(BaseModel):
    """What a line of generations.jsonl must have; it may have more."""

    request: int
    prompt: int
    sample: int
    turn: int
    id: str
    category: str | None
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    finish_reason: str
    tokens: int
    steps: int
    drafted: int
    accepted_lengths: list[int] = []


class EvidenceLine(BaseModel):
    """What a line of evidence.jsonl has."""

    request: int
    row: int
    numbers: str

    @field_validator("numbers")
    @classmethod
    def _whole(cls, letters: str) -> str:
        numbers_in(letters)
        return letters


def _even(step: Step) -> Step:
    lists = step.requests, step.nodes, step.depths, step.accepted, step.tokens
    if len({len(values) for values in lists}) > 1:
        raise ValueError("its lists have different lengths")
    return step


Kind = TypeAdapter[Any]  # of the lines of a file
GENERATIONS: Kind = TypeAdapter(GenerationLine)
STEPS: Kind = TypeAdapter(Annotated[Step, AfterValidator(_even)])
TREES: Kind = TypeAdapter(TreeRecord)
EVIDENCE: Kind = TypeAdapter(EvidenceLine)


def step_record(step: Step) -> Record:
    """As a line of steps.jsonl, which has no trees; without sources, if there are none to tell
    apart."""
    record = asdict(replace(step, trees=[]) if step.trees else step)
    left_out = ["trees"] if any(step.sources) else ["trees", "sources"]
    return {name: value for name, value in record.items() if name not in left_out}


class RecordFile:
    """A JSON-lines file that is appended to, each line complete on disk before the next begins.

    Args:
        kind: of its lines.
        lost: what becomes of what a line was about, if it is deleted.
        kept: whether lines stay in memory, as `records`.

    Its methods raise ValueError if the file cannot be written, a disk being full.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        *,
        lost: str = "its text is decoded again",
        kept: bool = True,
    ) -> None:
        self.path, self.kind, self.lost, self.kept = path, kind, lost, kept
        self.records: list[Record] = []
        self._file: TextIO | None = None

    def read(self) -> None:
        """Take over what the file holds, if there is one.

        Raises:
            ValueError: a line that is no record.
        """
        self.records = self._lines() if self.path.exists() else []

    def append(self, record: Record, *, flush: bool = True) -> None:
        """Add a line; without `flush` it may reach the disk later."""
        with writing(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(to_json(record) + "\n")
            if flush:
                self._file.flush()
        if self.kept:
            self.records.append(record)

    def flush(self) -> None:
        if self._file is not None:
            with writing(self.path):
                self._file.flush()

    def rewrite(self, records: list[Record]) -> None:
        """Replace the contents."""
        self.close()
        self.records = records if self.kept else []
        lines = [to_json(record) + "\n" for record in records]
        replace_file(self.path, "".join(lines))

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with writing(self.path):
                file.close()

    def _lines(self) -> list[Record]:
        """The complete lines of the file. A last line that a crash has cut off is dropped, and so
        are zeros, which some file systems leave in place of what they had not written yet."""
        lines = self.path.read_bytes().rstrip(b"\0").split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                self.kind.validate_json(line, strict=True)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is no record, {_reason(error)}; delete it, and "
                    f"{self.lost}"
                ) from None
            records.append(record)
        return records


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*map(str, first["loc"][:1]), first["msg"]])
    return first_line(error)

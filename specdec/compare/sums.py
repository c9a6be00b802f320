"""What a run has spent on each conversation: all turns and samples of one prompt together."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from specdec.lab.prompts import prompt_hash
from specdec.lab.repetition import degenerate
from specdec.reasons import first_line

Record = Mapping[str, Any]


class Conversation(NamedTuple):
    """A prompt by what was asked: `mark` is a hash of the tokens of its first turn."""

    category: str
    id: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.category}/{self.id}" if self.category else self.id


@dataclass(slots=True)
class Sums:
    """Of one conversation, or several.

    Args:
        texts: how many, of which `decoded` had a step; `loops` are degenerate.
        tokens, steps, drafted: tokens, steps of the sequences, nodes.
        lengths: sum of the accepted lengths of the decoded texts.
        loop_tokens, loop_steps: of the degenerate texts.
        verbs: seconds; a step's time belongs in equal parts to its sequences.
        passes: of the target, shared out likewise.
        depths: how often a tree of that depth had a path of that length accepted.
        expected_seconds: of replayed methods, by a cost table; their steps and nodes are expected
            ones as well.
    """

    texts: int = 0
    decoded: int = 0
    loops: int = 0
    tokens: int = 0
    steps: float = 0
    drafted: float = 0
    lengths: float = 0.0
    loop_tokens: int = 0
    loop_steps: float = 0
    passes: float = 0.0
    verbs: Counter[str] = field(default_factory=Counter)
    depths: Counter[tuple[int, int]] = field(default_factory=Counter)
    expected_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.verbs.values())

    def add(self, other: "Sums") -> None:
        for name in self.__slots__:
            mine, more = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, name, mine + more)


def total(parts: Iterable[Sums]) -> Sums:
    """All of them together."""
    found = Sums()
    for part in parts:
        found.add(part)
    return found


def read_side(folder: Path, *, plain: bool = False) -> dict[Conversation, Sums]:
    """What generations.jsonl and steps.jsonl say of each conversation, as far as they were
    written: of texts without all their steps nothing counts.

    Args:
        plain: it is plain decoding, of which depths are not asked for.

    Raises:
        ValueError: a file is missing, or a line in it is broken.
    """
    records = list(lines_of(folder / "generations.jsonl", ("request", "prompt", "turn", "tokens")))
    names = {one["prompt"]: _conversation(one) for one in records if not one["turn"]}
    texts = {one["request"]: one for one in records if one["prompt"] in names}
    sums = {request: _of_text(one) for request, one in texts.items()}
    seen = Counter[int]()
    for step in lines_of(folder / "steps.jsonl", ("requests", "seconds", "depths", "accepted")):
        requests, seconds = step["requests"], step["seconds"]
        share = 1.0 / len(requests) if requests else 0.0
        for place, request in enumerate(requests):
            own = sums.get(request)
            if own is None:
                continue
            seen[request] += 1
            own.passes += share
            for verb, spent in seconds.items():
                own.verbs[verb] += spent * share
            if not plain:
                own.depths[step["depths"][place], step["accepted"][place]] += 1
    found: defaultdict[Conversation, Sums] = defaultdict(Sums)
    for request, one in texts.items():
        if seen[request] == one["steps"]:
            found[names[one["prompt"]]].add(sums[request])
    return dict(found)


def replayed_sums(
    conversations: Sequence[Record], row: Mapping[str, Any]
) -> dict[Conversation, Sums]:
    """What a replay expects of each conversation. Of a text its own accepted length is not known,
    for that of expected steps is another."""
    spent = row.get("seconds") or [0.0] * len(conversations)
    every = zip(conversations, row["steps"], row["nodes"], spent, strict=True)
    return {
        Conversation(one["category"], one["id"], one["mark"]): Sums(
            texts=one["texts"],
            tokens=one["tokens"],
            steps=steps,
            drafted=nodes,
            expected_seconds=seconds,
        )
        for one, steps, nodes, seconds in every
    }


def _of_text(text: Record) -> Sums:
    """What its own line says."""
    tokens, steps, loops = text["tokens"], text["steps"], degenerate(text)
    return Sums(
        texts=1,
        decoded=int(steps > 0),
        loops=int(loops),
        tokens=tokens,
        steps=steps,
        drafted=text["drafted"],
        lengths=tokens / steps if steps else 0.0,
        loop_tokens=tokens * loops,
        loop_steps=steps * loops,
    )


def _conversation(text: Record) -> Conversation:
    mark = text.get("prompt_hash") or prompt_hash(text["prompt_ids"])  # older runs have none
    return Conversation(text["category"] or "", text["id"], mark)


def lines_of(path: Path, names: tuple[str, ...]) -> Iterator[Record]:
    """The complete lines of a file one by one, each with these fields. What a crash has left of a
    last one is none.

    Raises:
        ValueError: the file cannot be read, or a line is broken.
    """
    try:
        whole = path.read_bytes().rstrip(b"\0").split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read, {error.strerror}; put it back, or leave the run out"
        ) from None
    wanted = set(names)
    for number, line in enumerate(whole, start=1):
        try:
            record = from_json(line)
            if not wanted <= record.keys():
                raise ValueError(f"it has not all of {', '.join(names)}")
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: line {number} is no record, {first_line(error)}; leave the "
                f"run out, or delete the line and continue the run with resume=true"
            ) from None
        yield record

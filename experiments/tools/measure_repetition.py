"""How many texts are degenerate, as `specdec.lab.repetition` has it: of people's, and of runs?

    python -m specdec.experiments.tools.measure_repetition out=repetition.json \\
        texts=[gsm8k.jsonl:answer,humaneval.jsonl:canonical_solution] runs=[outputs/a,outputs/b]

Texts are those of a field of a `.jsonl` file, a text or a list of them in each record. They are
cut into stretches of so many tokens, up to `most` of each text; of runs, whose texts loop towards
their ends, the first tokens count. Shorter texts are left out.

The file:

    sources[].source, .length       a file with its field or the folder of a run; tokens
    sources[].stretches             how many there are
    sources[].degenerate            how many of them are
    sources[].distinct_bigrams      quantiles .05, .5, .95
    sources[].longest_loop          quantiles .5, .95, .99, 1
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from specdec.experiments.figures.markdown import piece, show
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.lab.repetition import degenerate, repetition
from specdec.models.load import zoo_path

BIGRAMS, LOOPS = (0.05, 0.5, 0.95), (0.5, 0.95, 0.99, 1.0)  # quantiles


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this program."""

    texts: tuple[str, ...] = option((), "FILE:FIELD each")
    runs: tuple[str, ...] = option((), "folders of runs")
    tokenizer: str = option("zoo:target", "model folder, hub id or zoo:NAME; of the texts")
    lengths: tuple[Positive, ...] = option((48, 128), "of stretches, in tokens")
    most: Positive = option(8, "stretches of a text")
    out: Path = option(about="result file")

    def __post_init__(self) -> None:
        """Refuse to begin without texts."""
        if not self.texts and not self.runs:
            raise ValueError("texts=[]: give files with a field, or runs")
        for text in self.texts:
            if not all(text.rpartition(":")):
                raise ValueError(f"texts={text}: must be FILE:FIELD")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read, {error}") from error


def stretches(tokens: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    for end in range(length, len(tokens) + 1, length):
        yield tokens[end - length : end]


def of_texts(options: Options, length: int) -> Iterator[tuple[str, list[Sequence[int]]]]:
    """The stretches of each file."""
    name = options.tokenizer
    place = zoo_path(name.removeprefix("zoo:")) if name.startswith("zoo:") else name
    encode = AutoTokenizer.from_pretrained(place)
    for source in options.texts:
        file, _, field = source.rpartition(":")
        values = [record.get(field) or [] for record in records(Path(file))]
        texts = [text for of in values for text in ([of] if isinstance(of, str) else of)]
        found: list[Sequence[int]] = []
        for text in texts:
            tokens = encode(text, add_special_tokens=False).input_ids
            found += islice(stretches(tokens, length), options.most)
        yield f"{Path(file).name}:{field}", found


def of_runs(options: Options, length: int) -> Iterator[tuple[str, list[Sequence[int]]]]:
    """The beginnings of the outputs of each run."""
    for run in options.runs:
        outputs = [one["output_ids"] for one in records(Path(run) / "generations.jsonl")]
        yield Path(run).name, [one[:length] for one in outputs if len(one) >= length]


def entry_of(source: str, length: int, found: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the file says of a source."""
    measured = [repetition(tokens) for tokens in found]
    bad = [degenerate({"repetition": one, "tokens": length}) for one in measured]
    quantiles = {"distinct_bigrams": BIGRAMS, "longest_loop": LOOPS}
    return {
        "source": source,
        "length": length,
        "stretches": len(found),
        "degenerate": sum(bad),
        **{
            name: np.quantile([dict(one)[name] for one in measured], at).tolist()
            for name, at in quantiles.items()
        },
    }


def work(options: Options) -> None:
    result: dict[str, Any] = {"sources": [], **begin(options, torch.device("cpu"))}
    for length in options.lengths:
        for sources in (of_texts, of_runs):
            for source, found in sources(options, length):
                if found:
                    result["sources"].append(entry_of(source, length, found))
    write(options.out, result)
    heads = [
        "source",
        "tokens",
        "stretches",
        "degenerate",
        "distinct bigrams",
        "longest loop, 99 %",
    ]
    rows = (
        [
            one["source"],
            str(one["length"]),
            f"{one['stretches']:,}",
            f"{one['degenerate']:,} ({one['degenerate'] / one['stretches']:.2%})",
            f"{one['distinct_bigrams'][1]:.2f}",
            f"{one['longest_loop'][2]:.0f}",
        ]
        for one in result["sources"]
    )
    show(piece("Degenerate texts", heads, rows))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())

"""Make a datastore for drafter=retriever and drafter=rest out of texts.

    python -m specdec.experiments.tools.build_datastore tokenizer=zoo:target out=stores/code \\
        src/ notes.txt
    python -m specdec.experiments.tools.build_datastore tokenizer=Qwen/Qwen3-8B out=stores/chat \\
        HuggingFaceH4/ultrachat_200k split=train_sft field=prompt limit=100000

A text is a file, a folder of files or the id of a data set that the `datasets` library can
load. In `.jsonl` and `.parquet` files and in data sets every record's `field` is a document;
any other file is one document. `.xz` and `.gz` are unpacked.

Tokens go to the file as they come. The suffix array is sorted in memory, which takes some 5 bytes
for each byte of the tokens (10 bytes a token below 65,535 different tokens, else 20; double from
2 GiB of tokens on). Until the last file is written the folder is no datastore, so an interrupted
build is never taken for one.
"""

import gzip
import json
import lzma
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import datasets
import numpy as np
from pydantic import Field
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from specdec.drafters.datastore import FORMAT, METADATA, SUFFIXES, TOKENS, fingerprint, token_bytes
from specdec.lab.command import Positive, option, run_main, write
from specdec.models.load import zoo_path

BATCH = 4_000_000  # characters encoded at a time
SLICE = 2**24  # entries of the suffix array moved at a time
FILES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet", ".xz", ".gz")  # no hub ids
PACKED = {".xz": lzma.open, ".gz": gzip.open}


def documents(
    source: str, *, field: str = "text", split: str = "train", name: str | None = None
) -> Iterator[str]:
    """The documents of a file, a folder or a data set.

    Raises:
        ValueError: it cannot be read; the message names source and reason.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in FILES and p.name[0] != ".")
        if not files:
            raise ValueError(f"{source}: a folder without files of {', '.join(FILES)}")
        for file in files:
            yield from documents(str(file), field=field)
    elif not path.is_file():
        check_source(source)
        yield from _fields(_load(source, name, split=split), field, source)
    elif path.suffix == ".parquet":
        files_of = {"data_files": str(path)}
        yield from _fields(_load("parquet", None, split="train", **files_of), field, source)
    else:
        packed = path.suffix in PACKED
        inner = Path(path.stem).suffix if packed else path.suffix
        opened: Any = PACKED[path.suffix] if packed else open
        try:
            with opened(path, "rt", encoding="utf-8") as file:
                if inner == ".jsonl":
                    yield from _fields(_records(file, source), field, source)
                else:
                    yield file.read()
        except UnicodeDecodeError:
            raise ValueError(f"{source}: not a text in UTF-8; leave it out") from None


def check_source(source: str) -> None:
    """Raise ValueError for a path where nothing is; what may be the id of a data set passes."""
    path = Path(source).expanduser()
    is_path = source.startswith(("/", ".", "~")) or path.suffix in FILES
    if is_path and not path.exists():
        raise ValueError(f"{source}: no such file; give a file, a folder or a hub id")


def _records(file: TextIO, source: str) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise ValueError(f"{source}: line {number} is not JSON") from None


def _fields(records: Iterable[Any], field: str, source: str) -> Iterator[str]:
    for number, record in enumerate(records, 1):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{source}: record {number} has no text in field={field}")
        yield text


def _load(path: str, name: str | None, **options: Any) -> Iterable[Any]:
    """A data set, read as it is asked for."""
    try:
        loaded: Iterable[Any] = datasets.load_dataset(path, name, streaming=True, **options)
    except Exception as error:  # whatever the library and the network raise
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: cannot be loaded as a data set: {first}") from None
    return loaded


def encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each text, encoded by the batch."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= BATCH:
            yield from _encode(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    if texts:
        settings = {"add_special_tokens": False, "return_attention_mask": False}
        yield from tokenizer(texts, verbose=False, **settings).input_ids


def build(
    texts: Iterable[str],
    folder: Path,
    *,
    tokenizer: Any,
    name: str,
    sources: Sequence[str] = (),
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a datastore.

    Args:
        texts: its documents; empty ones are left out.
        folder: made if it is not there; must hold no datastore.
        name: of the tokenizer, for messages.
        sources: of the texts, for messages.
        max_tokens: the document that reaches as many, separators included, is cut there.
        progress: where to show it.

    Returns:
        The metadata.

    Raises:
        ValueError: no tokens, a folder in use, or pydivsufsort is missing.
    """
    _check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = progress or Progress(disable=True)
    width = token_bytes(len(tokenizer))
    documents = encoded(texts, tokenizer)
    tokens, count = _write_tokens(documents, folder / TOKENS, width, max_tokens, progress)
    if not tokens:
        raise ValueError(f"{' '.join(sources) or 'texts'}: no tokens in there")
    task = progress.add_task("sorting suffixes", total=None, note="")
    position = 4 if tokens < 2**31 else 8
    sort(folder, width, position)
    progress.update(task, total=1, completed=1)
    metadata = {
        "format": FORMAT,
        "tokens": tokens,
        "documents": count,
        "token_bytes": width,
        "position_bytes": position,
        "tokenizer": {"name": name, "fingerprint": fingerprint(tokenizer)},
        "sources": list(sources),
        "files": {part: (folder / part).stat().st_size for part in (TOKENS, SUFFIXES)},
    }
    write(folder / METADATA, metadata)
    return metadata


def _check(folder: Path) -> None:
    """Raise ValueError, before hours of encoding, if the datastore could not be sorted or kept."""
    try:
        import pydivsufsort  # noqa: F401
    except ImportError:
        raise ValueError(
            "pydivsufsort is not installed; pip install 'specdec-lab[datastore]'"
        ) from None
    if (folder / METADATA).exists():
        raise ValueError(f"out={folder}: holds a datastore; remove it or choose another folder")


def _write_tokens(
    documents: Iterable[Sequence[int]],
    path: Path,
    width: int,
    max_tokens: int | None,
    progress: Progress,
) -> tuple[int, int]:
    """The documents, with a separator after each: how many tokens and documents these are."""
    tokens = count = 0
    task = progress.add_task("encoding", total=max_tokens, note="")
    with path.open("wb") as file:
        for ids in documents:
            if not ids:
                continue
            if max_tokens is not None:
                ids = ids[: max_tokens - tokens - 1]
            file.write(np.array([*ids, 256**width - 1], dtype=f">u{width}").tobytes())
            tokens, count = tokens + len(ids) + 1, count + 1
            note = f"{count:,} documents, {tokens:,} tokens"
            progress.update(task, completed=tokens, note=note)
            if max_tokens is not None and tokens >= max_tokens - 1:
                break
    progress.update(task, total=tokens, completed=tokens)
    return tokens, count


def sort(folder: Path, width: int, position: int) -> None:
    """Write the suffix array of the tokens, `position` bytes an entry.

    All suffixes of the bytes are sorted; those that begin with a token are in the order of the
    tokens, because these are big-endian.
    """
    from pydivsufsort import divsufsort

    order = divsufsort(np.fromfile(folder / TOKENS, dtype=np.uint8))
    with (folder / SUFFIXES).open("wb") as file:
        for begin in range(0, len(order), SLICE):
            part = order[begin : begin + SLICE]
            file.write((part[part % width == 0] // width).astype(f"<i{position}").tobytes())


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder, a hub id or zoo:NAME.

    Raises:
        ValueError: there is none.
    """
    where = zoo_path(path[4:], "tokenizer") if path.startswith("zoo:") else path
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"tokenizer={path}: cannot be loaded: {first}") from None


@dataclass(frozen=True, kw_only=True)
class Options:
    texts: tuple[str, ...] = option(about="files, folders or ids of data sets", free=True)
    tokenizer: str = option(about="model folder, hub id or zoo:NAME")
    out: Path = option(about="folder of the datastore")
    field: str = option("text", "of a record, that holds the document")
    split: str = option("train", "of data sets")
    name: str | None = option(None, "configuration, for data sets that have several")
    limit: Positive | None = option(None, "documents of each text at most")
    max_tokens: Annotated[int, Field(ge=2)] | None = option(None, "stop there")


def work(options: Options) -> None:
    read = partial(documents, field=options.field, split=options.split, name=options.name)
    for source in options.texts:  # before hours of encoding the others
        check_source(source)
    tokenizer = load_tokenizer(options.tokenizer)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        build(
            (t for s in options.texts for t in islice(read(s), options.limit)),
            options.out,
            tokenizer=tokenizer,
            name=options.tokenizer,
            sources=options.texts,
            max_tokens=options.max_tokens,
            progress=progress,
        )
    print(f"datastore in {options.out}: drafter.datastore={options.out}")


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())

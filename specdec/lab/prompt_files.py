"""Files and data sets of prompts: the records they hold, each with its place."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.lab.prompt_records import DIALOGUES, TEXT_FIELDS

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = Path(__file__).parents[1] / "data" / "prompts.jsonl"
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
# What a file may begin with, and the encoding that it tells; UTF-8 without one.
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UTF8 = "utf-8-sig"  # with a mark or without
Placed = tuple[str, Mapping[str, Any]]  # such as "line 3", and a record


def records_of(*, path: str | None, split: str | None, name: str | None) -> Iterator[Placed]:
    """The records of a set in its order, each with its place in it; arguments as in
    `load_prompts`.

    Raises:
        ValueError: a setting that cannot be used; a set that is missing or cannot be read, with
            the line at fault.
    """
    shown = "null" if path is None else repr(path)
    source = BUILT_IN if path is None else _source(path)
    suffix = source.suffix.lower()
    if source.is_dir() or (suffix not in FILE_SUFFIXES and not source.exists()):
        return _rows(_load(path=str(path), split=split, name=name), shown)
    for setting, value in (("split", split), ("name", name)):
        if value is not None:
            raise ValueError(
                f"prompts.{setting}={value!r} is for data sets, but prompts.path={shown} is one "
                "file; use null"
            )
    if not source.is_file():
        raise ValueError(f"prompts.path={shown} is not a file; check the spelling or use null")
    if suffix not in FILE_SUFFIXES:
        raise ValueError(
            f"prompts.path={shown} is no kind of file that can be read; "
            f"use one of {', '.join(FILE_SUFFIXES)}"
        )
    # The readers below would call an empty file malformed; no records is what the caller reports.
    if source.stat().st_size == 0:
        return iter(())
    if suffix == ".parquet":
        return _rows(_load(path=str(source), split="train", name=None), shown)
    return _readable(_json_lines(source) if suffix == ".jsonl" else _json(source), shown)


def _source(path: str) -> Path:
    """Where it is, if it is anywhere.

    Raises:
        ValueError: nothing can be there.
    """
    try:
        source = Path(path).expanduser()
        source.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"prompts.path={path!r} is no path ({first_line(error)})") from error
    if not path.strip():
        raise ValueError(
            f"prompts.path={path!r} is blank; give a file, a folder or a data set, or use null"
        )
    return source


def _readable(records: Iterator[Placed], shown: str) -> Iterator[Placed]:
    """The records of a file, or why they cannot be read on."""
    try:
        yield from records
    except OSError as error:
        raise ValueError(f"prompts.path={shown} cannot be read ({first_line(error)})") from error
    except UnicodeError as error:
        raise ValueError(
            f"prompts.path={shown} is not in the encoding that its first bytes tell "
            f"({first_line(error)}); save it as UTF-8"
        ) from error


def _encoding(source: Path) -> str:
    with source.open("rb") as file:
        return MARKS.get(file.read(2), UTF8)


def _json_lines(source: Path) -> Iterator[Placed]:
    shown = repr(str(source))
    # Bytes that are no text pass as lone surrogates, so that they are reported with their line.
    with source.open(encoding=_encoding(source), errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parsed(line, f"prompts.path={shown}: line {number}", "one record per line")
            if not isinstance(record, dict):
                raise ValueError(
                    f"prompts.path={shown}: line {number} is a JSON {type(record).__name__}; "
                    "write one object with named fields per line"
                )
            yield f"line {number}", record


def _json(source: Path) -> Iterator[Placed]:
    """A list of objects or texts, an object that holds one list of objects, or one record; or
    JSON lines under another name."""
    text = source.read_text(encoding=_encoding(source), errors="surrogateescape")
    shown = repr(str(source))
    if not text.strip():
        return
    try:
        content = _parsed(text, f"prompts.path={shown}", "a list of records")
    except ValueError:
        first = next(line for line in text.splitlines() if line.strip())
        if not isinstance(_or_none(first), dict):
            raise
        yield from _json_lines(source)
        return
    if isinstance(content, dict):
        content = _inside(content, shown)
    if not isinstance(content, list):
        raise ValueError(
            f"prompts.path={shown} is a JSON {type(content).__name__}; write a list of records"
        )
    for number, record in enumerate(content, start=1):
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise ValueError(
                f"prompts.path={shown}: record {number} is a JSON {type(record).__name__}; write "
                "objects with named fields"
            )
        yield f"record {number}", record


def _inside(content: dict[str, Any], shown: str) -> list[Any]:
    """The records that an object holds, or is."""
    lists = [v for v in content.values() if isinstance(v, list) and v]
    wrapped = [v for v in lists if all(isinstance(record, dict) for record in v)]
    if len(wrapped) == 1 and content.keys().isdisjoint(TEXT_FIELDS):
        return wrapped[0]
    columns = all(isinstance(value, list | dict) for value in content.values())
    if columns and content.keys().isdisjoint(DIALOGUES):
        raise ValueError(
            f"prompts.path={shown} is one object of columns; write a list with an object for each "
            "prompt"
        )
    return [content]


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(
            f"{where} is not UTF-8 (byte 0x{byte:02x} at character {error.start + 1}); "
            "save the file as UTF-8"
        ) from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON that can be read ({first_line(error)}); write {wanted}"
        ) from error


def _or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _rows(rows: "Dataset", shown: str) -> Iterator[Placed]:
    numbers = enumerate(rows, start=1)
    while True:
        try:
            number, row = next(numbers)
        except StopIteration:
            return
        except Exception as error:  # of Arrow, and of what a data set decodes
            raise ValueError(
                f"prompts.path={shown} cannot be read ({type(error).__name__}: "
                f"{first_line(error)}); check the file or folder"
            ) from error
        yield f"record {number}", row


def _load(*, path: str, split: str | None, name: str | None) -> "Dataset":
    """Load one split through `datasets`, which is imported only when it is needed."""
    source = Path(path).expanduser()
    saved = any((source / file).is_file() for file in ("dataset_dict.json", "state.json"))
    loaded: Any
    try:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised as well
        if saved:
            loaded = datasets.load_from_disk(str(source))
        elif source.is_file():
            kind = source.suffix[1:].lower()
            loaded = datasets.load_dataset(kind, data_files=str(source), split=split)
        else:
            loaded = datasets.load_dataset(
                str(source) if source.is_dir() else path, name, split=split
            )
    # Every layer below (files, Arrow, the hub, the network) raises kinds of its own.
    except Exception as error:
        advice = "check the file or folder, and prompts.split and prompts.name if they are given"
        if not source.exists():
            advice = (
                "check the id, prompts.name and prompts.split, or give a local file or folder "
                "in case no hub can be reached from here"
            )
        raise ValueError(
            f"prompts.path={path!r} could not be loaded "
            f"({type(error).__name__}: {first_line(error)}); {advice}"
        ) from error

    if saved and name is not None:
        raise ValueError(f"prompts.name={name!r}: {path!r} was saved without names; use null")
    if isinstance(loaded, datasets.Dataset):
        if saved and split not in (None, str(loaded.split)):
            raise ValueError(f"prompts.split={split!r}: {path!r} was saved as one split; use null")
        return loaded
    chosen = split or ("test" if "test" in loaded or len(loaded) > 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise ValueError(
            f"prompts.split={'null' if split is None else repr(split)} does not name a split of "
            f"prompts.path={path!r}; use one of {', '.join(loaded)}"
        )
    return loaded[chosen]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]

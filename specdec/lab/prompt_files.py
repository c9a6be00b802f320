"""Files and data sets of prompts: the records they hold, each with its place."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from specdec.lab.prompt_formats import READERS, TABLES, Placed
from specdec.reasons import first_line

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = Path(__file__).parents[1] / "data" / "prompts.jsonl"
PACKED = ".gz"  # may follow the name of every file of text
FILE_SUFFIXES = (*READERS, ".parquet")
# What a file may begin with, and the encoding that it tells; UTF-8 without one.
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
UTF8 = "utf-8-sig"  # with a mark or without
GZIP = b"\x1f\x8b"


def records_of(
    *, path: str | None, split: str | None, name: str | None, field: str | None = None
) -> Iterator[Placed]:
    """The records of a set in its order, each with its place in it; arguments as in
    `load_prompts`. (Of formats only tables need to know which field is asked for.)

    Raises:
        ValueError: a setting that cannot be used; a set that is missing or cannot be read, with
            the line at fault.
    """
    shown = "null" if path is None else repr(path)
    source = BUILT_IN if path is None else _source(path)
    suffix = Path(source.name.lower().removesuffix(PACKED)).suffix
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
    if suffix not in FILE_SUFFIXES or (suffix not in READERS and _packed(source)):
        raise ValueError(
            f"prompts.path={shown} is no kind of file that can be read; "
            f"use one of {', '.join(FILE_SUFFIXES)}, all but the last also as {PACKED}"
        )
    # The readers below would call an empty file malformed; no records is what the caller reports.
    if source.stat().st_size == 0:
        return iter(())
    if suffix == ".parquet":
        return _rows(_load(path=str(source), split="train", name=None), shown)
    return _read(source, suffix, shown, field)


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


def _read(source: Path, suffix: str, shown: str, field: str | None) -> Iterator[Placed]:
    """The records of a file of text, or why they cannot be read on."""
    place = "its beginning"
    try:
        with _opened(source, shown, lines=suffix not in TABLES) as file:
            for place, record in READERS[suffix](file, shown, field):
                yield place, record
    except UnicodeError as error:
        raise ValueError(
            f"prompts.path={shown} is not in the encoding that its first bytes tell "
            f"({first_line(error)}); save it as UTF-8"
        ) from error
    except (EOFError, zlib.error) as error:
        raise ValueError(
            f"prompts.path={shown} is cut off or damaged behind {place} ({first_line(error)}); "
            "pack it anew"
        ) from error
    except OSError as error:
        raise ValueError(f"prompts.path={shown} cannot be read ({first_line(error)})") from error


def _packed(source: Path) -> bool:
    return source.suffix.lower() == PACKED


def _opened(source: Path, shown: str, *, lines: bool) -> TextIO:
    """A file of text; with `lines`, all ends of lines are the same in it."""
    opener: Any = gzip.open if _packed(source) else open
    with opener(source, "rb") as file:
        head = file.read(2)
    if head == GZIP:
        raise ValueError(
            f"prompts.path={shown} is packed by gzip; let its name end in {PACKED}"
            f"{' once' if _packed(source) else ''}"
        )
    opened: TextIO = opener(
        source,
        "rt",
        encoding=MARKS.get(head, UTF8),
        errors="surrogateescape",
        newline=None if lines else "",
    )
    return opened


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

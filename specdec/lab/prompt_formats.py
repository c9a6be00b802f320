"""Formats of prompt files: from text to records, each with its place in the file.

Every reader takes an open file and what messages call it. Bytes that are no text arrive as lone
surrogates, so that they are reported with their line.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

from specdec.lab.prompt_records import DIALOGUES, TEXT_FIELDS
from specdec.reasons import first_line

Placed = tuple[str, Mapping[str, Any]]  # such as "line 3", and a record
Reader = Callable[[TextIO, str, str | None], Iterator[Placed]]
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
LONGEST_CELL = 2**31 - 1  # the csv module stops at 131072 characters, which prompts may have


def json_lines(file: TextIO, shown: str, field: str | None = None) -> Iterator[Placed]:
    """An object for each line."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        record = _parsed(line, f"prompts.path={shown}: line {number}", "one record per line")
        if not isinstance(record, dict):
            raise ValueError(
                f"prompts.path={shown}: line {number} is a JSON {type(record).__name__}; "
                "write one object with named fields per line"
            )
        yield f"line {number}", record


def json_records(file: TextIO, shown: str, field: str | None = None) -> Iterator[Placed]:
    """A list of objects or texts, an object that holds one list of objects, or one record; or
    JSON lines under another name."""
    text = file.read()
    if not text.strip():
        return
    try:
        content = _parsed(text, f"prompts.path={shown}", "a list of records")
    except ValueError:
        first = next(line for line in text.splitlines() if line.strip())
        if not isinstance(_or_none(first), dict):
            raise
        yield from json_lines(io.StringIO(text), shown)
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


def texts(file: TextIO, shown: str, field: str | None = None) -> Iterator[Placed]:
    """A text for each line that is not blank, to be continued as it is."""
    for number, line in enumerate(_readable_lines(file, shown), start=1):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def table(
    file: TextIO, shown: str, field: str | None = None, *, separator: str
) -> Iterator[Placed]:
    """A record for each row under a header that names the columns, quoted as RFC 4180 has it.
    Cells without anything in them are fields that the record lacks."""
    rows = _rows(file, shown, separator)
    _, header = next(rows, (1, []))
    if not header:
        return
    header = [name.strip() or f"column {i}" for i, name in enumerate(header, start=1)]
    _check_header(header, shown, field, separator)
    asked = [name for name in header if name == field or (field is None and name in TEXT_FIELDS)]
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"prompts.path={shown}: line {number} has {len(row)} cells and the header "
                f"{len(header)}; put texts that hold {SEPARATORS[separator]} into quotes"
            )
        record: dict[str, Any] = {
            name: cell for name, cell in zip(header, row, strict=True) if cell.strip()
        }
        if record.keys().isdisjoint(asked):
            record[asked[0]] = ""  # which is refused by the name of its column
        limit = record.get("max_new_tokens", "")
        if limit.strip().isdecimal():
            record["max_new_tokens"] = int(limit)
        yield f"line {number}", record


READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_records,
    ".csv": partial(table, separator=","),
    ".tsv": partial(table, separator="\t"),
    ".txt": texts,
}
TABLES = (".csv", ".tsv")


def _rows(file: TextIO, shown: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_readable_lines(file, shown), delimiter=separator, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"prompts.path={shown}: line {first} begins a row that cannot be read "
                f"({first_line(error)}); put texts that hold quotes, line breaks or "
                f"{SEPARATORS[separator]} into quotes, and write their own quotes twice"
            ) from error
        if any(cell.strip() for cell in row):
            yield first, row


def _check_header(header: Sequence[str], shown: str, field: str | None, separator: str) -> None:
    """Raise ValueError for a header that names a column twice, or none that holds prompts."""
    where = f"prompts.path={shown}: line 1, the header,"
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where} names {twice!r} twice; give each column a name of its own")
    names = ", ".join(name if name.isprintable() else ascii(name) for name in header)
    if len(header) == 1 and (other := next((s for s in SEPARATORS if s in header[0]), None)):
        raise ValueError(
            f"{where} is one column ({names}) by {SEPARATORS[separator]}; "
            f"its columns seem to be separated by {SEPARATORS[other]}, so write "
            f"{SEPARATORS[separator]}{' or call the file .tsv' if other == chr(9) else ''}"
        )
    if field is not None and field not in header:
        raise ValueError(f"prompts.field={field!r} is not in {where} use one of: {names}")
    if field is None and not set(header) & set(TEXT_FIELDS):
        raise ValueError(
            f"{where} names no column that is known to hold a prompt (columns: {names}); "
            "name the one that does with prompts.field, or write a header if there is none"
        )


def _readable_lines(file: TextIO, shown: str) -> Iterator[str]:
    """The lines of a file, each of them text."""
    for number, line in enumerate(file, start=1):
        _check_text(line, f"prompts.path={shown}: line {number}")
        yield line


def _check_text(text: str, where: str) -> None:
    """Raise ValueError for bytes that were no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(
            f"{where} is not UTF-8 (byte 0x{byte:02x} at character {error.start + 1}); "
            "save the file as UTF-8"
        ) from error


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
    _check_text(text, where)
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

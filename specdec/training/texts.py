"""Texts to train on: where they are read from, and which are left out.

A source is a file, a folder or `python`, which is the Python sources of the installed packages.
What shares 13 words in a row with a text for evaluation is no text to train on.
"""

import gzip
import hashlib
import json
import lzma
import os
import random
import re
import site
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

SHARED_WORDS = 13
PYTHON = "python"
CODE_BYTES = range(301, 120_000)  # of files of code: neither stubs nor tables
ASCII_SHARE, ASCII_BYTES = 0.97, 4000  # of code: least part of its beginning
OPENERS: dict[str, Callable[..., IO[Any]]] = {".xz": lzma.open, ".gz": gzip.open}
KINDS = (".jsonl", ".txt", ".py", ".md")


def files_of(source: str) -> list[Path]:
    """The files of a source, in the order of their names.

    Raises:
        ValueError: there are none.
    """
    if source == PYTHON:
        places = {sysconfig.get_path("stdlib"), *site.getsitepackages()}
        real = {os.path.realpath(place) for place in places}
        return sorted({path for place in real for path in _py(place)})
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(one for one in path.rglob("*") if one.is_file() and _kind(one))
        if not inside:
            raise ValueError(f"data={source}: holds no file of {_kinds()}")
        return inside
    if not path.is_file():
        raise ValueError(f"data={source}: no such file or folder; or python")
    if not _kind(path):
        raise ValueError(f"data={source}: must be a file of {_kinds()}, or a folder of them")
    return [path]


def _py(place: str) -> Iterator[Path]:
    for folder, _, names in os.walk(place):
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _kinds() -> str:
    return f"{', '.join(KINDS)}, also packed as .xz or .gz"


def _kind(path: Path) -> str | None:
    """What a file holds, by the end of its name."""
    name = path.stem if path.suffix in OPENERS else path.name
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def texts_in(path: Path) -> Iterator[str]:
    """The texts of a file: of .jsonl one for each line, else the whole.

    Raises:
        ValueError: the line at fault, or that it cannot be read.
    """
    kind = _kind(path)
    opener = OPENERS.get(path.suffix, open)
    if kind == ".py" and path.stat().st_size not in CODE_BYTES:
        return
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if kind != ".jsonl":
                yield from _whole(file.read(), kind)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(line, f"data={path}: line {number}")
    except UnicodeDecodeError:
        if kind != ".py":
            raise ValueError(f"data={path}: is not UTF-8; convert it") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"data={path}: cannot be read, {error}; is it whole?") from None


def texts_of(source: str, *, seed: int, enough: int) -> Iterator[str]:
    """The texts of a source.

    Args:
        seed: of the order of python, which is not read further than to
        enough: characters.
    """
    files = files_of(source)
    if source == PYTHON:
        random.Random(seed).shuffle(files)
    read = 0
    for path in files:
        if source == PYTHON and read >= enough:
            return
        for text in texts_in(path):
            read += len(text)
            yield text


def _whole(text: str, kind: str | None) -> Iterator[str]:
    head = text.encode()[:ASCII_BYTES]
    plain = sum(byte < 128 for byte in head) >= ASCII_SHARE * len(head)
    if text.strip() and (kind != ".py" or plain):
        yield text


def _text(line: str, name: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise ValueError(f'{name}: must be an object with a text, as {{"text": "..."}}')
    return text


class Selection:
    """Which texts are taken: each once, and none that shares words with those for evaluation.

    Args:
        without: texts for evaluation.

    Attributes:
        repeated, shared: texts left out so far, by reason.
    """

    def __init__(self, without: Iterable[str] = ()) -> None:
        self._known = set[bytes]()
        self._first = set[str]()  # words that a run of shared words begins with
        self._runs = set[str]()
        self.repeated = self.shared = 0
        for text in without:
            words = _words(text)
            for start in range(len(words) - SHARED_WORDS + 1):
                self._first.add(words[start])
                self._runs.add(" ".join(words[start : start + SHARED_WORDS]))

    def takes(self, text: str) -> bool:
        """Whether this text is taken."""
        mark = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
        if mark in self._known:
            self.repeated += 1
            return False
        self._known.add(mark)
        if self._runs and self._shares(_words(text)):
            self.shared += 1
            return False
        return True

    def _shares(self, words: list[str]) -> bool:
        return any(
            words[start] in self._first
            and " ".join(words[start : start + SHARED_WORDS]) in self._runs
            for start in range(len(words) - SHARED_WORDS + 1)
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def evaluation_texts(sources: Sequence[str]) -> Iterator[str]:
    """Every text in these files; `builtin` is the prompts of this package.

    Raises:
        ValueError: a file that cannot be read.
    """
    for source in sources:
        if source == "builtin":
            yield from _strings(Path(__file__).parents[1] / "data" / "prompts.jsonl")
            continue
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"corpus.without={source}: no such file or folder; or builtin")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".jsonl", ".json", ".txt"):
                yield from _strings(file)


def _strings(file: Path) -> Iterator[str]:
    """Every text of a file, wherever it stands in its records."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".txt":
        yield content
        return
    lines = [content] if file.suffix == ".json" else content.splitlines()
    for line in lines:
        try:
            yield from _within(json.loads(line) if line.strip() else None)
        except ValueError:
            raise ValueError(f"corpus.without={file}: is not JSON; leave it out") from None


def _within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _within(one)

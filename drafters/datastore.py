"""A datastore: the tokens of a corpus and their suffix array, in files mapped into memory.

    tokens.bin      every document, followed by a separator; big-endian, so that comparing bytes
                    compares sequences of tokens
    suffixes.bin    where each suffix of it begins, in lexicographic order; little-endian
    metadata.json   what the files are, and of which tokenizer; written last

`python -m specdec.experiments.tools.build_datastore` makes one.
"""

import hashlib
import json
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any

FORMAT = 1
TOKENS, SUFFIXES, METADATA = "tokens.bin", "suffixes.bin", "metadata.json"
METADATA_KEYS = ("format", "files", "token_bytes", "position_bytes", "tokenizer")
BUILD = "python -m specdec.experiments.tools.build_datastore"
PROBES = (
    "Hello, world! It's 12:30, isn't it?",
    "def f(x):\n\treturn  x ** 2  # y\r\n",
    "  Ünïcödé, 漢字, \U0001f642 and <|user|>",
)


def fingerprint(tokenizer: Any) -> str:
    """What tells one tokenizer from another: a hash of its vocabulary and of texts it encodes."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probes = [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()


def token_bytes(vocabulary: int) -> int:
    """Bytes of a token; the largest value of that size is the separator and no token."""
    return 2 if vocabulary < 2**16 - 1 else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Where a suffix of the context occurs: the entries `first` to `last` - 1 of the suffix array,
    at least one."""

    first: int
    last: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Datastore:
    """Documents to search, as `open` finds them.

    Args:
        tokens: of all documents, `width` bytes each.
        suffixes: where the suffixes of `tokens` begin, in order.
        width: 2 or 4.
    """

    tokens: mmap.mmap
    suffixes: memoryview
    width: int

    @classmethod
    def open(
        cls, folder: str | Path, *, tokenizer: Any, setting: str = "drafter.datastore"
    ) -> "Datastore":
        """Map the files of a datastore.

        Args:
            tokenizer: of the model that will read the tokens.
            setting: what messages call the folder.

        Raises:
            ValueError: no datastore there, one of another format or tokenizer, or not whole.
        """
        where, named = Path(folder).expanduser(), f"{setting}={folder}"
        about = find_datastore(folder, setting=setting, tokenizer=_name(tokenizer))
        position, maker = about["position_bytes"], about["tokenizer"]
        mine = fingerprint(tokenizer)
        if mine != maker["fingerprint"]:
            sources = " ".join(about.get("sources") or ["TEXTS"])
            raise ValueError(
                f"{named}: made with the tokenizer {maker['name']} ({maker['fingerprint'][:8]}), "
                f"but the target's is {_name(tokenizer)} ({mine[:8]}); "
                f"{BUILD} tokenizer={_name(tokenizer)} out=OTHER_FOLDER {sources} makes one for it"
            )
        suffixes = memoryview(_mapped(where / SUFFIXES)).cast("i" if position == 4 else "q")
        return cls(tokens=_mapped(where / TOKENS), suffixes=suffixes, width=about["token_bytes"])

    def __len__(self) -> int:
        """Tokens, separators included."""
        return len(self.suffixes)

    def find(self, context: Sequence[int], min_match: int, max_match: int) -> Match | None:
        """The longest suffix of `context` that occurs, of `min_match` to `max_match` tokens."""
        data, suffixes, width = self.tokens, self.suffixes, self.width
        try:
            query = _packer(width, min(len(context), max_match)).pack(*context[-max_match:])
        except StructError:
            return None  # a model may emit tokens that its tokenizer does not have
        first = 0
        # Each suffix of one that occurs does too, so its length can be searched for by halving.
        low, high = min_match - 1, len(query) // width
        while low < high:
            length = (low + high + 1) // 2
            size = width * length
            part = query[-size:]
            place = bisect_left(suffixes, part, key=lambda p: data[width * p : width * p + size])
            start = width * suffixes[place] if place < len(suffixes) else len(data)
            if data[start : start + size] == part:
                low, first = length, place
            else:
                high = length - 1
        if low < min_match:
            return None
        size = width * low
        part = query[-size:]
        last = bisect_right(
            suffixes, part, first, key=lambda p: data[width * p : width * p + size]
        )
        return Match(first=first, last=last, length=low)

    def continuations(self, match: Match, reach: int, samples: int) -> Iterator[tuple[int, ...]]:
        """What follows a match, up to `reach` tokens and never past the end of a document.

        There are `samples` at most, spread evenly over all occurrences. These are in
        lexicographic order of what follows them, so the frequent is met as often as it should.
        """
        found = match.last - match.first
        count = min(samples, found)
        separator = 256**self.width - 1
        for i in range(count):
            place = self.suffixes[match.first + (2 * i + 1) * found // (2 * count)]
            start = self.width * (place + match.length)
            part = self.tokens[start : start + self.width * reach]
            path: tuple[int, ...] = _packer(self.width, len(part) // self.width).unpack(part)
            yield path[: path.index(separator)] if separator in path else path


@cache
def _packer(width: int, count: int) -> Struct:
    return Struct(f">{count}{'H' if width == 2 else 'I'}")


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "")) or "TOKENIZER"


def find_datastore(
    folder: str | Path, *, setting: str = "drafter.datastore", tokenizer: str = "TOKENIZER"
) -> dict[str, Any]:
    """What a folder says of its datastore, whose files are there; all of `METADATA_KEYS` is.

    Raises:
        ValueError: no datastore there, one of another format, or not whole.
    """
    where, named = Path(folder).expanduser(), f"{setting}={folder}"
    about = _metadata(where, named, f"{BUILD} tokenizer={tokenizer} out={folder} TEXTS makes one")
    if about["format"] != FORMAT:
        raise ValueError(f"{named}: format {about['format']}, but {FORMAT} is read; build it anew")
    for name in (TOKENS, SUFFIXES):
        path = where / name
        size = path.stat().st_size if path.is_file() else 0
        if size != about["files"][name]:
            raise ValueError(
                f"{named}: {name} has {size} bytes instead of {about['files'][name]}; remove the "
                f"folder and build it anew"
            )
    return about


def _metadata(where: Path, named: str, mend: str) -> dict[str, Any]:
    """What a folder says of its datastore; all of `METADATA_KEYS` is there."""
    if not where.is_dir():
        raise ValueError(f"{named}: no such folder; {mend}")
    try:
        about: dict[str, Any] = json.loads((where / METADATA).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{named}: not a datastore, or one whose build was interrupted: {METADATA} is "
            f"missing; {mend}"
        ) from None
    except ValueError:
        about = {}
    if not isinstance(about, dict) or not about.keys() >= set(METADATA_KEYS):
        raise ValueError(f"{named}: {METADATA} is damaged; remove the folder and build it anew")
    return about

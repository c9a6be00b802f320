"""Corpus: texts as tokens in files that are mapped into memory, some of them held out.

tokens.bin      documents in random order, one after the other
starts.bin      int64, where each begins
held_out.bin    documents that are never trained on, likewise
held_starts.bin
manifest.json   what they were made of
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.lab.files import read_object, replace_file, to_json, writing
from specdec.training.texts import PYTHON, Selection, evaluation_texts, files_of, texts_of

MANIFEST = "manifest.json"
AT_ONCE = 512  # texts that are encoded together
THREADS = "TOKENIZERS_PARALLELISM"  # by this variable tokenizers choose between one and all
OFF = ("", "off", "false", "f", "no", "n", "0")
CHARACTERS = 12  # of a token at most, on average
Ids = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How a corpus is made.

    Args:
        tokens: of it, at most.
        without: files whose texts are for evaluation, or `builtin`.
        held_out: sequences that are never trained on.
        folder: where it is kept; None is beside what is trained.

    Raises:
        ValueError: a setting out of range.
    """

    tokens: float = 32e6
    without: str | list[str] = "builtin"
    held_out: int = 200
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"corpus.tokens={self.tokens:g}: must be at least 1")
        if self.held_out < 1:
            raise ValueError(f"corpus.held_out={self.held_out}: must be at least 1")


def listed(value: str | Sequence[str]) -> list[str]:
    """One or several."""
    return [value] if isinstance(value, str) else list(value)


def slow_words() -> str | None:
    """What to say, before a corpus is made, of an environment that makes it slow."""
    value = os.environ.get(THREADS)
    if value is None or value.lower() not in OFF:
        return None
    return (
        f"{THREADS}={value}: a single thread turns texts into tokens, which may take minutes; "
        f"unset it for all threads"
    )


class Corpus:
    """A corpus that has been made.

    Attributes:
        tokens, held_out: [N] ids.
        starts, held_starts: where their documents begin.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        kind = np.dtype(self.manifest["type"])
        self.tokens = _mapped(folder / "tokens.bin", kind)
        self.starts = _mapped(folder / "starts.bin", np.dtype(np.int64))
        self.held_out = _mapped(folder / "held_out.bin", kind)
        self.held_starts = _mapped(folder / "held_starts.bin", np.dtype(np.int64))

    def held_out_rows(self, width: int) -> Ids:
        """[held out, width], one after the other."""
        count = min(self.manifest["settings"]["held_out"], len(self.held_out) // width)
        rows: Ids = np.asarray(self.held_out[: count * width]).reshape(count, width)
        return rows


def _mapped(path: Path, kind: np.dtype[Any]) -> Ids:
    if not path.stat().st_size:
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How texts become tokens.

    Args:
        tokenizer: of transformers.
        end: token after every text, None for none.
        vocab: tokens that the target has.
    """

    tokenizer: Any
    end: int | None
    vocab: int

    @property
    def type(self) -> type[Any]:
        return np.uint16 if self.vocab <= 1 << 16 else np.uint32

    def of(self, texts: Sequence[str]) -> Iterator[Ids]:
        """Ids of each text; the tokenizer's own threads do the work.

        Raises:
            ValueError: a token that the target does not have.
        """
        end = self.end
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            found = self.tokenizer(some, return_attention_mask=False, verbose=False)
            for ids in found["input_ids"]:
                whole = [*ids] if end is None or ids[-1:] == [end] else [*ids, end]
                if max(whole, default=0) >= self.vocab:
                    raise ValueError(
                        f"data: token {max(whole)} is none of the {self.vocab} that the target "
                        f"has a row for; take weights that were resized to their tokenizer"
                    )
                yield np.array(whole, dtype=np.int64)


def corpus_of(
    sources: Sequence[str],
    settings: CorpusSettings,
    encoding: Encoding,
    folder: Path,
    *,
    width: int,
    seed: int,
) -> Corpus:
    """The corpus of these sources, made if the folder does not hold it yet.

    Args:
        width: tokens of a sequence.

    Raises:
        ValueError: sources that cannot be read, have too little text, or a folder that holds
            another corpus.
    """
    known = {
        "sources": [_described(source) for source in sources],
        "tokenizer": _digest(json.dumps(encoding.tokenizer.get_vocab(), sort_keys=True).encode()),
        "settings": {
            "tokens": int(settings.tokens),
            "without": listed(settings.without),
            "held_out": settings.held_out,
        },
        "width": width,
        "seed": seed,
    }
    found = read_object(folder / MANIFEST)
    if found is None:
        counts = _make(sources, settings, encoding, folder, width=width, seed=seed)
        manifest = {**known, "counts": counts, "type": np.dtype(encoding.type).name}
        replace_file(folder / MANIFEST, to_json(manifest, indent=1) + "\n")
        return Corpus(folder)
    for key, value in known.items():
        if found.get(key) != value:
            raise ValueError(f"{folder}: holds a corpus of other {key}; choose another folder")
    return Corpus(folder)


def _make(
    sources: Sequence[str],
    settings: CorpusSettings,
    encoding: Encoding,
    folder: Path,
    *,
    width: int,
    seed: int,
) -> dict[str, int]:
    """Write the files of a corpus but for its manifest; returns what was counted."""
    selection = Selection(evaluation_texts(listed(settings.without)))
    wanted = int(settings.tokens) + settings.held_out * width
    texts = [
        text
        for source in sources
        for text in texts_of(source, seed=seed, enough=CHARACTERS * wanted)
        if selection.takes(text)
    ]
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = encoding.of([texts[i] for i in order])
    kind, wanted = encoding.type, settings.held_out * width
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = _write(folder, "held_out.bin", "held_starts.bin", encoded, wanted, kind)
        trained = _write(folder, "tokens.bin", "starts.bin", encoded, int(settings.tokens), kind)
    if trained < width:
        raise ValueError(
            f"data={sources[0]}: {held + trained} tokens are too few for {settings.held_out} held "
            f"out sequences of {width} and one to train on; give more, or lower corpus.held_out"
        )
    counts = {"texts": len(texts), "repeated": selection.repeated, "shared": selection.shared}
    return {**counts, "trained": trained, "held_out": held}


def _described(source: str) -> dict[str, Any]:
    """A source by its contents."""
    files = files_of(source)
    if source == PYTHON:
        listing = "\n".join(f"{path} {path.stat().st_size}" for path in files)
        return {"source": source, "files": len(files), "hash": _digest(listing.encode())}
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return {"source": source, "files": len(files), "hash": hashed.hexdigest()[:32]}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _write(
    folder: Path, name: str, starts: str, documents: Iterator[Ids], most: int, kind: type[Any]
) -> int:
    """Write documents until there are so many tokens; returns how many there are."""
    places, written = list[int](), 0
    with (folder / name).open("wb") as file:
        while written < most:
            ids = next(documents, None)
            if ids is None:
                break
            places.append(written)
            file.write(ids.astype(kind).tobytes())
            written += len(ids)
    (folder / starts).write_bytes(np.array(places, dtype=np.int64).tobytes())
    return written

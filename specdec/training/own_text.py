"""Own text: what the target writes itself after beginnings of documents. A drafter that has seen
other people's text alone meets the target's own, its repetitions above all, only at work.

    own_rows.bin    a text a row, padded
    own_spans.bin   int32 [N, 2], where what was written begins and ends
    own.json        what it was made with, and whether it is complete

Row i has temperature `TEMPERATURES[i % 4]`, and its random numbers follow from i. The first rows
begin as held out documents do, and are held out themselves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdec.decode import Decoder
from specdec.lab.build import baseline_of
from specdec.lab.experiment import stop_tokens
from specdec.lab.files import read_object, replace_file, to_json
from specdec.models.fingerprint import fingerprint
from specdec.models.paged import PagedLM
from specdec.models.placement import free_memory
from specdec.request import CacheSettings, Request
from specdec.training.batches import EXTRA, OwnRows
from specdec.training.corpus import Corpus, Ids

TEMPERATURES = (0.0, 0.7, 1.0, 1.0)
SHORTEST = 16  # part of a sequence that a beginning has at least
MOST, FEW = 1024, 8  # beginnings at a time, on a GPU and on a CPU
CACHES = 0.15  # part of a GPU's free memory that the keys and values of a temperature may take
MANIFEST = "own.json"


@dataclass(frozen=True, kw_only=True)
class OwnTextSettings:
    """How much of it there is.

    Args:
        share: of a batch.
        tokens: to be written at most.
        minutes: for writing at most.
        new: tokens after each beginning; None is half the length.
        batch: beginnings at a time; None is what fits, up to `MOST` on a GPU.

    Raises:
        ValueError: a setting out of range.
    """

    share: float = 0.5
    tokens: float = 12e6
    minutes: float = 2.0
    new: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"own_text.share={self.share}: must be from 0 to 1")
        for name in ("tokens", "minutes", "new", "batch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"own_text.{name}={value}: must be above 0")

    def written(self, slots: int) -> int:
        """Tokens after each beginning, in sequences of so many slots.

        Raises:
            ValueError: there is no room for a beginning.
        """
        new = self.new or slots // 2
        if new > slots - 2:
            raise ValueError(
                f"own_text.new={new}: leaves no room for a beginning in length={slots}; lower it"
            )
        return new


class OwnText:
    """Own text that is written, or read if it is there.

    Args:
        folder: where it is kept.
        held_out: rows that are.

    Raises:
        ValueError: the folder holds own text of something else.
    """

    def __init__(
        self,
        corpus: Corpus,
        target: PagedLM,
        settings: OwnTextSettings,
        folder: Path,
        *,
        slots: int,
        held_out: int,
        seed: int,
    ) -> None:
        self.corpus, self.target, self.settings, self.folder = corpus, target, settings, folder
        self.width, self.held_out, self.seed = slots + EXTRA, held_out, seed
        self.new = settings.written(slots)
        self.batch = settings.batch or _batch(target, slots)
        self.known = {
            "target": fingerprint(target),
            "corpus": {key: corpus.manifest[key] for key in ("sources", "settings", "seed")},
            "slots": slots,
            "new": self.new,
            "seed": seed,
        }
        found = read_object(folder / MANIFEST)
        for key, value in self.known.items():
            if found is not None and found.get(key) != value:
                raise ValueError(
                    f"{folder}: holds own text of another {key}; choose another folder"
                )
        self.complete = bool(found and found.get("complete"))
        self.seconds = float(found["seconds"]) if found else 0.0

    @property
    def _kind(self) -> Any:
        return self.corpus.tokens.dtype

    def rows(self) -> int:
        """How many are written."""
        path = self.folder / "own_spans.bin"
        return path.stat().st_size // 8 if path.exists() else 0

    def read(self) -> tuple[OwnRows, OwnRows]:
        """What is held out, and what is trained on."""
        count = self.rows()
        shape = (count, self.width)
        rows = np.memmap(self.folder / "own_rows.bin", self._kind, mode="r", shape=shape)
        spans: Ids = np.fromfile(self.folder / "own_spans.bin", np.int32).reshape(-1, 2)[:count]
        held = min(self.held_out, count // 2)
        return (
            OwnRows(rows=rows[:held], spans=spans[:held]),
            OwnRows(rows=rows[held:], spans=spans[held:]),
        )

    def write(self, told: Callable[[float, int], None] = lambda share, tokens: None) -> None:
        """Write on until there is enough: so many tokens or minutes, but twice what is held out.

        Args:
            told: is told which part is done, and how many tokens are.
        """
        if self.complete:
            return
        decoders = {temperature: self._decoder(temperature) for temperature in TEMPERATURES}
        round_ = len(TEMPERATURES) * self.batch
        self._cut(self.rows() // round_ * round_)
        begun, before = time.monotonic(), self.seconds
        while True:
            rows, tokens = self.rows(), self._tokens()
            self.seconds = before + time.monotonic() - begun
            share = max(self.seconds / (60 * self.settings.minutes), tokens / self.settings.tokens)
            told(min(share, 1.0), tokens)
            if share >= 1 and rows >= 2 * self.held_out:
                break
            self._note()
            self._append(self._round(decoders, range(rows, rows + round_)))
        self.complete = True
        self._note()

    def _note(self) -> None:
        found = {
            **self.known,
            "complete": self.complete,
            "seconds": self.seconds,
            "rows": self.rows(),
            "tokens": self._tokens(),
        }
        replace_file(self.folder / MANIFEST, to_json(found, indent=1) + "\n")

    def _tokens(self) -> int:
        if not self.rows():
            return 0
        spans = np.fromfile(self.folder / "own_spans.bin", np.int32).reshape(-1, 2)
        return int((spans[:, 1] - spans[:, 0]).sum())

    def _cut(self, rows: int) -> None:
        """Forget a round that was interrupted."""
        for name, size in (
            ("own_rows.bin", self.width * self._kind.itemsize),
            ("own_spans.bin", 8),
        ):
            with (self.folder / name).open("ab") as file:
                file.truncate(rows * size)

    def _append(self, texts: list[tuple[list[int], int]]) -> None:
        rows = np.zeros((len(texts), self.width), self._kind)
        spans = np.zeros((len(texts), 2), np.int32)
        for i, (ids, begin) in enumerate(texts):
            rows[i, : len(ids)] = ids
            spans[i] = begin, len(ids)
        # Spans are what counts, and come last.
        for name, content in (("own_rows.bin", rows), ("own_spans.bin", spans)):
            with (self.folder / name).open("ab") as file:
                file.write(content.tobytes())

    def _decoder(self, temperature: float) -> Decoder:
        group = {"temperature": temperature}
        method = baseline_of({"sampling": group, "seed": self.seed, "cache": {}, "choices": {}})
        capacity = CacheSettings().capacity(
            rows=self.batch, max_tokens=self.width - EXTRA, device=self.target.device
        )
        ends = stop_tokens(self.target, ignore_eos=False)
        return method.decoder(self.target, capacity, stop_tokens=ends)

    def _round(self, decoders: dict[float, Decoder], rows: range) -> list[tuple[list[int], int]]:
        """Texts of these rows, each with where what was written begins."""
        found = dict[int, tuple[list[int], int]]()
        for temperature, decoder in decoders.items():
            requests = [
                Request(id=row, prompt_ids=self._beginning(row), max_new_tokens=self.new)
                for row in rows
                if TEMPERATURES[row % len(TEMPERATURES)] == temperature
            ]
            # Not all at once: beginnings that are read one by one take longer than texts.
            for start in range(0, len(requests), self.batch):
                for done in decoder.run(requests[start : start + self.batch]):
                    begin = len(done.request.prompt_ids)
                    found[done.request.id] = (list(done.tokens), begin)
        return [found[row] for row in rows]

    def _beginning(self, row: int) -> list[int]:
        """Of a document, of random length: of each in turn, in an order that follows from the
        seed."""
        corpus, slots = self.corpus, self.width - EXTRA
        held = row < self.held_out
        tokens, starts = (
            (corpus.held_out, corpus.held_starts) if held else (corpus.tokens, corpus.starts)
        )
        random = np.random.default_rng([self.seed, row])
        most = max(slots - self.new, 1)
        length = int(random.integers(min(max(slots // SHORTEST, 1), most), most + 1))
        which = row if held else row - self.held_out
        begin = int(starts[which % len(starts)])
        ends = starts[which % len(starts) + 1 :][:1]
        end = int(ends[0]) - 1 if len(ends) else len(tokens)  # without the token that ends it
        return [int(token) for token in tokens[begin : max(min(begin + length, end), begin + 1)]]


def _batch(target: PagedLM, slots: int) -> int:
    """Beginnings at a time that a device has room for."""
    if target.device.type != "cuda":
        return FEW
    row = slots * target.kv_shape.bytes_per_token(target.dtype)
    return max(1, min(MOST, int(CACHES * free_memory(target.device) / row)))

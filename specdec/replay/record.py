"""Record: distributions along texts of a target, and of a drafter along the same texts, on disk.

A folder has `plan.json` (what is recorded, written first), shards `NNNNN.safetensors` of a few
prompts each, and `record.json`, written last. A shard is written whole or not at all. Arrays of a
shard (t tokens of output, r prompts' tokens, s texts, K = 64, W = 256):

    prompt_ids [r], prompt_offsets [s + 1]; output_ids [t], offsets [s + 1]   int32
    request, category [s]     number of a text; place of its category in record.json
    finish [s]                place of the reason in FINISHES
    target_ids, target_logs [t, W]    the target's most probable tokens, logs of probabilities
    target_tail [t]           log of what it gives to all others
    own_log [t]               log of its probability of the text's token
    draft_ids, draft_logs [t, K]      the draft's, at temperature 1
    draft_target_logs [t, K]  what the target gives to those

Of a learned head the last three are [t, D, K]: what a step that begins there says after the text's
next d tokens, and what the target gives to it there.

The target's are of the law that tokens are drawn from, after temperature, filters and processors;
at temperature 0 of temperature 1.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specdec.lab.files import read_object, replace_file, to_json, writing
from specdec.replay.siblings import Along, Array
from specdec.sampling import SamplingParams

SCHEMA = 2
WIDEST, CANDIDATES = 256, 64  # of the target's tokens, and of the draft's
FINISHES = ("stop", "length", "context", "unknown_token")
PLAN, DONE = "plan.json", "record.json"
OFFSETS = ("offsets", "prompt_offsets")
Arrays = dict[str, NDArray[Any]]


def write_shard(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with writing(path):
        try:
            save_file({name: np.ascontiguousarray(one) for name, one in arrays.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished record.

    Args:
        path: its folder.
        about: what record.json holds.

    Raises:
        ValueError: no such folder, or no finished record in it.
    """

    path: Path
    about: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Record":
        about = read_object(path / DONE)
        if about is None:
            begun = (path / PLAN).exists()
            mend = "resume=true continues it" if begun else "specdec record makes one"
            raise ValueError(f"record={path}: holds no finished record; {mend}")
        if about.get("schema") != SCHEMA:
            raise ValueError(
                f"record={path}: schema {about.get('schema')}, not {SCHEMA}; record it anew"
            )
        return cls(path=path, about=about)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the run that was recorded."""
        found: dict[str, Any] = self.about["settings"]
        return found

    def read(self, name: str) -> NDArray[Any]:
        """An array of all shards, put together; mapped shard by shard, nothing else is read.

        Raises:
            ValueError: a shard that is missing or damaged.
        """
        found: list[NDArray[Any]] = []
        for shard in range(self.about["shards"]):
            path = shard_path(self.path, shard)
            try:
                with safe_open(path, framework="numpy") as file:
                    part = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read, {error}; record it anew") from error
            if name in OFFSETS:
                part = part[1:] + (found[-1][-1] if found else 0) if found else part
            found.append(part)
        return np.concatenate(found)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """[P + 1] of the texts in arrays of output tokens."""
        return self.read("offsets").astype(np.int64)

    @cached_property
    def outputs(self) -> list[list[int]]:
        return self._split("output_ids", self.offsets)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return self._split("prompt_ids", self.read("prompt_offsets").astype(np.int64))

    def _split(self, name: str, offsets: NDArray[np.int64]) -> list[list[int]]:
        parts = np.split(self.read(name), offsets[1:-1])
        return [part.tolist() for part in parts]

    @property
    def levels(self) -> int | None:
        """Of drafts that depend on where a step begins, how deep they are known; None of others,
        which are known at any depth."""
        found: int | None = self.about.get("levels")
        return found

    @property
    def drafts(self) -> bool:
        """Whether it holds a drafter's distributions."""
        return bool(self.about["drafts"])

    def along(self, sampling: SamplingParams, *, candidates: int, children: str) -> Along:
        """The distributions along the texts, as a rule is told them.

        Args:
            sampling: that of the record.
            candidates: of which sampled children are drawn.
            children: as in `Proposal`.

        Raises:
            ValueError: the draft's distribution cannot be worked out from what is stored.
        """
        if not self.drafts:
            raise ValueError(f"record={self.path}: holds no distributions of a drafter")
        if candidates > CANDIDATES and children != "top_k":
            raise ValueError(
                f"drafter.candidates={candidates}: a record holds {CANDIDATES}; lower it"
            )
        logs = self.read("draft_logs").astype(np.float64)
        draft = drawn_from(logs, sampling, candidates) if children != "top_k" else np.exp(logs)
        target = np.exp(self.read("draft_target_logs").astype(np.float64))
        ids = self.read("draft_ids")
        if ids.ndim == 2:
            return self._along(ids, draft, target, sampling, 0)
        levels = [
            self._along(ids[:, d], draft[:, d], target[:, d], sampling, d)
            for d in range(ids.shape[1])
        ]
        return replace(levels[0], deeper=tuple(levels[1:]))

    def _along(
        self, ids: NDArray[Any], draft: Array, target: Array, sampling: SamplingParams, by: int
    ) -> Along:
        """Of [t, K] that stand `by` tokens before what they are said of."""
        count = np.diff(self.offsets)
        tokens = _ahead(self.read("output_ids"), count, by, -1)
        text = _ahead(np.exp(self.read("own_log").astype(np.float64)), count, by, 1.0)
        same = (ids == tokens[:, None]) & (draft > 0)
        own = np.where(same.any(-1), same.argmax(-1), -1)
        if not sampling.greedy:
            target = np.where(draft > 0, target, 0.0)
        return Along(
            count=count,
            own=padded(own, count, -1),
            text=padded(text, count, 1.0),
            target=padded(target, count, 0.0),
            draft=padded(draft, count, 0.0),
        )


def _ahead(values: NDArray[Any], count: NDArray[np.int64], by: int, fill: float) -> NDArray[Any]:
    """[t] what stands `by` tokens later in its text, `fill` past its end."""
    if not by:
        return values
    ends = np.repeat(count.cumsum(), count)
    place = np.arange(len(values)) + by
    return np.where(place < ends, values[place.clip(max=len(values) - 1)], fill)


def known_draws(sampling: SamplingParams) -> bool:
    """Whether what sampled children are drawn from can be worked out from what is stored."""
    return sampling.greedy or not sampling.filters or sampling.temperature == 1.0


def drawn_from(logs: Array, sampling: SamplingParams, candidates: int) -> Array:
    """[..., K] what sampled children are drawn from, by logs of probabilities at temperature
    1, the most probable first: as `specdec.drafters.logits`.

    Raises:
        ValueError: filters at another temperature than 1, which need the whole vocabulary.
    """
    if sampling.greedy:
        return np.exp(logs)
    if not known_draws(sampling):
        raise ValueError(
            f"sampling.temperature={sampling.temperature}: of filtered draft distributions those "
            f"of temperature 1 alone can be worked out from a record; use tree.children=top_k"
        )
    scaled = logs / sampling.temperature
    probs = np.exp(logs) if sampling.filters else np.exp(scaled - scaled.max(-1, keepdims=True))
    kept = np.isfinite(logs)
    if sampling.top_k is not None:
        kept &= np.arange(logs.shape[-1]) < sampling.top_k
        probs = probs * kept
        if sampling.top_k <= logs.shape[-1]:
            probs = probs / probs.sum(-1, keepdims=True)
    if sampling.top_p is not None:
        kept &= probs.cumsum(-1) - probs < sampling.top_p
    if sampling.min_p is not None:
        kept &= probs >= sampling.min_p * probs[..., :1]
    kept[..., candidates:] = False
    probs = probs * kept
    found: Array = probs / probs.sum(-1, keepdims=True)
    return found


def padded(values: NDArray[Any], count: Sequence[int] | NDArray[Any], fill: float) -> NDArray[Any]:
    """[P, n, ...] of [t, ...], text by text."""
    longest = int(max(count, default=0))
    found = np.full((len(count), longest, *values.shape[1:]), fill, values.dtype)
    inside = np.arange(longest) < np.asarray(count)[:, None]
    found[inside] = values
    return found


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_file(path, to_json(value, indent=1) + "\n")

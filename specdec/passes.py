"""What passes of a target and of a draft take, where they stand in a step of decoding."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.models.paged import PagedLM
from specdec.models.placement import free_memory
from specdec.timing import Stopwatch
from specdec.tree import random_parents

MEMORY_SHARE = 0.8  # of the free memory that a cache and logits may take
FEWEST = 3  # steps that are timed, however long they take
CHOICES = 4  # most probable tokens asked of a draft, for each node
Call = Callable[[], Any]


def step_seconds(
    steps: Sequence[tuple[Sequence[Call], Call]],
    device: torch.device,
    *,
    replays: int,
    within: float = math.inf,
) -> list[tuple[float, float]]:
    """Median seconds of a pass of a draft and of one of a target, for each pair of passes of a
    draft, which may be none, and one of the target: on a GPU of CUDA graphs, between device
    events, else by the clock.

    They are timed where they stand in a step, one after the other, and all of it after a step like
    it: on a CPU a pass takes twice as long if the caches hold another model's weights. The first
    of a draft, which finds them so, counts only if it is all: what it takes more belongs to the
    start of a draft (`loop_costs`). Steps take turns, so that whatever else the machine does meets
    all of them alike.

    Args:
        within: seconds, after which no further turn begins. Half of them may pass until each was
            called once, which on a GPU may compile kernels; of more than three steps those that it
            does not suffice for are left out.
    """
    begun = time.perf_counter()
    made: dict[Call, Call] = {}
    ready: list[tuple[list[Call], Call]] = []
    for drafts, verify in steps:
        for call in {*drafts, verify} - made.keys():
            made[call] = _captured(call, device) if device.type == "cuda" else call
        ready.append(([made[call] for call in drafts], made[verify]))
        _clocked(*ready[-1], device)  # pays for what happens once
        if len(ready) >= FEWEST and time.perf_counter() - begun > within / 2:
            break
    found: list[list[tuple[float, float]]] = [[] for _ in ready]
    for turn in range(replays):
        for step, seconds in zip(ready, found, strict=True):
            if device.type != "cuda":
                _clocked(*step, device)
            seconds.append(_clocked(*step, device))
        if turn and time.perf_counter() - begun > within:
            break
    return [
        (statistics.median(drafted), statistics.median(verified))
        for drafted, verified in (zip(*seconds, strict=True) for seconds in found)
    ]


def _captured(call: Call, device: torch.device) -> Call:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, allocates, tunes
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clocked(drafts: Sequence[Call], verify: Call, device: torch.device) -> tuple[float, float]:
    """Seconds of a pass of each."""
    later = max(1, len(drafts) - 1)
    watch = Stopwatch(device)
    parts = {"first": drafts[:-later], "draft": drafts[-later:], "verify": [verify]}
    for part, calls in parts.items():
        for call in calls:
            call()
        watch.lap(part)
    seconds = watch.take().read()
    return seconds["draft"] / later, seconds["verify"]


class Passes:
    """Passes of a model over random trees after a random context, to be timed.

    Args:
        lm: the model.
        batch: sequences.
        context: tokens of each before its tree.
        nodes: of a tree at most, the root included; twice the widest level of a draft.
        page_size, kv_dtype: as in `Capacity`.

    Attributes:
        cache: None if the memory holds no such cache, or not the logits.
    """

    def __init__(
        self,
        lm: PagedLM,
        *,
        batch: int,
        context: int,
        nodes: int,
        page_size: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.lm, self.batch = lm, batch
        self.generator = torch.Generator(lm.device).manual_seed(0)
        self.kernels = lm.kernels.on(lm.device)
        self.rows = torch.arange(batch, device=lm.device)
        self.cache = self._filled(
            context, nodes, page_size or (128 if lm.device.type == "cuda" else 16), kv_dtype
        )

    def _filled(
        self, context: int, nodes: int, page_size: int, kv_dtype: torch.dtype | None
    ) -> PagedKVCache | None:
        lm, tokens = self.lm, context + nodes
        pages = self.batch * -(-tokens // page_size)
        if lm.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            needed = pages * page_size * lm.kv_shape.bytes_per_token(kv_dtype or lm.dtype)
            needed += 2 * self.batch * nodes * lm.vocab_size * lm.dtype.itemsize
            if needed > MEMORY_SHARE * free_memory(lm.device):
                return None
        cache = lm.new_cache(
            rows=self.batch,
            pages=pages,
            page_size=page_size,
            max_tokens=tokens,
            kv_dtype=kv_dtype,
        )
        for row in range(self.batch):
            cache.open(row, tokens=tokens)
        if kv_dtype is None:  # quantised ones stay zeros, which are read as fast
            for pool in (cache.keys, cache.values):
                pool.normal_(generator=self.generator)
        cache.lengths[: self.batch] = context
        return cache

    def tokens(self, width: int) -> Tensor:
        """[B, width] random ones."""
        lm = self.lm
        shape = self.batch, width
        return torch.randint(lm.vocab_size, shape, device=lm.device, generator=self.generator)

    def verify(self, nodes: int) -> Call:
        """A pass of a target over a random tree for each sequence, and who sees whom in it."""
        lm, cache, tokens = self.lm, self.cache, self.tokens(nodes)
        generator = torch.Generator().manual_seed(nodes)
        trees = [random_parents(nodes, generator) for _ in range(self.batch)]
        parents = torch.tensor(trees, dtype=torch.int32, device=lm.device)
        assert cache is not None

        def call() -> Tensor | None:
            structure = self.kernels.tree_structure(parents)
            return lm.forward(
                cache, self.rows, tokens, structure.depths, ancestors=structure.ancestors
            )

        return call

    def drafts(self, width: int, levels: int) -> list[Call]:
        """A draft's passes over so many levels of a tree, of that many nodes below the first,
        which is the root."""
        return [self.draft(1), *[self.draft(width)] * (levels - 1)][-levels:]

    def draft(self, width: int) -> Call:
        """A pass of a draft over the second level of a tree, and the best tokens after it."""
        lm, cache, tokens = self.lm, self.cache, self.tokens(width)
        roots = torch.full((self.batch, width), -1)
        level = torch.arange(width).expand(self.batch, -1)
        parents = torch.cat([roots, level], dim=1).to(lm.device, torch.int32)
        assert cache is not None
        cache.scratch(self.batch, 2 * width)

        def call() -> tuple[Tensor, Tensor]:
            structure = self.kernels.tree_structure(parents)
            logits = lm.forward(
                cache,
                self.rows,
                tokens,
                structure.depths[:, width:],
                ancestors=structure.ancestors[:, width:],
                first=width,
                key_offsets=structure.depths,
            )
            assert logits is not None
            best: tuple[Tensor, Tensor] = self.kernels.top_tokens(
                logits.flatten(0, 1), CHOICES, temperature=1.0
            )
            return best

        return call

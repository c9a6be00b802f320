"""Does exact mode (`kernels.exact`) give equal bits, and what does it cost?

    python -m specdec.experiments.bench.run exact bits_contexts=[1,8192] out=exact.json

**Bits**: `sequences` random texts, whose contexts lie between the two lengths, are decoded token
by token, all in one batch; a hash of the logits after every token is kept. Then the same tokens
are decoded otherwise: alone; in batches of other sizes; after a prefill that ends elsewhere; as
nodes of trees, at any place among other nodes. A hash that differs is counted.

**Times** of a pass over trees of so many nodes, in a CUDA graph, without exact mode and with it,
in turns; beside the larger of two roofs, which are measured in the same run: the weights over the
rate at which memory is read, the operations over the rate of a large product.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.bench.clock import Call, GraphClock, Timed, ceilings
from specdec.experiments.bench.taps import PAGE, passes
from specdec.experiments.bench.taps import Options as Pass
from specdec.lab.command import Positive, option
from specdec.lab.workshop import Workshop, word
from specdec.models.paged import PagedLM

SIDES = ("plain", "exact")
PASSES = ((1, 1), (8, 1), (32, 1), (1, 64), (1, 128), (1, 256), (8, 16), (8, 32), (32, 16))
TREES = ((1, 2), (2, 8), (4, 16), (8, 32), (8, 64), (1, 65), (4, 128), (2, 256), (8, 256))
BATCHES = (1, 2, 3, 5, 8, 17, 33, 48)
MODULUS = 2**61 - 1


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    target: str = option("standin:llama3_8b", "model folder, hub id, zoo:NAME or standin:NAME")
    dtype: str = option("bfloat16", "of the target")
    kv_dtype: str = option("", "of the pages: float8_e4m3fn or int8; the target's if empty")
    context: Positive = option(1024, "committed tokens of each sequence that is timed")
    turns: Positive = option(3, "of both sides")
    sequences: Positive = option(64, "whose bits are compared")
    bits_contexts: tuple[Positive, Positive] = option((1, 8192), "of their contexts")
    steps: Positive = option(64, "tokens of each that are compared")
    rounds: Positive = option(8, "of every kind of tree")
    replays: Positive = option(6, "of a graph; the median counts")
    out: Path = option(Path("exact.json"), "result file")

    def __post_init__(self) -> None:
        together = max(batch for batch, _ in TREES)
        if self.sequences < together:
            raise ValueError(
                f"sequences={self.sequences}: must be at least {together}, so many trees are "
                f"verified together"
            )
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}: must be at least 2, trees end among them")


def exact(options: Options, result: dict[str, Any], save: Callable[[], None]) -> int:
    """To result["bits"], [kind] = [compared, different], and to result["cases"]; 1 if some differ.

    Raises:
        ValueError: a model that cannot be exact.
    """
    shop = Workshop(word("target.path", options.target), f"device=cuda dtype={options.dtype}")
    plain = shop.target
    sure = PagedLM(plain.model, name=plain.name, kernels=replace(plain.kernels, exact=True))
    result["bits"] = {}
    differing = 0
    for kind, compared, different in Texts(sure, options).compare():
        before = result["bits"].get(kind, [0, 0])
        result["bits"][kind] = [before[0] + compared, before[1] + different]
        differing += different
        save()
    result["cases"] = {}
    clock = GraphClock(calls=4, replays=options.replays, longest=0.1)
    result["ceilings"] = ceilings(clock, result)
    for batch, nodes in PASSES:
        result["cases"][f"{batch} x {nodes}"] = timed(plain, sure, batch, nodes, options, clock)
        roof = roof_of(plain, batch * nodes, result["ceilings"])
        result["cases"][f"{batch} x {nodes}"]["roof_us"] = roof
        save()
    return int(differing > 0)


def timed(
    plain: PagedLM, sure: PagedLM, batch: int, nodes: int, options: Options, clock: GraphClock
) -> dict[str, Any]:
    """Microseconds of a pass on both sides."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    sized = Pass(dtype=options.dtype, nodes=nodes, context=options.context)

    def made(call: Call) -> Call:
        return call

    for turn in range(options.turns):
        order = (plain, sure) if turn % 2 == 0 else (sure, plain)
        for lm in order:
            call = passes(lm, batch, sized, ())
            times[SIDES[lm is sure]].append(clock.time(partial(made, call), 1).us)
    without, with_ = (statistics.median(times[side]) for side in SIDES)
    return {"batch": batch, "nodes": nodes, "us": times, "ratio": with_ / without}


def roof_of(lm: PagedLM, rows: int, limits: dict[str, float]) -> float:
    """Microseconds that reading the weights or the operations on them take at least."""
    weights = sum(one.numel() for one in lm.model.parameters())
    weights -= lm.model.get_input_embeddings().weight.numel()
    size = lm.model.dtype.itemsize
    return 1e6 * max(weights * size / limits["read"], 2 * rows * weights / limits["compute"])


class Texts:
    """Random texts, and hashes of the logits after each of their last tokens.

    Args:
        lm: decodes.
    """

    def __init__(self, lm: PagedLM, options: Options) -> None:
        self.lm, self.options = lm, options
        self.random = torch.Generator().manual_seed(0)
        low, high = (torch.tensor(float(one)).log() for one in options.bits_contexts)
        shares = torch.rand(options.sequences, generator=self.random)
        self.lengths = (low + shares * (high - low)).exp().round().long().tolist()
        self.texts = [self._tokens(length + options.steps + 1) for length in self.lengths]
        self.salt = torch.randint(MODULUS, (lm.vocab_size,), generator=self.random).to(lm.device)
        self.cache = self._cache(self.texts)
        self.rows = torch.arange(options.sequences, device=lm.device)

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(self.lm.vocab_size, (count,), generator=self.random).tolist()

    def _cache(self, texts: list[list[int]]) -> Any:
        """Room for the texts and a tree behind each."""
        sizes = [len(text) + 512 for text in texts]
        kv_dtype = getattr(torch, self.options.kv_dtype) if self.options.kv_dtype else None
        cache = self.lm.new_cache(
            rows=len(texts),
            pages=sum(-(-size // PAGE) for size in sizes),
            page_size=PAGE,
            max_tokens=max(sizes),
            kv_dtype=kv_dtype,
        )
        for row, size in enumerate(sizes):
            cache.open(row, tokens=size)
        return cache

    def hashes(self, logits: Tensor) -> Tensor:
        """[..., V] to [...]: equal for equal bits, and hardly else."""
        return (logits.view(torch.int16).long() * self.salt).sum(-1)

    def step(self, cache: Any, rows: Tensor, tokens: list[int]) -> Tensor:
        """Hashes of the logits after one token of each row, which is committed."""
        column = torch.tensor(tokens, device=self.lm.device)[:, None]
        return self.hashes(self.lm.append(cache, rows, column, torch.ones_like(column[:, 0])))

    def compare(self) -> Iterator[tuple[str, int, int]]:
        """(kind, hashes compared, of which differ), again and again."""
        lm, steps = self.lm, self.options.steps
        starts = [text[:length] for text, length in zip(self.texts, self.lengths, strict=True)]
        lm.prefill(self.cache, range(len(starts)), starts)
        self.before = self.cache.lengths.clone()
        wanted = [
            self.step(self.cache, self.rows, [t[n + i] for t, n in self._pairs(self.rows)])
            for i in range(steps)
        ]
        self.wanted = torch.stack(wanted, 1)  # [S, steps]
        yield from self._batches()
        yield from self._prefills()
        for batch, nodes in TREES:
            for _ in range(self.options.rounds):
                yield f"trees of {nodes}", *self._trees(batch, nodes)

    def _pairs(self, rows: Tensor) -> list[tuple[list[int], int]]:
        return [(self.texts[row], self.lengths[row]) for row in rows.tolist()]

    def _back(self, by: Tensor | int) -> None:
        """Forget all but so many of the tokens that are compared."""
        self.cache.lengths.copy_(self.before + by)

    def _batches(self) -> Iterator[tuple[str, int, int]]:
        """Few steps of some rows."""
        for size in BATCHES:
            if size > len(self.texts):
                continue
            rows = torch.randperm(len(self.texts), generator=self.random)[:size].to(self.lm.device)
            self._back(0)
            for i in range(8):
                found = self.step(self.cache, rows, [t[n + i] for t, n in self._pairs(rows)])
                different = int((found != self.wanted[rows, i]).sum())
                kind = "alone" if size == 1 else f"batches of 2 to {len(self.texts)}"
                yield kind, size, different

    def _prefills(self) -> Iterator[tuple[str, int, int]]:
        """Prompts that end somewhere among the tokens compared, in a cache of their own."""
        some = list(range(0, len(self.texts), 4))
        kept = torch.randint(1, self.options.steps, (len(some),), generator=self.random).tolist()
        texts = [self.texts[row] for row in some]
        cache = self._cache(texts)
        parts = [
            self.texts[row][: self.lengths[row] + k] for row, k in zip(some, kept, strict=True)
        ]
        self.lm.prefill(cache, range(len(some)), parts)
        rows = torch.arange(len(some), device=self.lm.device)
        nexts = [self.texts[row][self.lengths[row] + k] for row, k in zip(some, kept, strict=True)]
        found = self.step(cache, rows, nexts)
        wanted = self.wanted[torch.tensor(some), torch.tensor(kept)]
        yield "other prefills", len(some), int((found != wanted.to(found.device)).sum())

    def _trees(self, batch: int, nodes: int) -> tuple[int, int]:
        """Trees among whose nodes are those of the text."""
        lm = self.lm
        rows = torch.randperm(len(self.texts), generator=self.random)[:batch]
        kept = torch.randint(self.options.steps // 2, (batch,), generator=self.random)
        back = torch.zeros(len(self.before), dtype=torch.long).index_put((rows,), kept)
        self._back(back.to(self.cache.lengths))
        trees = [self._tree(int(row), int(k), nodes) for row, k in zip(rows, kept, strict=True)]
        device = lm.device
        tokens = torch.tensor([tree[0] for tree in trees], device=device)
        parents = torch.tensor([tree[1] for tree in trees], dtype=torch.int32, device=device)
        structure = lm.kernels.on(device).tree_structure(parents)
        logits = lm.forward(
            self.cache,
            rows.to(device),
            tokens,
            structure.depths,
            ancestors=structure.ancestors,
        )
        assert logits is not None
        found = self.hashes(logits)
        compared = different = 0
        for number, (row, k) in enumerate(zip(rows.tolist(), kept.tolist(), strict=True)):
            path = torch.tensor(trees[number][2], device=device)
            wanted = self.wanted[row, k : k + len(path)]
            compared += len(path)
            different += int((found[number, path] != wanted).sum())
        return compared, different

    def _tree(self, row: int, kept: int, nodes: int) -> tuple[list[int], list[int], list[int]]:
        """(tokens, parents, where the text is): the text's tokens at random places, in order."""
        text, start = self.texts[row], self.lengths[row] + kept
        longest = min(nodes, self.options.steps - kept, 60)
        length = int(torch.randint(1, longest + 1, (1,), generator=self.random))
        places = torch.randperm(nodes - 1, generator=self.random)[: length - 1].sort().values + 1
        path = [0, *places.tolist()]
        tokens, parents, depths = [text[start]], [-1], [0]
        others = self._tokens(nodes)
        for node in range(1, nodes):
            if node in path:
                parent = path[path.index(node) - 1]
                tokens.append(text[start + path.index(node)])
            else:
                parent = int(torch.randint(node, (1,), generator=self.random))
                parent = parent if depths[parent] < 63 else 0
                tokens.append(others[node])
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return tokens, parents, path

"""The loop: draft, verify, accept, commit, for a batch of sequences until every request is done.
Start reading here."""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from specdec.graphs import Graphs
from specdec.kernels import reference
from specdec.kernels.choose import AUTO, Kernels
from specdec.protocols import (
    AcceptanceRule,
    Capacity,
    Decoding,
    Drafter,
    DraftError,
    Request,
    StepContext,
    Verifier,
)
from specdec.sampling import SamplingParams, random_keys, uniforms
from specdec.timing import Laps, Stopwatch
from specdec.tree import Acceptance, TokenTree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # batches, and trees made by the host, on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step did, for the B sequences it ran; none if all of them had ended meanwhile.

    Args:
        requests: [B] ids.
        nodes: [B] drafted nodes, the root not counted.
        depths: [B] depth of the drafted trees.
        accepted: [B] drafted nodes the rule accepted.
        tokens: [B] new tokens that count: accepted ones and the target's own, up to the stop token
            or limit.
        seconds: time of each verb.
        sources: [B] of trees with several sources, by name: nodes drafted and nodes accepted; else
            empty.
    """

    requests: list[int]
    nodes: list[int]
    depths: list[int]
    accepted: list[int]
    tokens: list[int]
    seconds: dict[str, float]
    sources: list[dict[str, tuple[int, int]]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As a line of steps.jsonl; without sources, if there are none to tell apart."""
        record = asdict(self)
        return record if any(self.sources) else {k: v for k, v in record.items() if k != "sources"}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Batch:
    """Tensors of the steps with up to B sequences, always the same ones: captured graphs read
    them."""

    rows: Tensor  # [B] int64, cache rows
    active: Tensor  # [B] bool, False where there is no sequence
    roots: Tensor  # [B] int64
    keys: Tensor  # [B, 3] int64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Flight:
    """A step whose work is queued and whose results are on their way.

    Args:
        tree: what it verified.
        context: what the drafter was given.
        results: [B, 3 + N + 2 (depth + 1)] int64 on the host: new tokens, nodes, next token;
            parents, path, tokens; then, where there are any, [B, N] source, [B, N * K] candidates.
        arrived: None if they are there already.
    """

    sequences: list[Decoding]
    tree: TokenTree
    context: StepContext
    results: Tensor
    arrived: torch.cuda.Event | None
    laps: Laps


class Decoder:
    """Decodes requests, `batch_size` at a time; a finished row is refilled with the next request.

    On a GPU the host only queues work, in CUDA graphs where `kernels.graphs` allows, and learns
    what a step has yielded while the next one runs. A sequence that has ended meanwhile is cut
    exactly where it ended.

    Verifier and drafter start over with it: an earlier decoder of either is of no use any more.

    Args:
        verifier: the target model.
        drafter: what guesses.
        rule: what keeps.
        sampling: how tokens are chosen.
        kernels: which implementation of trees and rules computes; a model knows its own.
        batch_size: sequences decoded at a time.
        stop_tokens: a sequence ends after the first of these.
        max_context: positions the target has; a sequence ends when they are used up.
        max_tokens: longest prompt and output together that will be asked for; the context if None.
        page_size: tokens of a cache page.
        pages: pages of each cache; None is enough for `batch_size` sequences of `max_tokens`, or
            what the memory of the GPU holds.
        kv_dtype: what the pages hold keys and values as; None for the type of each model.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        drafter: Drafter,
        rule: AcceptanceRule,
        sampling: SamplingParams,
        max_context: int,
        device: torch.device,
        kernels: Kernels = AUTO,
        batch_size: int = 1,
        stop_tokens: Collection[int] = (),
        max_tokens: int | None = None,
        page_size: int = 16,
        pages: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.verifier, self.drafter, self.rule, self.sampling = verifier, drafter, rule, sampling
        self.max_context, self.device = max_context, device
        self._kernels = kernels.on(device)
        self.stop_tokens = frozenset(stop_tokens)
        longest = max_context if max_tokens is None else min(max_tokens, max_context)
        capacity = Capacity(
            rows=batch_size,
            max_tokens=longest,
            page_size=page_size,
            pages=pages,
            kv_dtype=kv_dtype,
        )
        verifier.prepare(capacity)
        drafter.prepare(capacity)
        drafter.forget()
        self.waiting: deque[Request] = deque()
        self.running: list[Decoding] = []
        self._free_rows = list(range(batch_size))
        self._batch_size, self._longest = batch_size, longest
        self._stopwatch = Stopwatch(device)
        self._padded = device.type == "cuda" and self._kernels is not reference
        self.graphs = Graphs(enabled=self._padded and kernels.graphs)
        # Steps queued before the last one ends: none if drafting begins with a look at its tokens.
        self._ahead = int(self._padded and drafter.on_device and not drafter.variants)
        # Of each cache row, the idle one last: its last token, and seed, sequence and step.
        self._roots = torch.zeros(batch_size + 1, dtype=torch.int64, device=device)
        self._keys = torch.zeros(batch_size + 1, 3, dtype=torch.int64, device=device)
        self._batches: dict[int, _Batch] = {}
        self._current: list[int] = []  # cache rows of the last step
        self._host_trees: dict[tuple[int, ...], TokenTree] = {}
        self._least_nodes = 1  # of trees made by the host
        self._wanted: Hashable = None  # variant of the draft
        self._flights: deque[_Flight] = deque()
        self._finished: deque[Decoding] = deque()
        self._full = False  # a request waits for another to end

    def submit(self, request: Request, *, first: bool = False) -> None:
        """Queue a request, at the front of the queue if `first`.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context or in a cache
                row.
        """
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if prompt >= self.max_context:
            raise ValueError(
                f"request {request.id}: a prompt of {prompt} tokens leaves no room in the context "
                f"of {self.max_context}"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={request.max_new_tokens}: must be at least 1")
        if min(request.max_tokens, self.max_context) > self._longest:
            raise ValueError(
                f"request {request.id}: {request.max_tokens} tokens exceed "
                f"max_tokens={self._longest}"
            )
        if first:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    @torch.inference_mode()
    def run(
        self, requests: Iterable[Request] = (), *, on_step: Callable[[Step], None] | None = None
    ) -> Iterator[Decoding]:
        """Decode everything submitted and yield sequences as they finish; more may be submitted
        meanwhile.

        Raises:
            ValueError: as `submit`, or a request that the whole page pool cannot hold.
            DraftError: the drafter raised something.
        """
        for request in requests:
            self.submit(request)
        self._stopwatch.start()
        flights = self._flights
        landed: list[tuple[_Flight, dict[str, Any]]] = []

        def report() -> None:
            for flight, what in landed:
                step = Step(**what, seconds=flight.laps.read())
                if on_step is not None:
                    on_step(step)
            landed.clear()

        yield from self._retire()  # what a run that was given up had finished
        while self.waiting or self.running or flights:
            self._admit()
            if self._worth_a_step(flights):
                flights.append(self._step())
            report()  # after the next step is queued: a report may have to wait for its step
            if len(flights) > self._ahead or not self._worth_a_step(flights):
                flight = flights.popleft()
                landed.append((flight, self._land(flight)))
            if any(sequence.finish_reason for sequence in self.running):
                report()
                yield from self._retire()
        report()

    def warm_up(self, prompt_ids: Sequence[int], tokens: int = 8) -> None:
        """Decode a few tokens at every size of batch and tree, so that no prompt pays for what
        happens once: compiling kernels, capturing graphs, allocating memory. What the drafter has
        learnt meanwhile is forgotten."""
        batches, sizes = [1], [1]
        if self._padded:
            batches = [n for n in SIZES if n < self._batch_size] + [self._batch_size]
            most = self.drafter.most_nodes
            if not self.drafter.on_device and most is not None:
                # The largest first, so that the scratch of the cache need not grow.
                sizes = [most, *(n for n in SIZES if n < most)]
                tokens = min(tokens, 2)
        tokens = max(1, min(tokens, self._longest - len(prompt_ids)))
        variants = self.drafter.variants or [None]
        for batch, self._wanted, self._least_nodes in product(batches, variants, sizes):
            # Prompts of other lengths go through other kernels.
            count = batch + 1  # the last one waits for a row
            prompts = [prompt_ids[: len(prompt_ids) >> i] or prompt_ids for i in range(count)]
            requests = [
                Request(id=i, prompt_ids=prompt, max_new_tokens=tokens)
                for i, prompt in enumerate(prompts)
            ]
            for _ in range(1 + self.graphs.enabled):  # called, then captured
                for _ in self.run(requests):
                    pass
        self._wanted, self._least_nodes = None, 1
        self.drafter.forget()

    def _worth_a_step(self, flights: Collection[_Flight]) -> bool:
        """Whether some sequence will still be running when the steps in flight have landed,
        however many tokens they yield."""
        coming = sum(flight.tree.depth + 1 for flight in flights)
        return any(self._room(sequence) > coming for sequence in self.running)

    def _admit(self) -> None:
        """Fill free rows with waiting requests, as far as the caches have room."""
        if self._full and self.running:
            return
        asked = [
            Decoding(request, row, list(request.prompt_ids))
            for request, row in zip(self.waiting, reversed(self._free_rows), strict=False)
        ]
        if not asked:
            return
        self._stopwatch.lap("other")
        admitted = self.verifier.start(asked)
        with self._blame(admitted):
            taken = self.drafter.start(admitted)
        if taken is not None:
            for sequence in admitted:
                if sequence not in taken:
                    self.verifier.finish(sequence)
            admitted = list(taken)
        if not admitted and not self.running:
            raise ValueError(f"request {asked[0].request.id}: the caches have no room for it")
        self._full = len(admitted) < len(asked)
        self.running += admitted
        self._current = []  # the batch of the last step knows nothing of them
        for sequence in admitted:
            self.waiting.remove(sequence.request)
            self._free_rows.remove(sequence.row)
            self._roots[sequence.row] = sequence.tokens[-1]
            self._keys[sequence.row] = random_keys(
                self.sampling.seed, [sequence.request.id], [0], self.device
            )[0]
        self._stopwatch.lap("prefill")

    def _retire(self) -> Iterator[Decoding]:
        """Give up the rows of finished sequences."""
        finished = [sequence for sequence in self.running if sequence.finish_reason]
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in finished:
            self.verifier.finish(sequence)
            self.drafter.finish(sequence)
            self._free_rows.append(sequence.row)
        self._full = False
        self._finished.extend(finished)
        while self._finished:
            yield self._finished.popleft()

    # One step

    def _step(self) -> _Flight:
        sequences = list(self.running)
        batch = self._batch(sequences)
        context = StepContext(
            sequences=sequences,
            roots=batch.roots,
            sampling=self.sampling,
            uniforms=self._uniforms(sequences, batch.keys),
            rows=batch.rows,
            kernels=self._kernels,
            keys=batch.keys,
            cache=self.verifier.cache,
        )
        self._stopwatch.lap("other")
        given, variant = context, None
        with self._blame(sequences):
            if self.drafter.variants:
                variant = self.drafter.look(sequences, self._wanted)
            if self.drafter.on_device:
                tree = self.graphs.run(
                    "draft", (len(batch.rows), variant), lambda: self._draft(context, batch)
                )
            else:
                given = self._on_host(context)
                tree = self._to_device(self.drafter.draft(given), len(batch.rows))
        self._stopwatch.lap("draft")
        key = len(batch.rows), tree.nodes, tree.depth, _support(tree), variant
        logits = self.graphs.run("verify", key, lambda: self.verifier.verify(context, tree))
        self._stopwatch.lap("verify")
        acceptance, results = self.graphs.run(
            "accept", key, lambda: self._accept(context, tree, logits)
        )
        results, arrived = self._to_host(results)
        self._stopwatch.lap("accept")
        self.graphs.run("commit", key, lambda: self._commit(context, batch, acceptance))
        self._stopwatch.lap("commit")
        return _Flight(
            sequences=sequences,
            tree=tree,
            context=given,
            results=results,
            arrived=arrived,
            laps=self._stopwatch.take(),
        )

    def _batch(self, sequences: Sequence[Decoding]) -> _Batch:
        """The tensors for these sequences, which hold their last tokens and keys."""
        count = len(sequences)
        size = _size(count, self._batch_size) if self._padded else count
        batch = self._batches.get(size)
        if batch is None:
            zeros = torch.zeros(size, dtype=torch.int64, device=self.device)
            keys = torch.zeros(size, 3, dtype=torch.int64, device=self.device)
            batch = _Batch(rows=zeros, active=zeros.bool(), roots=zeros.clone(), keys=keys)
            self._batches[size] = batch
        rows = [sequence.row for sequence in sequences] + [self._batch_size] * (size - count)
        if rows != self._current:
            self._current = rows
            _send(torch.tensor(rows), batch.rows)
            torch.lt(batch.rows, self._batch_size, out=batch.active)
            batch.roots.copy_(self._roots[batch.rows])
            batch.keys.copy_(self._keys[batch.rows])
        return batch

    def _draft(self, context: StepContext, batch: _Batch) -> TokenTree:
        tree = self.drafter.draft(context)
        return replace(tree, size=torch.where(batch.active, tree.size, 0))

    def _on_host(self, context: StepContext) -> StepContext:
        """What a drafter that works on the host is given."""
        if self.device.type == "cpu":
            return context
        sequences = context.sequences
        return StepContext(
            sequences=sequences,
            roots=torch.tensor([s.tokens[-1] for s in sequences]),
            sampling=self.sampling,
            uniforms=self._host_uniforms(sequences),
            rows=torch.tensor([s.row for s in sequences]),
        )

    @contextmanager
    def _blame(self, sequences: Sequence[Decoding]) -> Iterator[None]:
        """Name the drafter and what it drafted for in whatever it raises."""
        try:
            yield
        except DraftError:
            raise
        except Exception as error:
            raise DraftError.caused_by(error, self.drafter, sequences) from error

    def _to_device(self, tree: TokenTree, batch: int) -> TokenTree:
        """Trees made on the host, padded, in the tensors of all trees of that size."""
        if self.device.type == "cpu":
            return tree
        nodes = tree.nodes
        if tree.proposal is not None or not self.rule.needs_proposal:
            nodes = max(nodes, self._least_nodes)
        if self._padded:
            nodes = _size(nodes, self.drafter.most_nodes)
        if not self.rule.needs_proposal:
            tree = replace(tree, proposal=None)
        padded = tree.padded(batch, nodes)
        key = batch, nodes, _support(padded)
        if key not in self._host_trees:
            self._host_trees[key] = padded.to(self.device)
        there = self._host_trees[key]
        for mine, theirs in zip(padded.tensors(), there.tensors(), strict=True):
            _send(mine, theirs)
        return there

    def _uniforms(
        self, sequences: Sequence[Decoding], keys: Tensor
    ) -> Callable[[int, int], Tensor]:
        if self._kernels is not reference:
            return partial(self._kernels.uniforms, keys)
        host = self._host_uniforms(sequences)
        return lambda stream, count: host(stream, count).to(self.device)

    def _host_uniforms(self, sequences: Sequence[Decoding]) -> Callable[[int, int], Tensor]:
        """The same numbers, for sequences all of whose steps have landed."""
        ids, steps = [s.request.id for s in sequences], [s.steps for s in sequences]
        return partial(uniforms, self.sampling.seed, ids, steps)

    def _accept(
        self, context: StepContext, tree: TokenTree, logits: Tensor
    ) -> tuple[Acceptance, Tensor]:
        acceptance = self.rule.accept(context, tree, logits)
        if self.drafter.observes:
            count = min(self.drafter.observes, logits.shape[2])
            best, _ = context.kernels.top_tokens(logits.flatten(0, 1), count)
            acceptance = replace(acceptance, candidates=best.view(*tree.tokens.shape, -1))
        numbers = torch.stack([acceptance.length, tree.size, acceptance.next_token], dim=1)
        lists = [tree.parents, acceptance.path, acceptance.new_tokens(tree)]
        if tree.source is not None:
            lists.append(tree.source)
        if acceptance.candidates is not None and not self.drafter.on_device:
            lists.append(acceptance.candidates.flatten(1))
        return acceptance, torch.cat([numbers, *lists], dim=1)

    def _commit(self, context: StepContext, batch: _Batch, acceptance: Acceptance) -> None:
        self.verifier.commit(context, acceptance)
        if self.drafter.on_device:
            with self._blame(context.sequences):
                self.drafter.commit(context, acceptance)
        batch.roots.copy_(acceptance.next_token)
        batch.keys[:, 2] += 1
        self._roots[batch.rows] = batch.roots
        self._keys[batch.rows] = batch.keys

    # What a step has yielded

    def _to_host(self, results: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return results, None
        host = torch.empty(results.shape, dtype=results.dtype, pin_memory=True)
        host.copy_(results, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived

    def _land(self, flight: _Flight) -> dict[str, Any]:
        """Give sequences their new tokens; those that ended in an earlier step get none.

        Returns:
            What a `Step` holds, without the times.
        """
        if flight.arrived is not None:
            flight.arrived.synchronize()
        names = ("requests", "nodes", "depths", "accepted", "tokens", "sources")
        step: dict[str, list[Any]] = {name: [] for name in names}
        nodes, steps = flight.tree.nodes, flight.tree.depth + 1
        widths = [3, nodes, steps, steps, nodes if flight.tree.source is not None else 0]
        results = flight.results[: len(flight.sequences)]
        numbers, parents, path, tokens, source, candidates = results.split(
            [*widths, results.shape[1] - sum(widths)], dim=1
        )
        if not self.drafter.on_device:
            length, _, next_token = numbers.unbind(1)
            kept = Acceptance(path=path, length=length, next_token=next_token)
            if self.drafter.observes:
                kept = replace(kept, candidates=candidates.unflatten(1, (nodes, -1)))
            with self._blame(flight.sequences):
                self.drafter.commit(flight.context, kept)
        lists = (part.tolist() for part in (numbers, parents, path, tokens, source))
        for sequence, (length, size, _), parent, walked, new, of in zip(
            flight.sequences, *lists, strict=True
        ):
            if sequence.finish_reason:
                continue
            self._append(sequence, new[:length])
            sequence.steps += 1
            sequence.drafted += size - 1
            step["requests"].append(sequence.request.id)
            step["nodes"].append(size - 1)
            step["depths"].append(_depth(parent[:size]))
            step["accepted"].append(length - 1)
            step["tokens"].append(sequence.accepted_lengths[-1])
            step["sources"].append(
                self._credit(of[1:size], [of[n] for n in walked[1:length]]) if of else {}
            )
        return step

    def _credit(self, drafted: list[int], accepted: list[int]) -> dict[str, tuple[int, int]]:
        """By name of a source: its nodes, and those of them that were accepted."""
        return {
            name: (drafted.count(number), accepted.count(number))
            for number, name in enumerate(self.drafter.sources)
        }

    def _room(self, sequence: Decoding) -> int:
        """Tokens it may still get."""
        return min(sequence.request.max_tokens, self.max_context) - len(sequence.tokens)

    def _append(self, sequence: Decoding, tokens: list[int]) -> None:
        """Add new tokens up to the first stop token, the length limit or the end of the
        context."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        length = sequence.request.max_tokens - len(sequence.tokens)
        context = self.max_context - len(sequence.tokens)
        limits = {"stop": stop, "length": length, "context": context}
        reason, limit = min(
            ((name, n) for name, n in limits.items() if n is not None), key=lambda item: item[1]
        )
        if len(tokens) >= limit:
            tokens, sequence.finish_reason = tokens[:limit], reason
        sequence.tokens += tokens
        sequence.accepted_lengths.append(len(tokens))


def _size(count: int, most: int | None) -> int:
    """The next of the `SIZES`, as far as `most` allows."""
    size = next((n for n in SIZES if n >= count), count)
    return size if most is None else max(count, min(size, most))


def _support(tree: TokenTree) -> int:
    """Draft candidates kept per node."""
    return 0 if tree.proposal is None else tree.proposal.ids.shape[2]


def _depth(parents: list[int]) -> int:
    """Edges of the longest path of a tree."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


def _send(source: Tensor, target: Tensor) -> None:
    """Copy from the host; if to a GPU, while the host goes on."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

"""The loop: draft, verify, accept, commit, for a batch of sequences until every request is done.
Start reading here."""

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from specdec.arrivals import Arrivals, Intake
from specdec.batch import SIZES, Batch, Batches, HostTrees
from specdec.flight import Flight, Step, Yield, to_host
from specdec.graphs import Graphs
from specdec.observation import Observation
from specdec.processors import NO_PROCESSORS, Processing, Processors
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy, Verifier
from specdec.ranks import RanksError, here
from specdec.reasons import DraftError, LogitsError
from specdec.request import Capacity, Decoding, Request
from specdec.sampling import SamplingParams, uniforms
from specdec.stop_strings import StopStrings
from specdec.timing import Stopwatch
from specdec.tree import Acceptance, TokenTree
from specdec.tree_records import figures_of


class Decoder:
    """Decodes requests, as many at a time as `capacity` has rows; a finished row is refilled with
    the next request.

    On a GPU the host only queues work, in CUDA graphs where `kernels.graphs` allows, and learns
    what a step has yielded while the next one runs. A sequence that has ended meanwhile is cut
    exactly where it ended.

    Verifier and drafter start over with it: an earlier decoder of either is of no use any more.

    Args:
        verifier: the target model, which says on which device and with which kernels all is done.
        drafter: what guesses, loaded.
        tree: what shapes its trees.
        rule: what keeps.
        sampling: how tokens are chosen.
        capacity: of the caches of target and draft.
        stop_tokens: a sequence ends after the first of these.
        stop_strings: and after the token that completes one of these; None: there are none.
        processors: what is done to logits before the rule sees them; a drafter sees raw ones.
        trees: of the first so many steps of each sequence the trees are recorded.
        evidence: whether sequences get theirs (`specdec.evidence`).

    Raises:
        ValueError: a setting out of range, or trees that the drafter cannot draft.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        drafter: Drafter,
        tree: TreePolicy,
        rule: AcceptanceRule,
        sampling: SamplingParams,
        capacity: Capacity,
        stop_tokens: Collection[int] = (),
        stop_strings: StopStrings | None = None,
        processors: Processors = NO_PROCESSORS,
        trees: int = 0,
        evidence: bool = False,
    ) -> None:
        self.verifier, self.drafter, self.rule, self.sampling = verifier, drafter, rule, sampling
        self.device, self._recorded = verifier.device, trees
        self._kernels = verifier.kernels.on(self.device)
        self.stop_tokens, self.stop_strings = frozenset(stop_tokens), stop_strings
        self._evidence = evidence
        self._processing: Processing | None = None
        if processors:
            self._processing = Processing(
                processors, rows=capacity.rows, device=self.device, kernels=self._kernels
            )
        drafter.check(tree)
        if drafter.reads_states and capacity.share and not drafter.page_successors:
            raise ValueError(
                "capacity.share=True: the drafter reads states of whole prompts, which tokens "
                "found in shared pages do not have; make it False"
            )
        self.capacity = capacity = replace(capacity, successors=drafter.page_successors)
        verifier.prepare(capacity, drafter.observes)
        drafter.prepare(capacity, tree)
        drafter.forget()
        self._arrivals = Arrivals(capacity.rows)
        self.waiting = self._arrivals.waiting
        self.running: list[Decoding] = []
        self._stopwatch = Stopwatch(self.device)
        padded = self.device.type == "cuda" and not self._kernels.LOOKS
        self.graphs = Graphs(enabled=padded and verifier.kernels.graphs)
        # Steps queued before the last one ends: none if drafting begins with a look at its tokens.
        self._ahead = int(padded and drafter.on_device and not drafter.variants)
        self._batches = Batches(capacity.rows, self.device, padded=padded)
        proposals = rule.needs_proposal or trees > 0
        self._host_trees = HostTrees(self.device, padded=padded, proposals=proposals)
        self._wanted: Hashable = None  # variant of the draft, while warming up
        self._flights: deque[Flight] = deque()
        self._finished: deque[Decoding] = deque()

    def submit(self, request: Request, *, first: bool = False) -> None:
        """Queue a request, at the front of the queue if `first`.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the context or in a cache
                row.
        """
        prompt, context = len(request.prompt_ids), self.verifier.max_context
        if prompt == 0:
            raise ValueError(f"request {request.id}: the prompt is empty")
        if prompt >= context:
            raise ValueError(
                f"request {request.id}: a prompt of {prompt} tokens leaves no room in the context "
                f"of {context}"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={request.max_new_tokens}: must be at least 1")
        if min(request.max_tokens, context) > self.capacity.max_tokens:
            raise ValueError(
                f"request {request.id}: {request.max_tokens} tokens exceed "
                f"max_tokens={self.capacity.max_tokens}"
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
            DraftError: the drafter raised something, or its probabilities are NaN.
            LogitsError: the target's logits are.
        """
        for request in requests:
            self.submit(request)
        self._stopwatch.start()
        flights = self._flights
        landed: list[tuple[Flight, dict[str, Any]]] = []

        def report() -> None:
            for flight, what in landed:
                step = Step(**what, seconds=flight.laps.read())
                if on_step is not None:
                    on_step(step)
            landed.clear()

        yield from self._retire()  # what a run that was given up had finished
        while self._arrivals or self.running or flights:
            self._admit()
            if self._worth_a_step(flights):
                flights.append(self._step())
            report()  # after the next step is queued: a report may have to wait for its step
            if len(flights) > self._ahead or not self._worth_a_step(flights):
                flight = flights.popleft()
                landed.append((flight, self._land(flight)))
                here().landed(flight.sequences)
            if any(sequence.finish_reason for sequence in self.running):
                report()
                yield from self._retire()
        report()
        here().ended()

    def warm_up(self, prompt_ids: Sequence[int], tokens: int = 8) -> None:
        """Decode a few tokens at every size of batch and tree, so that no prompt pays for what
        happens once: compiling kernels, capturing graphs, allocating memory. What the drafter has
        learnt meanwhile is forgotten."""
        batches, sizes = [1], [1]
        if self._batches.padded:
            rows = self.capacity.rows
            batches = [n for n in SIZES if n < rows] + [rows]
            most = self.drafter.most_nodes
            if not self.drafter.on_device and most is not None:
                # The largest first, so that the scratch of the cache need not grow.
                sizes = [most, *(n for n in SIZES if n < most)]
                tokens = min(tokens, 2)
        tokens = max(1, min(tokens, self.capacity.max_tokens - len(prompt_ids)))
        variants = self.drafter.variants or [None]
        try:
            for batch, variant, nodes in product(batches, variants, sizes):
                self._wanted, self._host_trees.least = variant, nodes
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
        finally:
            self._wanted, self._host_trees.least = None, 1
        self.drafter.forget()

    def _worth_a_step(self, flights: Collection[Flight]) -> bool:
        """Whether some sequence will still be running when the steps in flight have landed,
        however many tokens they yield."""
        coming = sum(flight.tree.depth + 1 for flight in flights)
        return any(min(self._limits(sequence)) > coming for sequence in self.running)

    def _admit(self) -> None:
        """Let those join whose prompts are read, as far as there are rows and room."""
        beside = bool(self.running)
        if not self._arrivals.wants(beside=beside):
            return
        self._stopwatch.lap("other")
        admitted = self._arrivals.admit(self._start, beside=beside)
        if admitted:
            self.running += admitted
            self._batches.join(admitted, self.sampling.seed)
            if self._processing is not None:
                self._processing.join(admitted)
        self._stopwatch.lap("prefill")

    def _start(self, sequences: list[Decoding]) -> Intake:
        read, shareable = partial(self._read_prompt, sequences), self.drafter.shareable
        asked = self._start_draft, read, self._prefill_draft, self._blame(sequences)(shareable)
        return self.verifier.start(sequences, *asked)

    def _start_draft(self, sequences: list[Decoding]) -> Sequence[Decoding]:
        with self._blame(sequences):
            taken = self.drafter.start(sequences)
        return sequences if taken is None else taken

    def _prefill_draft(self, sequences: Sequence[Decoding], tokens: int) -> Sequence[Decoding]:
        with self._blame(sequences):
            read = self.drafter.prefill(sequences, tokens)
        return sequences if read is None else read

    def _read_prompt(
        self,
        sequences: Sequence[Decoding],
        rows: Tensor,
        tokens: Tensor,
        length: Tensor,
        seen: Observation,
    ) -> None:
        with self._blame(sequences):
            self.drafter.read(rows, tokens, length, seen)

    def _retire(self) -> Iterator[Decoding]:
        """Give up the rows of finished sequences."""
        finished = [sequence for sequence in self.running if sequence.finish_reason]
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        for sequence in finished:
            self.verifier.finish(sequence)
            self.drafter.finish(sequence)
            self._arrivals.leave(sequence)
        self._finished.extend(finished)
        while self._finished:
            yield self._finished.popleft()

    # One step

    def _step(self) -> Flight:
        sequences = list(self.running)
        batch = self._batches.of(sequences)
        context = self._context(sequences, batch)
        self._stopwatch.lap("other")
        tree, variant, given = self._draft(context, batch)
        self._stopwatch.lap("draft")
        key = len(batch.rows), tree.nodes, tree.depth, tree.support, variant
        logits, seen = self.graphs.run("verify", key, lambda: self.verifier.verify(context, tree))
        self._stopwatch.lap("verify")
        figures = self._figures(context, tree, logits)
        acceptance, results = self.graphs.run(
            "accept", key, lambda: self._accept(context, tree, logits, seen)
        )
        results, arrived = results.sent()
        self._stopwatch.lap("accept")
        self.graphs.run("commit", key, lambda: self._commit(context, batch, acceptance, seen))
        self._stopwatch.lap("commit")
        return Flight(
            sequences=sequences,
            tree=tree,
            context=given,
            results=results,
            arrived=arrived,
            laps=self._stopwatch.take(),
            figures=figures,
            recorded=self._recorded,
        )

    def _figures(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Tensor | None:
        """What trees are recorded with, on its way to the host; None if none of this step are.
        Before the rule, which has processors count what it keeps."""
        if not self._recorded or all(s.steps >= self._recorded for s in context.sequences):
            return None
        if self._processing is not None:
            logits = self._processing.process(context.rows, tree, logits)
        figures = to_host(figures_of(tree, logits, self.sampling))
        self._stopwatch.lap("other")
        return figures

    def _context(self, sequences: Sequence[Decoding], batch: Batch) -> StepContext:
        if self._kernels.LOOKS:
            host = self._host_uniforms(sequences)

            def numbers(stream: int, count: int) -> Tensor:
                return host(stream, count).to(self.device)
        else:
            numbers = partial(self._kernels.uniforms, batch.keys)
        return StepContext(
            sequences=sequences,
            roots=batch.roots,
            sampling=self.sampling,
            uniforms=numbers,
            rows=batch.rows,
            kernels=self._kernels,
            keys=batch.keys,
            cache=self.verifier.cache,
        )

    def _draft(
        self, context: StepContext, batch: Batch
    ) -> tuple[TokenTree, Hashable, StepContext]:
        """The trees, which variant of the draft they are, and what the drafter was given."""
        drafter, sequences = self.drafter, context.sequences
        with self._blame(sequences):
            if not drafter.on_device:
                given = self._on_host(context)
                tree = drafter.draft(given)
                tree.check_size()
                return (
                    self._host_trees.to_device(tree, len(batch.rows), drafter.most_nodes),
                    None,
                    given,
                )
            variant = drafter.look(sequences, self._wanted) if drafter.variants else None

            def draft() -> TokenTree:
                tree = drafter.draft(context)
                tree.check_size()
                return replace(tree, size=torch.where(batch.active, tree.size, 0))

            return self.graphs.run("draft", (len(batch.rows), variant), draft), variant, context

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

    def _host_uniforms(self, sequences: Sequence[Decoding]) -> Callable[[int, int], Tensor]:
        """The numbers of `StepContext.uniforms`, for sequences all of whose steps have landed."""
        ids, steps = [s.request.id for s in sequences], [s.steps for s in sequences]
        return partial(uniforms, self.sampling.seed, ids, steps)

    @contextmanager
    def _blame(self, sequences: Sequence[Decoding]) -> Iterator[None]:
        """Name the drafter and what it drafted for in whatever it raises."""
        try:
            yield
        except (DraftError, RanksError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise DraftError.caused_by(error, self.drafter, sequences) from error

    def _accept(
        self, context: StepContext, tree: TokenTree, logits: Tensor, seen: Observation
    ) -> tuple[Acceptance, Yield]:
        processing = self._processing
        if processing is not None:
            logits = processing.process(context.rows, tree, logits)
        acceptance = self.rule.accept(context, tree, logits)
        if processing is not None:
            processing.advance(context.rows, tree, acceptance)
        told = Observation() if self.drafter.on_device else seen
        return acceptance, Yield.of(tree, acceptance, told, logits, evidence=self._evidence)

    def _commit(
        self, context: StepContext, batch: Batch, acceptance: Acceptance, seen: Observation
    ) -> None:
        self.verifier.commit(context, acceptance)
        if self.drafter.on_device:
            with self._blame(context.sequences):
                self.drafter.commit(context, acceptance, seen)
        self._batches.advance(batch, acceptance.next_token)

    # What a step has yielded

    def _land(self, flight: Flight) -> dict[str, Any]:
        """Give sequences their new tokens, and a drafter on the host what was kept: what a `Step`
        holds, without the times."""
        flight.wait()
        self._check(flight)
        if not self.drafter.on_device:
            with self._blame(flight.sequences):
                kept, seen = flight.results.acceptance(len(flight.sequences))
                self.drafter.commit(flight.context, kept, seen)
        return flight.land(self._append, self.drafter.sources)

    def _check(self, flight: Flight) -> None:
        """Stop where numbers were none: nothing that follows would be the target's."""
        sound = flight.results.sound(len(flight.sequences))
        for sequence, (target, draft) in zip(flight.sequences, sound, strict=True):
            if (target and draft) or sequence.finish_reason:
                continue
            request, when = [sequence.request.id], f"step {sequence.steps + 1}"
            if not target:
                raise LogitsError(request, when)
            raise DraftError(self.drafter, request, f"{when}: its probabilities are NaN")

    def _limits(self, sequence: Decoding) -> tuple[int, int]:
        """Tokens it may still get, by its request and by the context."""
        have = len(sequence.tokens)
        return sequence.request.max_tokens - have, self.verifier.max_context - have

    def _append(self, sequence: Decoding, tokens: list[int]) -> None:
        """Add new tokens up to the first stop token or string, the length limit or the end of the
        context."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.stop_tokens), None)
        if self.stop_strings is not None:
            stop = self.stop_strings.end(sequence.tokens, tokens[:stop]) or stop
        limits = (stop or len(tokens) + 1, *self._limits(sequence))
        named = zip(limits, ("stop", "length", "context"), strict=True)
        limit, reason = min(named, key=lambda pair: pair[0])
        if len(tokens) >= limit:
            tokens, sequence.finish_reason = tokens[:limit], reason
        sequence.tokens += tokens
        sequence.accepted_lengths.append(len(tokens))

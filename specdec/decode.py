"""The loop: draft, verify, accept, commit, for a batch of sequences until every request is done.
Start reading here."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from specdec.kernels.choose import AUTO, Kernels
from specdec.protocols import (
    AcceptanceRule,
    Capacity,
    Decoding,
    Drafter,
    Request,
    StepContext,
    Verifier,
)
from specdec.sampling import SamplingParams, random_keys, uniforms
from specdec.timing import Stopwatch
from specdec.tree import TokenTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step did, for the B sequences it ran.

    Args:
        requests: [B] ids.
        nodes: [B] drafted nodes, the root not counted.
        depths: [B] depth of the drafted trees.
        accepted: [B] drafted nodes the rule accepted.
        tokens: [B] new tokens that count: accepted ones and the target's own, up to the stop token
            or limit.
        seconds: time of each verb.
    """

    requests: list[int]
    nodes: list[int]
    depths: list[int]
    accepted: list[int]
    tokens: list[int]
    seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        """As a line of steps.jsonl."""
        return asdict(self)


class Decoder:
    """Decodes requests, `batch_size` at a time; a finished row is refilled with the next request.

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
        pages: pages of each cache; None is enough for `batch_size` sequences of `max_tokens`.
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
        self.waiting: deque[Request] = deque()
        self.running: list[Decoding] = []
        self._free_rows = list(range(batch_size))
        self._longest = longest
        self._stopwatch = Stopwatch(device)

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
        """
        for request in requests:
            self.submit(request)
        while self.waiting or self.running:
            self._stopwatch.start()
            self._admit()
            self._stopwatch.lap("prefill")
            step = self._step()
            if on_step is not None:
                on_step(step)
            finished = [sequence for sequence in self.running if sequence.finish_reason]
            self.running = [sequence for sequence in self.running if not sequence.finish_reason]
            for sequence in finished:
                self.verifier.finish(sequence)
                self.drafter.finish(sequence)
                self._free_rows.append(sequence.row)
            yield from finished

    def _admit(self) -> None:
        """Fill free rows with waiting requests, as far as the caches have room."""
        asked = [
            Decoding(request, row, list(request.prompt_ids))
            for request, row in zip(self.waiting, reversed(self._free_rows), strict=False)
        ]
        if not asked:
            return
        admitted = self.verifier.start(asked)
        self.drafter.start(admitted)
        self.running += admitted
        for sequence in admitted:
            self.waiting.remove(sequence.request)
            self._free_rows.remove(sequence.row)

    def _step(self) -> Step:
        sequences = list(self.running)
        context = self._context(sequences)
        tree = self.drafter.draft(context)
        self._stopwatch.lap("draft")
        logits = self.verifier.verify(context, tree)
        self._stopwatch.lap("verify")
        acceptance = self.rule.accept(context, tree, logits)
        self._stopwatch.lap("accept")
        self.verifier.commit(context, acceptance)
        self.drafter.commit(context, acceptance)
        self._stopwatch.lap("commit")

        lengths, sizes = acceptance.length.tolist(), tree.size.tolist()
        gained = acceptance.new_tokens(tree).tolist()
        for sequence, tokens, length, size in zip(sequences, gained, lengths, sizes, strict=True):
            self._append(sequence, tokens[:length])
            sequence.steps += 1
            sequence.drafted += size - 1
        self._stopwatch.lap("other")
        return Step(
            requests=[sequence.request.id for sequence in sequences],
            nodes=[size - 1 for size in sizes],
            depths=_depths(tree),
            accepted=[length - 1 for length in lengths],
            tokens=[sequence.accepted_lengths[-1] for sequence in sequences],
            seconds=self._stopwatch.read(),
        )

    def _context(self, sequences: list[Decoding]) -> StepContext:
        ids, steps = [s.request.id for s in sequences], [s.steps for s in sequences]

        def draws(stream: int, count: int) -> torch.Tensor:
            return uniforms(self.sampling.seed, ids, steps, stream, count).to(self.device)

        roots = torch.tensor([s.tokens[-1] for s in sequences], device=self.device)
        keys = None
        if self._kernels.RULES:
            keys = random_keys(self.sampling.seed, ids, steps, self.device)
        return StepContext(
            sequences=sequences,
            roots=roots,
            sampling=self.sampling,
            uniforms=draws,
            kernels=self._kernels,
            keys=keys,
        )

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


def _depths(tree: TokenTree) -> list[int]:
    """[B] edges of the longest path of each tree."""
    depths = []
    for parents in tree.parents.tolist():
        depth = [0]  # of each node, 0 for padding
        for parent in parents[1:]:
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
        depths.append(max(depth))
    return depths

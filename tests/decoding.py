"""Decoders for tests: the one place that puts one together by hand."""

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec.arrivals import Intake, Join, Prefill, Shareable, Unread
from specdec.decode import Decoder
from specdec.drafters.trees.chain import Chain
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.observation import Observation, Observes, observe
from specdec.processors import NO_PROCESSORS, Processors
from specdec.protocols import AcceptanceRule, Drafter, Read, StepContext, TreePolicy, Verifier
from specdec.request import PREFILL_CHUNK, Capacity, Decoding, Request
from specdec.sampling import SamplingParams
from specdec.stop_strings import StopStrings
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.verifier import TreeVerifier

D = TypeVar("D", bound=Drafter)

BLIND = ModuleType("blind")
"""The kernels that define what is correct, with the host looking at nothing, as on a GPU."""
vars(BLIND).update({**vars(reference), "LOOKS": False})


def loaded(drafter: D, target: PagedLM) -> D:
    """The drafter, ready for this target."""
    drafter.load(target, Models(target.placement))
    return drafter


def prepared(
    drafter: D, tree: TreePolicy, target: Any = None, *, rows: int = 4, max_tokens: int = 64
) -> D:
    """The drafter, ready to draft outside a decoder; `target` has what it asks of one."""
    drafter.check(tree)
    if target is not None:
        drafter.load(target, Models(getattr(target, "placement", Placement())))
    drafter.prepare(Capacity(rows=rows, max_tokens=max_tokens), tree)
    return drafter


def decoder_of(
    target: PagedLM | Verifier,
    drafter: Drafter,
    tree: TreePolicy | None = None,
    rule: AcceptanceRule | None = None,
    *,
    sampling: SamplingParams | None = None,
    temperature: float = 0.0,
    seed: int = 3,
    rows: int = 1,
    max_tokens: int = 256,
    stop_tokens: Collection[int] = (),
    stop_strings: StopStrings | None = None,
    processors: Processors = NO_PROCESSORS,
    trees: int = 0,
    evidence: bool = False,
    chunk: int = PREFILL_CHUNK,
    **capacity: Any,
) -> Decoder:
    """A decoder over a model, for which the drafter is loaded, or over a verifier.

    Args:
        tree: None for no drafting.
        rule: None for one that is lossless for any children.
        sampling: instead of temperature and seed.
        chunk: prompt tokens that a model reads at a time.
        capacity: more of `Capacity`.
    """
    verifier: Any = target
    if isinstance(target, PagedLM):
        loaded(drafter, target)
        verifier = TreeVerifier(target, prefill_chunk=chunk)
    sampling = sampling or SamplingParams(temperature=temperature, seed=seed)
    most = min(max_tokens, verifier.max_context)
    capacity = {"share": not drafter.reads_states, **capacity}
    return Decoder(
        verifier=verifier,
        drafter=drafter,
        tree=tree or Chain(budget=0),
        rule=rule or (Greedy() if sampling.greedy else TargetOnly()),
        sampling=sampling,
        capacity=Capacity(rows=rows, max_tokens=most, **capacity),
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        processors=processors,
        trees=trees,
        evidence=evidence,
    )


def requests_of(
    prompts: Sequence[Sequence[int]], new: int, categories: Sequence[str | None] = ()
) -> list[Request]:
    """One for each prompt, numbered from 0."""
    kinds = [*categories, *[None] * (len(prompts) - len(categories))]
    return [
        Request(id=i, prompt_ids=ids, max_new_tokens=new, category=kind)
        for i, (ids, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


def outputs_of(decoder: Decoder, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """New tokens of each prompt."""
    done = {s.request.id: s.output_ids for s in decoder.run(requests_of(prompts, new))}
    return [done[i] for i in range(len(prompts))]


class FakeVerifier:
    """A verifier without a model, whose target is `logits`."""

    cache = None

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        kernels: Kernels | None = None,
        max_context: int = 400,
    ) -> None:
        self.device = torch.device(device)
        self.kernels = kernels or Kernels(impl="reference")
        self.max_context = max_context
        self._observes = Observes()

    def logits(self, context: StepContext, tree: TokenTree) -> Tensor:
        """[B, N, V] after every node."""
        raise NotImplementedError

    def prepare(self, capacity: Capacity, observes: Observes) -> None:
        self._observes = observes

    def start(
        self,
        sequences: Sequence[Decoding],
        join: Join,
        read: Read,
        prefill: Prefill,
        shareable: Shareable,
    ) -> Intake:
        return Unread(join(list(sequences)), prefill)

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        logits = self.logits(context, tree)
        return logits, observe(self._observes, logits, {}, context.kernels)

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        pass

    def finish(self, sequence: Decoding) -> None:
        pass

"""Replay of trees that are functions of the tokens before them: the drafter itself drafts along
the texts, without a pass of the target. Top-k children alone: what a step keeps is then known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.decode import Decoder
from specdec.kernels.choose import Kernels
from specdec.observation import Observation, Observes
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy
from specdec.request import Capacity, Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree

CONTEXT = 1 << 30


class NoTarget:
    """A verifier without a model."""

    device = torch.device("cpu")
    kernels = Kernels(impl="reference")
    max_context = CONTEXT
    cache: PagedKVCache | None = None

    def prepare(self, capacity: Capacity, observes: Observes) -> None: ...

    def start(
        self,
        sequences: Sequence[Decoding],
        join: Callable[[list[Decoding]], Sequence[Decoding]],
        read: Callable[[Tensor, Tensor, Tensor, Observation], None],
    ) -> list[Decoding]:
        return list(join(list(sequences)))

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        return torch.zeros(*tree.tokens.shape, 1), Observation()

    def commit(self, context: StepContext, acceptance: Acceptance) -> None: ...

    def finish(self, sequence: Decoding) -> None: ...


@dataclass
class Follow(AcceptanceRule):
    """Keeps what the texts go on with."""

    texts: Mapping[int, Sequence[int]]
    name = "follow"

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return None

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        path = torch.zeros(len(tree.tokens), tree.depth + 1, dtype=torch.int64)
        length, after = torch.zeros_like(path[:, 0]), torch.zeros_like(path[:, 0])
        parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
        for row, sequence in enumerate(context.sequences):
            rest = self.texts[sequence.request.id][len(sequence.output_ids) :]
            children = {
                (parent, token): node
                for node, (parent, token) in reversed(
                    list(enumerate(zip(parents[row], tokens[row], strict=True)))
                )
            }
            node, kept = 0, [0]
            for token in rest[: tree.depth]:
                child = children.get((node, token))
                if child is None or child == 0:
                    break
                node = child
                kept.append(node)
            path[row, : len(kept)] = torch.tensor(kept)
            length[row] = len(kept)
            after[row] = rest[len(kept) - 1] if len(kept) <= len(rest) else 0
        return Acceptance(path=path, length=length, next_token=after)


@dataclass(frozen=True, kw_only=True)
class Walked:
    """Of each text, in order.

    Args:
        lengths: tokens of each step.
        nodes: drafted in all steps.
    """

    lengths: list[list[int]]
    nodes: NDArray[np.float64]


@torch.inference_mode()
def walk(
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    *,
    drafter: Drafter,
    tree: TreePolicy,
    sampling: SamplingParams,
    page_size: int = 16,
) -> Walked:
    """What steps keep of these texts, one after the other in the order in which they were
    recorded.

    Args:
        drafter: loaded.
    """
    longest = max(one.max_tokens for one in requests)
    decoder = Decoder(
        verifier=NoTarget(),
        drafter=drafter,
        tree=tree,
        rule=Follow(dict(zip((one.id for one in requests), outputs, strict=True))),
        sampling=sampling,
        capacity=Capacity(rows=1, max_tokens=longest, page_size=page_size),
    )
    done = {sequence.request.id: sequence for sequence in decoder.run(requests)}
    for request, output in zip(requests, outputs, strict=True):
        if done[request.id].output_ids != list(output):
            raise RuntimeError(f"request {request.id}: the walk left the text")
    return Walked(
        lengths=[done[one.id].accepted_lengths for one in requests],
        nodes=np.array([done[one.id].drafted for one in requests], float),
    )

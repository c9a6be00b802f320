"""Replay of trees that are functions of the tokens before them: the drafter itself drafts along
the texts, without a pass of the target. Top-k children alone: what a step keeps is then known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.arrivals import Join, Prefill, Shareable, Unread
from specdec.cache import PagedKVCache
from specdec.decode import Decoder
from specdec.kernels.choose import Kernels
from specdec.observation import Observation, Observes
from specdec.protocols import AcceptanceRule, Drafter, Read, StepContext, TreePolicy
from specdec.replay.siblings import Array
from specdec.request import Capacity, Decoding, Request
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, Children, TokenTree

CONTEXT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What drafters ask of a target that they do not run: whose tokens these are."""

    name: str
    vocab_size: int
    tokenizer: Any


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
        join: Join,
        read: Read,
        prefill: Prefill,
        shareable: Shareable,
    ) -> Unread:
        return Unread(join(list(sequences)), prefill)

    def verify(self, context: StepContext, tree: TokenTree) -> tuple[Tensor, Observation]:
        return torch.zeros(*tree.tokens.shape, 1), Observation()

    def commit(self, context: StepContext, acceptance: Acceptance) -> None: ...

    def finish(self, sequence: Decoding) -> None: ...


@dataclass
class Follow(AcceptanceRule):
    """Keeps what the texts go on with.

    Args:
        texts: by request.
        everywhere: a step begins at every token of a text, whatever it keeps.
        seen: by request and place, drafted tokens that are kept there, and nodes.
    """

    texts: Mapping[int, Sequence[int]]
    everywhere: bool = False
    seen: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    name = "follow"

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return None

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        path = torch.zeros(len(tree.tokens), tree.depth + 1, dtype=torch.int64)
        length, after = torch.zeros_like(path[:, 0]), torch.zeros_like(path[:, 0])
        parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
        size = tree.size.tolist()
        for row, sequence in enumerate(context.sequences):
            place = len(sequence.output_ids)
            rest = self.texts[sequence.request.id][place:]
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
            self.seen[sequence.request.id, place] = len(kept) - 1, size[row] - 1
            kept = kept[:1] if self.everywhere else kept
            path[row, : len(kept)] = torch.tensor(kept)
            length[row] = len(kept)
            after[row] = rest[len(kept) - 1] if len(kept) <= len(rest) else 0
        return Acceptance(path=path, length=length, next_token=after)


@dataclass(frozen=True, kw_only=True)
class Walked:
    """Of each place of each text at which a step began; 0 elsewhere.

    Args:
        kept: [P, n], drafted tokens that are kept.
        nodes: [P, n], drafted.
    """

    kept: NDArray[np.int64]
    nodes: NDArray[np.int64]

    @property
    def survivals(self) -> Array:
        """[P, n, D + 1], as those of trees of one shape."""
        depths = np.arange(int(self.kept.max(initial=0)) + 1)
        found: Array = (self.kept[..., None] >= depths).astype(np.float64)
        return found


@torch.inference_mode()
def walk(
    requests: Sequence[Request],
    outputs: Sequence[Sequence[int]],
    *,
    drafter: Drafter,
    tree: TreePolicy,
    sampling: SamplingParams,
    everywhere: bool = False,
    rows: int = 1,
    page_size: int = 16,
) -> Walked:
    """What steps keep of these texts.

    Args:
        drafter: loaded.
        rows: texts together; with 1, which a drafter needs that looks into earlier ones, they go
            one after the other in the order in which they were recorded.
        everywhere: as in `Follow`.
    """
    texts = dict(zip((one.id for one in requests), outputs, strict=True))
    some = [one for one in requests if texts[one.id]]
    rule = Follow(texts, everywhere=everywhere)
    decoder = Decoder(
        verifier=NoTarget(),
        drafter=drafter,
        tree=tree,
        rule=rule,
        sampling=sampling,
        capacity=Capacity(
            rows=min(rows, len(some)),
            max_tokens=max(one.max_tokens for one in some),
            page_size=page_size,
        ),
    )
    done = {sequence.request.id: sequence for sequence in decoder.run(some)}
    for one in some:
        if done[one.id].output_ids != list(texts[one.id]):
            raise RuntimeError(f"request {one.id}: the walk left the text")
    longest = max(map(len, outputs))
    kept, nodes = (np.zeros((len(requests), longest), np.int64) for _ in range(2))
    order = {one.id: place for place, one in enumerate(requests)}
    for (number, place), (length, size) in rule.seen.items():
        if place < len(texts[number]):
            kept[order[number], place], nodes[order[number], place] = length, size
    return Walked(kept=kept, nodes=nodes)


def draft_widths(tree: TreePolicy, levels: int) -> list[int]:
    """Nodes of each pass of a draft that grows such trees, of one sequence."""
    widths = [1]
    for level in range(levels - 1):
        grown = widths[-1] * tree.width(level)
        widths.append(min(grown, getattr(tree, "expanded", grown)))
    return widths[:levels]

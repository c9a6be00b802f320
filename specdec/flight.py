"""A step on its way: queued on the device, and landed on the host when its results have come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.evidence import evidence_of
from specdec.observation import Observation
from specdec.protocols import StepContext
from specdec.request import Decoding
from specdec.timing import Laps
from specdec.tree import Acceptance, TokenTree
from specdec.tree_records import TreeRecord


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
        trees: what is recorded of them: nothing, or those of sequences in their first steps.
    """

    requests: list[int]
    nodes: list[int]
    depths: list[int]
    accepted: list[int]
    tokens: list[int]
    seconds: dict[str, float]
    sources: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    trees: list[TreeRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Yield:
    """What a step has yielded, in one tensor, so that one copy brings it to the host.

    Args:
        packed: [B, W] int64, the parts of `widths` side by side.
        widths: of new tokens, nodes and next token; parents; path; tokens; where there are any,
            sources and observed tokens of the N nodes, and evidence; two float64 that are finite
            if all is well.
    """

    packed: Tensor
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tree: TokenTree,
        acceptance: Acceptance,
        seen: Observation,
        logits: Tensor,
        *,
        evidence: bool = False,
    ) -> "Yield":
        """Pack it, with what the host is to know of what was seen, and whether it can be relied
        on; and the `evidence` of new tokens, if it is recorded."""
        numbers = torch.stack([acceptance.length, tree.size, acceptance.next_token], dim=1)
        nothing, new, kept = numbers[:, :0], acceptance.new_tokens(tree), _kept(acceptance, logits)
        parts = [
            numbers,
            tree.parents,
            acceptance.path,
            new,
            nothing if tree.source is None else tree.source,
            nothing if seen.tokens is None else seen.tokens.flatten(1),
            evidence_of(kept, new).flatten(1).view(torch.int64) if evidence else nothing,
            _sums(tree, kept).view(torch.int64),
        ]
        widths = tuple(part.shape[1] for part in parts)
        return cls(packed=torch.cat(parts, dim=1), widths=widths)

    def sent(self) -> tuple["Yield", torch.cuda.Event | None]:
        """Itself on the host, and what to wait for until it is there; None: it is."""
        if not self.packed.is_cuda:
            return self, None
        host = to_host(self.packed)
        arrived = torch.cuda.Event()
        arrived.record()
        return replace(self, packed=host), arrived

    def parts(self, batch: int) -> tuple[Tensor, ...]:
        """As in `widths`, of the first sequences."""
        return self.packed[:batch].split(self.widths, dim=1)

    def sound(self, batch: int) -> list[list[bool]]:
        """Of the first sequences: whether the target's logits make a distribution wherever the
        path went, and whether the draft's probabilities are numbers."""
        sums = self.parts(batch)[-1].view(torch.float64)
        return sums.isfinite().tolist()

    def evidence(self, batch: int) -> list[list[list[float]]]:
        """Of the first sequences: the four numbers of each new token; none, if not recorded."""
        numbers: list[list[list[float]]]
        numbers = self.parts(batch)[-2].view(torch.float64).unflatten(1, (-1, 4)).tolist()
        return numbers

    def acceptance(self, batch: int) -> tuple[Acceptance, Observation]:
        """What a drafter that works on the host is told."""
        numbers, parents, path, _, _, observed, *_ = self.parts(batch)
        tokens = observed.unflatten(1, (parents.shape[1], -1)) if observed.shape[1] else None
        kept = Acceptance(path=path, length=numbers[:, 0], next_token=numbers[:, 2])
        return kept, Observation(tokens=tokens)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Flight:
    """A step whose work is queued and whose results are on their way.

    Args:
        tree: what it verified.
        context: what the drafter was given.
        results: on the host.
        arrived: None if they are there already.
        figures: [B, N, 3] as of `figures_of`, on the host when the results are; None: no tree of
            this step is recorded.
        recorded: steps of each sequence whose trees are.
    """

    sequences: list[Decoding]
    tree: TokenTree
    context: StepContext
    results: Yield
    arrived: torch.cuda.Event | None
    laps: Laps
    figures: Tensor | None = None
    recorded: int = 0

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()

    def land(
        self, finish: Callable[[Decoding, list[int]], None], sources: Sequence[str]
    ) -> dict[str, list[Any]]:
        """Give sequences their new tokens; those that ended in an earlier step get none.

        Args:
            finish: adds tokens to a sequence, as many as count.
            sources: names of the numbers in `TokenTree.source`.

        Returns:
            What a `Step` holds, without the times.
        """
        names = ("requests", "nodes", "depths", "accepted", "tokens", "sources", "trees")
        step: dict[str, list[Any]] = {name: [] for name in names}
        parts = self.results.parts(len(self.sequences))[:5]
        evidence = self.results.evidence(len(self.sequences))
        rows = zip(self.sequences, *(part.tolist() for part in parts), strict=True)
        for place, (sequence, numbers, parents, path, new, source) in enumerate(rows):
            if sequence.finish_reason:
                continue
            length, size, next_token = numbers
            if self.figures is not None and sequence.steps < self.recorded:
                record = TreeRecord.of(
                    self.figures[place],
                    request=sequence.request.id,
                    step=sequence.steps,
                    parents=parents[:size],
                    path=path[:length],
                    next_token=next_token,
                )
                step["trees"].append(record)
            finish(sequence, new[:length])
            sequence.evidence += evidence[place][: sequence.accepted_lengths[-1]]
            sequence.steps += 1
            sequence.drafted += size - 1
            step["requests"].append(sequence.request.id)
            step["nodes"].append(size - 1)
            step["depths"].append(_depth(parents[:size]))
            step["accepted"].append(length - 1)
            step["tokens"].append(sequence.accepted_lengths[-1])
            drafted, accepted = source[1:size], [source[n] for n in path[1:length] if source]
            step["sources"].append(
                {
                    name: (drafted.count(number), accepted.count(number))
                    for number, name in enumerate(sources if source else ())
                }
            )
        return step


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there when what is queued up to now is done; a tensor of the
    host itself."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def _kept(acceptance: Acceptance, logits: Tensor) -> Tensor:
    """[B, depth + 1, V] of the target's logits [B, N, V], those at the nodes of the path: all that
    became of the step."""
    batch, nodes, _ = logits.shape
    if acceptance.path.shape[1] == 1:
        return logits[:, :1]
    first = torch.arange(0, batch * nodes, nodes, device=logits.device)[:, None]
    kept = logits.flatten(0, 1).index_select(0, (first + acceptance.path).flatten())
    return kept.view(*acceptance.path.shape, -1)


def _sums(tree: TokenTree, kept: Tensor) -> Tensor:
    """[B, 2] float64: of the largest of the target's logits at each node of the path
    [B, depth + 1, V], and of the draft probabilities. Sums, because one number that is none spoils
    them; the largest, as in `specdec.sampling.sound`."""
    probs = kept[:, :1, :0] if tree.proposal is None else tree.proposal.probs
    largest = kept.amax(-1)
    return torch.stack(
        [largest.sum(1, dtype=torch.float64), probs.sum((1, 2), dtype=torch.float64)], dim=1
    )


def _depth(parents: list[int]) -> int:
    """Edges of the longest path of a tree."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)

"""Drafters whose answers are known: what a tree should look like can then be worked out without
any of the code that grows it.

A scripted drafter answers from tables of random distributions keyed by the path from the root.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.growth import Frontier, grow
from specdec.drafters.host import HostDrafter
from specdec.protocols import StepContext, TreePolicy, levels_of
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams, uniforms
from specdec.tree import TokenTree

VOCAB = 6
CHILDREN = ("top_k", "sample", "sample_with_replacement")
Path = tuple[int, ...]


class Script:
    """A drafter's `expand` that looks distributions up by path and notes what it was asked.

    Args:
        roots: last committed token of each row; a row's tables depend on it.
        support: tokens with probability above zero; the last of the candidates are void.
        candidates: K, how many tokens an answer lists.
    """

    def __init__(
        self, roots: Sequence[int], *, support: int = VOCAB, candidates: int = VOCAB
    ) -> None:
        self.roots, self.support, self.candidates = roots, support, candidates
        self.paths: list[list[Path]] = [[] for _ in roots]  # by number of expanded node
        self.levels: list[int] = []

    def table(self, root: int, path: Path) -> list[tuple[int, float]]:
        """(token, probability), most probable first; sums to 1."""
        generator = np.random.default_rng([root, *(token + 1 for token in path)])
        probs = np.sort(generator.dirichlet(np.full(self.support, 0.8)))[::-1]
        tokens = generator.permutation(VOCAB)[: self.support]
        chosen = probs[: self.candidates] / probs[: self.candidates].sum()
        return [(int(t), float(p)) for t, p in zip(tokens, chosen, strict=False)]

    def __call__(self, frontier: Frontier) -> tuple[Tensor, Tensor]:
        batch, count = frontier.tokens.shape
        assert frontier.level == len(self.levels)
        assert frontier.first == len(self.paths[0])
        assert len(self.roots) == batch
        self.levels.append(count)
        ids = torch.zeros(batch, count, self.candidates, dtype=torch.int64)
        probs = torch.zeros(batch, count, self.candidates, dtype=torch.float64)
        for row in range(batch):
            for place in range(count):
                token = int(frontier.tokens[row, place])
                parent = int(frontier.parents[row, place])
                if frontier.level == 0:
                    assert (token, parent) == (self.roots[row], -1)
                    path: Path = ()
                else:
                    assert 0 <= parent < frontier.first
                    path = (*self.paths[row][parent], token)
                self.paths[row].append(path)
                for slot, (token, p) in enumerate(self.table(self.roots[row], path)):
                    ids[row, place, slot], probs[row, place, slot] = token, p
        return ids, probs


def context_for(roots: Sequence[int], *, seed: int = 0, step: int = 0) -> StepContext:
    """The root is also the number of the sequence."""

    def draws(stream: int, count: int) -> Tensor:
        return uniforms(seed, list(roots), [step] * len(roots), stream, count)

    return StepContext(
        sequences=[],
        roots=torch.tensor(list(roots)),
        sampling=SamplingParams(temperature=1.0),
        uniforms=draws,
    )


def grown(
    policy: TreePolicy, roots: Sequence[int], *, seed: int = 0, **script: int
) -> tuple[TokenTree, Tensor, Script]:
    expand = Script(roots, **script)
    levels = levels_of(policy, None)
    tree, expanded = grow(policy, levels, context_for(roots, seed=seed), expand)
    return tree, expanded, expand


def paths_of(tree: TokenTree, row: int) -> list[Path]:
    """The path of each real node, in the order of nodes."""
    found: list[Path] = []
    for node in range(int(tree.size[row])):
        parent = int(tree.parents[row, node])
        token = int(tree.tokens[row, node])
        found.append(() if node == 0 else (*found[parent], token))
    return found


def row_of(tree: TokenTree, row: int) -> list[object]:
    """All there is to know about one row, padding cut off."""
    size = int(tree.size[row])
    assert tree.proposal is not None
    support = tree.proposal.probs[row, :size] > 0
    return [
        tree.tokens[row, :size].tolist(),
        tree.parents[row, :size].tolist(),
        tree.proposal.probs[row, :size].tolist(),
        tree.proposal.ids[row, :size].masked_fill(~support, -1).tolist(),
    ]


def decoding(tokens: Sequence[int], row: int = 0, number: int = 0) -> Decoding:
    request = Request(id=number, prompt_ids=list(tokens), max_new_tokens=8)
    return Decoding(request, row, list(tokens))


def step_for(sequences: list[Decoding]) -> StepContext:
    return replace(
        context_for([sequence.request.id for sequence in sequences]),
        sequences=sequences,
        roots=torch.tensor([sequence.tokens[-1] for sequence in sequences]),
    )


class Listed(HostDrafter):
    """Proposes what it was told, by row."""

    proposals: list[list[tuple[list[int], float]]]

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        return [(path[:levels], weight) for path, weight in self.proposals[sequence.row]]

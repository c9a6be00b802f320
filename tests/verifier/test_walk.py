"""Ways down a tree against a walk in plain Python, with the host looking at results and, as on a
GPU, without."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.sampling import SamplingParams
from specdec.tree import Children, Proposal, TokenTree, random_parents
from specdec.verifier.block import Block
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.support import SupportRule
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.walk import deepest, descend_to, walk
from tests.decoding import BLIND
from tests.kernels.cases import DEVICE, context_for, random_case

SIZES = [9, 1, 0, 7, 12, 12, 5, 12]  # nodes of each tree, of at most twelve


def some_trees(seed: int, children: Children) -> tuple[TokenTree, Tensor]:
    """Trees of those sizes, and [B, N] which of their nodes are taken. Where children are drawn
    with replacement few tokens make many twins, of which the eldest has all children."""
    generator = torch.Generator().manual_seed(seed)
    twins = children == "sample_with_replacement"
    batch, nodes = len(SIZES), max(SIZES)
    parents = torch.full((batch, nodes), -2, dtype=torch.int32)
    tokens = torch.arange(nodes).repeat(batch, 1)
    if twins:
        tokens = torch.randint(3, (batch, nodes), generator=generator)
    for row, size in enumerate(SIZES):
        for node, parent in enumerate(random_parents(size, generator) if size else []):
            if twins and parent > 0:
                alike = (parents[row] == parents[row, parent]) & (
                    tokens[row] == tokens[row, parent]
                )
                parent = int(alike.nonzero()[0])
            parents[row, node] = parent
    ways = [
        up(row, node) for row, n in zip(parents.tolist(), SIZES, strict=True) for node in range(n)
    ]
    tree = TokenTree(
        tokens=tokens,
        parents=parents,
        size=torch.tensor(SIZES, dtype=torch.int32),
        depth=max(map(len, ways)) - 1,
        proposal=Proposal(
            ids=tokens[..., None], probs=torch.ones(batch, nodes, 1), children=children
        ),
    )
    tree.check()
    return tree, torch.rand(batch, nodes, generator=generator) < 0.6


def walked(tokens: list[int], parents: list[int], taken: list[bool]) -> list[int]:
    """The path of one tree, by the definition."""
    path = [0] if parents[0] == -1 else []
    while path:
        children = [node for node, parent in enumerate(parents) if parent == path[-1]]
        token = next((tokens[node] for node in children if taken[node]), None)
        if token is None:
            break
        path.append(next(node for node in children if tokens[node] == token))
    return path


def up(parents: list[int], node: int) -> list[int]:
    """From the root to a node."""
    return [*(up(parents, parents[node]) if node else []), node]


@pytest.mark.parametrize("kernels", [reference, BLIND], ids=["looking", "blind"])
@pytest.mark.parametrize("children", ["sample", "sample_with_replacement"])
def test_ways_are_those_of_the_definition(children: Children, kernels: ModuleType) -> None:
    lengths = set()
    for seed in range(8):
        tree, taken = some_trees(seed, children)
        paths, counts, ends = walk(tree, taken, kernels)
        longest = deepest(tree, taken, kernels)
        again = descend_to(tree, ends, kernels)
        for row, parents in enumerate(tree.parents.tolist()):
            kept = taken[row].tolist()
            path = walked(tree.tokens[row].tolist(), parents, kept)
            lengths.add(len(path))
            for found, count in ((paths, counts), again[:2]):
                assert found[row, : count[row]].tolist() == path
            if not path:
                continue
            assert ends[row] == again[2][row] == path[-1]
            ways = [up(parents, node) for node in range(SIZES[row])]
            open_ways = [way for way in ways if all(kept[node] for node in way[1:])]
            assert longest[row] == max(open_ways, key=len)[-1]  # of equals the first
    assert lengths >= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kernels", [reference, BLIND], ids=["looking", "blind"])
def test_a_root_alone_is_all_of_its_way(kernels: ModuleType) -> None:
    roots = TokenTree.roots(torch.tensor([3, 4]))
    for way in (
        walk(roots, torch.zeros(2, 1, dtype=torch.bool), kernels),
        descend_to(roots, torch.tensor([0, 0]), kernels),
    ):
        assert [part.tolist() for part in way] == [[[0], [0]], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("rule", "children"),
    [
        (RecursiveRejection(), "sample"),
        (Traversal(), "sample"),
        (KSeq(), "sample_with_replacement"),
        (MultiPath(), "sample_with_replacement"),
        (Block(), "sample"),
        (Tokenwise(), "sample"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_rules_keep_without_a_look_what_they_keep_with_one(
    rule: SupportRule, children: Children
) -> None:
    """Of so few tokens, of which a draft knows a part, that every slip in what is read and taken
    of them shows in the last draw."""
    repeats = children == "sample_with_replacement"
    chains = getattr(rule, "chains", False)
    case = random_case(
        4,
        sizes=[6, 0, 4, 1] * 6,
        vocab=8,
        support=4,
        repeats=repeats,
        dtype=torch.float32,
        bushy=0.0 if chains else 0.5,
    )
    trees = case.trees(support=6)
    assert trees.draft_ids is not None
    assert trees.draft_probs is not None
    tree = TokenTree(
        tokens=trees.tokens,
        parents=trees.parents,
        size=trees.size,
        depth=trees.depth,
        proposal=Proposal(ids=trees.draft_ids, probs=trees.draft_probs, children=children),
    )
    params = SamplingParams(temperature=0.8, seed=3)
    busy = tree.size > 0
    for step in range(4):
        plain = rule.accept(context_for(params, 24, step, reference), tree, case.logits)
        found = rule.accept(context_for(params, 24, step, BLIND), tree, case.logits)
        past = torch.arange(plain.path.shape[1], device=DEVICE) >= plain.length[:, None]
        assert torch.equal(found.length, plain.length)
        assert ((found.path == plain.path) | past)[busy].all()
        assert torch.equal(found.next_token[busy], plain.next_token[busy])

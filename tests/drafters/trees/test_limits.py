"""No tree has more than 256 nodes besides its root, none more than 64 levels: a method that could
is refused before any model is loaded."""

from collections.abc import Callable

import pytest
import torch

from specdec.batch import SIZES
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.optimal import Optimal
from specdec.drafters.trees.static import Static
from specdec.lab.build import method_of
from specdec.lab.settings import settings_of
from specdec.protocols import TreePolicy, levels_of
from specdec.tree import MOST_LEVELS, MOST_NODES, TokenTree


class Deep(TreePolicy):
    """A policy of a user's, which knows no limit."""

    def levels(self, depth: int | None) -> int:
        return depth or self.budget

    def width(self, level: int) -> int:
        return 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tree=dynamic tree.budget=257", "tree.budget=257: must be at most 256, of any tree"),
        ("tree=threshold tree.budget=1000", "tree.budget=1000: must be at most 256"),
        ("tree=cost_aware tree.budget=257", "tree.budget=257: must be at most 256"),
        ("tree=optimal tree.budget=300", "tree.budget=300: must be at most 256"),
        ("tree=dynamic tree.depth=65", "tree.depth=65: must be at most 64, of any tree"),
        ("tree=threshold tree.depth=65", "tree.depth=65: must be at most 64"),
        ("tree=accuracy tree.depth=65", "tree.depth=65: must be at most 64"),
        ("tree=cost_aware tree.depth=99", "tree.depth=99: must be at most 64"),
        ("tree=chain tree.budget=65", "tree.budget=65: must be at most 64, for a chain has"),
        ("tree=static tree.widths=[16,16]", r"tree.widths=\[16, 16\]: 272 nodes, and a tree has"),
        (f"tree=static tree.widths={[1] * 65}".replace(", ", ","), "65 levels, and a tree has at"),
        (f"tree=paths tree.paths={[[0] * n for n in range(1, 66)]}".replace(", ", ","), "65 lev"),
        (f"tree=paths tree.paths={[[n] for n in range(257)]}".replace(", ", ","), "257 nodes, an"),
        ("drafter=ngram drafter.depth=65", "drafter.depth=65: must be at most 64, of any tree"),
        ("drafter=small_llama drafter.depth=65", "drafter.depth=65: must be at most 64"),
        ("drafter=lookahead drafter.window=65", "drafter.window=65: must be from 1 to 64"),
        (
            "drafter=lookahead drafter.window=60 drafter.ngram=8",
            "drafter.window=60: with drafter.ngram=8 the last column is at depth 65",
        ),
    ],
)
def test_what_is_too_large_is_refused(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        method_of(settings_of(words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "tree=dynamic tree.budget=256 tree.width=16 tree.depth=64",
        "tree=cost_aware tree.budget=256 tree.depth=64",
        "tree=static tree.widths=[16,15]",
        "tree=chain tree.budget=64",
        "tree=optimal tree.budget=256",
        "drafter=lookahead drafter.window=62 drafter.ngram=5 tree.budget=256 tree=dynamic",
    ],
)
def test_what_is_as_large_as_may_be_is_not(words: str) -> None:
    method = method_of(settings_of(words))
    assert 0 < method.tree.budget <= MOST_NODES


def test_a_policy_of_a_users_is_held_to_it_too() -> None:
    assert levels_of(Deep(budget=64), None) == 64
    assert levels_of(Deep(budget=200), 3) == 3
    with pytest.raises(ValueError, match=r"tree.budget=65: Deep has 65 levels, a tree has at"):
        levels_of(Deep(budget=65), None)


def test_a_shape_that_is_searched_for_stops_at_the_deepest_level() -> None:
    sure = Optimal(rates="zoo", budget=256)
    assert sure.levels(None) <= MOST_LEVELS


@pytest.mark.parametrize(
    "tree",
    [
        lambda: Static(widths=[256]),
        lambda: Dynamic(budget=MOST_NODES),
        lambda: Chain(budget=MOST_LEVELS),
    ],
)
def test_sizes_of_the_host_reach_the_largest_trees(tree: Callable[[], TreePolicy]) -> None:
    """Or a graph would be captured for every number of nodes."""
    assert max(SIZES) + 1 >= tree().budget + 1


def chain_of(nodes: int, depth: int) -> TokenTree:
    parents = torch.arange(-1, nodes - 1, dtype=torch.int32)[None]
    size = torch.tensor([nodes], dtype=torch.int32)
    return TokenTree(tokens=parents.long(), parents=parents, size=size, depth=depth)


def test_a_tree_that_a_drafter_made_itself_is_looked_at() -> None:
    chain_of(65, 64).check_size()
    chain_of(257, 3).check_size()
    with pytest.raises(ValueError, match="a tree of 258 nodes: 256 and the root are the most"):
        chain_of(258, 3).check_size()
    with pytest.raises(ValueError, match="a tree of 65 levels: 64 are the most"):
        chain_of(66, 65).check_size()


def test_padding_leaves_paths_as_long_as_may_be() -> None:
    """Rules and commits go through as many edges."""
    assert chain_of(3, 2).padded(2, 40).depth == 39
    assert chain_of(3, 2).padded(2, 257).depth == MOST_LEVELS

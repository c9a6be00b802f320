"""tree=static."""

from collections.abc import Callable

import numpy as np
import pytest

from specdec.drafters.trees.static import Static
from tests.drafters.scripted import CHILDREN, grown, paths_of


@pytest.mark.parametrize("widths", [[1], [4], [2, 2], [3, 2, 1], [1, 5, 1, 2]])
@pytest.mark.parametrize("children", CHILDREN)
def test_static_gives_every_node_the_children_of_its_level(
    widths: list[int], children: str
) -> None:
    """All but a token drawn again among its siblings, which no rule would ever enter."""
    tree, _, _ = grown(Static(widths=widths, children=children), (7, 8))
    full = [int(np.prod(widths[: level + 1])) for level in range(len(widths))]
    assert Static(widths=widths).budget == sum(full)
    for row in range(2):
        paths = paths_of(tree, row)
        parents = tree.parents[row].tolist()
        for node, path in enumerate(paths):
            repeated = path in paths[:node]
            expected = 0 if repeated or len(path) == len(widths) else widths[len(path)]
            assert parents.count(node) == expected
        if children != "sample_with_replacement":
            assert np.bincount([len(path) for path in paths]).tolist() == [1, *full]


@pytest.mark.parametrize("children", ["top_k", "sample"])
def test_widths_beyond_the_support_give_fewer_nodes(children: str) -> None:
    tree, _, _ = grown(Static(widths=[4, 5], children=children), (7,), support=2)
    tree.check()
    assert int(tree.size[0]) == 1 + 2 + 4
    cut, _, _ = grown(Static(widths=[4, 5], children=children), (7,), candidates=3)
    cut.check()
    assert int(cut.size[0]) == 1 + 3 + 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Static(widths=[]), r"tree.widths=\[\]: must be a list"),
        (lambda: Static(widths=[2, 0]), r"tree.widths=\[2, 0\]: must be a list"),
        (
            lambda: Static(widths=[2, 2], budget=5),
            r"tree.widths=\[2, 2\]: 6 nodes exceed tree.budget=5",
        ),
        (lambda: Static(widths=[2], budget=-1), "tree.budget=-1|tree.widths"),
        (
            lambda: Static(widths=[2, 2]).levels(1),
            r"drafter.depth=1: tree.widths=\[2, 2\] has 2 levels",
        ),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

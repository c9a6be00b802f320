"""tree=chain."""

from collections.abc import Callable

import pytest

from specdec.drafters.trees.chain import Chain
from tests.drafters.scripted import Path, grown, paths_of


def test_chain_follows_the_most_probable_token() -> None:
    tree, _, script = grown(Chain(budget=5, children="top_k"), (7,))
    path: Path = ()
    while len(path) < 5:
        path = (*path, script.table(7, path)[0][0])
    assert paths_of(tree, 0)[-1] == path
    assert tree.size.tolist() == [6]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Chain(budget=-1), "tree.budget=-1: must be 0"),
        (lambda: Chain(budget=2, children="best"), "tree.children=best: must be one of .*top_k"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

"""Pictures of token trees: all nodes in their places, the accepted path on top."""

from dataclasses import replace

import pytest

from specdec.compare.tree_picture import COLUMN, NODES, ROW, picture, printable, visible
from tests.compare import made


@pytest.mark.parametrize("step", range(6))
def test_nodes_have_places_of_their_own_and_the_path_is_the_first_row(step: int) -> None:
    tree = made.tree("m", step, nodes=25)
    drawn = picture(tree)
    places = [(node.x, node.y) for node in drawn.nodes]
    assert len(places) == len(set(places)) == 26  # and the target's own
    depths = [0]
    for parent in tree.parents[1:]:
        depths.append(depths[parent] + 1)
    assert [node.x // COLUMN for node in drawn.nodes[:-1]] == depths
    kept = [node for node in drawn.nodes if node.kind != "drafted"]
    assert len(kept) == len(tree.path) + 1
    assert {node.y // ROW for node in kept} == {0}
    assert len(drawn.edges) == 25
    assert all(node.x < drawn.width and node.y < drawn.height for node in drawn.nodes)


def test_the_targets_own_token_follows_the_last_accepted_one() -> None:
    tree = made.tree("m", path=[0], next_token="\n")
    drawn = picture(tree)
    assert (drawn.nodes[-1].text, drawn.nodes[-1].x // COLUMN) == ("⏎", 1)
    assert [node.kind for node in drawn.nodes] == ["root", *["drafted"] * 13, "own"]


def test_large_trees_keep_the_path_and_what_is_probable() -> None:
    tree = made.tree("m", nodes=200)
    worst = [None if p is None else 0.5 for p in tree.draft]
    worst[tree.path[-1]] = 1e-9
    drawn = picture(replace(tree, draft=worst))
    assert drawn.drafted == 199
    assert drawn.shown <= NODES + len(tree.path)
    assert sum(node.kind == "accepted" for node in drawn.nodes) == len(tree.path) - 1
    assert len(drawn.edges) == len(drawn.nodes) - 1  # every parent is there
    unknown = picture(replace(tree, draft=[None] * 200, target=[None] * 200))
    assert all(node.draft is None for node in unknown.nodes)


def test_a_root_alone_is_a_tree() -> None:
    alone = made.tree("m", nodes=1)
    assert [node.kind for node in picture(alone).nodes] == ["root", "own"]


def test_signs_that_one_does_not_see_are_shown() -> None:
    assert visible(" a\n\t\x00") == "␣a⏎⇥\\x00"
    assert visible("") == "∅"
    assert printable("é ü 中 \ud800\u200b") == "é ü 中 \\ud800\\u200b"

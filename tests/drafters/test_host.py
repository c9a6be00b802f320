"""Drafters on the host: tries of weighted continuations, and trees grown from them."""

import pytest

from specdec.drafters.host import Trie
from specdec.drafters.trees.static import Static
from tests.decoding import prepared
from tests.drafters.scripted import CHILDREN, Listed, decoding, paths_of, step_for


@pytest.mark.parametrize("children", CHILDREN)
def test_host_drafters_grow_from_shares_of_the_weights(children: str) -> None:
    drafter = prepared(Listed(), Static(widths=[2, 2], children=children))
    drafter.proposals = [
        [([1, 2], 3.0), ([1, 3], 1.0), ([2, 0], 4.0), ([5], 2.0)],
        [],
        [([4], 1.0)],
    ]
    sequences = [decoding([9, row], row=row, number=row) for row in range(3)]
    tree = drafter.draft(step_for(sequences))
    tree.check()
    assert tree.proposal is not None
    shares = {1: 0.4, 2: 0.4, 5: 0.2} if children != "top_k" else {1: 0.5, 2: 0.5}
    pairs = zip(tree.proposal.ids[0, 0].tolist(), tree.proposal.probs[0, 0].tolist(), strict=True)
    assert {token: p for token, p in pairs if p} == pytest.approx(shares)
    assert tree.size[1] == 1
    known = {(), (1,), (1, 2), (1, 3), (2,), (2, 0), (5,)}
    assert set(paths_of(tree, 0)) <= known
    assert set(paths_of(tree, 2)) == {(), (4,)}
    if children == "top_k":
        assert set(paths_of(tree, 0)) == known - {(5,)}


def test_trie_merges_common_beginnings() -> None:
    trie = Trie()
    for path, weight in [([1, 2], 1.0), ([3], 2.5), ([1, 4], 2.0), ([5], 2.5)]:
        trie.add(path, weight)
    assert trie.best(9) == [(1, 3.0 / 8.0), (3, 2.5 / 8.0), (5, 2.5 / 8.0)]
    assert trie.best(2) == [(1, 3.0 / 5.5), (3, 2.5 / 5.5)]
    assert trie.children[1].best(9) == [(4, 2.0 / 3.0), (2, 1.0 / 3.0)]
    assert trie.children[3].best(9) == []

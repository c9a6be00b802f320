"""Warming a decoder up: every size once, within the room of a row, and nothing of it stays."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.protocols import StepContext
from specdec.request import Request
from specdec.tree import TokenTree
from tests.decoding import decoder_of, outputs_of
from tests.drafters.learning import Scripted, following


@pytest.mark.parametrize(("length", "new"), [(1, 8), (10, 2), (11, 1)])
def test_warming_up_takes_no_more_room_than_a_row_has(
    length: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = decoder_of(Scripted(), NoDrafter(), max_tokens=12)
    asked, submit = [], loop.submit

    def noted(request: Request, **how: Any) -> None:
        asked.append(request.max_new_tokens)
        submit(request, **how)

    monkeypatch.setattr(loop, "submit", noted)
    loop.warm_up([1] * length)
    assert asked == [new] * 2  # one waits for the row
    assert outputs_of(loop, [[1]], 11) == [following(1, 11)]


@pytest.mark.parametrize("drafter", [NGram(), NoDrafter()], ids=["of the host", "of the device"])
def test_all_sizes_are_warmed_up_where_there_are_few(
    drafter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: of trees that the host makes the largest first, so that what holds them need
    not grow, and two tokens of each."""
    verifier, sizes, ids = Scripted(), [], []
    loop = decoder_of(verifier, drafter, Chain(budget=5), rows=3)
    logits, submit = verifier.logits, loop.submit

    def noted(context: StepContext, tree: TokenTree) -> Tensor:
        sizes.append((tree.tokens.shape[0], loop._host_trees.least))
        return logits(context, tree)

    def asked(request: Request, **how: Any) -> None:
        assert request.max_new_tokens == (2 if isinstance(drafter, NGram) else 8)
        ids.append(request.id)
        submit(request, **how)

    monkeypatch.setattr(loop._batches, "padded", True)
    monkeypatch.setattr(verifier, "logits", noted)
    monkeypatch.setattr(loop, "submit", asked)
    loop.warm_up([1, 2, 3])
    nodes = [6, 1, 2, 3, 4] if isinstance(drafter, NGram) else [1]
    assert set(sizes) == {(batch, least) for batch in (1, 2, 3) for least in nodes}
    assert sizes[0][1] == nodes[0]
    rounds = len(nodes)  # of each batch, and one request more than it has rows
    assert Counter(ids) == {0: 3 * rounds, 1: 3 * rounds, 2: 2 * rounds, 3: rounds}
    assert loop._host_trees.least == 1

"""What does not fit is refused, at the number where it stops fitting."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.cache import KVShape
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.lab import fit
from specdec.lab.fit import check_fit, check_memory
from specdec.protocols import TreePolicy
from specdec.request import Capacity

SHAPE = KVShape(layers=3, kv_heads=2, key_dim=5, value_dim=4)
TOKEN = 3 * 2 * (5 + 4) * 2  # bytes of its keys and values in bfloat16
VOCABULARY = 11


def target(*, context: int = 20, device: str = "cpu") -> Any:
    return SimpleNamespace(
        max_context=context,
        vocab_size=VOCABULARY,
        kv_shape=SHAPE,
        dtype=torch.bfloat16,
        device=torch.device(device),
    )


@pytest.mark.parametrize(
    ("tree", "new", "message"),
    [
        (Chain(budget=19), 19, None),
        (Chain(budget=19), 20, "max_new_tokens=20: the context of the target has 20 tokens; "),
        (Chain(budget=20), 1, "tree.budget=20: trees of 20 levels do not fit the target's "),
        (Chain(budget=0), 19, None),
        (Dynamic(budget=0, width=VOCABULARY + 1), 19, None),
        (Static(widths=[1, VOCABULARY]), 1, None),
        (Static(widths=[1, VOCABULARY + 1]), 1, "tree: a node may have 12 children, and the "),
    ],
)
def test_a_method_fits_a_target_up_to_its_sizes(
    tree: TreePolicy, new: int, message: str | None
) -> None:
    if message is None:
        check_fit(target(), tree, new)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as refused:
        check_fit(target(), tree, new)
    assert "\n" not in str(refused.value)
    assert "lower" in str(refused.value)


CAPACITIES: dict[str, tuple[dict[str, Any], str, int]] = {
    # Of three rows of 8 tokens in pages of four: what it is refused with, and bytes of the cache.
    "rows of whole pages": ({}, "batch_size=3", 24 * TOKEN),
    "pages that are begun": ({"max_tokens": 9}, "batch_size=3", 36 * TOKEN),
    "so many pages": ({"pages": 5}, "cache.pages=5", 20 * TOKEN),
    "quantised pages": ({"kv_dtype": torch.int8}, "batch_size=3", 24 * (TOKEN // 2 + 3 * 2 * 8)),
}


@pytest.mark.parametrize("name", CAPACITIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_keys_and_values_take_what_is_free_and_not_a_byte_more(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    """On a GPU rows may wait for pages, so it is enough if those of one fit, unless it is said how
    many there are."""
    changed, setting, needed = CAPACITIES[name]
    if device == "cuda" and "pages" not in changed:
        needed //= 3
    capacity = Capacity(**{"rows": 3, "max_tokens": 8, "page_size": 4, **changed})
    tree = Chain(budget=0)
    for free in (needed, needed - 1):
        monkeypatch.setattr(fit, "free_memory", lambda device, free=free: free)
        if free == needed:
            check_memory(target(device=device), tree, capacity)
            continue
        with pytest.raises(ValueError, match=f"^{setting}: keys and values of ") as refused:
            check_memory(target(device=device), tree, capacity)
        assert "\n" not in str(refused.value)


def test_logits_of_all_nodes_take_what_is_free_and_not_a_byte_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = 2 * (250 + 1) * VOCABULARY * 4  # float32, two rows, the root too
    capacity, tree = Capacity(rows=2, max_tokens=8, page_size=4), Dynamic(budget=250)
    monkeypatch.setattr(fit, "free_memory", lambda device: needed)
    check_memory(target(), tree, capacity)
    monkeypatch.setattr(fit, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"^batch_size=2: the logits of 502 nodes") as refused:
        check_memory(target(), tree, capacity)
    assert "(tree.budget=250) take 0.0 GiB" in str(refused.value)

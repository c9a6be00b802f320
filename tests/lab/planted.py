"""Faults to be found: of the pass over a tree and of the cache, and rules that go wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.decode import Decoder
from specdec.models.paged import PagedLM
from specdec.pages import Pages
from specdec.protocols import StepContext
from specdec.sampling import ACCEPT_STREAM
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection, try_children
from specdec.verifier.support import Trial
from specdec.verifier.walk import Path, at, walk


def mask(patch: pytest.MonkeyPatch) -> None:
    """Nodes do not see the first drafted one."""
    layout = PagedLM._layout

    def wrong(lm: Any, cache: Any, rows: Any, offsets: Any, ancestors: Any, *rest: Any) -> Any:
        if ancestors is not None:
            ancestors = ancestors.clone()
            ancestors[:, 2:] &= ~2
        return layout(lm, cache, rows, offsets, ancestors, *rest)

    patch.setattr(PagedLM, "_layout", wrong)


def position(patch: pytest.MonkeyPatch) -> None:
    """From the second level of a tree on, one too far."""
    layout = PagedLM._layout

    def wrong(lm: Any, cache: Any, rows: Any, offsets: Any, ancestors: Any, *rest: Any) -> Any:
        if ancestors is not None:
            offsets = offsets + (offsets >= 2)
        return layout(lm, cache, rows, offsets, ancestors, *rest)

    patch.setattr(PagedLM, "_layout", wrong)


def _appending(patch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    append = PagedKVCache.append

    def wrong(cache: Any, rows: Any, path: Any, length: Any, *rest: Any) -> None:
        append(cache, rows, None if path is None else change(path, length), length, *rest)

    patch.setattr(PagedKVCache, "append", wrong)


def stale(patch: pytest.MonkeyPatch) -> None:
    """Of a path, the second node's row of the cache is that of the first."""
    _appending(patch, lambda path, length: torch.cat([path[:, :1], path[:, :-1]], dim=1))


def short(patch: pytest.MonkeyPatch) -> None:
    """The last row of a path is not written, and is counted."""
    append = PagedKVCache.append

    def wrong(cache: Any, rows: Any, path: Any, length: Any, *rest: Any) -> None:
        append(cache, rows, path, length if path is None else length - 1, *rest)
        if path is not None:
            cache.lengths.index_add_(0, rows, torch.ones_like(length, dtype=torch.int32))

    patch.setattr(PagedKVCache, "append", wrong)


def page(patch: pytest.MonkeyPatch) -> None:
    """Prompts share pages of any prompt."""
    key = Pages._key
    patch.setattr(Pages, "_key", lambda pages, prefix, of, i: key(pages, [0] * len(prefix), of, i))


def stop(patch: pytest.MonkeyPatch) -> None:
    """A stop token counts as the last of what a step yields alone."""
    append = Decoder._append

    def wrong(decoder: Any, sequence: Any, tokens: list[int]) -> None:
        known = decoder.stop_tokens
        decoder.stop_tokens = known & {tokens[-1]}
        append(decoder, sequence, tokens)
        decoder.stop_tokens = known

    patch.setattr(Decoder, "_append", wrong)


class Faulty(RecursiveRejection):
    """Recursive rejection with a fault.

    Args:
        fault: none; residual: after rejections the next token is drawn from the target; told: the
            rule is told other probabilities than children were drawn with; coins: siblings share
            theirs; bonus: after a leaf the next token is drawn from its parent's law.
    """

    kernel = "by hand"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        parents = tree.parents.long().clamp(min=0)
        if self.fault == "told" and tree.proposal is not None:
            probs = tree.proposal.probs.sqrt()
            probs = probs / probs.sum(-1, keepdim=True)
            tree = replace(tree, proposal=replace(tree.proposal, probs=probs))
        if self.fault == "coins":
            known = context.uniforms

            def uniforms(stream: int, count: int) -> Tensor:
                found = known(stream, count)
                return found.gather(1, parents) if stream == ACCEPT_STREAM else found

            context = replace(context, uniforms=uniforms)
        if self.fault == "bonus":
            node = torch.arange(tree.nodes)
            inner = (parents[:, None, 1:] == node[:, None]).any(-1)  # [B, N]
            where = torch.where(inner, node, parents)
            logits = logits.gather(1, where[..., None].expand_as(logits))
        return super().accept(context, tree, logits)

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        chance, inside, scale = try_children(trial)
        path = walk(trial.tree, trial.coins < chance, trial.kernels)
        left, factor, whole = at(path[2], inside, scale[..., None], trial.target)
        return path, whole if self.fault == "residual" else left / factor

"""Faults to be found: of the pass over a tree and of the cache, and rules that go wrong."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import PagedKVCache
from specdec.decode import Decoder
from specdec.kernels.reference import layer
from specdec.models.paged import PagedLM
from specdec.pages import Pages
from specdec.protocols import StepContext
from specdec.sampling import ACCEPT_STREAM
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection, _children, try_children
from specdec.verifier.support import Trial
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.walk import Path, at, walk

NODES = 11  # of a tree of 2, 2 and 1 children, with the root


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


def many(patch: pytest.MonkeyPatch) -> None:
    """A row more than was kept is written, and counted."""
    append = PagedKVCache.append

    def wrong(cache: Any, rows: Any, path: Any, length: Any, *rest: Any) -> None:
        if path is not None:
            length = (length + 1).clamp(max=path.shape[1])
        append(cache, rows, path, length, *rest)

    patch.setattr(PagedKVCache, "append", wrong)


def unwritten(patch: pytest.MonkeyPatch) -> None:
    """The scratch row of the first drafted node keeps what it held."""
    write = layer.write_tree

    def wrong(keys: Tensor, values: Tensor, key: Tensor, *rest: Any, **options: Any) -> None:
        whole = key.shape[2] == NODES
        kept = [tree[:, :, 1].clone() for tree in (keys, values)] if whole else []
        write(keys, values, key, *rest, **options)
        for tree, row in zip((keys, values), kept, strict=False):
            tree[:, :, 1] = row

    patch.setattr(layer, "write_tree", wrong)


def page(patch: pytest.MonkeyPatch) -> None:
    """Prompts share pages of any prompt."""
    key = Pages._key
    patch.setattr(Pages, "_key", lambda pages, prefix, of, i: key(pages, [0] * len(prefix), of, i))


def written(patch: pytest.MonkeyPatch) -> None:
    """Texts that share pages share the next one as well, which both write to."""
    opened = Pages.open

    def wrong(pages: Pages, row: int, **how: Any) -> int:
        done = opened(pages, row, **how)
        place, own = done // pages.size, pages._rows[row].pages
        shared = own[:place]
        others = (held.pages for held in pages._rows.values() if held.pages is not own)
        for other in others if shared else ():
            if other[:place] == shared:
                pages._references[own[place]] -= 1
                pages._free.append(own[place])
                own[place] = other[place]
                pages._references[own[place]] += 1
                break
        return done

    patch.setattr(Pages, "open", wrong)


def stop(patch: pytest.MonkeyPatch) -> None:
    """A stop token counts as the last of what a step yields alone."""
    append = Decoder._append

    def wrong(decoder: Any, sequence: Any, tokens: list[int]) -> None:
        known = decoder.stop_tokens
        decoder.stop_tokens = known & {tokens[-1]}
        append(decoder, sequence, tokens)
        decoder.stop_tokens = known

    patch.setattr(Decoder, "_append", wrong)


class SharedCoins(TargetOnly):
    """The coins of siblings are one."""

    name = "by hand"

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        known, parents = context.uniforms, tree.parents.long().clamp(min=0)

        def uniforms(stream: int, count: int) -> Tensor:
            found = known(stream, count)
            return found.gather(1, parents) if stream == ACCEPT_STREAM else found

        return super().accept(replace(context, uniforms=uniforms), tree, logits)


class Faulty(RecursiveRejection):
    """Recursive rejection with a fault.

    Args:
        fault: none; residual: after rejections the next token is drawn from the target; told: the
            rule is told the draft's law at temperature 1; unnormalised: what rejections leave of
            the target is not scaled to 1, which matters from the second child on; bonus: after a
            leaf the next token is drawn from its parent's law.
    """

    kernel = "by hand"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        parents = tree.parents.long().clamp(min=0)
        if self.fault == "told" and tree.proposal is not None:
            probs = tree.proposal.probs**context.sampling.temperature
            probs = probs / probs.sum(-1, keepdim=True)
            tree = replace(tree, proposal=replace(tree.proposal, probs=probs))
        if self.fault == "bonus":
            node = torch.arange(tree.nodes)
            inner = (parents[:, None, 1:] == node[:, None]).any(-1)  # [B, N]
            where = torch.where(inner, node, parents)
            logits = logits.gather(1, where[..., None].expand_as(logits))
        return super().accept(context, tree, logits)

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        again = tried if self.fault == "unnormalised" else try_children
        chance, inside, scale = again(trial)
        path = walk(trial.tree, trial.coins < chance, trial.kernels)
        left, factor, whole = at(path[2], inside, scale[..., None], trial.target)
        return path, whole if self.fault == "residual" else left / factor


def tried(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """As `try_children` of children drawn without replacement, without normalising what is left
    of the target."""
    tree, draft, inside = trial.tree, trial.proposal.probs, trial.target
    chance, scale = torch.zeros_like(inside[..., 0]), torch.ones_like(inside[..., 0])
    for child in _children(tree).unbind(-1):
        token = tree.tokens.gather(1, child.clamp(min=0))[..., None]
        here = (trial.proposal.ids == token) & (draft > 0) & (child >= 0)[..., None]
        p, q = (inside * here).sum(-1), (draft * here).sum(-1)
        ratio = torch.where(p > 0, p / q.clamp(min=1e-30), 0.0).clamp(max=1.0)
        chance = chance.scatter_add(1, child.clamp(min=0), ratio.masked_fill(child < 0, 0.0))
        left = (inside - draft).clamp(min=0.0)
        inside = torch.where((child >= 0)[..., None], left, inside)
        draft = draft.masked_fill(here, 0.0)
        draft = draft / draft.sum(-1, keepdim=True).clamp(min=1e-30)
    return chance, inside, scale

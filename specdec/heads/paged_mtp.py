"""PagedMTP: several MTP layers, one for each depth, over a paged cache for each."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor

from specdec.cache import CacheFullError
from specdec.heads.paged import PagedHead
from specdec.heads.recurrent import MTPHead
from specdec.models.paged import PagedLM
from specdec.request import Capacity


class PagedMTP:
    """Runs pairs through MTP layers as `PagedHead` runs them through a head, by the same calls.

    Layer m drafts what is m levels below the root's children (DeepSeek-AI 2024, section 2.2): its
    pair of a token has the state that layer m - 1 made of the pair before, of layer 0 the
    target's. So its first pair is that of token m + 1, and its cache is m entries behind. A node d
    levels below the root passes the layers from d on, whose states its children read; below all
    layers the last is used again. A node's features are the states of all layers, side by side.

    Legend: E layers, D their width. Of a text of fewer than E tokens layers read a node too many.

    Args:
        head: the first layer, which has the others.
        target: as of `PagedHead`.
    """

    def __init__(self, head: MTPHead, target: PagedLM) -> None:
        self.each = [PagedHead(one, target) for one in (head, *head.later)]
        first = self.each[0]
        self.device, self.dtype, self.looks = first.device, first.dtype, first.looks
        self._width = head.width
        self._depth = 0  # of the nodes that passed last
        self._made: list[Tensor] = []  # [B, N, D], what each layer made of them
        self._seen: Tensor  # [rows], pairs read, not those in shared pages
        self._last: Tensor  # [rows, E, D], what each layer made of the last of them

    @property
    def cache(self) -> Self:
        """Those of all layers, as one."""
        return self

    @property
    def max_tokens(self) -> int:
        return self.each[0].cache.max_tokens

    def prepare(self, capacity: Capacity) -> None:
        """As that of `PagedHead`."""
        for one in self.each:
            one.prepare(capacity)
        rows, device = capacity.rows + 1, self.device
        self._seen = torch.zeros(rows, dtype=torch.int64, device=device)
        self._last = torch.zeros(
            rows, len(self.each), self._width, dtype=self.dtype, device=device
        )

    def shareable(self, prefix: Sequence[int]) -> int:
        """As that of `PagedKVCache`, in all of them."""
        return min(one.cache.shareable(prefix) for one in self.each)

    def offer(self, rows: Sequence[int]) -> None:
        """As that of `PagedKVCache`."""
        for one in self.each:
            one.cache.offer(rows)

    def open(
        self, row: int, *, tokens: int, prefix: Sequence[int] = (), found: int | None = None
    ) -> None:
        """As that of `PagedKVCache`. A row that begins with shared pages has as many entries of
        each layer, and goes on as one that begins: layer m leaves out its first m pairs, whose
        entries it has."""
        for index, one in enumerate(self.each):
            try:
                one.cache.open(row, tokens=tokens, prefix=prefix, found=found)
            except CacheFullError:
                for before in self.each[:index]:
                    before.cache.close(row)
                raise
        self._seen[row] = 0

    def close(self, row: int) -> None:
        for one in self.each:
            one.cache.close(row)

    @contextmanager
    def scratch_apart(self, batch: int, nodes: int) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.each:
                stack.enter_context(one.cache.scratch_apart(batch, nodes))
            yield

    @torch.inference_mode()
    def append(self, rows: Tensor, path: None, length: Tensor, most: int | None = None) -> None:
        """Commit the first `length` [B] of the pairs that passed last."""
        seen, some = self._seen[rows], (length > 0)[:, None]
        newest = (length - 1).clamp(min=0)[:, None]
        for index, one in enumerate(self.each):
            late = (index - seen).clamp(min=0)
            one.cache.append(rows, path, (length - late).clamp(min=0), most)
            made = _at(self._made[index], newest)[:, 0]
            self._last[rows, index] = torch.where(some, made, self._last[rows, index])
        self._seen.index_add_(0, rows, length)

    @torch.inference_mode()
    def forward(
        self,
        rows: Tensor,
        embedded: Tensor,
        features: Tensor,
        offsets: Tensor,
        *,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As that of `PagedHead`: without ancestors of pairs that follow each other, with the
        target's states [B, N, D]; with them of the next level of a tree, with the features
        [B, N, E * D] of parents.

        Returns:
            [B, N, E * D], features; and what the output head reads [B, N, D].
        """
        if ancestors is None:
            self._depth = 0
            normal = self._along(rows, embedded, features, offsets)
            return torch.cat(self._made, dim=-1), normal
        self._depth += 1
        states = list(features.unflatten(-1, (len(self.each), -1)).unbind(2))
        made, reads = list(states), []
        for index in range(min(self._depth, len(self.each) - 1), len(self.each)):
            before = index - (self._depth <= index)  # below its depth, itself
            made[index], read = self.each[index].forward(
                rows,
                embedded,
                states[before].contiguous(),
                offsets,
                ancestors=ancestors,
                first=first,
                key_offsets=key_offsets,
            )
            reads.append(read)
        return torch.cat(made, dim=-1), reads[0]

    def _along(self, rows: Tensor, embedded: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        """Pairs that follow each other through all layers; what the output head reads [B, N, D]
        of the first."""
        seen, reads = self._seen[rows], []
        self._made = []
        for index, one in enumerate(self.each):
            late = (index - seen).clamp(min=0)[:, None]  # pairs of others that it has none of
            place = (offsets + late).clamp(max=offsets.shape[1] - 1)
            made, read = one.forward(rows, _at(embedded, place), _at(features, place), offsets)
            made = _at(made, (offsets - late).clamp(min=0))
            self._made.append(made)
            reads.append(read)
            features = torch.cat([self._last[rows, index][:, None], made[:, :-1]], dim=1)
        return reads[0]

    def logits(self, normal: Tensor) -> Tensor:
        """[B, N, D] to [B, N, VD], by the output head of all."""
        return self.each[0].logits(normal)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """[B, N, D] at the places [B, F]."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))

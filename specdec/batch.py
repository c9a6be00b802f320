"""The tensors of a batch, which stay where they are: captured graphs read them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.request import Decoding
from specdec.sampling import random_keys
from specdec.tree import TokenTree

# Of batches, and of trees made by the host, on a GPU.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Tensors of the steps with up to B sequences, always the same ones."""

    rows: Tensor  # [B] int64, cache rows
    active: Tensor  # [B] bool, False where there is no sequence
    roots: Tensor  # [B] int64
    keys: Tensor  # [B, 3] int64


class Batches:
    """For every cache row its last token and what its random numbers are made of, and the tensors
    of the batches these go through.

    Args:
        rows: sequences at most; the row after them is the idle one.
        padded: whether batches have one of the `SIZES`, with idle rows.
    """

    def __init__(self, rows: int, device: torch.device, *, padded: bool) -> None:
        self.rows, self.device, self.padded = rows, device, padded
        # Of each cache row, the idle one last: its last token, and seed, sequence and step.
        self._roots = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._keys = torch.zeros(rows + 1, 3, dtype=torch.int64, device=device)
        self._known: dict[int, Batch] = {}
        self._current: list[int] = []  # cache rows of the last step

    def join(self, sequences: Sequence[Decoding], seed: int) -> None:
        """These sequences are decoded from now on."""
        self._current = []  # the batch of the last step knows nothing of them
        for sequence in sequences:
            self._roots[sequence.row] = sequence.tokens[-1]
            keys = random_keys(seed, [sequence.request.id], [0], self.device)
            self._keys[sequence.row] = keys[0]

    def of(self, sequences: Sequence[Decoding]) -> Batch:
        """The tensors for these sequences, which hold their last tokens and keys."""
        count = len(sequences)
        size = size_for(count, self.rows) if self.padded else count
        batch = self._known.get(size)
        if batch is None:
            zeros = torch.zeros(size, dtype=torch.int64, device=self.device)
            keys = torch.zeros(size, 3, dtype=torch.int64, device=self.device)
            batch = Batch(rows=zeros, active=zeros.bool(), roots=zeros.clone(), keys=keys)
            self._known[size] = batch
        rows = [sequence.row for sequence in sequences] + [self.rows] * (size - count)
        if rows != self._current:
            self._current = rows
            send(torch.tensor(rows), batch.rows)
            torch.lt(batch.rows, self.rows, out=batch.active)
            batch.roots.copy_(self._roots[batch.rows])
            batch.keys.copy_(self._keys[batch.rows])
        return batch

    def advance(self, batch: Batch, next_token: Tensor) -> None:
        """The sequences of the batch are a step further, and end with these tokens [B]."""
        batch.roots.copy_(next_token)
        batch.keys[:, 2] += 1
        self._roots[batch.rows] = batch.roots
        self._keys[batch.rows] = batch.keys


class HostTrees:
    """Brings trees that were made on the host to the device: on a GPU to the tensors of all trees
    of their size.

    Args:
        padded: as for `Batches`.
        proposals: whether draft probabilities are of any use there.

    Attributes:
        least: nodes, while warming up.
    """

    def __init__(self, device: torch.device, *, padded: bool, proposals: bool) -> None:
        self.device, self.padded, self.proposals = device, padded, proposals
        self.least = 1
        self._known: dict[tuple[int, ...], TokenTree] = {}

    def to_device(self, tree: TokenTree, batch: int, most: int | None) -> TokenTree:
        """The trees, padded to a batch of so many and to one of the `SIZES` up to `most`."""
        if self.device.type == "cpu":
            return tree
        nodes = tree.nodes
        if tree.proposal is not None or not self.proposals:
            nodes = max(nodes, self.least)
        if self.padded:
            nodes = size_for(nodes, most)
        if not self.proposals:
            tree = replace(tree, proposal=None)
        padded = tree.padded(batch, nodes)
        key = batch, nodes, padded.support
        if key not in self._known:
            self._known[key] = padded.to(self.device)
        there = self._known[key]
        for mine, theirs in zip(padded.tensors(), there.tensors(), strict=True):
            send(mine, theirs)
        return there


def size_for(count: int, most: int | None) -> int:
    """The next of the `SIZES`, as far as `most` allows."""
    size = next((n for n in SIZES if n >= count), count)
    return size if most is None else max(count, min(size, most))


def send(source: Tensor, target: Tensor) -> None:
    """Copy from the host; if to a GPU, while the host goes on."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

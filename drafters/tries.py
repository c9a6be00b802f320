"""Tries as tensors: what drafters on the host have found, for trees that grow on the device."""

import heapq
from itertools import count

import torch
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier
from specdec.drafters.host import Trie
from specdec.protocols import StepContext

DEAD, ROOT = 0, 1  # places of nodes: 0 has no children, 1 is where a trie begins


class TrieTable:
    """For each cache row a trie, as far as its most probable nodes go.

    Args:
        rows: of the cache, the idle one included.
        nodes: nodes with children that are kept.
        width: children that are kept of each.
    """

    def __init__(self, *, rows: int, nodes: int, width: int, device: torch.device) -> None:
        shape = rows, nodes + ROOT, width
        pinned = device.type == "cuda"
        self._host = (
            torch.zeros(*shape, 2, dtype=torch.int64, pin_memory=pinned),
            torch.zeros(shape, dtype=torch.float64, pin_memory=pinned),
        )
        # [rows, M, K, 2] token and place of each child, [rows, M, K] its probability
        self._links, self._probs = (part.to(device, copy=True) for part in self._host)

    def write(self, row: int, trie: Trie) -> int:
        """On the host; `send` brings it to the device. How many nodes it has there, the root
        included."""
        links, probs = (part[row].numpy() for part in self._host)
        links[:], probs[:] = 0, 0.0
        nodes, width = probs.shape
        order = count()
        heap = [(-1.0, next(order), trie, DEAD, 0)]  # the most probable first
        for place in range(ROOT, nodes):
            if not heap:
                break
            mass, _, node, parent, slot = heapq.heappop(heap)
            links[parent, slot, 1] = place
            for slot, (token, prob) in enumerate(node.best(width)):
                links[place, slot, 0], probs[place, slot] = token, prob
                child = node.children[token]
                if child.children:
                    heapq.heappush(heap, (mass * prob, next(order), child, place, slot))
        return 1 + int((probs > 0).sum())

    def send(self) -> None:
        """What was written, to the device."""
        for mine, theirs in zip(self._host, (self._links, self._probs), strict=True):
            theirs.copy_(mine, non_blocking=True)

    def expand(self, context: StepContext) -> Expand:
        """Answers from the tries of the sequences of a step."""
        tokens, places = self._links[context.rows].unbind(-1)  # [B, M, K] each
        probs = self._probs[context.rows]
        index = torch.arange(len(context.rows), device=probs.device)[:, None]
        found: list[Tensor] = []  # [B, F] places of all frontiers so far

        def answer(frontier: Frontier) -> tuple[Tensor, Tensor]:
            if frontier.level:
                parent = torch.cat(found, dim=1).gather(1, frontier.parents)  # [B, F]
                same = tokens[index, parent] == frontier.tokens[..., None]
                same &= probs[index, parent] > 0
                place = places[index, parent].masked_fill(~same, DEAD).amax(-1)
            else:
                place = torch.full_like(frontier.tokens, ROOT)
            found.append(place)
            return tokens[index, place], probs[index, place]

        return answer

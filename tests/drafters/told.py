"""Heads that guess well. Of what a random head drafts hardly a path is kept, and then a decode
shows neither what a wrong commit does nor a wrong parent."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.decode import Decoder
from specdec.drafters.growth import Expand, Frontier
from specdec.protocols import StepContext
from tests.decoding import requests_of


def told(drafter: Any, texts: Sequence[Sequence[int]]) -> Any:
    """The drafter, to which it is told how the target goes on.

    Args:
        texts: by request, its prompt and the target's own text. Their tokens are the best children
            at most places, the second at every fourth, and not told at every fifth.
    """
    begin = drafter.begin

    def begun(context: StepContext) -> Expand:
        expand, cache = begin(context), context.cache
        assert cache is not None
        roots = cache.lengths[context.rows].tolist()  # all before the root is committed

        def expanded(frontier: Frontier) -> tuple[Tensor, Tensor]:
            ids, probs = expand(frontier)
            ids = ids.clone()
            for row, sequence in enumerate(context.sequences):
                text, place = texts[sequence.request.id], roots[row] + 1 + frontier.level
                if place < len(text) and place % 5:
                    best = ids[row, :, min(int(place % 4 == 0), ids.shape[2] - 1)]  # [F]
                    ids[row] = ids[row].where(ids[row] != text[place], best[:, None])
                    best[:] = text[place]
            return ids, probs

        return expanded

    drafter.begin = begun
    return drafter


def decoded(
    decoder: Decoder, prompts: Sequence[Sequence[int]], new: int
) -> tuple[list[list[int]], int]:
    """New tokens of each prompt, and most that a step has gained."""
    done = sorted(decoder.run(requests_of(prompts, new)), key=lambda one: one.request.id)
    return [one.output_ids for one in done], max(max(one.accepted_lengths) for one in done)

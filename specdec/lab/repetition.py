"""Degenerate texts: how much of an output repeats itself.

Greedy decoding of small models falls into loops (Holtzman et al. 2020), and nothing is easier to
guess than a loop, so that an accepted length may say how often texts loop instead of how well a
drafter guesses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

LONGEST_PERIOD = 32  # tokens
# Of stretches of 48 and 128 tokens of people's texts 2 in 8,867 are degenerate by these; of greedy
# texts of the zoo's target 31 % and 52 %, of sampled ones fewer than 1 %
# (experiments/results/repetition.json).
LEAST_LOOP, LEAST_SHARE = 16, 0.25  # tokens, and of a text


class Repetition(TypedDict):
    """How much of a text repeats.

    Args:
        distinct_bigrams: distinct pairs of neighbouring tokens over all pairs (distinct-2, Li et
            al. 2016); 1 of a text without pairs.
        longest_loop: tokens of the longest stretch with a period of at most `LONGEST_PERIOD`
            tokens that goes through it twice or more (a run, Kolpakov and Kucherov 1999): every
            token but those of the first period is the one a period before. 0 if there is none.
    """

    distinct_bigrams: float
    longest_loop: int


def repetition(tokens: Sequence[int]) -> Repetition:
    """Of the tokens of an output."""
    text = np.asarray(tokens, dtype=np.int64)
    pairs = len(text) - 1
    if pairs < 1:
        return {"distinct_bigrams": 1.0, "longest_loop": 0}
    _, names = np.unique(text, return_inverse=True)
    distinct = len(np.unique(names[:-1] * len(text) + names[1:]))
    return {"distinct_bigrams": distinct / pairs, "longest_loop": _longest_loop(text)}


def degenerate(text: Mapping[str, Any]) -> bool:
    """Whether a record of generations.jsonl is a degenerate text: its longest loop has 16 tokens
    or more, and a quarter of the text."""
    found = text.get("repetition") or repetition(text["output_ids"])
    return bool(found["longest_loop"] >= max(LEAST_LOOP, LEAST_SHARE * text["tokens"]))


def _longest_loop(text: np.ndarray) -> int:
    periods = np.arange(1, min(LONGEST_PERIOD, len(text) // 2) + 1)[:, None]
    places = np.arange(len(text))
    # Whether a token is the one a period before; how many in a row are, up to each place.
    same = (places >= periods) & (text[places] == text[places - periods])
    broken = np.maximum.accumulate(np.where(same, -1, places), axis=1)
    lengths = (places - broken).max(axis=1)
    loops = np.where(lengths >= periods[:, 0], lengths + periods[:, 0], 0)
    return int(loops.max())

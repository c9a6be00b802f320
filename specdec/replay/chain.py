"""What decoding a text takes, from survival functions: step boundaries are a Markov chain."""

import numpy as np

from specdec.replay.siblings import Array


def starts(survivals: Array, count: np.ndarray) -> Array:
    """[P, n], the chance that a step begins at each place of each text.

    A step that begins at t keeps d drafted tokens and one of the target's, so that the next begins
    at t + d + 1, with probability S_d - S_(d+1): given the text, independent of all before.

    Args:
        survivals: [P, n, D + 1].
        count: [P], tokens of each text.
    """
    texts, length, levels = survivals.shape
    ends = np.concatenate([survivals[..., 1:], np.zeros((texts, length, 1))], -1)
    stops = survivals - ends  # [P, n, D + 1]
    found = np.zeros((texts, length + levels))
    found[:, 0] = 1.0
    for place in range(length):
        found[:, place + 1 : place + 1 + levels] += found[:, place, None] * stops[:, place]
    inside: Array = found[:, :length] * (np.arange(length) < count[:, None])
    return inside

"""What drafters that search for matches share: how far a match reaches, and what it weighs."""

import math

DOUBLINGS = 1000  # of the weight of a match: floats end at 2 to the power of 1024


def check_matches(min_match: int, max_match: int, max_spec_factor: float | None) -> None:
    """Raise ValueError, naming the setting, if one is out of range."""
    if not 1 <= min_match <= max_match:
        raise ValueError(
            f"drafter.min_match={min_match}, drafter.max_match={max_match}: "
            f"need 1 <= min_match <= max_match"
        )
    if max_spec_factor is not None and not 1 <= max_spec_factor < math.inf:
        raise ValueError(f"drafter.max_spec_factor={max_spec_factor}: must be at least 1")


def reach(length: int, levels: int, max_spec_factor: float | None) -> int:
    """How many tokens a match of `length` is continued for: the longer it is, the further it can
    be trusted (SuffixDecoding, Oliaro et al. 2025); None for as many as the tree takes."""
    return levels if max_spec_factor is None else min(levels, int(max_spec_factor * length))


def weight(length: int) -> float:
    """A match counts twice as much as one a token shorter."""
    return 2.0 ** min(length, DOUBLINGS)

"""drafter=user of the golden trace."""


def repeat(tokens: list[int]) -> list[list[int]]:
    """What followed the last token where it stood before, the latest place first; else the last
    tokens once more."""
    places = [i for i in range(len(tokens) - 1) if tokens[i] == tokens[-1]]
    return [tokens[i + 1 : i + 5] for i in reversed(places)][:3] or [tokens[-3:]]

"""tree=paths: the tree whose paths are listed."""

from typing import Any

from specdec.drafters.trees.fixed import FixedShape
from specdec.tables import load_table

EXAMPLE = "a list of paths like [[0], [1], [0, 0]]"


class Paths(FixedShape):
    """The same tree at every step, given node by node (the choices of Medusa, Cai et al. 2024,
    section 2.1.2).

    Args:
        paths: one path for each node, as ranks of children from the root: [[0], [1], [0, 0]]; or a
            JSON file with such a list.
        budget: an upper limit of nodes; None takes what is listed; 0 turns drafting off.
        children: how children are chosen.

    Raises:
        ValueError: no such file, one without such a list, a node without its parent, more nodes
            than the budget, or ranks skipped among sampled children.
    """

    def __init__(self, *, paths: Any, budget: int | None = None, children: str = "top_k") -> None:
        if isinstance(paths, str):
            mend = f"it must hold {EXAMPLE}"
            shape = load_table(paths, _listed, mend=mend, setting="tree.paths")
        else:
            try:
                shape = _listed(paths)
            except ValueError as error:
                raise ValueError(f"tree.paths={paths}: {error}, or be a file of one") from None
        super().__init__(shape=shape, budget=budget, children=children)


def _listed(data: Any) -> list[list[int]]:
    if not isinstance(data, list) or not all(_is_path(path) for path in data):
        raise ValueError(f"must be {EXAMPLE}")
    return data


def _is_path(path: Any) -> bool:
    return isinstance(path, list) and all(type(rank) is int for rank in path)

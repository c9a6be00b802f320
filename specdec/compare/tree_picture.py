"""Where the nodes of a token tree lie in its picture; the page's template draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.compare.figures import Tree

NODES = 40  # shown of a tree; of larger ones the most probable, and the accepted path
BOX, COLUMN, ROW = 94, 118, 50  # pixels: a node, and from one to the next
LETTERS = 12  # of a token that a box holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A token in its place.

    Args:
        kind: root, accepted, drafted, or own: the token that the target adds.
        draft, target: its probabilities, in per cent; None where unknown.
    """

    x: int
    y: int
    text: str
    whole: str
    kind: str
    draft: float | None = None
    target: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    path: str
    width: float
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A tree as it is drawn: `shown` of its `drafted` nodes, the root not counted."""

    tree: Tree
    width: int
    height: int
    nodes: list[Node]
    edges: list[Edge]
    drafted: int
    shown: int


def visible(token: str) -> str:
    """A token with its blanks and other signs that one does not see."""
    named = {" ": "␣", "\n": "⏎", "\t": "⇥", "": "∅"}
    return "".join(named.get(sign, printable(sign)) for sign in token) or named[""]


def printable(text: str) -> str:
    """Without control characters and halves of surrogates, which no page may hold."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def picture(tree: Tree) -> Picture:
    """The tree from left to right, the accepted path and the target's own token in its first
    row."""
    nodes = _chosen(tree)
    path = set(tree.path)
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in sorted(nodes, key=lambda node: (node not in path, node)):
        if node:
            children[tree.parents[node]].append(node)
    own = len(tree.tokens)
    end = tree.path[-1] if tree.path else 0
    children[end].insert(0, own)
    children[own] = []
    places = _places(children)
    drawn = [_node(tree, node, *places[node]) for node in sorted(places)]
    edges = [
        _edge(places[parent], places[node], _kind(tree, node), _draft(tree, node))
        for parent, found in children.items()
        for node in found
    ]
    edges.sort(key=lambda edge: edge.kind != "drafted")  # the path on top
    return Picture(
        tree=tree,
        width=max(column for column, _ in places.values()) * COLUMN + BOX + 2,
        height=max(row for _, row in places.values()) * ROW + ROW - 4,
        nodes=drawn,
        edges=edges,
        drafted=len(tree.tokens) - 1,
        shown=len(nodes) - 1,
    )


def _chosen(tree: Tree) -> list[int]:
    """The nodes to show: with a node its parent."""
    joint: list[float] = []
    for node, parent in enumerate(tree.parents):
        above = joint[parent] if parent >= 0 else 1.0
        own = tree.draft[node]
        joint.append(above * (1.0 if own is None else min(own, 1.0)))
    order = sorted(range(len(joint)), key=lambda node: (-joint[node], node))
    return sorted({0, *tree.path, *order[:NODES]})


def _places(children: dict[int, list[int]]) -> dict[int, tuple[int, int]]:
    """Column and row of each node: a node in the row of its first child."""
    places: dict[int, tuple[int, int]] = {}
    row, waiting = 0, [(0, 0)]
    while waiting:
        node, column = waiting.pop()
        places[node] = column, row
        found = children[node]
        waiting += [(child, column + 1) for child in reversed(found)]
        row += not found
    return places


def _kind(tree: Tree, node: int) -> str:
    if node == len(tree.tokens):
        return "own"
    if node == 0:
        return "root"
    return "accepted" if node in tree.path else "drafted"


def _draft(tree: Tree, node: int) -> float | None:
    return tree.draft[node] if node < len(tree.tokens) else None


def _node(tree: Tree, node: int, column: int, row: int) -> Node:
    own = node == len(tree.tokens)
    whole = visible(tree.next_token if own else tree.tokens[node])
    probabilities = [None, None] if own or not node else [tree.draft[node], tree.target[node]]
    draft, target = (None if p is None or math.isnan(p) else 100 * p for p in probabilities)
    return Node(
        x=column * COLUMN + 1,
        y=row * ROW + 1,
        text=whole if len(whole) <= LETTERS else whole[: LETTERS - 1] + "…",
        whole=whole,
        kind=_kind(tree, node),
        draft=draft,
        target=target,
    )


def _edge(start: Sequence[int], end: Sequence[int], kind: str, draft: float | None) -> Edge:
    """A curve from the right side of a box to the left side of the next; the wider the more
    probable the draft held it."""
    x, y = start[0] * COLUMN + BOX + 1, start[1] * ROW + 12
    to, down = end[0] * COLUMN + 1, end[1] * ROW + 12
    half = (x + to) // 2
    return Edge(
        path=f"M{x} {y}C{half} {y} {half} {down} {to} {down}",
        width=round(1.0 + 3.0 * (draft or 0.0), 1),
        kind=kind,
    )

"""How much is an acceptance rule worth, as the draft departs from the target?

    python -m specdec.experiments.studies.acceptance_bounds

Exact, on any CPU: in tiny worlds (`rule_laws.py`) all trees a drafter can draw and all ways the
coins can fall are gone through, for a chain and for a tree. In every world the draft moves away
from a random target in a straight line, towards another random distribution. The file has, at
each distance, the mean over the worlds of the total variation between draft and target (where the
target goes), of the drafted tokens that a step keeps under each rule, and of the most that any
lossless rule can keep of such trees. The plot is drawn beside it.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.optimize import linprog
from scipy.sparse import coo_array

from specdec.compare.canvas import COLOURS, canvas, save
from specdec.experiments.figures.markdown import piece, show
from specdec.experiments.studies.rule_laws import (
    CONCENTRATION,
    DrawnTree,
    Table,
    Tokens,
    accepted_tokens,
    dirichlet_table,
    drawn_trees,
    emitted_law,
    extend_law,
    token_trees,
    widths,
)
from specdec.lab.command import Positive, begin, option, run_main, write
from specdec.tree import Children
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal

VOCAB = 6
MOST = "any lossless rule, at most"


@dataclass(frozen=True)
class Panel:
    """Children of every node by level, and the rules that are tried on such trees, by how the
    children are chosen."""

    shape: tuple[int, ...]
    rules: Mapping[Children, tuple[CoinRule, ...]]


PANELS = {
    "chain": Panel((1, 1, 1), {"sample": (Block(), Tokenwise()), "top_k": (TargetOnly(),)}),
    "tree": Panel(
        (2, 1),
        {
            "sample": (Traversal(), RecursiveRejection()),
            "sample_with_replacement": (KSeq(), MultiPath(), RecursiveRejection()),
            "top_k": (TargetOnly(),),
        },
    ),
    "fork": Panel((1, 2), {"sample": (Traversal(), Hsd(), RecursiveRejection())}),
}
LINES = {  # what the plot shows: title, colour and style
    "block, sample": ("block", COLOURS[0], "o-"),
    "tokenwise, sample": ("tokenwise", COLOURS[1], "s-"),
    "traversal, sample": ("traversal", COLOURS[2], "o-"),
    "recursive_rejection, sample": ("recursive_rejection", COLOURS[3], "s-"),
    "hsd, sample": ("hsd", COLOURS[4], "D-"),
    "k_seq, sample_with_replacement": ("k_seq, with replacement", COLOURS[5], "D:"),
    "multi_path, sample_with_replacement": ("multi_path, with replacement", COLOURS[4], "^:"),
    "recursive_rejection, sample_with_replacement": (
        "recursive_rejection, with replacement",
        COLOURS[3],
        "s:",
    ),
    "target_only, top_k": ("target_only, top-k children", COLOURS[6], "v-"),
    f"{MOST}, sample": (MOST, "black", "--"),
    f"{MOST}, sample_with_replacement": (f"{MOST}, with replacement", "black", ":"),
}


def mixture(first: Table, second: Table, share: float) -> Table:
    """`share` of the second."""
    return lambda context: (1.0 - share) * first(context) + share * second(context)


def total_variation(target: Table, draft: Table, depth: int) -> float:
    """Between the distributions of a token, expected over the target's own texts and averaged over
    the first `depth` tokens."""
    total = 0.0
    for length in range(depth):
        for context, mass in extend_law({(): 1.0}, target, length).items():
            total += mass * float(np.abs(target(context) - draft(context)).sum()) / 2.0
    return total / depth


def most_accepted(trees: list[DrawnTree], target: Table) -> float:
    """Expected drafted tokens that the best of all lossless rules keeps, by linear programming.

    The unknowns are the chances k(t, c) that tree t is drawn and the path to its node c is kept.
    A path can be kept only if its beginning is, and siblings exclude each other: over the children
    c of a node, k(t, c) adds up to at most that of the node. And a rule is lossless if and only
    if, over all trees together, what goes on with x after the context c is p(x | c) of what gets
    as far as c; the token after a path can supply what is missing, and cannot take back what is
    too much: over all t, k(t, cx) adds up to at most p(x | c) times the sum of k(t, c).

    So no rule is above it, not even one that looks at more of the target than the drafted nodes;
    and one that solves the programme attains it. With one level it is optimal transport.
    """
    drawn: dict[frozenset[Tokens], float] = {}  # a token drawn twice is one node
    for tree in trees:
        nodes = frozenset(tree.contexts)
        drawn[nodes] = drawn.get(nodes, 0.0) + tree.probability
    pairs = [(t, c) for t, nodes in enumerate(drawn) for c in sorted(nodes) if c]
    if not pairs:
        return 0.0
    column = {pair: i for i, pair in enumerate(pairs)}
    rows: list[dict[int, float]] = []
    limits: list[float] = []
    for t, (nodes, probability) in enumerate(drawn.items()):
        for node in nodes:
            row = {column[t, c]: 1.0 for c in nodes if c and c[:-1] == node}
            if row:
                rows.append(row | ({column[t, node]: -1.0} if node else {}))
                limits.append(0.0 if node else probability)
    for context in sorted({c for _, c in pairs}):
        before, share = context[:-1], float(target(context[:-1])[context[-1]])
        row = {column[t, context]: 1.0 for t in range(len(drawn)) if (t, context) in column}
        if before:
            all_before = (t for t in range(len(drawn)) if (t, before) in column)
            row |= {column[t, before]: -share for t in all_before}
        rows.append(row)
        limits.append(0.0 if before else share)
    entries = [(i, j, value) for i, row in enumerate(rows) for j, value in row.items()]
    row_of, column_of, values = zip(*entries, strict=True)
    matrix = coo_array((values, (row_of, column_of)), shape=(len(rows), len(pairs))).tocsr()
    solved = linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=limits, method="highs")
    if solved.status != 0:
        raise RuntimeError(f"no optimum: {solved.message}")
    return -float(solved.fun)


def measure(panel: Panel, worlds: Iterable[int], steps: int) -> dict[str, Any]:
    """Means over the worlds, at distances from none to that of the other distribution."""
    depth = len(panel.shape)
    found: dict[str, list[list[float]]] = {}  # by name, for each world, for each step

    def note(name: str, value: float) -> None:
        found.setdefault(name, [[]])[-1].append(value)

    for world in worlds:
        target, other = (dirichlet_table(2 * world + place, VOCAB) for place in (0, 1))
        for values in found.values():
            values.append([])
        for share in np.linspace(0.0, 1.0, steps):
            draft = mixture(target, other, float(share))
            note("total_variation", total_variation(target, draft, depth))
            for children, rules in panel.rules.items():
                trees = drawn_trees(widths(*panel.shape), depth, draft, children)
                tree = token_trees(trees, draft, children)
                for rule in rules:
                    law = emitted_law(rule, trees, tree, target)
                    note(f"{rule.name}, {children}", accepted_tokens(law))
                note(f"{MOST}, {children}", most_accepted(trees, target))
    means = {name: np.round(np.mean(values, 0), 6).tolist() for name, values in found.items()}
    return {
        "shape": list(panel.shape),
        "total_variation": means.pop("total_variation"),
        "accepted": means,
    }


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Accepted tokens by distance, a part for each shape."""
    figure, (parts,) = canvas(5.25 * len(result["panels"]), 4.2, 1, len(result["panels"]))
    for axes, (name, panel) in zip(parts, result["panels"].items(), strict=True):
        lines = [line for line in LINES if line in panel["accepted"]]
        for line in lines:
            title, colour, style = LINES[line]
            x, y = panel["total_variation"], panel["accepted"][line]
            axes.plot(x, y, style, color=colour, label=title, markersize=4)
        axes.set_title(f"{name}, children by level: {panel['shape']}", fontsize="medium")
        axes.set_xlabel("total variation between draft and target")
        axes.set_ylabel("drafted tokens accepted per step")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    save(figure, path)


@dataclass(frozen=True, kw_only=True)
class Options:
    worlds: Positive = option(8, "random ones")
    steps: Positive = option(9, "distances, 0 among them")
    out: Path = option(Path("acceptance_bounds.json"), "result file")


def work(options: Options) -> None:
    torch.set_num_threads(1)
    result = begin(options, torch.device("cpu"))
    result["settings"] |= {"vocab": VOCAB, "concentration": CONCENTRATION}
    result["versions"]["scipy"] = version("scipy")
    panels = result["panels"] = {}
    for name, panel in PANELS.items():
        worlds = track(range(options.worlds), description=name, transient=True)
        panels[name] = measure(panel, worlds, options.steps)
    write(options.out, result)
    plot(result, options.out.with_suffix(".png"))
    for name, panel in panels.items():
        heads = ["total variation", *(f"{x:.2f}" for x in panel["total_variation"])]
        rows = (
            [line, *(f"{y:.3f}" for y in values)] for line, values in panel["accepted"].items()
        )
        show(piece(name, heads, rows))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())

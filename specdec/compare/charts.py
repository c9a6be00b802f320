"""The charts of a report, each an `<svg>` element, or empty where there is nothing to draw.

`styles` says which methods are drawn in a colour and a shape of their own, by name, and which;
artists of method i have the class `method-i`, by which a page shows and hides them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.compare import canvas
from specdec.compare.canvas import INK, LINE, METHODS, MUTED, PAPER
from specdec.compare.figures import Difference, Entry, Estimate, Group
from specdec.lab.metrics import VERBS

Styles = Mapping[str, int]

MARKERS = "osD^vPX*"
SIZES = (6.5, 6.0, 5.6, 7.0, 7.0, 7.5, 7.0, 9.5)  # that they look equally big
WIDTH = 1040  # of a page, in pixels
MANY = 12  # rows that are named; beyond, bars are thinner
BATCH = "batch_size"


def styles_of(groups: Sequence[Group]) -> list[dict[str, int]]:
    """For each group the best methods that can be told apart; in all groups a name has the same
    style, as far as they go round."""
    known: dict[str, int] = {}
    found = []
    for group in groups:
        best = [entry.name for entry in group.entries[: len(METHODS)]]
        kept = {name: known[name] for name in best if name in known}
        taken: dict[int, str] = {}
        for name, style in kept.items():
            taken.setdefault(style, name)
        free = iter(i for i in range(len(METHODS)) if i not in taken)
        styles = {n: kept[n] if taken.get(kept.get(n, -1)) == n else next(free) for n in best}
        known |= styles
        found.append(styles)
    return found


def reach(estimate: Estimate) -> tuple[float, float]:
    """The ends of the interval; of few conversations those of their range."""
    if estimate.low is not None and estimate.high is not None:
        return estimate.low, estimate.high
    if estimate.least is not None and estimate.most is not None:
        return estimate.least, estimate.most
    return estimate.value, estimate.value


def spoken(estimate: Estimate, unit: str = "") -> str:
    """An estimate in words."""
    low, high = reach(estimate)
    text = f"{estimate.value:.2f}{unit}"
    if estimate.low is not None:
        return f"{text} ({low:.2f} to {high:.2f})"
    return f"{text} (single conversations {low:.2f} to {high:.2f})" if low < high else text


class Chart:
    """A figure in the making, and what its markers say when hovered over.

    Args:
        width, height: pixels.
        columns: panels beside each other, which share their rows.
    """

    def __init__(self, width: float, height: float, columns: int = 1) -> None:
        self.figure, (self.panels,) = canvas.canvas(
            width / 72, height / 72, 1, columns, sharey=columns > 1
        )
        self.figure.patch.set_visible(False)
        for axes in self.panels:
            axes.patch.set_visible(False)
            axes.set_axisbelow(True)
        self.titles: dict[str, list[str]] = {}

    def dots(
        self,
        axes: Any,
        x: Sequence[float],
        y: Sequence[float],
        titles: Sequence[str],
        style: int | None,
        **options: Any,
    ) -> None:
        """Markers of a method; one without a style is a small pale dot."""
        look: dict[str, Any] = {"marker": "o", "color": MUTED, "markersize": 4.5}
        if style is not None:
            look = {
                "marker": MARKERS[style],
                "color": METHODS[style],
                "markersize": SIZES[style],
                "markeredgecolor": PAPER,
                "markeredgewidth": 0.8,
            }
        look |= {"linestyle": "none", "clip_on": False, "zorder": 3, **options}
        (line,) = axes.plot(x, y, **look)
        gid = f"dots-{len(self.titles)}" + ("" if style is None else f" method-{style}")
        line.set_gid(gid)
        self.titles[gid] = list(titles)

    def intervals(
        self,
        axes: Any,
        estimates: Sequence[Estimate],
        y: Sequence[float],
        style: int | None,
        **options: Any,
    ) -> None:
        """A line across each interval; thin where it is a range."""
        for sure in (True, False):
            look: dict[str, Any] = {"linewidth": 2.0 if sure else 1.0, "alpha": 0.75}
            look["color"] = MUTED if style is None else METHODS[style]
            across: list[float] = []
            at: list[float] = []
            for estimate, height in zip(estimates, y, strict=True):
                if (estimate.low is not None) == sure:
                    across += [*reach(estimate), math.nan]
                    at += [height, height, math.nan]
            if across:
                (line,) = axes.plot(across, at, solid_capstyle="butt", **(look | options))
                line.set_gid("" if style is None else f"method-{style}")

    def svg(self, name: str, label: str) -> str:
        return canvas.svg(self.figure, name, label, self.titles)


def rows(axes: Any, labels: Sequence[str], *, bands: bool = False) -> None:
    """A row for each label, from the top; without ticks or a spine."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [shortened(label) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    for row in range(0, len(labels), 2) if bands else ():
        axes.axhspan(row - 0.5, row + 0.5, color=LINE, alpha=0.28, linewidth=0, zorder=0)


def shortened(name: str, most: int = 44) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def by_category(group: Group, styles: Styles, name: str) -> str:
    """Accepted length, and speedup where times are known, a row for each category: those first in
    which the best method accepts most."""
    drawn = [entry for entry in group.entries if entry.name in styles and entry.by_category]
    names = list(dict.fromkeys(name for entry in drawn for name in entry.by_category))
    if len(names) < 2:
        return ""

    def best(category: str) -> float:
        shares = [e.by_category[category] for e in drawn if category in e.by_category]
        return max(share.accepted_length.value for share in shares)

    names.sort(key=best, reverse=True)
    timed = any(share.speedup for entry in drawn for share in entry.by_category.values())
    chart = Chart(WIDTH, 70 + len(names) * (14 + 8 * len(drawn)), 2 if timed else 1)
    for axes, quantity in zip(chart.panels, ("accepted_length", "speedup"), strict=False):
        rows(axes, names, bands=True)
        axes.tick_params(axis="x", labeltop=len(names) > 6)
        for place, entry in enumerate(drawn):
            shift = (place - (len(drawn) - 1) / 2) / (len(drawn) + 1)
            _across(chart, axes, entry, names, quantity, shift, styles[entry.name])
    chart.panels[0].set_title("accepted length")
    chart.panels[0].set_xlabel("tokens per step")
    if timed:
        chart.panels[1].set_title("speedup")
        chart.panels[1].set_xlabel("times plain decoding")
        chart.panels[1].axvline(1.0, color=MUTED, linewidth=1.0)
    return chart.svg(name, "Accepted length and speedup by category")


def _across(
    chart: Chart,
    axes: Any,
    entry: Entry,
    names: Sequence[str],
    quantity: str,
    shift: float,
    style: int,
) -> None:
    """One quantity of one method in all categories."""
    found, y, titles = [], [], []
    for row, category in enumerate(names):
        share = entry.by_category.get(category)
        estimate = getattr(share, quantity, None)
        if share is None or estimate is None:
            continue
        found.append(estimate)
        y.append(row + shift)
        count = f"{share.conversations} conversations"
        titles.append(f"{category} · {entry.name}: {spoken(estimate)}, {count}")
    if found:
        chart.intervals(axes, found, y, style)
        chart.dots(axes, [one.value for one in found], y, titles, style)


def by_depth(group: Group, styles: Styles, name: str) -> str:
    """Of the trees that reach a depth, the share whose accepted path does too."""
    drawn = [entry for entry in group.entries if entry.name in styles]
    deepest = max((len(entry.acceptance_by_depth) for entry in drawn), default=0)
    if not deepest:
        return ""
    chart = Chart(760, 360)
    axes = chart.panels[0]
    for entry in reversed(drawn):  # the best on top
        style, shares = styles[entry.name], entry.acceptance_by_depth
        depths = range(1, len(shares) + 1)
        titles = [f"{entry.name}, depth {d}: {s:.0%}" for d, s in zip(depths, shares, strict=True)]
        (line,) = axes.plot(depths, shares, color=METHODS[style], linewidth=1.6)
        line.set_gid(f"method-{style}")
        chart.dots(axes, list(depths), shares, titles, style)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlim(0.5, deepest + 0.5)
    step = math.ceil(deepest / 16)
    axes.set_xticks(range(1, deepest + 1, step))
    axes.set_xlabel("depth of the tree")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return chart.svg(name, "Acceptance by depth")


def by_batch(groups: Sequence[Group], styles: Styles, name: str) -> str:
    """Tokens per second of methods over batches: of groups that differ in nothing else."""
    batches = sorted({entry.batch_size for group in groups for entry in group.entries})
    speeds: dict[str, dict[int, float]] = {}
    for group in groups:
        for entry in group.entries:
            if entry.name in styles and entry.tokens_per_second is not None:
                speeds.setdefault(entry.name, {})[entry.batch_size] = entry.tokens_per_second
    if len(batches) < 2 or not any(len(found) > 1 for found in speeds.values()):
        return ""
    chart = Chart(760, 360)
    axes = chart.panels[0]
    for method, found in speeds.items():
        sizes, style = sorted(found), styles[method]
        values = [found[size] for size in sizes]
        titles = [f"{method}, batch {size}: {found[size]:,.1f} tokens/s" for size in sizes]
        (line,) = axes.plot(sizes, values, color=METHODS[style], linewidth=1.6)
        line.set_gid(f"method-{style}")
        chart.dots(axes, sizes, values, titles, style)
    canvas.by_powers_of_two(axes, batches)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch, sequences")
    axes.set_ylabel("tokens/s")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    return chart.svg(name, "Tokens per second by batch")


def frontier(entries: Sequence[Entry]) -> list[Entry]:
    """Those of which no other verifies fewer nodes and gains as much, by nodes."""
    found: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.nodes_per_step, -e.accepted_length.value)):
        if not found or entry.accepted_length.value > found[-1].accepted_length.value:
            found.append(entry)
    return found


def pareto(group: Group, styles: Styles, name: str) -> str:
    """What verifying more nodes gains; all methods, those without a colour as grey dots."""
    if len(group.entries) < 2:
        return ""
    chart = Chart(760, 380)
    axes = chart.panels[0]
    edge = frontier(group.entries)
    x = [entry.nodes_per_step for entry in edge]
    y = [entry.accepted_length.value for entry in edge]
    axes.step(x, y, where="post", color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for entry in reversed(group.entries):
        nodes, length = entry.nodes_per_step, entry.accepted_length
        title = f"{entry.name}: {nodes:.1f} nodes, {spoken(length)} tokens"
        style = styles.get(entry.name)
        if style is not None:
            look = {"color": METHODS[style], "linewidth": 1.6, "alpha": 0.6}
            (line,) = axes.plot([nodes, nodes], reach(length), solid_capstyle="butt", **look)
            line.set_gid(f"method-{style}")
        size = 5.0 if style is None else 1.3 * SIZES[style]
        chart.dots(axes, [nodes], [length.value], [title], style, markersize=size)
    axes.set_xlim(left=0)
    axes.set_xlabel("drafted nodes verified, per step of a sequence")
    axes.set_ylabel("accepted length, tokens")
    axes.grid(color=LINE, linewidth=0.8)
    return chart.svg(name, "Nodes verified against accepted length")


def anatomy(group: Group, name: str) -> tuple[str, list[str]]:
    """Milliseconds of a step by verb, a bar for each method; and the verbs there are."""
    drawn = [entry for entry in group.entries if entry.anatomy]
    verbs = [v for v in VERBS if any((entry.anatomy or {}).get(v) for entry in drawn)]
    if not verbs:
        return "", []
    height = 24 if len(drawn) <= MANY else 17
    chart = Chart(WIDTH, 60 + height * len(drawn))
    axes = chart.panels[0]
    rows(axes, [entry.name for entry in drawn])
    for row, entry in enumerate(drawn):
        left = 0.0
        for verb in verbs:
            width = (entry.anatomy or {}).get(verb, 0.0)
            colour = canvas.VERBS[VERBS.index(verb)]
            axes.barh(row, width, 0.68, left=left, color=colour, edgecolor=PAPER, linewidth=0.8)
            left += width
        look = {"textcoords": "offset points", "va": "center", "fontsize": 10.5, "color": MUTED}
        axes.annotate(f"{left:.1f}", (left, row), (6, 0), **look)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.04)
    axes.set_xlabel("ms per step of the batch")
    return chart.svg(name, "Time of a step by verb"), verbs


def differences(found: Sequence[Difference], styles: Styles, name: str) -> str:
    """The ratio of every conversation, a row for each pair, and over them that of all with its
    interval; on a log scale, so that twice and half are equally far."""
    if not found:
        return ""
    chart = Chart(WIDTH, 64 + 46 * len(found))
    axes = chart.panels[0]
    rows(axes, [f"over {one.second}" for one in found])
    for row, one in enumerate(found):
        style = styles.get(one.second)
        pairs = sorted(one.by_conversation.items(), key=lambda pair: pair[1])
        heights = [row + 0.62 * ((i * 0.618034) % 1.0 - 0.5) for i in range(len(pairs))]
        titles = [f"{conversation}: {value:.2f}" for conversation, value in pairs]
        faint = {"markersize": 4.5, "alpha": 0.55, "markeredgewidth": 0.0, "marker": "o"}
        chart.dots(axes, [v for _, v in pairs], heights, titles, style, **faint)
        chart.intervals(
            axes, [one.ratio], [row], style, linewidth=3.0, color=INK, alpha=1.0, zorder=4
        )
        chart.dots(
            *(axes, [one.ratio.value], [row], [f"all: {spoken(one.ratio)}"], style),
            marker="D",
            markersize=7.5,
            color=INK,
            zorder=5,
        )
    axes.axvline(1.0, color=MUTED, linewidth=1.0)
    _ratios(axes)
    axes.set_xlabel("ratio: right of 1 the first is better")
    return chart.svg(name, "Paired differences by conversation")


def _ratios(axes: Any) -> None:
    """A log axis with a few plain numbers."""
    low, high = axes.get_xlim()
    axes.set_xscale("log")
    low, high = max(low, 1e-3), max(high, 1.02)
    wide = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    ticks = (
        wide if high / low > 6 else (0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4)
    )
    near = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(near, [f"{tick:g}" for tick in near])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def predicted(group: Group, styles: Styles, name: str) -> str:
    """Speedups that were promised (a hollow ring), and what came of them."""
    drawn = [
        (entry, entry.predicted_speedup, entry.speedup)
        for entry in group.entries
        if entry.predicted_speedup is not None and entry.speedup is not None
    ]
    if not drawn:
        return ""
    chart = Chart(760, 64 + 30 * len(drawn))
    axes = chart.panels[0]
    rows(axes, [entry.name for entry, _, _ in drawn])
    for row, (entry, promise, measured) in enumerate(drawn):
        style = styles.get(entry.name)
        (line,) = axes.plot([promise, measured.value], [row, row], color=LINE, linewidth=1.2)
        line.set_gid("" if style is None else f"method-{style}")
        chart.intervals(axes, [measured], [row], style)
        ring = {"marker": "o", "markersize": 8, "markerfacecolor": PAPER, "markeredgecolor": INK}
        ring |= {"markeredgewidth": 1.4}
        chart.dots(axes, [promise], [row], [f"predicted {promise:.2f}"], style, **ring)
        chart.dots(axes, [measured.value], [row], [f"measured {spoken(measured)}"], style)
    axes.axvline(1.0, color=MUTED, linewidth=1.0)
    axes.set_xlabel("speedup, times plain decoding")
    return chart.svg(name, "Predicted and measured speedup")

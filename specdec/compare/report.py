"""The report of a comparison: one HTML file that needs nothing else, to open, mail, print, keep.

Tables and pictures are made here, `report.html.j2` puts them in their places. Equal comparisons
give equal bytes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from specdec.compare import charts, tables
from specdec.compare.canvas import page_style
from specdec.compare.figures import Comparison, Group
from specdec.compare.tables import Table
from specdec.compare.tree_picture import Picture, picture, printable
from specdec.lab.metrics import VERBS
from specdec.lab.values import flat

TREES = 12  # pictures of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A section of a group.

    Args:
        about: what is seen, in a sentence or two.
        charts: titles and `<svg>` elements.
        legend: whether methods are told apart by colour; verbs: those that are.
        narrow: whether the legend has room beside the chart.
        table: under the charts; `table_title` says what it is where it is folded away.
        more: a second table, with its title.
        empty: why there is nothing, in place of all that.
    """

    id: str
    title: str
    about: str = ""
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    legend: bool = False
    narrow: bool = False
    verbs: list[str] = field(default_factory=list)
    table: Table | None = None
    table_title: str = ""
    more: tuple[str, Table] | None = None
    pictures: list[Picture] = field(default_factory=list)
    empty: str = ""


def write(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison.

    Args:
        path: of an .html file; its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    page = html(comparison)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def html(comparison: Comparison) -> str:
    """The report as a text."""
    comparison = _cleaned(comparison)
    styles = charts.styles_of(comparison.groups)
    with page_style():
        groups = [
            (group, styles[i], _parts(comparison.groups, i, styles[i]))
            for i, group in enumerate(comparison.groups)
        ]
    settings = tables.matrix(comparison.differing, "run") if comparison.differing else None
    environment = {name: flat(one) for name, one in comparison.environment.items()}
    page: str = _template().render(
        comparison=comparison,
        groups=groups,
        settings=settings,
        environment=tables.matrix(environment, "machine") if environment else None,
        shapes=[(charts.MARKERS[i], i) for i in range(len(charts.MARKERS))],
        verbs=VERBS,
    )
    return page.lstrip()


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _cleaned(value: Any) -> Any:
    """The same with every text printable; tokens of trees have signs of their own for that."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_cleaned(key): _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        kept = ("tokens", "next_token")
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        return replace(value, **{k: v if k in kept else _cleaned(v) for k, v in inner.items()})
    return value


def _parts(groups: Sequence[Group], place: int, styles: Mapping[str, int]) -> list[Part]:
    """The sections of a group that there is something for, in the order of the report."""
    group, name = groups[place], f"g{place}"
    replayed = all(entry.mark == "REPLAYED" for entry in group.entries)
    parts = [
        _methods(group, styles),
        _categories(group, styles, name),
        _depths(group, styles, name),
        _batches(groups, place, styles, name),
        _pareto(group, styles, name),
        None if replayed else _anatomy(group, name),
        _differences(group, styles, name),
        _predicted(group, styles, name),
        None if replayed else _lossless(group, styles),
        None if replayed else _trees(group),
    ]
    return [part for part in parts if part is not None]


def _lossless(group: Group, styles: Mapping[str, int]) -> Part:
    return Part(
        id="lossless",
        title="Losslessness",
        about="Whether each run's own texts passed its check of them.",
        table=tables.lossless(group, styles),
    )


def _few(group: Group, styles: Mapping[str, int], table: bool = True) -> str:
    """Says so where charts leave methods out."""
    if len(group.entries) <= len(styles):
        return ""
    rest = " The table has all." if table else ""
    return f" The best {len(styles)} of {len(group.entries)} methods are drawn.{rest}"


def _methods(group: Group, styles: Mapping[str, int]) -> Part:
    about = (
        "The best first, lossless ones before those that are not. Under a value is its 95 % "
        "interval over conversations; of fewer than six conversations their range (with dots)."
    )
    chosen = None
    if group.chosen:
        title = "Best settings of each drafter, chosen on one half of the conversations and "
        chosen = title + "measured on the other", tables.methods(group.chosen, styles)
    table = tables.methods(group.entries, styles)
    return Part(id="methods", title="Methods", about=about, table=table, more=chosen)


def _categories(group: Group, styles: Mapping[str, int], name: str) -> Part | None:
    table = tables.categories(group, styles)
    if table is None:
        return None
    drawn = charts.by_category(group, styles, f"{name}c")
    about = "Dots are ratios over a category's conversations, lines their 95 % intervals; thin "
    about += "lines, of fewer than six conversations, their range."
    return Part(
        id="categories",
        title="By category",
        about=about + _few(group, styles) if drawn else "",
        charts=[("", Markup(drawn))] if drawn else [],
        legend=bool(drawn),
        table=table,
        table_title="Accepted length by category, all methods",
    )


def _depths(group: Group, styles: Mapping[str, int], name: str) -> Part | None:
    drawn = charts.by_depth(group, styles, f"{name}d")
    if not drawn:
        return None
    about = "Of the trees that reach a depth, the share whose accepted path does too."
    return Part(
        id="depth",
        title="Acceptance by depth",
        about=about + _few(group, styles, table=False),
        charts=[("", Markup(drawn))],
        legend=True,
        narrow=True,
    )


def _batches(
    groups: Sequence[Group], place: int, styles: Mapping[str, int], name: str
) -> Part | None:
    """Of groups that differ in the batch alone the first shows all."""

    def rest(group: Group) -> dict[str, Any]:
        return {k: v for k, v in group.workload.items() if k != charts.BATCH}

    alike = [i for i, group in enumerate(groups) if rest(group) == rest(groups[place])]
    if alike[0] != place:
        return None
    family = [groups[i] for i in alike]
    drawn = charts.by_batch(family, styles, f"{name}b")
    if not drawn:
        return None
    return Part(
        id="batch",
        title="Tokens per second by batch",
        about="Of the groups that differ in their batch alone."
        + _few(groups[place], styles, False),
        charts=[("", Markup(drawn))],
        legend=True,
        narrow=True,
    )


def _pareto(group: Group, styles: Mapping[str, int], name: str) -> Part | None:
    drawn = charts.pareto(group, styles, f"{name}p")
    if not drawn:
        return None
    about = "On the dashed line are methods that no other beats with as few nodes."
    if len(group.entries) > len(styles):
        about += " Grey dots: methods that have no colour here; hovering names them."
    return Part(
        id="pareto",
        title="Nodes verified against tokens gained",
        about=about,
        charts=[("", Markup(drawn))],
        legend=True,
        narrow=True,
    )


def _anatomy(group: Group, name: str) -> Part:
    drawn, verbs = charts.anatomy(group, f"{name}a")
    part = Part(id="anatomy", title="Anatomy of a step", empty=f"Not shown: {group.times}.")
    if not drawn:
        return part
    return replace(
        part,
        about="Where the time of a step of the batch goes; other is the host.",
        charts=[("", Markup(drawn))],
        verbs=verbs,
        empty="",
    )


def _differences(group: Group, styles: Mapping[str, int], name: str) -> Part | None:
    if not group.differences:
        return None
    found: list[tuple[str, Markup]] = []
    sides = dict.fromkeys((one.quantity, one.first) for one in group.differences)
    for side in sides:  # methods of each mark have a best one
        drawn = [d for d in group.differences if (d.quantity, d.first) == side]
        drawn = [one for one in drawn if one.second in styles]
        if drawn:
            title = f"{side[0].replace('_', ' ')}: {side[1]} over the others"
            chart = charts.differences(drawn, styles, f"{name}r{len(found)}")
            found.append((title, Markup(chart)))
    about = "A dot is a conversation, hovering names it; the diamond is all of them, the bar its "
    about += "95 % interval. p is of no difference, Holm's corrected for all pairs of a quantity."
    return Part(
        id="differences",
        title="Paired differences by conversation",
        about=about + _few(group, styles),
        charts=found,
        legend=bool(found),
        table=tables.pairs(group.differences),
        table_title="All pairs",
    )


def _predicted(group: Group, styles: Mapping[str, int], name: str) -> Part | None:
    drawn = charts.predicted(group, styles, f"{name}s")
    if not drawn:
        return None
    return Part(
        id="predicted",
        title="Predicted and measured speedup",
        about="A ring is what the policy that chose the tree promised, the mark what came of it.",
        charts=[("", Markup(drawn))],
        legend=True,
        narrow=True,
    )


def _trees(group: Group) -> Part:
    part = Part(id="trees", title="Token trees")
    if not group.trees:
        return replace(part, empty="No trees were kept; record.trees=8 keeps the first of a run.")
    order = {entry.name: place for place, entry in enumerate(group.entries)}
    trees = sorted(group.trees, key=lambda tree: order.get(tree.method, len(order)))
    count: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []  # a tree of each method before the second of any
    for place, tree in sorted(enumerate(trees), key=lambda one: len(one[1].tokens) == 1):
        turns.append((count[tree.method], place))  # of each, trees that are more than a root
        count[tree.method] += 1
    shown = sorted(place for _, place in sorted(turns)[:TREES])
    about = (
        "The accepted path is the first row, and ends with the token that the target adds. Under "
        "a token are its probabilities after its parent: by the draft, left and above; by the "
        "target, right and below."
    )
    if len(shown) < len(trees):
        about += f" {len(shown)} of {len(trees)} trees."
    return replace(part, about=about, pictures=[picture(trees[place]) for place in shown])

"""A comparison on the terminal."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD  # columns are many
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specdec.compare.figures import Comparison, Difference, Entry, Estimate, Group
from specdec.compare.measure import LENGTH, SPEED

WIDE = 19  # characters of a column with a method above it
LOUD = {"REPLAYED": "cyan", "LOSSY": "yellow", "SYNTHETIC": "yellow", "FAILED": "bold red"}


def show(comparison: Comparison, console: Console) -> None:
    """Print tables, differences and verdict of each group, then what is left out."""
    for group in comparison.groups:
        console.rule(Text(group.name), align="left")
        console.print(_methods(group))
        if any(entry.by_category for entry in group.entries):
            console.print(_categories(group, console.width))
        if group.chosen:
            console.print(_chosen(group))
        for sentence in group.verdict:
            console.print(Text(sentence), style="bold")
        for note in (f"times: {group.times}", *group.notes):
            console.print(Text(f"· {note}"), style="dim")
    for name, why in comparison.left_out.items():
        console.print(Text(f"left out: {name}: {why}"))


Column = tuple[str, Callable[[Entry], str]]
COLUMNS: Sequence[Column] = (
    ("speedup", lambda one: estimated(one.speedup, "x")),
    ("tok/s", lambda one: _number(one.tokens_per_second, 1)),
    ("accepted", lambda one: estimated(one.accepted_length)),
    ("expected tok/s", lambda one: _number(one.expected_speed, 1)),
    ("request", lambda one: _number(getattr(one.per_request, "value", None))),
    ("unlooped", lambda one: _number(getattr(one.unrepetitive, "value", None))),
    ("nodes", lambda one: f"{one.nodes_per_step:.1f}"),
    ("J/token", lambda one: _number(one.energy)),
    ("lossless", lambda one: ", ".join(sorted({str(r.get("verdict")) for r in one.lossless}))),
)


def _methods(group: Group) -> Table:
    """The best first, with what is known of its differences to the best."""
    table = _table(f"{group.entries[0].conversations} conversations")
    columns = [one for one in COLUMNS if _wanted(one, group.entries)]
    chances = [quantity for quantity in (SPEED, LENGTH) if _of(group, quantity)]
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for quantity in chances:
        table.add_column("p speed" if quantity == SPEED else "p length", justify="right")
    for one in group.entries:
        cells = [cell(one) for _, cell in columns]
        cells += [_chance(_of(group, quantity), one.name) for quantity in chances]
        table.add_row(_named(one), *map(Text, cells))
    return table


def _wanted(column: Column, entries: Sequence[Entry]) -> bool:
    """Whether it tells anything: accepted lengths without degenerate texts only if there are
    some."""
    title, cell = column
    if title == "unlooped":
        return any(one.repetitive for one in entries)
    return any(cell(one) for one in entries)


def _of(group: Group, quantity: str) -> list[Difference]:
    return [one for one in group.differences if one.quantity == quantity]


def _chance(own: Sequence[Difference], name: str) -> str:
    """That a method differs from the best by chance alone, after Holm."""
    for one in own:
        if one.second == name and one.equivalent:
            return "equal"
        if one.second == name:
            return _number(one.p_holm, 4)
    return "best" if any(one.first == name for one in own) else ""


def _categories(group: Group, width: int) -> Table:
    """Accepted lengths by category, a row for each, of the best methods; the best in bold."""
    count = max(2, width // WIDE - 1)
    shown = group.entries[:count]
    rest = f", of the first {count} methods" if len(group.entries) > count else ""
    table = _table(f"accepted length by category{rest}")
    for one in shown:
        table.add_column(_named(one), justify="right", overflow="fold")
    for name in shown[0].by_category:
        shares = [one.by_category[name] for one in shown]
        best = max(share.accepted_length.value for share in shares)
        cells = [
            Text(
                f"{share.accepted_length.value:.2f}",
                style="bold" if share.accepted_length.value == best else "",
            )
            for share in shares
        ]
        table.add_row(Text(f"{name or 'none'} ({shares[0].conversations})"), *cells)
    return table


def _chosen(group: Group) -> Table:
    """Settings chosen on one half of the conversations, with their figures on the other."""
    count = group.chosen[0].conversations
    half = group.entries[0].conversations - count
    table = _table(f"best setting of each drafter, chosen on {half}, reported on {count}")
    for title in ("speedup", "tok/s", "accepted"):
        table.add_column(title, justify="right")
    for one in group.chosen:
        cells = estimated(one.speedup, "x"), _number(one.tokens_per_second, 1)
        table.add_row(_named(one), *cells, estimated(one.accepted_length))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    table.add_column("", overflow="fold", min_width=12)
    return table


def _named(one: Entry) -> Text:
    if not one.mark:
        return Text(one.name)
    return Text.assemble((one.mark, LOUD[one.mark]), f" {one.name}")


def estimated(one: Estimate | None, unit: str = "") -> str:
    """A value over its interval; of few conversations over their range, with dots."""
    if one is None:
        return ""
    if one.low is not None and one.high is not None:
        return f"{one.value:.2f}{unit}\n{one.low:.2f}–{one.high:.2f}"
    if one.least is None or one.most is None:
        return f"{one.value:.2f}{unit}"
    return f"{one.value:.2f}{unit}\n{one.least:.2f} … {one.most:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"

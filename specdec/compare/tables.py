"""The tables of a report: what stands in their cells, and by what their rows are sorted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.compare.charts import reach, spoken
from specdec.compare.figures import Difference, Entry, Estimate, Group
from specdec.lab.values import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What stands in a table.

    Args:
        text: empty where nothing is known.
        key: by which its column is sorted; None: by the text.
        note: small, under it.
        title: what hovering says.
        kind: method, name, number, words, code, or verdict.
        style, mark: of a method, its colour and its LOSSY or SYNTHETIC.
        best: whether it is the best of its column.
    """

    text: str
    key: float | None = None
    note: str = ""
    title: str = ""
    kind: str = "number"
    style: int | None = None
    mark: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns by title, with the unit below it, and rows."""

    heads: list[tuple[str, str]]
    rows: list[list[Cell]]
    kinds: list[str] = field(default_factory=list)


NOTHING = Cell(text="")


def number(value: float | None, digits: int = 2, *, unit: str = "", **look: Any) -> Cell:
    if value is None:
        return NOTHING
    return Cell(text=f"{value:,.{digits}f}{unit}", key=value, **look)


def words(text: str, kind: str = "words", **look: Any) -> Cell:
    return Cell(text=text, kind=kind, **look)


def estimated(estimate: Estimate | None, unit: str = "", **look: Any) -> Cell:
    """A value, and under it its interval; of few conversations their range, with dots."""
    if estimate is None:
        return NOTHING
    low, high = reach(estimate)
    between = "–" if estimate.low is not None else " … "
    note = f"{low:.2f}{between}{high:.2f}" if low < high else ""
    options = {"note": note, "title": spoken(estimate, unit)} | look
    return number(estimate.value, unit=unit, **options)


def named(entry: Entry, styles: Mapping[str, int]) -> Cell:
    return Cell(text=entry.name, kind="method", style=styles.get(entry.name), mark=entry.mark)


Column = tuple[str, str, Callable[[Entry], Cell]]

COLUMNS: tuple[Column, ...] = (
    ("speedup", "over plain", lambda e: estimated(e.speedup, "×")),
    ("tok/s", "", lambda e: _speed(e)),
    ("expected", "tok/s by costs", lambda e: number(e.expected_speed, 1)),
    ("accepted", "tokens/step", lambda e: estimated(e.accepted_length)),
    ("request", "tokens/step", lambda e: estimated(e.per_request)),
    ("unlooped", "tokens/step", lambda e: estimated(e.unrepetitive)),
    (
        "repetitive",
        "of texts",
        lambda e: NOTHING if e.mark == "REPLAYED" else number(100 * e.repetitive, 0, unit=" %"),
    ),
    ("per pass", "tokens", lambda e: number(e.tokens_per_pass or None)),
    ("nodes", "per step", lambda e: number(e.nodes_per_step, 1)),
    ("energy", "J/token", lambda e: _energy(e)),
    ("lossless", "", lambda e: _verdict(e)),
    ("conv.", "", lambda e: number(e.conversations, 0, note=f"{e.tokens:,} tokens")),
    ("seeds", "", lambda e: Cell(text=", ".join(map(str, e.seeds)), key=float(len(e.seeds)))),
)


def _speed(entry: Entry) -> Cell:
    """With how far runs of equal seed are apart."""
    apart = "" if entry.repeats is None else f"±{entry.repeats / 2:.1%}"
    return number(entry.tokens_per_second, 1, note=apart, title=apart and "between repeats")


def _energy(entry: Entry) -> Cell:
    idle = "" if entry.idle_watts is None else f"{entry.idle_watts:.0f} W idle"
    return number(entry.energy, note=idle)


def _verdict(entry: Entry) -> Cell:
    """The verdicts of all runs, each once; the worst first."""
    worst = ("failed", "lossy", "not checked", "passed")
    found = {str(one.get("verdict", "not checked")) for one in entry.lossless}
    order = sorted(found, key=lambda one: (worst.index(one) if one in worst else -1, one))
    return Cell(text=", ".join(order), kind="verdict")


def methods(entries: Sequence[Entry], styles: Mapping[str, int]) -> Table:
    """All figures of all methods; columns of which nothing is known are left out, and that of
    texts that repeat themselves where no method has one."""
    columns = [(title, unit, list(map(cell, entries))) for title, unit, cell in COLUMNS]
    columns = [one for one in columns if any(cell.text not in ("", "0 %") for cell in one[2])]
    names = [named(entry, styles) for entry in entries]
    return _table(("method", ""), names, columns)


def categories(group: Group, styles: Mapping[str, int]) -> Table | None:
    """Accepted lengths by category; the best of each is marked."""
    names = sorted({name for entry in group.entries for name in entry.by_category})
    if not names:
        return None
    columns = []
    for name in names:
        shares = [entry.by_category.get(name) for entry in group.entries]
        most = max(share.accepted_length.value for share in shares if share is not None)
        cells = [
            NOTHING
            if share is None
            else estimated(share.accepted_length, best=share.accepted_length.value == most)
            for share in shares
        ]
        count = max(share.conversations for share in shares if share is not None)
        columns.append((name, f"{count} conv.", cells))
    return _table(("method", ""), [named(entry, styles) for entry in group.entries], columns)


def pairs(found: Iterable[Difference]) -> Table:
    """Ratios of the best to the others, and whether they could be chance."""
    rows = []
    for one in found:
        said = "equivalent within 2 %" if one.equivalent else ""
        if one.p_holm is not None and not said:
            said = "not told apart"
        if one.p_holm is not None and one.p_holm < 0.05:
            said = "different" + (", by less than 2 %" if one.equivalent else "")
        rows.append(
            [
                words(one.first, "name"),
                words(one.second, "name"),
                words(one.quantity.replace("_", " ")),
                estimated(one.ratio, "×"),
                _chance(one.p),
                _chance(one.p_holm),
                words(said),
            ]
        )
    heads = ["method", "over", "quantity", "ratio", "p", "p", "verdict"]
    units = ["", "", "", "", "", "Holm", ""]
    kinds = ["name", "name", "words", "number", "number", "number", "words"]
    return _without_empty(
        Table(heads=list(zip(heads, units, strict=True)), rows=rows, kinds=kinds)
    )


def _chance(p: float | None) -> Cell:
    if p is None:
        return NOTHING
    return Cell(text="< 0.0001" if p < 1e-4 else f"{p:.4f}", key=p)


def lossless(group: Group, styles: Mapping[str, int]) -> Table:
    """The verdict of each run."""
    rows = []
    for entry in group.entries:
        for place, one in enumerate(entry.lossless):
            folder = entry.folders[place] if place < len(entry.folders) else ""
            texts = one.get("checked"), one.get("identical"), one.get("texts")
            rows.append(
                [
                    named(entry, styles),
                    words(str(one.get("verdict", "not checked")), "verdict"),
                    words(str(one.get("reason") or "")),
                    words("" if texts[0] is None else f"{texts[1]} of {texts[0]}", "number"),
                    number(texts[2], 0),
                    number(one.get("impossible"), 0),
                    _chance(one.get("p_value")),
                    words(folder, "code"),
                ]
            )
    heads = [("method", ""), ("verdict", ""), ("why", ""), ("equal", "to plain decoding")]
    heads += [("read anew", "texts"), ("impossible", "tokens"), ("p", ""), ("run", "")]
    kinds = ["method", "verdict", "words", "number", "number", "number", "number", "code"]
    return _without_empty(Table(heads=heads, rows=rows, kinds=kinds))


def matrix(found: Mapping[str, Mapping[str, Any]], corner: str) -> Table:
    """Values by row and column name; of both sides the longer one goes down."""
    others = list(dict.fromkeys(name for row in found.values() for name in row))
    if len(others) > len(found):
        found = {
            name: {key: row[name] for key, row in found.items() if name in row} for name in others
        }
        others = list(dict.fromkeys(name for row in found.values() for name in row))

    def cell(value: Any) -> Cell:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return Cell(text=shown(value), key=float(value) if plain else None, kind="code")

    columns = [(name, "", [cell(row.get(name, "")) for row in found.values()]) for name in others]
    return _table((corner, ""), [words(row, "code") for row in found], columns)


def _table(
    head: tuple[str, str], names: list[Cell], columns: list[tuple[str, str, list[Cell]]]
) -> Table:
    """Rows from columns."""
    rows = [[name, *(column[2][place] for column in columns)] for place, name in enumerate(names)]
    kinds = [cells[0].kind for _, _, cells in columns if cells]
    kinds = [names[0].kind if names else "name", *kinds]
    return Table(
        heads=[head, *((title, unit) for title, unit, _ in columns)], rows=rows, kinds=kinds
    )


def _without_empty(table: Table) -> Table:
    """Without columns in which nothing stands."""
    kept = [i for i in range(len(table.heads)) if any(row[i].text for row in table.rows)]
    return Table(
        heads=[table.heads[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
        kinds=[table.kinds[i] for i in kept],
    )

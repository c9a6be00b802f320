"""Charts: what they draw stands where its number belongs."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from specdec.compare import charts
from specdec.compare.canvas import page_style
from tests.compare import made


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with page_style():
        yield


def markers(text: str) -> list[tuple[float, float, str]]:
    """x, y and title of all that hovering names."""
    uses = ElementTree.fromstring(text).iter("use")
    titled = [(use, use.findtext("title")) for use in uses]
    return [(float(u.attrib["x"]), float(u.attrib["y"]), t) for u, t in titled if t is not None]


def linear(points: list[tuple[float, float]]) -> bool:
    """Whether one rises evenly with the other, as far as titles are exact."""
    (a, low), *_, (b, high) = sorted(points)
    assert high - low > 100
    return all(
        abs(low + (x - a) / (b - a) * (high - low) - pixel) < 1 + 0.02 * (high - low)
        for x, pixel in points
    )


def test_conversations_stand_at_the_logarithm_of_their_ratio() -> None:
    group = made.small()
    found = [one for one in group.differences if one.quantity == "accepted_length"]
    (styles,) = charts.styles_of([group])
    drawn = markers(charts.differences(found, styles, "x"))
    titles = {title.rpartition(": ")[0] for _, _, title in drawn}
    assert titles == {"all", *(name for one in found for name in one.by_conversation)}
    values = [(math.log(float(t.split(": ")[1].split()[0])), x) for x, _, t in drawn]
    assert len(values) == sum(len(one.by_conversation) + 1 for one in found)
    assert linear(values)


def test_methods_stand_at_their_nodes_and_length() -> None:
    group = made.small()
    (styles,) = charts.styles_of([group])
    text = charts.pareto(group, styles, "x")
    drawn = markers(text)
    assert len(drawn) == 3
    by_name = {title.split(":")[0]: (x, y) for x, y, title in drawn}
    of = {entry.name: entry for entry in group.entries}
    assert linear([(of[name].nodes_per_step, x) for name, (x, _) in by_name.items()])
    (dashed,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-dasharray', text)
    corners = {(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", dashed)}
    assert {by_name[entry.name] for entry in charts.frontier(group.entries)} <= corners
    heights = sorted(by_name, key=lambda name: -by_name[name][1])
    assert heights == sorted(of, key=lambda name: of[name].accepted_length.value)


def test_categories_are_sorted_by_what_the_best_method_accepts() -> None:
    group = made.small()
    (styles,) = charts.styles_of([group])
    text = charts.by_category(group, styles, "x")
    lengths = [one for one in markers(text) if one[0] < 520]  # the left panel
    assert len(lengths) == 3 * len(made.CATEGORIES)
    best: dict[str, float] = {}
    rows: dict[str, float] = {}
    for _, y, title in lengths:
        category = title.split(" · ")[0]
        best[category] = max(best.get(category, 0), float(title.split(": ")[1].split()[0]))
        rows[category] = max(rows.get(category, 0), y)
    order = sorted(rows, key=lambda name: rows[name])
    assert all(best[above] >= best[below] for above, below in pairwise(order))


def test_bars_are_as_long_as_their_times() -> None:
    group = made.small()
    text, verbs = charts.anatomy(group, "x")
    assert verbs == ["prefill", "draft", "verify", "accept", "commit", "other"]
    lengths: list[float] = []
    for path in ElementTree.fromstring(text).iter("path"):
        if "var(--v2)" in path.get("style", ""):  # verify
            xs = [float(x) for x in re.findall(r"[ML] (\S+)", path.attrib["d"])]
            lengths.append(max(xs) - min(xs))
    totals = [sum((entry.anatomy or {}).values()) for entry in group.entries]
    assert all(f">{total:.1f}<" in text for total in totals)
    assert len(lengths) == 3
    assert max(lengths) - min(lengths) < 0.5  # all verify equally long


def test_the_frontier_is_of_those_that_none_beats() -> None:
    names = [f"{drafter} {shape}" for drafter in made.DRAFTERS for shape in made.TREES]
    entries = [made.entry(name) for name in names]
    entries.append(replace(entries[0], name="as good"))
    unbeaten = {
        (e.nodes_per_step, e.accepted_length.value)
        for e in entries
        if not any(
            o.nodes_per_step <= e.nodes_per_step
            and o.accepted_length.value >= e.accepted_length.value
            and (o.nodes_per_step, o.accepted_length.value)
            != (e.nodes_per_step, e.accepted_length.value)
            for o in entries
        )
    }
    found = charts.frontier(entries)
    assert {(e.nodes_per_step, e.accepted_length.value) for e in found} == unbeaten
    assert len(found) == len(unbeaten)


def test_eight_methods_have_a_style_and_keep_it_in_all_groups() -> None:
    names = [f"ngram {i}" for i in range(12)]
    entries = [made.entry(name) for name in names]
    first = replace(made.small(), entries=entries)
    second = replace(first, entries=[entries[11], *entries[3:11]])
    one, two = charts.styles_of([first, second])
    assert sorted(one.values()) == sorted(two.values()) == list(range(8))
    assert list(one) == names[:8]
    assert all(two[name] == one[name] for name in names[3:8])


def test_a_method_can_be_hidden_wherever_it_is_drawn() -> None:
    group = made.small()
    (styles,) = charts.styles_of([group])
    drawn = [
        charts.by_category(group, styles, "a"),
        charts.by_depth(group, styles, "b"),
        charts.pareto(group, styles, "c"),
        charts.differences(group.differences[:2], styles, "d"),
    ]
    for text in drawn:
        found = set(re.findall(r'class="method-(\d)"', text))
        expected = {0, 1, 2} if "differences" not in text else {1, 2}
        assert found == set(map(str, expected))
        assert not re.search("#000[123][0-9a-f]{2}", text)  # all colours are the page's

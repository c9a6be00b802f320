"""Tables of a report: what their cells say and by what they are sorted."""

from dataclasses import replace

from specdec.compare import tables
from specdec.compare.figures import Estimate
from specdec.lab.values import flat
from tests.compare import made


def column(table: tables.Table, title: str) -> list[tables.Cell]:
    place = [head for head, _ in table.heads].index(title)
    return [row[place] for row in table.rows]


def test_an_interval_is_told_from_a_range() -> None:
    sure = tables.estimated(Estimate(value=2.0, low=1.5, high=2.5))
    few = tables.estimated(Estimate(value=2.0, least=1.5, most=2.5), "×")
    single = tables.estimated(Estimate(value=2.0, least=2.0, most=2.0))
    assert (sure.text, sure.note, sure.key) == ("2.00", "1.50–2.50", 2.0)
    assert (few.text, few.note) == ("2.00×", "1.50 … 2.50")
    assert single.note == ""


def test_every_method_has_its_figures_and_columns_without_any_are_left_out() -> None:
    entries = made.small().entries
    whole = tables.methods(entries, {})
    assert [cell.key for cell in column(whole, "nodes")] == [e.nodes_per_step for e in entries]
    assert [cell.key for cell in column(whole, "energy")] == [e.energy for e in entries]
    assert column(whole, "energy")[0].note == "68 W idle"
    assert {len(row) for row in whole.rows} == {len(whole.heads)} == {len(whole.kinds)}
    one = [replace(entries[0], energy=None), *entries[1:]]
    assert column(tables.methods(one, {}), "energy")[0].text == ""
    none = [replace(entry, energy=None) for entry in entries]
    assert "energy" not in dict(tables.methods(none, {}).heads)
    one = [replace(entries[0], repetitive=0.0), replace(entries[1], mark="REPLAYED"), *entries[2:]]
    assert [c.text for c in column(tables.methods(one, {}), "repetitive")[:2]] == ["0 %", ""]
    none = [replace(entry, repetitive=0.0) for entry in entries]
    assert "repetitive" not in dict(tables.methods(none, {}).heads)


def test_the_worst_verdict_of_several_runs_is_the_first() -> None:
    verdicts = [{"verdict": one, "reason": ""} for one in ("passed", "failed", "passed")]
    entry = replace(made.entry("ngram"), lossless=verdicts, folders=["a", "b", "c"])
    assert column(tables.methods([entry], {}), "lossless")[0].text == "failed, passed"
    each = tables.lossless(made.small(entries=[entry]), {})
    assert [cell.text for cell in column(each, "run")] == ["a", "b", "c"]


def test_the_best_of_each_category_is_marked() -> None:
    group = made.small()
    table = tables.categories(group, {})
    assert table is not None
    for name in made.CATEGORIES:
        lengths = [entry.by_category[name].accepted_length.value for entry in group.entries]
        best = [length == max(lengths) for length in lengths]
        assert [cell.best for cell in column(table, name)] == best


def test_of_runs_and_settings_the_more_go_down() -> None:
    runs = {"a": 1, "b": 2, "c": True, "d": None}
    table = tables.matrix({"x": runs, "y": {"b": "text"}}, "run")
    assert [title for title, _ in table.heads] == ["run", "x", "y"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["a", "1", ""],
        ["b", "2", "text"],
        ["c", "true", ""],
        ["d", "null", ""],
    ]
    assert [row[1].key for row in table.rows] == [1.0, 2.0, None, None]
    turned = tables.matrix({"x": {"a": 1}, "y": {"b": 2}, "z": {}}, "setting")
    assert [row[0].text for row in turned.rows] == ["x", "y", "z"]


def test_pairs_say_whether_they_differ() -> None:
    (one, *_) = made.small().differences
    cases = {(0.01, False): "different", (0.5, True): "equivalent within 2 %"}
    cases |= {(0.01, True): "different, by less than 2 %", (None, False): ""}
    cases[0.5, False] = "not told apart"
    found = [replace(one, p_holm=p, equivalent=same) for p, same in cases]
    table = tables.pairs(found)
    assert [row[-1].text for row in table.rows] == list(cases.values())
    assert tables.pairs([replace(one, p=3e-9)]).rows[0][4].text == "< 0.0001"
    few = tables.pairs([replace(one, p=None, p_holm=None, equivalent=False)])
    assert [title for title, _ in few.heads] == ["method", "over", "quantity", "ratio"]


def test_nested_values_have_dotted_names() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": None}, "e": 2}) == {
        "a.b.c": 1,
        "a.d": None,
        "e": 2,
    }

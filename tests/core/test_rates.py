"""Measured rates, and the tables that come with the package."""

import json
from pathlib import Path

import pytest

from specdec.costs import CostTable
from specdec.drafters.trees.cost_aware import CostAware
from specdec.drafters.trees.optimal import Optimal
from specdec.rates import AcceptanceRates
from specdec.tables import DATA
from tests.drafters.trees.measured import case, cases_file, rates_of


@pytest.mark.parametrize(
    ("children", "temperature", "first"),
    [
        ("top_k", 0, 0.1),
        ("top_k", 0.01, 0.2),
        ("top_k", 0.7, 0.3),
        ("top_k", 0.6, 0.2),
        ("top_k", 9.0, 0.4),
        ("sample", 1.0, 0.6),
        ("sample", 0.75, 0.6),
    ],
)
def test_the_nearest_case_counts(
    tmp_path: Path, children: str, temperature: float, first: float
) -> None:
    path = cases_file(
        tmp_path,
        case("top_k", 0.0, 0.1, top_p=None),
        case("top_k", 0.5, 0.2),
        case("top_k", 0.8, 0.3, top_p=0.9),
        case("top_k", 1.0, 0.4, top_p=None),
        case("sample", 1.0, 0.5, top_p=0.9),
        case("sample", 1.0, 0.6, top_p=None),
        case("sample", 1.0, 0.7, top_p=None),
        case("sample", 0.5, 0.8, top_p=0.9),
    )
    rates = AcceptanceRates.load(path, children=children, temperature=temperature)
    assert rates.values.tolist() == [[first, 0.1]]


def test_beyond_what_was_measured() -> None:
    rates = rates_of([0.5, 0.2], [0.4, 0.1])
    assert [rates.row(depth).tolist() for depth in (0, 1, 7)] == [
        [0.5, 0.2],
        [0.4, 0.1],
        [0.4, 0.1],
    ]
    assert [rates.at(3, rank) for rank in (0, 1, 2)] == [0.4, 0.1, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (
            "{}",
            "is no such table, it has no 'cases'; "
            "python -m specdec.experiments.tools.measure_acceptance",
        ),
        ('{"cases": 3}', "not iterable"),
        (
            '{"cases": []}',
            r"at temperature 0 \(nothing\); choose other children or another table, or",
        ),
        (
            json.dumps({"cases": [case("sample", 0.0, 0.1), case("top_k", 1.0, 0.1)]}),
            r"holds no rates of children=top_k at temperature 0 \(sample at 0, top_k at 1\)",
        ),
        ('{"cases": [{"children": "top_k", "temperature": 0}]}', "it has no 'rates'"),
        *(
            (json.dumps({"cases": [case("top_k", 0, 0.1) | {"rates": rates}]}), message)
            for rates, message in [
                ([], "rates must be lists of numbers"),
                ([[]], "rates must be lists of numbers"),
                ([0.5], "rates must be lists of numbers"),
                ([[0.5], [0.5, 0.1]], "rates must be lists of numbers"),
                ([["0.5"]], "rates must be lists of numbers"),
                ([[0.5, None]], "rates must be lists of numbers"),
                ([[0.5], [1.5]], "rates at depth 1: each must be from 0 to 1"),
                ([[-0.1]], "rates at depth 0: each must be from 0 to 1"),
                ([[float("nan")]], "rates at depth 0: each must be from 0 to 1"),
                ([[0.5, 0.6]], "rates at depth 0: siblings .* sum to 1 at most, not 1.1"),
            ]
        ),
    ],
)
def test_what_is_wrong_with_rates_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        AcceptanceRates.load(path, children="top_k", temperature=0.0)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match=message) as error:
        Optimal(rates=str(path), budget=3)
    assert str(error.value).startswith(f"tree.rates={path}: ")
    assert "\n" not in str(error.value)


def test_rounding_may_exceed_a_sum_of_one() -> None:
    assert rates_of([0.5, 0.5 + 5e-7]).values.shape == (1, 2)


@pytest.mark.parametrize("name", [path.stem for path in (DATA / "costs").glob("*.json")])
def test_packaged_costs(name: str) -> None:
    table = CostTable.load(name)
    assert table.verify(1, table.most_nodes, 512) > 0
    assert table.draft(1, table.most_width, 128) > 0
    path = DATA / f"costs/{name}.json"
    assert CostTable.load(path).verify(2, 5, 300) == table.verify(2, 5, 300)


@pytest.mark.parametrize(
    ("children", "temperature"),
    [("top_k", 0.0), ("top_k", 1.0), ("sample", 1.0), ("sample_with_replacement", 1.0)],
)
def test_packaged_rates(children: str, temperature: float) -> None:
    """Of the zoo: by name and by path they are the same, and the likeliest child is the first."""
    found, same = (
        AcceptanceRates.load(path, children=children, temperature=temperature)
        for path in ("zoo", DATA / "acceptance/zoo.json")
    )
    assert (found.values == same.values).all()
    assert (found.values.argmax(axis=1) == 0).all()


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"^h100: no such table; known are cpu, .*, a file is"):
        CostTable.load("h100")
    with pytest.raises(
        ValueError, match=r"^tree.rates=mine: no such table; known are .*zoo.*, a f"
    ):
        Optimal(rates="mine", budget=3)
    with pytest.raises(ValueError, match=r"^tree.rates=./zoo: no such file; python -m specdec"):
        Optimal(rates="./zoo", budget=3)
    with pytest.raises(ValueError, match=r"^tree.costs=zoo.json: no such file; python -m specdec"):
        CostAware(rates="zoo", costs="zoo.json", budget=3)

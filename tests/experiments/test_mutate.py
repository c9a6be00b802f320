"""Faults are planted one at a time, and survivors named."""

import ast
import json
from pathlib import Path

import pytest

from specdec.experiments.tools.mutants import mutants_of, replacements
from specdec.experiments.tools.mutate import main

CODE = '''
"""Numbers."""

import os
from functools import cached_property, wraps

LEAST = int(os.environ["SHELF"])


def twice(call):
    @wraps(call)
    def called(*given):
        return call(*given) * 2

    return called


class Shelf:
    def __init__(self, most):
        self.most = most

    @cached_property
    def full(self):
        return self.most > 3

    @twice
    def room(self, used):
        return max(self.most - used, LEAST)

    def close(self):
        """Nothing is to be done."""


def untested(a):
    return a


def halvings(n):
    count = 0
    while n > 1:
        n //= 2
        count += 1
    return count
'''
TESTS = """
import pytest
from shelf import Shelf, halvings

@pytest.fixture(scope="module")
def shelf():
    return Shelf(5)

def test_room(shelf):
    assert shelf.room(2) == 6
    assert shelf.room(7) == 0

def test_full(shelf):
    assert shelf.full

def test_halvings():
    assert [halvings(n) for n in range(6)] == [0, 0, 1, 1, 2, 2]

def test_that_fails():
    assert not Shelf(5).full
"""
CONFTEST = """
import gc
import os

os.environ["SHELF"] = "0"

def pytest_collection_finish():
    gc.freeze()  # which hides functions from who looks for them

def pytest_runtest_setup(item):
    with open("ran", "a") as file:
        print(item.name, file=file)
"""


@pytest.mark.slow
def test_survivors_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shelf.py").write_text(CODE)
    (tmp_path / "test_shelf.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    monkeypatch.setenv("SHELF", "7")  # until the tests' own conftest says otherwise
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ("shelf.py", "tests=test_shelf.py", "equivalent=same.json", "workers=2")
    assert main(words) == 0
    printed, _ = capfd.readouterr()
    found = json.loads((tmp_path / "mutants.json").read_text())["mutants"]
    alive = {name for name, one in found.items() if not one["dead"]}
    at_three = "shelf.py Shelf.full: `return self.most > 3` "
    assert alive == {
        *(f"{at_three}{change}" for change in ("self.most > 3 -> self.most >= 3", "3 -> 4")),
        f"{at_three}3 -> 2",
        "shelf.py untested: `return a` returns at once",
        "shelf.py untested: `return a` return a -> return None",
        "shelf.py twice: `def called(*given):` returns at once",  # it ran at import
        "shelf.py twice: `return called` return called -> return None",
    }
    assert all(f": {name}" in printed for name in alive)
    assert "left out, since they fail without a fault: test_shelf.py::test_that_fails" in printed
    by = {one.get("by") for one in found.values()}
    assert {"test_shelf.py::test_room", "test_shelf.py::test_full", "too slow"} <= by
    dead = len(found) - len(alive)
    assert f"{dead} of {len(found)} faults found" in printed

    survivor = "shelf.py untested: `return a` returns at once"
    (tmp_path / "same.json").write_text(json.dumps(dict.fromkeys(alive - {survivor}, "why")))
    ran = tmp_path / "ran"
    ran.unlink()
    assert main((*words, "resume=true")) == 0
    assert not ran.exists()  # all is known of the tests, and none executes the fault that is left
    printed, _ = capfd.readouterr()
    assert f"{dead} of {dead + 1} faults found" in printed
    (tmp_path / "test_shelf.py").write_text(TESTS + "# other than it was\n")
    assert main((*words, "resume=true")) == 0
    assert len(ran.read_text().split()) == 4
    (tmp_path / "sizes").mkdir()
    (tmp_path / "shelves").mkdir()
    (tmp_path / "shelves/sizes").symlink_to("../sizes")
    for file, text in (("shelves/__init__.py", ""), ("sizes/most.yaml", "5")):
        (tmp_path / file).write_text(text)  # which any test may read
        ran.unlink()
        assert main((*words, "resume=true")) == 0
        assert len(ran.read_text().split()) == 4
    (tmp_path / "same.json").write_text(json.dumps(dict.fromkeys(alive, "why")))
    assert main((*words, "resume=true")) == 0
    printed, _ = capfd.readouterr()
    assert f"{dead} of {dead} faults found, 100.0%" in printed
    assert main(("nothing.py",)) == 2


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("a < b <= c", {"a <= b <= c", "a >= b <= c", "a < b < c", "a < b > c"}),
        ("a and not b", {"a or not b", "b"}),
        ("a + 1 - b", {"a - 1", "a + 1 + b", "0", "2"}),
        ("x[-1]", {"-2", "0"}),
        ("min(a, b)", {"max"}),
        ("f(a, b, c=True)", {"f(b, a, c=True)", "False"}),
        ("zip(a, *b, strict=True)", set()),
        ("a if b else c", {"a if not b else c"}),
    ],
)
def test_what_may_stand_instead(tmp_path: Path, code: str, changes: set[str]) -> None:
    found = {
        ast.unparse(ast.fix_missing_locations(new))
        for node in ast.walk(ast.parse(code, mode="eval"))
        for new in replacements(node)
    }
    (tmp_path / "one.py").write_text(f"def f(x):\n    return {code}\n")
    planted = {mutant.name for mutant in mutants_of(tmp_path / "one.py", "one")}
    for change in changes:
        assert change in found
        assert any(name.endswith(f"-> {change}") for name in planted)
    assert len(planted) == len(changes) + 2  # the return, and a return at once

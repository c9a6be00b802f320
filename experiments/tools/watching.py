"""Which tests execute which lines of some files, for `mutate`, and which of them have found faults
before: what is kept from one run to the next."""

import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.experiments.tools.mutants import SEEN, Living, watched
from specdec.lab.files import read_object, replace_file, writing

NEARER = 20  # how much more a fault found in the same function counts than one elsewhere


@dataclass(slots=True)
class Watched:
    """What a test does without faults.

    Args:
        seconds: what it takes.
        lines: where statements of the files begin that it executes, by file.
    """

    seconds: float
    lines: dict[str, set[int]]


class Memory:
    """What is known of tests, in a JSON file.

    Tests are watched anew once their own file has changed, the files that faults are planted in
    are others, or anything in a folder here that holds Python is other than it was, what is read
    as data too, but for other files of tests.

    Args:
        path: of the JSON file.
        files: where faults are planted.
    """

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        self.path, self.files = path, sorted(files)
        known = (read_object(path) if path.exists() else None) or {}
        self._tests: dict[str, Any] = known.get("tests", {})  # by their file: state, and the rest
        self._kills: dict[str, dict[str, int]] = known.get("kills", {})  # by function, of tests
        self._common = hashlib.sha256(" ".join(self.files).encode())
        for file in _own_files():
            if not file.match("test_*.py") and file.resolve() != path.resolve():
                self._common.update(f"{file}\0{file.stat().st_size}\0".encode())
                self._common.update(file.read_bytes())

    def unknown(self, items: Sequence[Any]) -> list[Any]:
        """Those of these tests that have not been watched as they are now."""
        known = {
            file: self._tests[file]["tests"]
            for file in {file_of(item.nodeid) for item in items}
            if self._tests.get(file, {}).get("state") == self._state(file)
        }
        return [item for item in items if item.nodeid not in known.get(file_of(item.nodeid), {})]

    def add(self, found: Mapping[str, Any]) -> None:
        """What `watch` has returned."""
        for name, one in found.items():
            file, state = file_of(name), self._state(file_of(name))
            if self._tests.get(file, {}).get("state") != state:
                self._tests[file] = {"state": state, "tests": {}}
            self._tests[file]["tests"][name] = one
        self.save()

    def of(self, items: Sequence[Any]) -> dict[str, Watched | None]:
        """By their names; None is a test that fails without a fault."""
        found = {item.nodeid: self._tests[file_of(item.nodeid)]["tests"] for item in items}
        return {
            name: Watched(seconds, {file: set(lines[file]) for file in lines}) if passes else None
            for name, known in found.items()
            for seconds, passes, lines in (known[name],)
        }

    def killed(self, function: str, test: str) -> None:
        of = self._kills.setdefault(function, {})
        of[test] = of.get(test, 0) + 1

    def kills(self, function: str) -> Counter[str]:
        """Faults that tests have found, those in this function counted `NEARER` times."""
        all_of_them: Counter[str] = Counter()
        for where, found in self._kills.items():
            for test, count in found.items():
                all_of_them[test] += count * (NEARER if where == function else 1)
        return all_of_them

    def save(self) -> None:
        text = json.dumps({"tests": self._tests, "kills": self._kills})
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, text)

    def _state(self, file: str) -> str:
        state = self._common.copy()
        state.update(Path(file).read_bytes())
        return state.hexdigest()


def _own_files() -> Iterator[Path]:
    """What lies in the folders here that hold Python, and where links in them lead."""
    for top in sorted(Path().iterdir()):
        if top.name.startswith(".") or not next(top.rglob("*.py"), None):
            continue
        for folder, folders, files in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            yield from (Path(folder, name) for name in sorted(files))


def file_of(test: str) -> str:
    """Where a test stands, by its name."""
    return test.partition("::")[0]


def watch(
    items: Sequence[Any], modules: Mapping[str, str], living: Living, failed: Sequence[str]
) -> dict[str, tuple[float, bool, dict[str, list[int]]]]:
    """Run tests of pytest: seconds, whether it passed, and lines by file, of each by its name.
    What a fixture executes may serve later tests of its file as well, and counts for all of them.

    Args:
        modules: their files, by name.
        failed: where a plugin adds the names of tests that fail.
    """
    lines: set[tuple[str, int]] = set()
    for module, file in modules.items():
        setattr(sys.modules[module], SEEN, lambda *line: lines.add(line))
        living.plant(module, watched(Path(file)))
    tests: dict[str, tuple[float, set[tuple[str, int]]]] = {}
    shared: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)

    class Setups:
        @staticmethod
        def pytest_runtest_call(item: Any) -> None:
            shared[file_of(item.nodeid)] |= lines

    if items:
        items[0].config.pluginmanager.register(Setups())
    for item, following in zip(items, [*items[1:], None], strict=True):
        start = time.perf_counter()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        tests[item.nodeid] = time.perf_counter() - start, set(lines)
        lines.clear()
    found = {}
    for name, (seconds, own) in tests.items():
        by_file: defaultdict[str, list[int]] = defaultdict(list)
        for file, line in sorted(own | shared[file_of(name)]):
            by_file[file].append(line)
        found[name] = seconds, name not in failed, dict(by_file)
    return found

"""Plant small faults in files and see whether the tests notice.

    python -m specdec.experiments.tools.mutate specdec/cache.py specdec/decode.py tests=tests/core
    python -m specdec.experiments.tools.mutate drafters/compose.py "tests=[tests/core,tests/lab]"

Run from the root of the repository. A fault is one of `mutants.py`: a comparison turned round, a
number off by one, a statement left out, and so on. Of all that the files allow, `count` are chosen
by `seed`. First all of `tests` run once, and it is noted which of them execute which lines; `kept`
keeps that for the next time. Then each fault is tried with those that execute its own, first the
quickest and those that found others, up to `limit` seconds of them, until one fails. A fault that
outlives them, or that none executes, is a survivor, and a hole in the tests, unless `equivalent`
lists it with the reason why it changes nothing that matters.

One process imports everything and forks for each fault, in which the code of living functions is
replaced. So a fault costs its tests alone, but what ran at import, defaults and constants of
modules, and what tests start as processes of their own is out of reach. mutmut forks likewise, but
leaves functions with decorators out; cosmic-ray and mutatest start a process for each fault.
"""

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from specdec.experiments.tools.mutants import Living, Mutant, mutants_of
from specdec.experiments.tools.watching import Memory, Watched, file_of, watch
from specdec.lab.command import Positive, begin, option, run_main, write

MEMORY = 16 << 30  # bytes that a process with a fault may have: some never stop asking for more
UNTOUCHED = "no test executes it"
SURVIVED, KILLED = 0, 1  # exit codes of such a process


@dataclass(frozen=True, kw_only=True)
class Options:
    files: tuple[Path, ...] = option(about="files to plant faults in", free=True)
    tests: tuple[Path, ...] = option((Path("tests"),), "files or folders of tests")
    count: Positive = option(200, "faults, over all files")
    seed: int = option(0, "which of them")
    limit: Positive = option(60, "seconds of tests for a fault")
    workers: Positive = option(1, "faults tried at a time")
    equivalent: Path = option(Path("tests/equivalent.json"), "faults that change nothing, and why")
    kept: Path = option(Path("build/mutants.json"), "what is known of the tests, for later runs")
    out: Path = option(Path("mutants.json"), "result file")
    resume: bool = option(False, "keep the dead that it holds, and try survivors again")


class Plan:
    """A plugin of pytest that, instead of running the tests once, runs them as said above."""

    def __init__(
        self,
        options: Options,
        modules: Mapping[str, str],
        mutants: Sequence[Mutant],
        report: Any,
    ) -> None:
        self.options, self.modules, self.mutants = options, modules, mutants
        self.report = report
        self.failed: list[str] = []  # of this process
        self.folder = Path(tempfile.mkdtemp(prefix="mutants"))
        self.living: Living
        self.memory: Memory
        self.fault: ValueError | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: Any) -> bool:
        try:
            self._work(session)
        except ValueError as error:
            self.fault = error
        return True

    def _work(self, session: Any) -> None:
        if session.testsfailed:
            raise ValueError(f"tests={_words(self.options.tests)}: cannot be collected; see above")
        # Not before the tests are collected: what they set up for imports counts here as well.
        for module, file in self.modules.items():
            _import(module, file)
        self.living = Living(self.modules)
        self.memory = Memory(self.options.kept, self.modules.values())
        tests = self._watch(session)
        items = {item.nodeid: item for item in session.items if item.nodeid in tests}
        running: dict[int, tuple[Mutant, float, Path]] = {}
        for mutant in self.mutants:
            chosen = self._chosen(mutant, tests)
            if not chosen:
                self.report(mutant, False, UNTOUCHED)
                continue
            while len(running) >= self.options.workers:
                self._wait(running)
            seconds = sum(tests[name].seconds for name in chosen)
            own = [items[name] for name in chosen]
            work = partial(self._try, own, mutant, 2 + int(3 * seconds))
            pid, folder = self._fork(session, work)
            running[pid] = mutant, time.monotonic() + 60 + 10 * seconds, folder
        while running:
            self._wait(running)
        self.memory.save()

    def _watch(self, session: Any) -> dict[str, Watched]:
        """Every test that passes, by its name."""
        unknown: defaultdict[str, list[Any]] = defaultdict(list)
        for item in self.memory.unknown(session.items):
            unknown[file_of(item.nodeid)].append(item)
        parts: list[list[Any]] = [[] for _ in range(self.options.workers)]
        for own in sorted(unknown.values(), key=len, reverse=True):
            min(parts, key=len).extend(own)
        forks = [self._fork(session, partial(self._record, part)) for part in parts if part]
        for pid, folder in forks:
            os.waitpid(pid, 0)
            try:
                self.memory.add(json.loads((folder / "watched").read_text()))
            except OSError:
                raise ValueError(
                    f"tests={_words(self.options.tests)}: their process died"
                ) from None
        found = self.memory.of(session.items)
        failed = sorted(name for name, one in found.items() if one is None)
        if failed:
            print(f"left out, since they fail without a fault: {', '.join(failed)}")
        tests = {name: one for name, one in found.items() if one is not None}
        total = sum(test.seconds for test in tests.values())
        print(f"{len(tests)} tests, {total:.0f} s; {len(self.mutants)} faults", flush=True)
        return tests

    def _record(self, items: Sequence[Any], folder: Path) -> int:
        found = watch(items, self.modules, self.living, self.failed)
        (folder / "watched").write_text(json.dumps(found))
        return SURVIVED

    def _chosen(self, mutant: Mutant, tests: dict[str, Watched]) -> list[str]:
        """Names of the tests to try: of each file the quickest, weighed by what it has found, then
        the others file by file, whose fixtures are then made once."""
        kills = self.memory.kills(mutant.function)
        touching = [
            n for n, test in tests.items() if mutant.line in test.lines.get(mutant.file, ())
        ]
        touching.sort(key=lambda name: tests[name].seconds / (1 + kills[name]))
        first: dict[str, str] = {}  # of each file, in that order
        for name in touching:
            first.setdefault(file_of(name), name)
        order = [*first.values()]
        for file, begun in first.items():
            order += [name for name in touching if file_of(name) == file and name != begun]
        left = float(self.options.limit)
        chosen: list[str] = []
        for name in order:
            if tests[name].seconds <= left or not chosen:
                left -= tests[name].seconds
                chosen.append(name)
        return chosen

    def _try(self, items: Sequence[Any], mutant: Mutant, seconds: int, folder: Path) -> int:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        self.living.plant(mutant.module, mutant.codes)
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                (folder / "killer").write_text(self.failed[0])
                return KILLED
        return SURVIVED

    def _fork(self, session: Any, work: Callable[[Path], int]) -> tuple[int, Path]:
        """Start a process that does the work, in silence; it is given a folder to write to."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid, folder
        code = KILLED
        try:
            os.setpgid(0, 0)  # with whatever it starts
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
            plugins = session.config.pluginmanager
            plugins.unregister(plugins.getplugin("terminalreporter"))
            code = work(folder)
        finally:
            os._exit(code)
        raise AssertionError

    def _wait(self, running: dict[int, tuple[Mutant, float, Path]]) -> None:
        """Until one of the processes has ended; what takes too long is killed, and its fault is
        found."""
        while True:
            for pid, (mutant, deadline, folder) in running.items():
                done, status = os.waitpid(pid, os.WNOHANG)
                late = time.monotonic() > deadline
                if not done and not late:
                    continue
                if not done:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                killer = (folder / "killer").read_text() if (folder / "killer").exists() else ""
                if killer:
                    self.memory.killed(mutant.function, killer)
                code = os.waitstatus_to_exitcode(status)
                late |= code in (-signal.SIGXCPU, -signal.SIGKILL)
                dead = late or code != SURVIVED
                self.report(mutant, dead, killer or ("too slow" if late else "crash"))
                del running[pid]
                return
            time.sleep(0.01)


def work(options: Options) -> None:
    result = begin(options, torch.device("cpu"))
    excepted = _excepted(options.equivalent)
    modules = {_module_of(file): str(file) for file in options.files}
    found = [one for name, file in modules.items() for one in mutants_of(Path(file), name)]
    found.sort(key=lambda mutant: mutant.rank(options.seed))
    chosen = [mutant for mutant in found if mutant.name not in excepted][: options.count]
    before = result.get("mutants", {}) if options.resume else {}
    names = {mutant.name for mutant in chosen}
    mutants = {name: one for name, one in before.items() if one["dead"] and name in names}

    def report(mutant: Mutant, dead: bool, by: str) -> None:
        mutants[mutant.name] = {"dead": dead, **({"by": by} if dead else {})}
        if not dead:
            why = f" ({by})" if by == UNTOUCHED else ""
            print(f"survived: line {mutant.line}: {mutant.name}{why}", flush=True)
        write(options.out, {**result, "mutants": mutants})

    left = [mutant for mutant in chosen if mutant.name not in mutants]
    if left:
        _run(options, Plan(options, modules, left, report))
    dead = sum(one["dead"] for one in mutants.values())
    print(f"{dead} of {len(mutants)} faults found, {dead / max(1, len(mutants)):.1%}")


def _run(options: Options, plan: Plan) -> None:
    import pytest
    from hypothesis import settings

    settings.register_profile("mutate", database=None, deadline=None, derandomize=True)
    settings.load_profile("mutate")
    off = [f"-pno:{plugin}" for plugin in ("cacheprovider", "xdist", "faulthandler")]
    pytest.main(["-q", "-Wignore", *off, *map(str, options.tests)], plugins=[plan])
    if plan.fault:
        raise plan.fault


def _module_of(file: Path) -> str:
    """What a file is imported as."""
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"files={file}: is no file of Python; name one below the current folder")
    parts = file.with_suffix("").parts
    if Path("specdec", file).exists():  # by the link it is imported through
        parts = ("specdec", *parts)
    return ".".join(parts)


def _import(module: str, file: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"files={file}: cannot be imported ({error})") from None


def _excepted(path: Path) -> dict[str, str]:
    """Reasons by names of faults; none without a file."""
    return json.loads(path.read_text()) if path.exists() else {}


def _words(paths: Sequence[Path]) -> str:
    return ",".join(map(str, paths))


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())

"""A run is shown from its folder as it was shown while it ran."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specdec.lab.running import run
from specdec.lab.settings import settings_of
from specdec.lab.tracking import NoTracker, TrackedRun
from specdec.sync import main, sync
from tests.running import QUICK, lines

SPY = ("tracker=none", f"tracker._target_={__name__}.Spy", "+tracker.project=ours")
WORDS = ("drafter=ngram", "tree.budget=4", "baseline=false", *QUICK[1:], *SPY)


class Spy(NoTracker):
    """Notes all it is told in a file of the folder."""

    def __init__(self, *, project: str) -> None:
        self.told: list[Any] = [project]

    def start(self, run: TrackedRun) -> None:
        self.run = run
        self.told.append({**vars(run), "folder": None})

    def step(self, step: Any) -> None:
        self.told.append(vars_of(step))

    def finish(self, summary: Any, generations: Any) -> str | None:
        self.told += [summary, [vars_of(one) for one in generations]]
        (self.run.folder / "told.json").write_text(json.dumps(self.told, default=str))
        return f"see {self.run.folder.name}"

    def compare(self, run: TrackedRun, tables: Any, files: Any) -> str | None:
        columns, rows = tables["methods"]
        place = list(columns).index("accepted_length")
        return f"{run.name}: {[row[place] for row in rows]}, {[file.name for file in files]}"


def vars_of(value: Any) -> Any:
    found = value if isinstance(value, dict) else {n: getattr(value, n) for n in value.__slots__}
    return {n: one for n, one in found.items() if n != "sources"}  # trees have one


def told(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "told.json").read_text())
    (folder / "told.json").unlink()
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, printed = tmp_path_factory.mktemp("sync") / "o", io.StringIO()
    run(settings_of([*WORDS, f"out={folder}"]), folder, Console(file=printed), words=WORDS)
    assert printed.getvalue().count("see o\n") == 1
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "o"))


def test_a_folder_tells_what_the_run_told(folder, capsys):
    live = told(folder)
    assert len(live) == 4 + len(lines(folder / "steps.jsonl"))
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == "see o\n"
    assert told(folder) == live
    assert main([str(folder), "tracker.project=other"]) == 0
    assert told(folder) == ["other", *live[1:]]


def test_a_run_that_is_resumed_tells_of_all_its_steps(folder, specdec):
    live = told(folder)
    # As an interruption leaves it, in the middle of the last text.
    for name in ("generations.jsonl", "steps.jsonl"):
        text = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(text[:-1]))
    code, _, error = specdec(*WORDS, f"out={folder}", "resume=true")
    assert (code, error) == (0, "")
    again = told(folder)
    assert again[1]["id"] == live[1]["id"]
    assert again[1]["name"] == live[1]["name"]
    tokens, before = ([step["tokens"] for step in one[2:-2]] for one in (again, live))
    assert tokens == before


def test_a_sweep_is_shown_run_by_run(folder, capsys):
    told(folder)
    other = Path(shutil.copytree(folder, folder.with_name("p")))
    change(
        other / "identity.json",
        lambda found: found["parts"]["settings"].update({"tree.budget": 5}),
    )
    assert main([str(folder.parent)]) == 0
    length = json.loads((folder / "summary.json").read_text())["mean_accepted_length"]["pooled"]
    files = ["report.html", "compare.csv", "compare.json"]
    name = f"comparison of {'-'.join(folder.parent.parts[-2:])}"
    assert capsys.readouterr().out == f"see o\nsee p\n{name}: {[length, length]}, {files}\n"


class Broken(Spy):
    def step(self, step: Any) -> None:
        raise OSError("no\nnetwork")


def test_a_tracker_that_fails_is_an_error_here(folder):
    with pytest.raises(ValueError, match=r"o: Broken failed, OSError: no network$"):
        sync(folder, Broken(project="p"))


def change(path: Path, how: Callable[[Any], Any]) -> None:
    found = json.loads(path.read_text())
    how(found)
    path.write_text(json.dumps(found))


def spoil(folder: Path, name: str, text: str | None) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", None, "summary.json: cannot be read, No such file or directory"),
        ("summary.json", '{"schema"', "summary.json: cannot be read"),
        ("config.yaml", "{", "config.yaml: cannot be read"),
        ("config.yaml", "seed: 1\n", "o: its files are of an older version"),
        ("config.yaml", None, "o: must be the folder of a run that has ended, or of a sweep"),
        ("steps.jsonl", "{}\n", "steps.jsonl: line 1 is no record"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(folder, capsys, name, text, said):
    spoil(folder, name, text)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "folders: must be given"),
        (["tracker=nonsense"], "tracker=nonsense"),
        (["tracker.nonsense=1"], "tracker.nonsense=1"),
        (["nowhere"], "nowhere: must be the folder of a run"),
    ],
)
def test_words_that_say_nothing_are_refused(folder, capsys, words, said):
    where = [] if words in ([], ["nowhere"]) else [str(folder)]
    assert main([*where, *words]) == 2
    assert said in capsys.readouterr().err

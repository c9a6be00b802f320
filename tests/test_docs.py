"""The documentation says what is so: its commands can be typed, its programs run, its links lead
somewhere, and its tables of settings and of fields are complete."""

import ast
import dataclasses
import importlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from specdec import run as runner
from specdec.lab.build import method_of
from specdec.lab.command import parse
from specdec.lab.energy import EnergyLine, energy_of
from specdec.lab.jobs import Job
from specdec.lab.lossless import compare
from specdec.lab.settings import settings_of
from specdec.lab.witness import Witness
from specdec.models.load import load_model
from specdec.training.settings import method_of_training, parts_of, plan_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "specdec" / "configs"
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "specdec/zoo/README.md"]
PAGES = ["README", *(f"docs/{page}" for page in ("guide", "drafters", "trees_and_rules"))]
PAGES += ["docs/acceptance", "docs/sweeps", "docs/compare", "docs/learned"]
SOURCES = ("specdec", "hydra_plugins", "drafters", "verifier", "kernels", "experiments", "tests")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def section(page: Path, title: str) -> str:
    """What stands below a heading, up to the next of its level or above."""
    heading = re.search(rf"^(#+) {re.escape(title)}$", page.read_text(), flags=re.MULTILINE)
    assert heading is not None, f"{page.name} has no section {title}"
    rest = page.read_text()[heading.end() :]
    return re.split(rf"^#{{1,{len(heading[1])}}} ", rest, flags=re.MULTILINE)[0]


# --- size


@pytest.mark.parametrize(("page", "lines"), [("README", 160), ("ARCHITECTURE", 120)])
def test_first_pages_stay_short(page: str, lines: int) -> None:
    assert len((ROOT / f"{page}.md").read_text().splitlines()) <= lines


def test_three_blocks_of_the_readme_are_generated() -> None:
    marks = re.findall(r"<!-- (.*?) -->", README.read_text())
    assert marks == ["results", "/results", "verdict", "/verdict", "learned", "/learned"]


# --- commands and programs


def commands(*beginnings: str) -> list[str]:
    """Lines of shell blocks that begin so, without their comments."""
    lines = [
        line.partition(" # ")[0].strip()
        for page in PAGES
        for block in blocks(ROOT / f"{page}.md", "sh")
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line.startswith(beginnings)))


def first_of_a_sweep(word: str) -> str:
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


@pytest.mark.some(20)
@pytest.mark.parametrize("line", commands("python -m specdec.run", "make run ARGS="))
def test_settings_of_a_run_can_be_used(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line)[3:]
    if line.startswith("make"):
        words = shlex.split(shlex.split(line)[2].removeprefix("ARGS="))
    if "-m" in words:
        words = [first_of_a_sweep(word) for word in words if word != "-m"]
    settings = settings_of(words)
    (function,) = blocks(README, "python")
    (tmp_path / "my_drafter.py").write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    if not any(word.endswith("s.json") for word in words):  # tables that would have to be measured
        method_of(settings)


@pytest.mark.parametrize("line", commands("python -m specdec.train"))
def test_settings_of_a_training_can_be_used(line: str) -> None:
    settings = settings_of(shlex.split(line)[3:], "train")
    plan_of(settings)
    method_of_training(settings)
    parts_of(settings)


@pytest.mark.parametrize("line", commands("python -m specdec.experiments."))
def test_options_of_a_program_can_be_used(line: str) -> None:
    module, *words = shlex.split(line)[2:]
    program: Any = importlib.import_module(module)
    parts = getattr(program, "PARTS", None)  # of a program of several, named by the first word
    if parts is not None:
        file, options = parts[words.pop(0)]
        part = importlib.import_module(f"{program.__package__}.{file}")
        parse(getattr(part, options), words)
    elif hasattr(program, "Options"):
        parse(program.Options, words)


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/*.py")), ids=lambda p: p.stem)
def test_what_a_program_prints_of_itself_has_the_lines_of_its_source(path: Path) -> None:
    """A backslash at the end of a line, which a shell reads, is gone if Python has read it."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert max(map(len, doc.splitlines()), default=0) < 100


@pytest.mark.parametrize("program", blocks(GUIDE, "python"))
def test_programs_of_the_guide_run(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(program, {})
    assert float(capsys.readouterr().out.split()[-1]) > 1.5  # the accepted length


# --- links and paths


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!\w+://)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_source_files_exist(page: Path) -> None:
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    files = [f"/{path.relative_to(ROOT).as_posix()}" for path in paths]
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text()):
        own = name in ("my_drafter.py", "verifier/my_rule.py")  # of examples
        assert own or any(file.endswith(f"/{name}") for file in files), name


# --- settings


def option_files() -> dict[str, dict[str, Path]]:
    """The files of each group, by option, without Hydra's own."""
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(CONFIGS.glob("*/**/*.yaml")):
        group, _, option = path.relative_to(CONFIGS).with_suffix("").as_posix().partition("/")
        if group != "hydra" and not option.startswith("_"):
            groups.setdefault(group, {})[option] = path
    return groups


def own_settings(path: Path) -> dict[str, Any]:
    """Settings of an option with those it takes from files beside it, references unresolved."""
    config = yaml.safe_load(path.read_text())
    found: dict[str, Any] = {}
    for base in config.pop("defaults", []):
        if base != "_self_" and isinstance(base, str):
            found |= own_settings(path.parent / f"{base}.yaml")
    found |= config
    return {k: v for k, v in found.items() if k != "_target_" or v == "???"}


def documented(group: str, options: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Of each setting that the guide has for a group, the default by option, "" for the rest."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| .*\|$", section(GUIDE, group), re.MULTILINE)
    table: dict[str, dict[str, str]] = {}
    for name, cell in rows:
        defaults = table[name.removeprefix(f"{group}.")] = {}
        for value, names in re.findall(r"`([^`]*)`([^`;]*)", cell):
            for option in names.replace(",", " ").split() or [""]:
                assert not option or option in options, f"{name}: no option {option}"
                defaults[option] = value
    return table


@pytest.mark.parametrize("group", [g for g in option_files() if g != "experiment"])
def test_guide_has_every_setting_with_its_default(group: str) -> None:
    options = option_files()[group]
    table = documented(group, options)
    unused = {(name, option) for name, defaults in table.items() for option in defaults}
    for option, path in options.items():
        for name, value in own_settings(path).items():
            assert name in table, f"{group}.{name} of {option}"
            place = option if option in table[name] else ""
            assert yaml.safe_load(table[name][place]) == value, f"{group}.{name} of {option}"
            unused.discard((name, place))
    assert not unused, "described, but nowhere to be set"


def test_guide_has_every_setting_without_a_group() -> None:
    config = yaml.safe_load((CONFIGS / "run.yaml").read_text())
    found = {k: v for k, v in config.items() if k not in ("defaults", "hydra")}
    table = documented("run", {})
    assert {name: yaml.safe_load(by[""]) for name, by in table.items()} == found


@pytest.mark.parametrize("group", option_files())
def test_guide_names_every_option(group: str) -> None:
    named = set(re.findall(r"`([^`]*)`", section(GUIDE, group)))
    assert set(option_files()[group]) <= named


# --- what a run leaves

OUTPUTS = ROOT / "docs" / "outputs.md"
VARIABLE = {"time": "VERB", "seconds": "VERB", "graphs.counts": "VERB"}
VARIABLE |= {"finish_reasons": "REASON", "sources": "NAME", "own": "SETTING"}
VARIABLE |= {"chosen_by": "SETTING"}
OWN = "tests.golden.repeat.repeat"
SMALL = "zoo:draft"
LOSSY = "acceptance=typical acceptance.allow_lossy=true"
RUNS = {
    "composed": "drafter=compose tree=dynamic record.trees=2 record.energy=true "
    "record.evidence=true",
    "sampled": "sampling=sample tree=cost_aware tree.costs=cpu",
    "synthetic": "drafter=synthetic tree=static ignore_eos=true",
    "lossy": f"drafter=user drafter._target_={OWN} {LOSSY} sampling=sample",
}


def fields(value: Any, name: str = "") -> Iterator[str]:
    """Names of the leaves of a record, as the page writes them."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            part = VARIABLE.get(name, key)
            yield from fields(inner, f"{name}.{part}" if name else part)
        return
    yield name
    if name == "lossless.divergences":
        for item in value:
            for key in item:
                yield f"{name}[].{key}"


def listed(title: str) -> dict[str, str]:
    """Fields that the page lists below a heading, each with the case in which it is there; ""
    for always."""
    rows = re.findall(r"^\| `([^`]+)`(?: \((.*?)\))? \|", section(OUTPUTS, title), re.MULTILINE)
    return dict(rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of runs that leave all there is between them."""
    folders = []
    for name, words in RUNS.items():
        folders.append(tmp_path_factory.mktemp(name))
        words += f" target.path={SMALL} prompts.limit=2 max_new_tokens=8 device=cpu"
        settings = settings_of(f"{words} tracker=none out={folders[-1]}")
        runner.run(settings, folders[-1], Console(file=io.StringIO()))
    return folders


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def agrees(title: str, found: list[set[str]]) -> None:
    """Whether the page lists what was found, no more and no less."""
    page = listed(title)
    always = {name for name, case in page.items() if not case}
    for names in found:
        assert always <= names, "listed as always there"
    elsewhere = {name for name, case in page.items() if case in ("on a GPU", "in a sweep")}
    assert set.union(*found) == set(page) - elsewhere


@pytest.mark.parametrize(
    "file", ["generations.jsonl", "steps.jsonl", "evidence.jsonl", "trees.jsonl"]
)
def test_fields_of_lines_are_those_listed(runs: list[Path], file: str) -> None:
    lines = [line for run in runs if (run / file).exists() for line in records(run / file)]
    agrees(file, [set(fields(line)) for line in lines])
    for path in (run / "baseline" / file for run in runs):
        for line in records(path) if path.exists() else ():
            assert set(fields(line)) <= set(listed(file))


def test_fields_of_the_config_are_those_listed(runs: list[Path]) -> None:
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    agrees("config.yaml", [set(config) for config in configs])


def test_fields_of_the_identity_are_those_listed(runs: list[Path]) -> None:
    found = [json.loads((run / "identity.json").read_text()) for run in runs]
    for record in found:
        for part in ("settings", "contents"):
            record["parts"][part] = None
        record["prompts"] = None
    agrees("identity.json", [set(fields(record)) for record in found])


def test_fields_of_the_summary_are_those_listed(runs: list[Path]) -> None:
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    for summary in summaries:
        assert {*fields(summary["baseline"])} <= set(listed("Figures"))
        summary["baseline"] = None
        if summary["git"] is None:  # not from a checkout
            summary["git"] = {"commit": None, "dirty": None}
    agrees("summary.json", [set(fields(summary)) | divergence(runs[0]) for summary in summaries])


def test_fields_of_jobs_are_those_listed() -> None:
    assert listed("jobs") == dict.fromkeys((one.name for one in dataclasses.fields(Job)), "")


def test_settings_of_the_launcher_are_listed_with_their_defaults() -> None:
    file = CONFIGS / "hydra" / "launcher" / "processes.yaml"
    own = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "_target_"}
    page = section(ROOT / "docs" / "sweeps.md", "Where jobs run")
    rows = re.findall(r"^\| `hydra\.launcher\.(\w+)` \| `(.*?)` \|", page, re.MULTILINE)
    assert {name: yaml.safe_load(default) for name, default in rows} == own


def test_fields_of_energy_are_those_listed() -> None:
    line = asdict(EnergyLine(joules=9e3, seconds=30.0, tokens=90, idle_watts=100.0))
    assert set(line) == set(listed("energy.jsonl"))
    measured, nothing = (set(fields(energy_of(lines))) for lines in ([line], []))
    assert measured | nothing == set(listed("Energy"))


def divergence(run: Path) -> set[str]:
    """Fields of a divergence, of which the runs have none."""
    theirs = records(run / "baseline" / "generations.jsonl")
    mine = [{**one, "output_ids": [one["output_ids"][0] + 1]} for one in theirs]
    return set(fields({"lossless": compare(mine, theirs, Witness(load_model(SMALL)))}))

"""The examples of docs/extending.md, run as a reader would run them, outside the repository; and
what the contract says of mistakes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.build import method_of
from specdec.lab.settings import settings_of
from tests.running import ROOT, SMALL_TARGET, forked

PAGE = "docs/extending.md"
SHORT = ("tracker=none", "prompts.limit=2", "max_new_tokens=12", SMALL_TARGET)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands() -> list[Any]:
    lines = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
    # The contract of a drafter takes long; tests/drafters holds every one of ours to it.
    slow = [line for line in lines if "contract" in line and "drafter=" in line]
    return [pytest.param(c, marks=[pytest.mark.slow] if c in slow else []) for c in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All files of the page."""
    for block in blocks(PAGE, "python") + blocks(PAGE, "yaml"):
        path = tmp_path / block.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    return tmp_path


@pytest.mark.some(5)
@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_page_run(command: str, folder: Path) -> None:
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    runs = module == "specdec.run"
    done = forked(folder, module, *arguments, *(SHORT if runs else ()))
    assert done.returncode == 0, done.stderr
    if not runs:
        assert "keeps its contract" in done.stdout
    elif "sampling=sample" not in arguments:
        assert "2 of 2 outputs equal the baseline" in done.stdout
    if "my_drafter.lookup" in command:
        (line,) = (text for text in done.stdout.splitlines() if "accepted length, pooled" in text)
        assert float(line.split("│")[2]) > 1


def test_settings_of_ones_own_without_hydra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for words in (
        "--config-dir my/configs drafter=echo drafter.window=4",
        "--config-dir=my/configs drafter=echo drafter.window=4",
        f"hydra.searchpath=[file://{folder}/my/configs] drafter=echo drafter.window=4",
        "drafter=user drafter._target_=my.echo.Echo +drafter.window=4",
    ):
        assert vars(method_of(settings_of(words)).drafter)["window"] == 4
    with pytest.raises(ValueError, match="drafter=echo: no such option"):
        settings_of("drafter=echo")
    with pytest.raises(ValueError, match=r"drafter.windows=4: Echo has no such setting"):
        method_of(settings_of("drafter=user drafter._target_=my.echo.Echo +drafter.windows=4"))


def test_a_parameter_without_a_type_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    bare = (folder / "my/echo.py").read_text().replace("window: int = 8", "window=8")
    (folder / "bare.py").write_text(bare)
    with pytest.raises(
        ValueError, match=r"drafter.window=4: Echo.__init__ gives window no type; annotate it"
    ):
        method_of(settings_of("drafter=user drafter._target_=bare.Echo +drafter.window=4"))


@pytest.mark.slow
def test_a_drafter_added_to_the_repository_passes_its_contract_tests(folder: Path) -> None:
    """The contract test over every option, for that one alone."""
    copy = folder / "repository"
    copy.mkdir()
    opened = {ROOT / name for name in ("drafters", "configs", "configs/drafter", "specdec")}
    for source in sorted(opened | {ROOT}):
        target = copy / source.relative_to(ROOT)
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            place = target / entry.name
            if entry in opened or entry.name == ".git":
                continue
            if entry.is_symlink():  # specdec/drafters and the like, to those of the copy
                place.symlink_to(entry.readlink())
            else:
                place.symlink_to(entry)
    (copy / "drafters/echo.py").write_text((folder / "my/echo.py").read_text())
    settings = (folder / "my/configs/drafter/echo.yaml").read_text()
    (copy / "configs/drafter/echo.yaml").write_text(
        settings.replace("my.echo.Echo", "specdec.drafters.echo.Echo")
    )
    tests = copy / "tests"
    tests.unlink()
    tests.mkdir()
    for entry in (ROOT / "tests").iterdir():
        (tests / entry.name).symlink_to(entry)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("tests/drafters/test_drafter_contract.py", "-k", "echo and not 4"),
        ],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


LIAR = '''
from dataclasses import replace

from specdec.drafters.small_llama import SmallLlama


class Liar(SmallLlama):
    """Tells the rule that its candidates are more alike than those it draws from."""

    composable = False

    def draft(self, context):
        tree = super().draft(context)
        if tree.proposal is None:
            return tree
        flat = tree.proposal.probs.sqrt()
        flat = flat / flat.sum(-1, keepdim=True).clamp(min=1e-9)
        return replace(tree, proposal=replace(tree.proposal, probs=flat))
'''
ORPHANS = '''
from specdec.drafters.trees.dynamic import Dynamic


class Orphans(Dynamic):
    """Drops the most probable node, the parent of others."""

    def keep(self, scores, kernels):
        kept = super().keep(scores, kernels).clone()
        kept.scatter_(1, scores.argmax(1, keepdim=True), False)
        return kept
'''
BOLD = '''
from specdec.verifier.target_only import TargetOnly


class Bold(TargetOnly):
    """Claims to be lossless, and accepts more than it may."""

    name = "bold"

    def judge(self, tree, target, coins):
        return super().judge(tree, target, coins * 0.8)
'''


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        pytest.param(
            LIAR,
            "drafter=user drafter._target_=mistake.Liar +drafter.path=zoo:draft",
            "its children are not those drawn from its proposal",
            marks=pytest.mark.slow,
        ),
        (
            ORPHANS,
            "tree=dynamic tree._target_=mistake.Orphans",
            "Orphans: keeps a node, and drops its parent",
        ),
        (
            BOLD,
            "acceptance=target_only acceptance._target_=mistake.Bold",
            "claims to be lossless",
        ),
    ],
)
def test_mistakes_are_found(program: str, words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mistake.py").write_text(program)
    done = forked(tmp_path, "specdec.experiments.tools.contract", *words.split())
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
    assert re.search(message, line), line

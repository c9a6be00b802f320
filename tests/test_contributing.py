"""The examples of the documentation, run as a reader would run them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def program(path: str) -> str:
    """The file of CONTRIBUTING that begins with this name."""
    (found,) = (b for b in blocks("CONTRIBUTING.md", "python") if b.startswith(f"# {path}\n"))
    return found


def test_the_function_of_contributing_drafts_losslessly(tmp_path):
    (tmp_path / "my_drafter.py").write_text(program("my_drafter.py"))
    command = next(b for b in blocks("CONTRIBUTING.md", "sh") if "my_drafter" in b)
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "tracker=none", "prompts.limit=2", "max_new_tokens=24"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 outputs equal the baseline" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "accepted length, pooled" in line)
    assert float(line.split("│")[2]) > 1


def test_the_drafter_of_contributing_drafts_losslessly(tmp_path):
    # A copy of the folders it goes into; everything else by links.
    for entry in ROOT.iterdir():
        if entry.name in ("drafters", "configs"):
            (tmp_path / entry.name).mkdir()
            for part in entry.iterdir():
                (tmp_path / entry.name / part.name).symlink_to(part)
    package = tmp_path / "specdec"
    package.mkdir()
    for entry in (ROOT / "specdec").iterdir():
        target = (
            tmp_path / entry.name if entry.name in ("drafters", "configs") else entry.resolve()
        )
        (package / entry.name).symlink_to(target)
    (tmp_path / "configs/drafter").unlink()
    (tmp_path / "configs/drafter").mkdir()
    (tmp_path / "drafters/echo.py").write_text(program("drafters/echo.py"))
    (tmp_path / "configs/drafter/echo.yaml").write_text(blocks("CONTRIBUTING.md", "yaml")[0])

    command = "-m specdec.run drafter=echo tree=chain tree.budget=8 tracker=none prompts.limit=2"
    done = subprocess.run(
        [sys.executable, *command.split(), "max_new_tokens=24", f"out={tmp_path}/out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 outputs equal the baseline" in done.stdout

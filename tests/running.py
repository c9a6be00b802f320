"""The command line in tests: settings that make a run short, and what it leaves."""

import json
import os
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QUICK = ("tracker=none", "prompts.limit=3", "max_new_tokens=10", "dtype=float32")
SMALL_TARGET = "target.path=zoo:draft"  # where it does not matter which drafts are kept


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outputs(folder: Path) -> dict[tuple[int, int], list[int]]:
    return {(g["prompt"], g["turn"]): g["output_ids"] for g in lines(folder / "generations.jsonl")}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def jobs(folder: Path) -> list[Path]:
    """Folders of the jobs of a sweep."""
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def jobs_by(folder: Path, setting: str) -> dict[Any, Path]:
    """Those folders by the value of a setting."""
    found = {}
    for job in jobs(folder):
        value = yaml.safe_load((job / "config.yaml").read_text())
        for name in setting.split("."):
            value = value[name]
        found[value] = job
    return found


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


def forked(folder: Path, module: str, *arguments: str) -> Ended:
    """`python -m MODULE ARGUMENTS` in that folder, by a fork of this process: as a process of its
    own would do, without importing torch again. On a GPU it is one: who has asked CUDA for as
    much as the number of devices cannot be forked into a process that uses them.

    Its folder is on the path first, and the output goes to two files of it.
    """
    if torch.cuda.is_available():
        command = [sys.executable, "-m", module, *arguments]
        path = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            command, cwd=folder, env=path, capture_output=True, text=True, check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)
    logs = [folder / ".stdout", folder / ".stderr"]
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return Ended(os.waitstatus_to_exitcode(status), *(log.read_text() for log in logs))
    code = 1
    try:
        for stream, log in zip((1, 2), logs, strict=True):
            os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        os.chdir(folder)
        # The pool of threads that the fork has lost is made again before several of them ask.
        torch.set_num_threads(torch.get_num_threads())
        sys.path.insert(0, str(folder))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

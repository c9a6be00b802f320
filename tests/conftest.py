"""Shared by all tests: one thread per process, so that parallel test processes do not wait for
each other; without a GPU, Triton kernels run in its interpreter."""

import gc
import hashlib
import os
import sys
import tempfile
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "SPECDEC_CACHE" not in os.environ:  # costs measured by tests are none of the machine's
    costs = tempfile.TemporaryDirectory(prefix="specdec-costs-")
    os.environ["SPECDEC_CACHE"] = costs.name
if "TRACKIO_DIR" not in os.environ:  # which is read when it is imported
    tracked = tempfile.TemporaryDirectory(prefix="specdec-trackio-")
    os.environ["TRACKIO_DIR"] = tracked.name

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml

from tests.composing import choose_quickly, compose_once, keep_composed
from tests.interpreter import hasten

gc.disable()  # until all is imported, see below
torch.set_num_threads(1)
# Settings are put together hundreds of times, and half of that is reading YAML; libyaml reads the
# same in a fraction of the time.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # type: ignore[misc]
choose_quickly()
keep_composed()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    hasten()


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the marker `some(n)` all cases but n are slow ones, chosen by their names."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("some"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for grid in cases.values():
        (count,) = grid[0].get_closest_marker("some").args
        grid.sort(key=lambda item: hashlib.sha256(item.name.encode()).digest())
        for item in grid[count:]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported, and the tests themselves, stay to the end: half a million objects that
    the collector need not go through again and again, which took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def little_warming_up() -> Iterator[None]:
    """Runs warm up with one token: there is nothing here that is compiled."""
    from specdec.lab import lane

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "WARM_UP_TOKENS", 1)
        yield


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """Model folders are read once; reading them anew for each case would take most of the
    time."""
    from specdec.models import load

    original, known = load.load_model, {}

    def cached(path: str, placement: Any = load.CPU, **options: Any) -> Any:
        key = path, placement, options.get("quantize", "none")
        if key not in known:
            known[key] = original(path, placement, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_model", cached)
        yield


@pytest.fixture
def specdec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr). Anchors, by which a sweep
    knows its pace, are short."""
    from hydra._internal.hydra import Hydra

    from specdec import run as command
    from specdec.lab import baselines

    monkeypatch.setattr(baselines, "PROMPTS", 1)
    monkeypatch.setattr(baselines, "TOKENS", 2)
    # Hydra composes all settings once more beforehand, for a `hydra.mode` that nobody sets.
    monkeypatch.setattr(Hydra, "get_mode", lambda *given, **named: None)
    compose_once(monkeypatch)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdec", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call

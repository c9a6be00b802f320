"""Faults of machines, injected: a run that is resumed after one ends as if nothing had happened,
token for token, or says in one line what is wrong."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specdec.lab import environment
from specdec.lab import experiment as experiments
from specdec.lab.interrupts import interruptible
from specdec.lab.records import RecordFile
from specdec.lab.runs import RunFolder
from tests.lab import scripted
from tests.lab.scripted import decode
from tests.running import lines

SIDES = ("", "baseline/")
FILES = ("config.yaml", *(s + f for s in SIDES for f in ("generations.jsonl", "steps.jsonl")))


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "OurSession", scripted.Session)
    monkeypatch.setattr(environment, "_git", lambda: None)
    monkeypatch.setattr("os.fsync", lambda number: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "OurSession", scripted.Session)
        decode(out)
    return out


def results(out: Path) -> Any:
    """All texts, and what their steps come to; of the first steps of each text there is a tree."""
    found = []
    for side in SIDES:
        generations = {g["request"]: g for g in lines(out / f"{side}generations.jsonl")}
        assert len(generations) == len(lines(out / f"{side}generations.jsonl"))
        lengths: dict[int, list[int]] = {request: [] for request in generations}
        for step in lines(out / f"{side}steps.jsonl"):
            for request, tokens in zip(step["requests"], step["tokens"], strict=True):
                lengths[request].append(tokens)
        found.append((dict(sorted(generations.items())), lengths))
        assert lengths == {r: g["accepted_lengths"] for r, g in generations.items()}
        trees = [(tree["request"], tree["step"]) for tree in lines(out / f"{side}trees.jsonl")]
        first = {r: range(min(scripted.TREES, len(of))) for r, of in lengths.items()}
        assert sorted(trees) == sorted((r, step) for r, steps in first.items() for step in steps)
    return found


def assert_recovers(out: Path, whole: Path) -> str:
    """Resumed, the folder holds the same texts, or one line names a file or a setting of it."""
    printed, refused = io.StringIO(), ""
    try:
        summary = decode(out, resume=True, console=Console(file=printed, width=1000))
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "\n" not in refused
        assert str(out) in refused
        return refused
    assert results(out) == results(whole)
    assert summary["tokens"] == sum(map(sum, results(out)[0][1].values()))
    assert not (out / "lock").exists()
    return printed.getvalue()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_a_run_that_ends_at_any_point_goes_on(tmp_path, monkeypatch, whole, fault):
    """Of all its writes to disk one raises, before or after it is done."""
    append, count = RecordFile.append, 0

    def counting(*given: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        if count == first:
            raise fault
        append(*given, **more)
        if count == last:
            raise fault

    monkeypatch.setattr(RecordFile, "append", counting)
    total = sum(len(lines(whole / name)) for name in FILES[1:])
    places = random.Random(fault.__name__).sample(range(1, total + 1), 20)
    for number, place in enumerate(places):
        out, count = tmp_path / str(number), 0
        first, last = (place, 0) if number % 2 else (0, place)
        with pytest.raises(fault):
            decode(out)
        assert not (out / "lock").exists()
        first = last = 0
        assert_recovers(out, whole)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_anywhere(tmp_path, whole, name):
    size = (whole / name).stat().st_size
    random.seed(name)
    for cut in {0, size - 1, *random.sample(range(size), 15)}:
        out = tmp_path / str(cut)
        shutil.copytree(whole, out)
        with (out / name).open("r+b") as file:
            file.truncate(cut)
            if cut % 3 == 0:  # a file system that had not written its last block
                file.truncate(cut + 512)
        said = assert_recovers(out, whole)
        assert ("config.yaml" in said or "differ" in said) == said.startswith(("/", "resume="))


def test_a_record_that_is_cut_inside_a_character(tmp_path, whole):
    path = tmp_path / "o/generations.jsonl"
    shutil.copytree(whole, path.parent)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex("é".encode()) + 1])
    assert_recovers(path.parent, whole)


BROKEN = {
    "half": '{"request": 1000, "pro',
    "other": '{"name": "value"}',
    "list": "[1, 2]",
    "deep": "[" * 100_000,
    "text": "no JSON",
    "types": None,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", FILES[1:])
def test_a_broken_line_in_the_middle_is_named(tmp_path, whole, name, kind):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    found = (out / name).read_text().splitlines()
    found[1] = BROKEN[kind] or found[1].replace("[", '["x", ', 1)
    (out / name).write_text("\n".join(found) + "\n")
    with pytest.raises(ValueError, match=rf"^{out / name}: line 2 is no record, .+; delete it"):
        decode(out, resume=True)
    (out / name).write_text("\n".join(found[:1] + found[2:]) + "\n")
    assert "decoded again" in assert_recovers(out, whole)


def test_a_step_whose_lists_have_different_lengths_is_named(tmp_path, whole):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    first, second, *others = (out / "steps.jsonl").read_text().splitlines()
    uneven = json.loads(second)
    uneven["tokens"].append(1)
    (out / "steps.jsonl").write_text("\n".join([first, json.dumps(uneven), *others, ""]))
    with pytest.raises(ValueError, match=r"line 2 is no record, .+ different lengths; delete it"):
        decode(out, resume=True)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, whole, name):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    (out / name).unlink()
    with pytest.raises(ValueError, match=rf"^{out / name}: is missing; put it back"):
        decode(out, resume=True)


def test_records_of_two_runs_count_once(tmp_path, whole):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    texts = (out / "generations.jsonl").read_text().splitlines(keepends=True)
    (out / "generations.jsonl").write_text("".join(texts + texts[:2]))
    assert "2 texts of" in assert_recovers(out, whole)
    for name in FILES[1:]:  # what two runs in one folder left, before there were locks
        (out / name).write_text((whole / name).read_text() * 2)
    assert "decoded again" in assert_recovers(out, whole)


class Full(io.TextIOWrapper):
    """A file on a disk that takes so many bytes."""

    left = 0

    def write(self, text: str) -> int:
        data = text.encode()
        taken, Full.left = data[: Full.left], Full.left - len(data)
        self.buffer.write(taken)
        self.buffer.flush()
        if Full.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(text)


def test_a_full_disk_costs_nothing_that_was_finished(tmp_path, monkeypatch, whole):
    total = sum((whole / name).stat().st_size for name in FILES)
    opened = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode in ("a", "w"):
            return Full(opened(path, f"{mode}b"), encoding="utf-8")
        return opened(path, mode, **more)

    random.seed(5)
    for number, space in enumerate(random.sample(range(total), 20)):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            Full.left = space
            patch.setattr(Path, "open", full)
            with pytest.raises(ValueError, match=r": cannot be written, No space left on dev"):
                decode(out)
        if out.exists():
            assert_recovers(out, whole)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many KiB; may grow."""
    folder, mounted = tmp_path / "disk", False
    folder.mkdir()

    def sized(size: int) -> Path:
        nonlocal mounted
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a disk here")
        mounted = True
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("size", [4, 12, 20, 28])
def test_a_disk_that_is_really_full(disk, whole, size):
    out = disk(size) / "o"
    with pytest.raises(ValueError, match="No space left on device") as refused:
        decode(out)
    assert "\n" not in str(refused.value)
    disk(1024)
    if out.exists():
        assert_recovers(out, whole)
    decode(out.with_name("other"))  # nothing stands in the way of others


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path, monkeypatch, whole, number):
    """Processes of their own, each killed up to three times."""
    step = scripted.Decoder.step

    def slow(*given: Any) -> int:
        time.sleep(0.001)
        return step(*given)

    def child(out: Path) -> None:
        monkeypatch.setattr(scripted.Decoder, "step", slow)
        with contextlib.suppress(BaseException), interruptible():
            decode(out, resume=(out / "config.yaml").exists())
        os._exit(0)

    random.seed(number)
    for place in range(3):
        out = tmp_path / str(place)
        for _ in range(3):
            process = os.fork()
            if not process:
                child(out)
            time.sleep(random.uniform(0.0, 0.12))
            os.kill(process, number)
            os.waitpid(process, 0)
        if (out / "config.yaml").exists():
            assert "resume=" not in assert_recovers(out, whole)
        else:
            decode(out)


def test_what_a_refused_run_leaves(tmp_path, monkeypatch):
    """Nothing, whether it was refused before or after its folder was begun; but for what was there
    before."""
    settings = scripted.SETTINGS

    def refused(out: Path, *, begun: bool) -> None:
        folder = RunFolder(out, config=settings, resume=False)
        with contextlib.suppress(ValueError), folder:
            if begun:
                folder.begin()
            raise ValueError

    (tmp_path / "there").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for begun in (False, True):
        for name in ("new/a/b", "there", "there/new", "full"):
            refused(tmp_path / name, begun=begun)
            left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
            assert left == ["full", "full/notes.txt", "there"]


def test_a_run_that_was_interrupted_before_its_first_text_can_go_on(tmp_path, whole):
    interrupted = RunFolder(tmp_path / "o", config=scripted.SETTINGS, resume=False)
    with contextlib.suppress(KeyboardInterrupt), interrupted as folder:
        folder.identify(scripted.RESOLVED)
        folder.begin()
        raise KeyboardInterrupt
    assert "resumed" not in assert_recovers(tmp_path / "o", whole)


def test_settings_and_what_they_name_stay_the_same(tmp_path, whole):
    out = tmp_path / "o"
    shutil.copytree(whole, out)
    for changed, resolved, name in (
        ({"settings": {**scripted.SETTINGS, "seed": 4}}, {}, "seed"),
        ({}, {"dtype": "bfloat16"}, "dtype"),
        ({"contents": {"prompts": "4567"}}, {}, "contents of prompts"),
        ({"contents": {}}, {}, "contents of prompts"),
        ({"code": "89ab"}, {}, "the code of specdec"),
    ):
        identity = replace(scripted.IDENTITY, **changed)
        with (
            pytest.raises(ValueError, match=rf"^out={out}: {name} differs from the run there"),
            RunFolder(out, config=scripted.SETTINGS, resume=True, identity=identity) as folder,
        ):
            folder.identify({**scripted.RESOLVED, **resolved})
    assert json.loads((out / "summary.json").read_text())["tokens"]

"""Command lines of programs: what is read, what is refused, and the result files."""

import json
import os
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from specdec.lab.command import begin, command_line, option, parse, run_main, write
from specdec.lab.values import typed


@dataclass(frozen=True, kw_only=True)
class Options:
    texts: tuple[str, ...] = option(about="files or folders", free=True)
    batches: tuple[int, ...] = option((1, 8), "sequences together")
    shapes: tuple[tuple[int, ...], ...] = option((), "of trees")
    tokens: Annotated[int, Field(ge=100)] = option(1000, "of the datastore")
    sizes: Annotated[tuple[int, ...], Field(max_length=2)] = option((), "of trees")
    temperature: float = option(0.0)
    device: Literal["cpu", "cuda"] = option("cpu")
    name: str | None = option(None, "of the data set")
    out: Path = option(Path("speed.json"), "result file")
    cases: tuple[str, ...] = option(("none",), varies=True)
    resume: bool = option(False, "keep what the file holds")


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("batches=[1,4]", "batches", (1, 4)),
        ("batches=4", "batches", (4,)),
        ("sizes=4", "sizes", (4,)),
        ("shapes=[[1,2],[3]]", "shapes", ((1, 2), (3,))),
        ("temperature=1", "temperature", 1.0),
        ("device=cuda", "device", "cuda"),
        ("name=007", "name", "007"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name='a=b'", "name", "a=b"),
        ("name=null", "name", None),
        ("out=7", "out", Path("7")),
        ("resume=true", "resume", True),
        ("texts=[7,a]", "texts", ("7", "a")),
    ],
)
def test_a_word_gives_its_value_and_the_command_gives_it_back(
    word: str, name: str, value: Any
) -> None:
    options = parse(Options, [word] if name == "texts" else [word, "a text"])
    assert getattr(options, name) == value
    words = shlex.split(command_line(options))
    assert words[:3] == ["python", "-m", __name__]
    assert parse(Options, words[3:]) == options


def test_defaults_are_left_out_of_the_command_and_free_words_are_one_option() -> None:
    options = parse(Options, ["a.txt", "./b=c", "tokens=100"])
    assert options.texts == ("a.txt", "./b=c")
    assert command_line(options, "x part") == (
        """python -m x part 'texts=["a.txt","./b=c"]' tokens=100"""
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["t", "tokens=few"], "tokens=few: must be a valid integer"),
        (["t", "tokens=99"], "tokens=99: must be greater than or equal to 100"),
        (["t", "tokens=1.5"], "tokens=1.5: must be a valid integer"),
        (["t", "tokens=true"], "tokens=true: must be a valid integer"),
        (["t", "device=tpu"], "device=tpu: must be 'cpu' or 'cuda'"),
        (["t", "batches=[1,x]"], "batches=[1, 'x']: must be a valid integer"),
        (["t", "batches=[1"], "batches=[1: not YAML; put it in quotes"),
        (["t", "tokens=100", "tokens=200"], "tokens=200: given twice; leave one out"),
        (["t", "texts=a"], "t: texts is given as well; put all of them there"),
        ([], "texts: must be given, texts=...: files or folders"),
        (
            ["t", "token=1"],
            "token=1: no such option; there are texts, batches, shapes, tokens, sizes, "
            "temperature, device, name, out, cases, resume",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(Options, lambda options: pytest.fail("not to be done"), words, doc="") == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_word_alone_is_refused_where_no_option_is_free() -> None:
    @dataclass(frozen=True)
    class Few:
        tokens: int = option(1)

    with pytest.raises(ValueError, match=r"^--tokens: must be name=value; there are tokens$"):
        parse(Few, ["--tokens"])


def test_the_exit_code_is_that_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(Options, lambda options: None, ["t"], doc="") == 0
    assert run_main(Options, lambda options: len(options.texts), ["t", "u"], doc="") == 2

    def fail(options: Options) -> int:
        raise ValueError("one\n  two")

    assert run_main(Options, fail, ["t"], doc="") == 2
    assert capsys.readouterr().err == "error: one two\n"


def test_help_shows_the_docstring_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(Options, lambda options: 1, ["--help"], doc="What it does.\n") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("What it does.\n")
    for line in (
        "texts=... files or folders, also as words without a name",
        "batches=[1,8] sequences together",
        "out=speed.json result file",
        "resume=false keep what the file holds",
        "name=null of the data set",
    ):
        assert line in " ".join(shown.split())


def test_typed_reads_lists_as_tuples_and_refuses_other_types() -> None:
    assert typed("x", [1, 2], tuple[int, ...]) == (1, 2)
    with pytest.raises(ValueError, match=r"^a\.b=yes: must be a valid boolean$"):
        typed("a.b", "yes", bool)


def test_a_result_is_continued_with_the_same_settings_alone(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "result.json"
    first = parse(Options, ["t", f"out={out}"])
    top = begin(first, torch.device("cpu"))
    assert top["settings"]["batches"] == [1, 8]
    assert not {"out", "cases", "resume"} & top["settings"].keys()
    assert {"command", "settings", "versions", "hardware", "git"} == top.keys()
    words = ["t", f"out={out}", "cases=[none,chain:4]", "resume=true"]
    again = begin(parse(Options, words), torch.device("cpu"))
    assert again["settings"] == top["settings"]  # no file yet
    write(out, top | {"cases": {"a": 1}})
    assert not out.with_suffix(".tmp").exists()

    found = begin(parse(Options, words), torch.device("cpu"))
    assert found["cases"] == {"a": 1}
    assert found["command"] == f"{top['command']}; {again['command']}"
    assert json.loads(out.read_text())["command"] == top["command"]  # until it is written
    assert "cases" not in begin(first, torch.device("cpu"))  # resume was not asked for

    with pytest.raises(ValueError, match=r"tokens=1000 there, 200 now; leave resume out$"):
        begin(parse(Options, [*words, "tokens=200"]), torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Measured:
    out: Path = option(Path("speed.json"), "result file")
    resume: bool = option(False)


def test_a_result_file_has_one_process_at_a_time(tmp_path: Path, capsys) -> None:
    out = tmp_path / "new/result.json"

    def work(options: Measured) -> int:
        if options.resume:
            os.kill(os.getpid(), signal.SIGTERM)
        return 10 * run_main(Measured, lambda _: 7, [f"out={out}"], doc=None)

    assert run_main(Measured, work, [f"out={out}"], doc=None) == 20
    said = capsys.readouterr().err
    assert said.startswith(f"error: out={out}: process {os.getpid()} on ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert run_main(Measured, work, [f"out={out}", "resume=true"], doc=None) == 130
    assert run_main(Measured, lambda _: 7, [f"out={out}"], doc=None) == 7
    for name in (".", str(tmp_path)):
        assert run_main(Measured, work, [f"out={name}"], doc=None) == 2
        assert "must be a file\n" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"command": 3}', '{"settings": {}}', "\0" * 9])
def test_a_result_that_is_broken_is_named(tmp_path: Path, text: str) -> None:
    out = tmp_path / "result.json"
    out.write_text(text)
    with pytest.raises(ValueError, match=rf"^{out}: cannot be continued, .+; leave resume out"):
        begin(Measured(out=out, resume=True), torch.device("cpu"))
    assert begin(Measured(out=out), torch.device("cpu"))["command"]


def test_a_result_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"result.json: cannot be written, File exists; "):
        write(tmp_path / "file/result.json", {})

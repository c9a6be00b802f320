"""The command line of every program beside `specdec.run`, in the same words, and its result file.

A program declares its options and says what to do with them:

    @dataclass(frozen=True, kw_only=True)
    class Options:
        texts: tuple[str, ...] = option(about="files or folders", free=True)  # required
        batches: tuple[Positive, ...] = option((1, 8), "sequences together", varies=True)
        tokens: Annotated[int, Field(ge=100)] = option(1000, "of the datastore")
        out: Path = option(Path("speed.json"), "result file")
        resume: bool = option(False, "keep what the file holds")

    def work(options: Options) -> int | None:  # exit code, if not 0
        result = begin(options, torch.device("cpu"))
        ...
        write(options.out, result)

    main = partial(run_main, Options, work, doc=__doc__)

    if __name__ == "__main__":
        sys.exit(main())

Words are `name=value` with values in YAML, `batches=[1,8]`, where one alone needs no brackets.
Words without a name go to the option that is `free`. `--help` shows the docstring and all options.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field

from specdec.lab.files import replace_file, to_json, writing
from specdec.lab.interrupts import interruptible
from specdec.lab.lock import Lock
from specdec.lab.values import typed
from specdec.reasons import FailedError

if TYPE_CHECKING:
    import torch

Options = TypeVar("Options")
Positive = Annotated[int, Field(ge=1)]
VOLATILE = ("out", "resume")  # no settings of a measurement
TEXTS = (str, Path)


def option(
    default: Any = MISSING, about: str = "", *, free: bool = False, varies: bool = False
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: without it the option must be given.
        about: what it is.
        free: takes the words without a name.
        varies: may have another value when a result is continued, so it is none of its settings.
    """
    return field(default=default, metadata={"about": about, "free": free, "varies": varies})


def run_main(
    kind: type[Options],
    work: Callable[[Options], int | None],
    arguments: Sequence[str] | None = None,
    *,
    doc: str | None,
) -> int:
    """Read the command line, of the process if left out, and do the work; returns the exit code,
    as `ended`. A result file that can be continued has one process at a time.

    Args:
        doc: what `--help` says before the options.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(words):
        print(usage(kind, doc))
        return 0

    def done() -> int | None:
        options = parse(kind, words)
        with _alone(options):
            return work(options)

    return ended(done)


def ended(work: Callable[[], int | None]) -> int:
    """Do the work of a command; returns its exit code: that of the work (None is 0), of a
    ValueError, which becomes one line on stderr, 2, or 1 if no setting is wrong, and 130 of an
    interruption."""
    try:
        with interruptible():
            return work() or 0
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FailedError) else 2
    except KeyboardInterrupt:
        return 130


@contextmanager
def _alone(options: Any) -> Iterator[None]:
    """Hold the lock of a result file."""
    out = getattr(options, "out", None)
    if out is None or not hasattr(options, "resume"):
        yield
        return
    if not out.name or out.is_dir():
        raise ValueError(f"out={out}: must be a file")
    lock = Lock(out.with_name(f"{out.name}.lock"), f"out={out}")
    try:
        yield
    finally:
        lock.release()


def parse(kind: type[Options], words: Sequence[str]) -> Options:
    """The options that these words give.

    Raises:
        ValueError: an unknown or repeated name, a value of another type, or one is missing.
    """
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    free = next((name for name, one in known.items() if one.metadata.get("free")), None)
    kinds = get_type_hints(kind, include_extras=True)
    found: dict[str, Any] = {}
    loose: list[str] = []
    for word in words:
        name, text = re.fullmatch(r"(?s)(?:(\w+)=)?(.*)", word).groups()  # type: ignore[union-attr]
        if name is None and free is not None:
            loose.append(text)
        elif name not in known:
            what = "must be name=value" if name is None else "no such option"
            raise ValueError(f"{word}: {what}; there are {', '.join(known)}")
        elif name in found:
            raise ValueError(f"{word}: given twice; leave one out")
        else:
            found[name] = typed(name, _read(name, text, kinds[name]), kinds[name])
    if free is not None and loose:
        if free in found:
            raise ValueError(f"{loose[0]}: {free} is given as well; put all of them there")
        found[free] = typed(free, loose, kinds[free])
    for name, one in known.items():
        if name not in found and one.default is MISSING:
            raise ValueError(f"{name}: must be given, {name}=...: {one.metadata.get('about')}")
    return kind(**found)


def _read(name: str, text: str, kind: Any) -> Any:
    """What a word says: YAML, or the text itself where a text is wanted and YAML has a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{name}={text}: not YAML; put it in quotes") from None
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (tuple, list):
        values = value if isinstance(value, list) else [value]
        texts = any(one in TEXTS for one in get_args(kind))
        return [str(one) if texts and isinstance(one, int | float) else one for one in values]
    wanted = any(one in TEXTS for one in (kind, *get_args(kind)))
    if wanted and not isinstance(value, str | None):
        return text
    return value


def usage(kind: type, doc: str | None) -> str:
    """The docstring, and every option with its default, or with `...` if it must be given."""
    lines = [(doc or "").strip(), *(["", "Options, as name=value:"] if fields(kind) else [])]
    for one in fields(kind):
        default = "..." if one.default is MISSING else _text(one.default)
        about = one.metadata.get("about", "")
        about += ", also as words without a name" if one.metadata.get("free") else ""
        lines.append(f"  {f'{one.name}={default}':<28} {about}".rstrip())
    return "\n".join(lines)


def command_line(options: Any, program: str | None = None) -> str:
    """The command that gives these options, less those that have their defaults. `program` is what
    follows `python -m`: the module of the options if left out."""
    module = type(options).__module__
    spec = sys.modules[module].__spec__  # where __main__ has its name
    words = (program or (spec.name if spec else module)).split()
    given = ((one.name, getattr(options, one.name), one.default) for one in fields(options))
    words += [f"{name}={_text(value)}" for name, value, default in given if value != default]
    return shlex.join(["python", "-m", *words])


def _text(value: Any) -> str:
    """A value as a word has it."""
    if isinstance(value, TEXTS) and yaml.safe_load(str(value)) == str(value):
        return str(value)
    return json.dumps(value, default=str, separators=(",", ":"))


def begin(options: Any, device: "torch.device", program: str | None = None) -> dict[str, Any]:
    """What every result file begins with: command, settings, versions, hardware and git; and with
    `resume=true` what an earlier run has left in `out`, with the commands of both. Settings are
    the options, but for `out`, `resume` and those that vary. `program`: see `command_line`.

    Raises:
        ValueError: the earlier one had other settings.
    """
    from specdec.lab.environment import describe_environment  # imports torch, as few commands do

    settings = {
        one.name: getattr(options, one.name)
        for one in fields(options)
        if one.name not in VOLATILE and not one.metadata.get("varies")
    }
    head = {
        "command": command_line(options, program),
        "settings": json.loads(json.dumps(settings, default=str)),
        **describe_environment(device),
    }
    if not getattr(options, "resume", False) or not options.out.exists():
        return head
    result = _read_result(options.out)
    for name, value in head["settings"].items():
        before = result["settings"].get(name)
        if before != value:
            raise ValueError(
                f"{options.out}: {name}={before} there, {value} now; leave resume out"
            )
    commands = dict.fromkeys([*result["command"].split("; "), head["command"]])
    return {**result, **head, "command": "; ".join(commands)}


def _read_result(path: Path) -> dict[str, Any]:
    """What an earlier run has left.

    Raises:
        ValueError: no result file.
    """
    try:
        found = json.loads(path.read_bytes())
        whole = isinstance(found, dict) and isinstance(found.get("settings"), dict)
        reason = "" if whole and isinstance(found.get("command"), str) else "no such result file"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    if reason:
        raise ValueError(
            f"{path}: cannot be continued, {reason}; leave resume out, or put it back"
        )
    return dict(found)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Replace a file at once, so that an interruption leaves the old one or the new one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_json(result, indent=1) + "\n")

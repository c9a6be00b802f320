"""Settings: what words like `drafter=pld tree=chain tree.budget=16` stand for, as Hydra composes
them from the files in `configs/`. Beside `run.py` the only file that knows Hydra."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdec.lab.files import check_folder
from specdec.lab.jobs import SWEEP, Ledger
from specdec.lab.lock import Lock, missing
from specdec.lab.options import CONFIGS, nearest, no_option, no_setting, options

ERRORS = (HydraException, OmegaConfBaseException)
FOLDERS = ("--config-dir", "-cd")
# What else may begin with a dash, and what may follow it; None: a word of the user's own.
FLAGS: dict[str, Sequence[str] | None] = {
    **dict.fromkeys(("--multirun", "-m", "--run", "-r", "--resolve", "--shell-completion"), ()),
    **dict.fromkeys(("-sc", "--help", "-h", "--hydra-help", "--version"), ()),
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins")),
    **dict.fromkeys(("--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), None),
    **dict.fromkeys((*FOLDERS, "--experimental-rerun"), None),
}
# Options of Hydra's that come with other packages.
EXTRAS = {
    **dict.fromkeys(
        ("submitit_slurm", "submitit_local"), "; pip install 'specdec-lab[slurm]' brings it"
    ),
    "optuna": "; pip install hydra-optuna-sweeper brings it",
}
Settings = dict[str, Any]
"""Every setting, resolved; `choices` has the option that was taken of each group, by name."""


class Refused(BaseException):
    """What Hydra lets through its callbacks, of which it only warns of an Exception."""


class SweepFolder(Callback):
    """Looks at the folder of a sweep before Hydra writes to it, and opens its ledger."""

    made: ClassVar[list[Path]] = []  # by the sweep of this process
    ledger: ClassVar[Ledger | None] = None
    planned: ClassVar[list[list[str]]] = []  # words of its jobs; none if they are not known ahead

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a folder that cannot be used, and remember what is going to be made."""
        try:
            file = out_of(config) / "multirun.yaml"
            if config["resume"] is True and not file.exists():
                raise ValueError(
                    f"resume=true: there is no sweep to continue in out={file.parent}"
                )
            check_folder(file.parent, "a sweep")
            Lock(file.with_name("lock"), f"out={file.parent}").release()
            planned = _jobs_ahead(config)
            places = {word for words in planned for word in words if word.startswith("out=")}
            if len(places) > 1:
                raise ValueError(
                    f"{', '.join(sorted(places))}: the jobs of a sweep share a folder; give one"
                )
            SweepFolder.made = missing(file)
            SweepFolder.ledger, SweepFolder.planned = Ledger.open(file.parent), planned
        except ValueError as error:
            raise Refused(str(error)) from error

    @classmethod
    def forget(cls) -> None:
        """Remove what Hydra has made of a sweep that has left nothing else."""
        for path in cls.made:
            with suppress(OSError):
                if path.is_dir():
                    path.rmdir()
                elif os.listdir(path.parent) == [path.name]:
                    path.unlink()
        cls.made, cls.ledger, cls.planned = [], None, []
        os.environ.pop(SWEEP, None)


def _jobs_ahead(config: DictConfig) -> list[list[str]]:
    """Words of the jobs of a sweep; none of a sweeper that decides as it goes."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return []
    words = [f"{name}={value}" for name, value in (sweeper.get("params") or {}).items()]
    words += [str(word) for word in config.hydra.overrides.task]
    with suppress(HydraException, AssertionError):  # which Hydra tells, or of a glob
        overrides = OverridesParser.create().parse_overrides(words)
        return BasicSweeper.split_arguments(overrides, None)[0]
    return []


def find_own_code() -> None:
    """Let classes of the user's own be imported from the folder in which a command is typed, as
    with `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def out_of(config: Mapping[Any, Any]) -> Path:
    """The folder of a run or a sweep, from all its settings.

    Raises:
        ValueError: there is none.
    """
    out = config["out"]
    if not isinstance(out, str | int | float) or isinstance(out, bool) or not str(out).strip():
        raise ValueError(f"out={out}: must be a folder, which is made if there is none")
    return Path(str(out)).absolute()


def continuing(
    arguments: Sequence[str], out: Path, command: str = "run", resume: str = "true"
) -> str:
    """The command that continues what these arguments began, a run, a sweep or a training, which
    has left something in `out`; to be typed in the same folder."""
    flags, words = list[str](), list[str]()
    given = iter(arguments)
    for word in given:
        if FLAGS.get(word, ()) != ():
            flags += [word, next(given, "")]
        elif not re.match(r"\+*(out|resume)=", word):
            (flags if word.startswith("-") else words).append(word)
    again = [f"resume={resume}", word_of("out", str(out))]
    return shlex.join(["python", "-m", f"specdec.{command}", *flags, *words, *again])


def word_of(name: str, value: str) -> str:
    """A setting whose value is a text, as Hydra reads it."""
    if re.fullmatch(r"[\w/.:@%+-]+", value):
        return f"{name}={value}"
    # Backslashes are doubled where a quote follows, and nowhere else.
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"\\+\Z", lambda found: 2 * found[0], value).replace("${", "\\${")
    return f'{name}="{value}"'


def settings_of(words: str | Sequence[str], command: str = "run") -> Settings:
    """What `python -m specdec.run WORDS` would run; `--config-dir FOLDER` adds options of one's
    own. Of words for the same setting the last one counts.

    Args:
        command: whose settings: run or train.

    Raises:
        ValueError: no such setting or option; one line.
    """
    given, flags = split(shlex.split(words) if isinstance(words, str) else words)
    check_words(given)
    found = [Path(folder).absolute().as_uri() for folder in folders_of(flags)]
    overrides = [*given, f"hydra.searchpath=[{','.join(found)}]"] if found else given

    def composed(words: list[str]) -> DictConfig:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(command, overrides, return_hydra_config=True)

    return settings_in(composed, given, command)


@contextmanager
def in_one_line(command: str = "run") -> Iterator[None]:
    """What Hydra refuses is a ValueError that says so in one line."""
    try:
        yield
    except ERRORS as error:
        raise ValueError(message_of(error, command)) from error


def settings_in(
    composed: Callable[[list[str]], DictConfig], words: list[str], command: str = "run"
) -> Settings:
    """What a job of a sweep would run.

    Args:
        composed: the config of words, with Hydra's own.
        command: whose settings they are.

    Raises:
        ValueError: no such setting or option; one line.
    """
    with in_one_line(command):
        config = composed(words)
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        return resolved(own, config.hydra.runtime.choices, words)


def split(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Settings and options of groups, wherever they stand; and what begins with dashes, with its
    value.

    Raises:
        ValueError: nothing known begins so, or its value is missing or wrong.
    """
    given: list[str] = []
    flags: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            given.append(word)
            continue
        if name not in FLAGS:
            near = nearest(name, FLAGS)
            raise ValueError(
                f"{word}: no such option{near}; settings are words without dashes, as in "
                f"drafter=ngram"
            )
        flags.append(word)
        known = FLAGS[name]
        if known == ():
            if equals:
                raise ValueError(f"{word}: takes no value")
            continue
        if not equals:
            value = next(rest, "")
            flags.append(value)
        if not value or (known is not None and value not in known):
            raise ValueError(f"{name}={value}: must be {', '.join(known or ['given'])}")
    return given, flags


def folders_of(flags: Sequence[str]) -> list[Path]:
    """Of the user's own options.

    Raises:
        ValueError: there is no such folder.
    """
    found = []
    for place, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in FOLDERS:
            folder = Path(value if equals else flags[place + 1]).expanduser()
            if not folder.is_dir():
                raise ValueError(f"--config-dir {folder}: no such folder")
            found.append(folder)
    return found


def check_words(words: Sequence[str]) -> None:
    """Raise ValueError for a word that Hydra would take in silence or refuse without a name."""
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise ValueError(f"{word}: must be group=option or setting=value")
        if name.lstrip("+") == "hydra.sweeper.params":  # OmegaConf stumbles over it
            raise ValueError(
                f"{name}: what is swept over are words, as in tree.budget=4,8; in a file of "
                f"settings it stands there"
            )
        if not equals:  # Hydra says it, or the word begins with ~ and removes something
            continue
        if value[:1] in ("", "[") or value == "null":
            by_name = options(name)
            if by_name:
                raise ValueError(no_option(name, value, by_name))


def resolved(config: DictConfig, choices: Mapping[str, Any], words: Sequence[str]) -> Settings:
    """A composed config as settings.

    Args:
        words: it was composed of.

    Raises:
        OmegaConfBaseException: something is missing or refers to nothing.
        ValueError: an option that is none, or a word without effect.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for place, option in choices.items():
        group = place.partition("@")[0]
        if group in settings and not re.fullmatch(r"(\w+/)*[^\W_][\w-]*", str(option)):
            raise ValueError(no_option(group, option, options(group)))
    for word in words:
        name, _, value = word.partition("=")
        if value == "{}" and OmegaConf.select(config, name.lstrip("+")):
            raise ValueError(
                f"{word}: empties nothing, for it is added to what is there; ~{name} removes it"
            )
    if "choices" in settings:
        raise ValueError(no_setting("choices"))
    named = [*map(str, config), "experiment"]
    return {
        **settings,
        "choices": {name: choices[name] for name in named if choices.get(name) is not None},
    }


def message_of(error: BaseException, command: str = "run") -> str:
    """What is wrong, in one line that begins with the setting."""
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: must be given; its file in configs/ shows how"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: must be group=option, or setting=value with the value in YAML"
    option = re.search(r"Could not find '(hydra/\w+|\w+)/([^']*)'", text)
    if option:
        listed = re.search(r"Available options in '.*?':\n((?:\t.*\n?)*)", text)
        known = listed[1].split() if listed else []
        extra = EXTRAS.get(option[2], "")
        return no_option(option[1], option[2], {*options(option[1]), *known}) + extra
    unknown = re.match(r"Could not (?:override|delete from config\.) '?(.*?)'", text)
    if unknown and "@" in unknown[1]:
        return f"{unknown[1]}: nothing there to be replaced; --cfg job shows what there is"
    if unknown:
        return no_setting(unknown[1], command)
    twice = re.match(r"Multiple values for (\S+)\.", text)
    if twice:
        return f"{twice[1]}: there is such an option already; leave the + out"
    several = re.match(r"Ambiguous value for argument '(.*?)'", text)
    if several:
        name, _, values = several[1].partition("=")
        return (
            f"{several[1]}: several values; for a list write '{name}=[{values}]', for a run of "
            f"each add -m"
        )
    lines = []
    for line in text.splitlines():
        if line.strip().startswith(("full_key:", "object_type=", "Config search path")):
            break
        lines.append(line.strip().rstrip("."))
    message = "; ".join(line for line in lines if line)
    if "'${out}'" in message or "'out' not found" in message:
        return f"out: must be a folder ({message})"
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key and key not in message else message

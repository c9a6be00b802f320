"""Settings: what words like `drafter=pld tree=chain tree.budget=16` stand for, as Hydra composes
them from the files in `configs/`. Beside `run.py` the only file that knows Hydra."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from specdec.lab.lock import Lock, missing

CONFIGS = str(Path(__file__).parents[1] / "configs")
ERRORS = (HydraException, OmegaConfBaseException)
VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")  # take a word
Settings = dict[str, Any]
"""Every setting, resolved; `choices` has the option that was taken of each group, by name."""


class Refused(BaseException):
    """What Hydra lets through its callbacks, of which it only warns of an Exception."""


class SweepFolder(Callback):
    """Looks at the folder of a sweep before Hydra writes to it."""

    made: ClassVar[list[Path]] = []  # by the sweep of this process

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a folder that cannot be used, and remember what is going to be made."""
        try:
            file = out_of(config) / "multirun.yaml"
            if config["resume"] is True and not file.exists():
                raise ValueError(
                    f"resume=true: there is no sweep to continue in out={file.parent}"
                )
            Lock(file.with_name("lock"), f"out={file.parent}").release()
            SweepFolder.made = missing(file)
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
        cls.made = []


def out_of(config: Mapping[Any, Any]) -> Path:
    """The folder of a run or a sweep, from all its settings.

    Raises:
        ValueError: there is none.
    """
    out = config["out"]
    if not isinstance(out, str | int | float) or isinstance(out, bool) or not str(out).strip():
        raise ValueError(f"out={out}: must be a folder, which is made if there is none")
    return Path(str(out)).absolute()


def continuing(arguments: Sequence[str], out: Path) -> str:
    """The command that continues a run or a sweep of these arguments, which has left something in
    `out`; to be typed in the same folder."""
    flags, words = list[str](), list[str]()
    given = iter(arguments)
    for word in given:
        if word in VALUED:
            flags += [word, next(given, "")]
        elif not re.match(r"\+*(out|resume)=", word):
            (flags if word.startswith("-") else words).append(word)
    again = ["resume=true", word_of("out", str(out))]
    return shlex.join(["python", "-m", "specdec.run", *flags, *words, *again])


def word_of(name: str, value: str) -> str:
    """A setting whose value is a text, as Hydra reads it."""
    if re.fullmatch(r"[\w/.:@%+-]+", value):
        return f"{name}={value}"
    # Backslashes are doubled where a quote follows, and nowhere else.
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"\\+\Z", lambda found: 2 * found[0], value).replace("${", "\\${")
    return f'{name}="{value}"'


def settings_of(words: str | Sequence[str]) -> Settings:
    """What `python -m specdec.run WORDS` would run; `--config-dir FOLDER` adds options of one's
    own.

    Raises:
        ValueError: no such setting or option; one line.
    """
    overrides = _with_folders(shlex.split(words) if isinstance(words, str) else words)
    try:
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose("run", overrides, return_hydra_config=True)
        choices = config.hydra.runtime.choices
        return resolved(
            OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), choices
        )
    except ERRORS as error:
        raise ValueError(message_of(error)) from error


def _with_folders(words: Sequence[str]) -> list[str]:
    """With `--config-dir FOLDER` as Hydra's composing wants it."""
    left, folders = [], []
    given = iter(words)
    for word in given:
        name, _, folder = word.partition("=")
        if name == "--config-dir":
            folders.append(Path(folder or next(given, "")).absolute().as_uri())
        else:
            left.append(word)
    return [*left, f"hydra.searchpath=[{','.join(folders)}]"] if folders else left


def resolved(config: DictConfig, choices: Mapping[str, Any]) -> Settings:
    """A composed config as settings.

    Raises:
        OmegaConfBaseException: something is missing or refers to nothing.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {
        **settings,
        "choices": {name: choices[name] for name in map(str, config) if name in choices},
    }


def message_of(error: BaseException) -> str:
    """What is wrong, in one line."""
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        text = f"{error.full_key}: must be given; its file in configs/ shows how"
    if isinstance(error, OverrideParseException):
        text = f"{error.override}: must be group=option, or setting=value with the value in YAML"
    unknown = re.match(r"Could not override '(.*?)'", text)
    if unknown:
        text = f"{unknown[1]}: no such setting; python -m specdec.run --cfg job lists them"
    lines = []
    for line in text.splitlines():
        if line.strip().startswith(("full_key:", "object_type=", "Config search path")):
            break
        lines.append(line.strip().rstrip("."))
    group = re.search(r"Could not find '(\w+)/", text)
    if group:  # Hydra names the options of a group, not those in its folders
        folders = sorted((Path(CONFIGS) / group[1]).glob("*/*.yaml"))
        lines += [f"{path.parent.name}/{path.stem}" for path in folders]
    return "; ".join(line for line in lines if line)

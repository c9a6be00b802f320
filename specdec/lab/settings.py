"""Settings: what words like `drafter=pld tree=chain tree.budget=16` stand for, as Hydra composes
them from the files in `configs/`. Beside `run.py` the only file that knows Hydra."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = str(Path(__file__).parents[1] / "configs")
ERRORS = (HydraException, OmegaConfBaseException)
Settings = dict[str, Any]
"""Every setting, resolved; `choices` has the option that was taken of each group, by name."""


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


def message_of(error: Exception) -> str:
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

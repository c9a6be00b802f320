"""The words that make a run again, from its settings and the defaults of the options it took."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml

from specdec.compare.read import Run
from specdec.lab.options import CONFIGS, general, read

NO_WORD = ("out", "resume", "tracker", "record")  # of the same results elsewhere


def words_of(run: Run) -> list[str]:
    """What differs from the defaults, as one types it."""
    return list(_words(run.config, run.choices))


def _words(config: Mapping[str, Any], choices: Mapping[str, str]) -> Iterator[str]:
    usual = _usual_options()
    for group, option in choices.items():
        if group not in usual or group in NO_WORD:
            continue
        if option != usual[group]:
            yield f"{group}={option}"
        defaults = _defaults(group, option)
        for name, value in config.get(group, {}).items():
            if name in defaults and value != _resolved(defaults[name], config):
                yield f"{group}.{name}={_typed(value)}"
    for name, one in general().items():
        if name not in NO_WORD and name in config and config[name] != yaml.safe_load(one.default):
            yield f"{name}={_typed(config[name])}"


def _usual_options() -> dict[str, str]:
    """The option of each group that is taken without a word."""
    order = yaml.safe_load((CONFIGS / "run.yaml").read_text())["defaults"]
    return {name: option for one in order if isinstance(one, dict) for name, option in one.items()}


@cache
def _defaults(group: str, option: str) -> dict[str, Any]:
    """Of an option's settings; none of an option of the user's own."""
    path = CONFIGS / group / f"{option}.yaml"
    settings = read(path).settings if path.is_file() else {}
    return {name: yaml.safe_load(one.default) for name, one in settings.items()}


def _resolved(default: Any, config: Mapping[str, Any]) -> Any:
    """A default that is that of another setting, as `${batch_size}`, is its value."""
    named = re.fullmatch(r"\$\{([\w.]+)\}", default) if isinstance(default, str) else None
    if named is None:
        return default
    found: Any = config
    for part in named[1].split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _typed(value: Any) -> str:
    """As a word has it."""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))

"""Wrong inputs over all settings: one line that names the setting, nothing left behind, and soon.
The settings are those of the files, so that a new one is tested too."""

import math
import random
import re
import time
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from specdec.lab.build import cache_of, method_of, placement_of
from specdec.lab.options import CONFIGS, general, groups
from specdec.lab.settings import settings_of
from specdec.lab.setup import general_of, record_of, target_of, tracker_of

COUNT, SOON = 150, 5.0
NEEDED = {
    "dflash": "drafter.path=heads",
    "eagle": "drafter.path=heads",
    "medusa": "drafter.path=heads",
    "mtp": "drafter.path=heads",
    "peagle": "drafter.path=heads",
    "rest": "drafter.datastore=store",
    "user": "drafter._target_=builtins.len",
    "hf": "target.path=zoo:target",
    "typical": "acceptance.allow_lossy=true",
    "relaxed": "acceptance.allow_lossy=true",
}
# What no setting of any type may be.
ALWAYS_WRONG: tuple[Any, ...] = ({"a": 1}, [[["deep"]]], [None])
NUMBERS: tuple[Any, ...] = ("many", True, [1], math.nan, -math.inf, math.inf, -1e300, -(10**30))


@cache
def composed(words: str) -> dict[str, Any]:
    return settings_of(words)


def copied(words: str) -> dict[str, Any]:
    """Composing takes half a second."""
    return deepcopy(composed(words))


def words_of(group: str, option: str) -> str:
    """An option that can be built, with what it cannot do without."""
    lossy = "acceptance.allow_lossy=true" if option == "synthetic" else ""
    return " ".join(filter(None, (f"{group}={option}", NEEDED.get(option, ""), lossy)))


def cases() -> list[tuple[str, str, Any]]:
    """Words, a setting, and a wrong value of it; seeded."""
    found: list[tuple[str, str, Any]] = []
    every = [("", name, one) for name, one in general().items() if name != "out"]
    for group, options in groups().items():
        if group in ("experiment", "prompts"):
            continue
        for option, about in options.items():
            words = words_of(group, option)
            every += [(words, f"{group}.{name}", one) for name, one in about.settings.items()]
    for words, name, one in every:
        if name.endswith(("_target_", ".path", ".paths", ".datastore")):
            wrong: tuple[Any, ...] = ({"a": 1}, True)
        elif one.default.replace(".", "").isdigit():
            wrong = (*NUMBERS, None)
        elif one.default in ("true", "false"):
            wrong = ("maybe", 2, None, [True])
        else:
            wrong = ALWAYS_WRONG
        found += [(words, name, value) for value in wrong if (name, value) not in LEGAL]
    return random.Random(0).sample(found, min(COUNT, len(found)))


# Seeds of any size work, so does a null that stands for no limit, and rates may be a list.
LEGAL = (
    ("seed", -(10**30)),
    ("drafter.max_spec_factor", None),
    ("drafter.rates", [1]),
    *((f"sampling.{name}", None) for name in ("top_p", "top_k", "min_p")),
)


def check(settings: dict[str, Any]) -> None:
    """All that a run checks before it loads a model."""
    general_of(settings)
    method_of(settings)
    cache_of(settings)
    placement_of(settings)
    target_of(settings)
    tracker_of(settings)
    record_of(settings)


@pytest.fixture(scope="module")
def imported() -> None:
    """What is imported once is no part of the time of a case."""
    check(copied("tracker=wandb"))


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("words", "name", "value"), cases())
def test_wrong_values_end_in_one_line_that_names_the_setting(
    words: str, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = copied(words)
    *path, last = name.split(".")
    place = settings
    for part in path:
        place = place[part]
    place[last] = value
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(name)) as refusal:
        check(settings)
    assert time.perf_counter() - begun < SOON
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [g for g in groups() if g not in ("experiment", "prompts")])
def test_unknown_names_of_a_group_are_refused(group: str) -> None:
    for option in groups()[group]:
        settings = copied(words_of(group, option))
        settings[group]["nonsense"] = 1
        with pytest.raises(ValueError, match=f"^{group}.nonsense=1: .*no such setting"):
            check(settings)


@pytest.mark.parametrize("group", ["drafter", "tree", "acceptance", "tracker"])
@pytest.mark.parametrize(
    "target",
    ["collections.OrderedDict", "json", "specdec.no.X", "", 7, None, ["a"], "a b", "x:y:z"],
)
def test_what_is_not_of_its_kind_is_refused(group: str, target: Any) -> None:
    settings = copied("acceptance=greedy")
    settings[group]["_target_"] = target
    if (group, target) == ("acceptance", None):  # stands for auto
        return check(settings)
    with pytest.raises(ValueError, match=rf"^{group}._target_=") as refusal:
        check(settings)
    assert "\n" not in str(refusal.value)


def test_what_is_missing_is_named() -> None:
    for name in (*general(), *(group for group in groups() if group != "experiment")):
        settings = copied("")
        del settings[name]
        if name in ("stop_strings", "prompts"):
            continue
        with pytest.raises(ValueError, match=f"{name}: must be given|^{name}=null"):
            check(settings)


def test_the_files_are_all_read() -> None:
    commands = (groups(), groups(command="train"))
    known = {option for one in commands for options in one.values() for option in options}
    every = (p for p in CONFIGS.rglob("*.yaml") if p.parent != CONFIGS and p.name[0] != "_")
    files = [p for p in every if "hydra" not in p.relative_to(CONFIGS).parts]  # its own groups
    assert known == {str(p.relative_to(CONFIGS)).split("/", 1)[1][:-5] for p in files}

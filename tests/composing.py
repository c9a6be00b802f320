"""Hydra's settings, in less time."""

from collections import defaultdict
from copy import copy, deepcopy
from typing import Any

import pytest


def choose_quickly() -> None:
    """At every file of settings Hydra writes down what has been chosen so far, for defaults that
    are named by an interpolation, which takes a fifth of the time: let it do so where there are
    such."""
    from hydra._internal import defaults_list

    write_down = getattr(defaults_list, "_create_interpolation_map", None)

    def choices(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        if not any(default.is_interpolation() for default in defaults):
            return None
        return write_down(overrides, defaults, self_added)

    if write_down is not None:
        defaults_list._create_interpolation_map = choices  # type: ignore[assignment]


def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes each job of a sweep to see whether it can be, and again when its turn comes:
    let it keep the first."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.plugins.sweeper import Sweeper

    compose, check = ConfigLoaderImpl.load_sweep_config, Sweeper.validate_batch_is_legal
    kept: defaultdict[tuple[str, ...], list[Any]] = defaultdict(list)  # by the words of a job
    checking = False

    def checked(sweeper: Sweeper, batch: Any) -> None:
        nonlocal checking
        kept.clear()
        checking = True
        try:
            check(sweeper, batch)
        finally:
            checking = False

    def composed(loader: ConfigLoaderImpl, master_config: Any, sweep_overrides: list[str]) -> Any:
        waiting = kept[tuple(sweep_overrides)]
        if waiting and not checking:
            return waiting.pop(0)
        made = compose(loader, master_config, sweep_overrides)
        if checking:
            waiting.append(made)
        return made

    monkeypatch.setattr(Sweeper, "validate_batch_is_legal", checked)
    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", composed)


def keep_composed() -> None:
    """What the files of settings say, and what comes of the same files in the same order, is the
    same each time: it is kept, and settings that are given are put into a copy. Settings in other
    folders are read anew."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import ConfigRepository

    load = ConfigRepository.load_config
    compose = getattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", None)
    files, composed = dict[Any, Any](), dict[Any, Any]()
    if compose is None:
        return

    def places(repo: Any) -> tuple[str, ...] | None:
        from specdec.lab.options import CONFIGS

        found = [(source.scheme(), source.path) for source in repo.get_sources()]
        ours = all(scheme != "file" or path == str(CONFIGS) for scheme, path in found)
        return tuple(f"{scheme}://{path}" for scheme, path in found) if ours else None

    def load_once(repo: ConfigRepository, config_path: str) -> Any:
        key = places(repo), config_path
        if key[0] is None:
            return load(repo, config_path)
        if key not in files:
            files[key] = load(repo, config_path)
        return files[key]

    def compose_once(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> Any:
        key = places(repo), *map(repr, defaults)
        if key[0] is None:
            return compose(loader, defaults, repo)
        if key not in composed:
            kept, spare = files.copy(), copy(repo)
            spare.cache = deepcopy(repo.cache)  # for it is made of their parts
            composed[key] = compose(loader, defaults, spare)
            files.clear()
            files.update(kept)
        return deepcopy(composed[key])

    ConfigRepository.load_config = load_once  # type: ignore[assignment]
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_once  # type: ignore[assignment]

"""What `--help` and `--version` of `python -m specdec.run` print; nothing is run."""

from pathlib import Path

import pytest
import yaml

from specdec import __version__
from specdec.lab import running
from specdec.lab.options import CONFIGS, OTHER_NAMES, general, groups


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "opened", None)


def options() -> dict[str, dict[str, dict[str, object]]]:
    """Settings of each option of each group that a run may choose of, as YAML has them."""
    chosen = yaml.safe_load((CONFIGS / "run.yaml").read_text())["defaults"]
    groups = [name for one in chosen if isinstance(one, dict) for name in one if "/" not in name]
    found: dict[str, dict[str, dict[str, object]]] = {}
    for group in groups:
        for path in (CONFIGS / group).rglob("*.yaml"):
            if not path.name.startswith("_"):
                option = path.relative_to(CONFIGS / group).with_suffix("").as_posix()
                text = path.read_text()
                settings = {} if "@package _global_" in text else yaml.safe_load(text) or {}
                found.setdefault(group, {})[option] = settings
    return found


@pytest.mark.parametrize("words", [("--version",), ("drafter=nothing", "--version")])
def test_the_version_is_all_that_is_told(specdec, tmp_path, words):
    assert specdec(*words) == (0, f"specdec {__version__}\n", "")
    assert not list(tmp_path.iterdir())


def test_help_names_every_option_and_every_setting(specdec, tmp_path):
    code, printed, error = specdec("--help")
    assert (code, error) == (0, "")
    lines = printed.splitlines()
    sections = printed.split("\n\n")
    for group, named in options().items():
        (section,) = (one for one in sections if one.startswith(f"{group}="))
        for option, settings in named.items():
            (line,) = (one for one in section.splitlines() if one.split()[0] == option)
            assert line.split()[1:], option  # and says what it is
            for name in settings.keys() - {"defaults", "_target_"}:
                shown = [one for one in section.splitlines() if f" {group}.{name}=" in one]
                assert shown, f"{group}.{name}"
    general = yaml.safe_load((CONFIGS / "run.yaml").read_text())
    for name in general.keys() - {"defaults", "hydra"}:
        assert [one for one in lines if one.startswith(f"  {name}=")], name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "train"])
def test_every_setting_of_a_group_says_what_it_is(command):
    for group, known in groups(command=command).items():
        said = [one for option in known.values() for one in option.settings.items()]
        told = {name for name, setting in said if setting.about}
        assert {name for name, _ in said} == told, group


def test_what_others_call_a_setting_leads_to_one_that_there_is():
    ours = {*general("run"), *general("train")}
    for command in ("run", "train"):
        for group, known in groups(command=command).items():
            ours |= {f"{group}.{name}" for one in known.values() for name in one.settings}
    assert set(OTHER_NAMES.values()) <= ours


def test_help_is_the_same_by_its_short_name_and_beside_words(specdec):
    whole = specdec("--help")
    assert specdec("-h") == whole
    assert specdec("-m", "drafter=nothing", "--help") == whole


def test_help_knows_options_of_ones_own(specdec, tmp_path):
    (tmp_path / "my/drafter").mkdir(parents=True)
    (tmp_path / "my/drafter/echo.yaml").write_text(
        "# What was said before\n_target_: my.Echo\nwindow: 4  # how many tokens of it\n"
    )
    code, printed, _ = specdec("--config-dir", "my", "--help")
    assert code == 0
    assert printed != specdec("--help")[1]
    assert any(
        " ".join(one.split()) == "echo What was said before" for one in printed.splitlines()
    )
    (line,) = (one for one in printed.splitlines() if "drafter.window=4 " in one)
    assert "how many tokens of it" in line
    assert line.endswith("[echo]")
    code, printed, error = specdec("--config-dir", "nowhere", "--help")
    assert (code, printed) == (2, "")
    assert error == "error: --config-dir nowhere: no such folder\n"

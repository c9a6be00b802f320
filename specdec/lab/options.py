"""What can be typed after `python -m specdec.run`: groups, options and settings, as the files in
`configs/` have them. For `--help`, and for what is said of a misspelled one."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
NO_SETTINGS = ("defaults", "hydra", "_target_")
COLUMN = 36  # where the text of `--help` begins that says what something is
HELP = """\
python -m specdec.run [--config-dir FOLDER] [-m] WORDS

A word is group=option, or setting=value with the value in YAML, as in
    python -m specdec.run drafter=small_llama tree=static tree.widths=[3,2,1]
Of a group one option counts; its settings follow, with their defaults. ??? must be given.
--config-dir FOLDER adds options of your own, -m runs every combination of a=1,2 b=3,4, --cfg job
prints all settings instead of running, --version the version, --hydra-help what Hydra can do.
Other commands, each with a --help: specdec compare, audit, sync, train, record, replay."""
# What engines, papers and transformers call it; what is nearly our own name needs no place here.
OTHER_NAMES = {
    name: ours
    for ours, names in {
        "target.path": "model model_path target_model",
        "target.tp": "tensor_parallel_size tp_size",
        "target.quantize": "quantization",
        "drafter.path": "draft draft_model assistant_model speculative_model head",
        "tree.budget": "num_speculative_tokens num_assistant_tokens gamma total_token nodes",
        "sampling.temperature": "do_sample temp",
        "prompts.path": "dataset prompt_file",
        "prompts.limit": "num_prompts num_samples",
        "prompts.samples": "n num_return_sequences",
        "cache.page_size": "block_size",
        "cache.dtype": "kv_cache_dtype",
        "max_new_tokens": "max_length max_model_len new_tokens",
        "batch_size": "bs batch max_num_seqs",
        "stop_strings": "stop stop_words",
        "seed": "random_seed",
        "out": "output_dir",
        "method.rate": "lr learning_rate",
        "minutes": "epochs num_train_epochs",
        "tokens": "max_tokens max_steps",
    }.items()
    for name in names.split()
}
# What a path or the name of a model is given to, where it was given as an option.
PATHS = {
    "target": "target=hf target.path",
    "drafter": "drafter=small_llama drafter.path",
    "prompts": "prompts=file prompts.path",
}


class Setting(NamedTuple):
    """A setting as its file has it: its default, in YAML, and the comment beside it."""

    default: str
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A file of settings: its first comment, and the settings by name."""

    about: str
    settings: dict[str, Setting]


def groups(folders: Sequence[Path] = (), command: str = "run") -> dict[str, dict[str, Option]]:
    """The options of every group of a command, by name, those of further folders among them."""
    order = yaml.safe_load((CONFIGS / f"{command}.yaml").read_text())["defaults"]
    names = [name for one in order if isinstance(one, dict) for name in one]
    return {name: options(name, folders) for name in names if "/" not in name}


def options(group: str, folders: Sequence[Path] = ()) -> dict[str, Option]:
    """The options of a group, by name; files whose names begin with _ are none."""
    found = {}
    for folder in (CONFIGS, *folders):
        for path in sorted((folder / group).rglob("*.yaml") if group.isidentifier() else ()):
            if not path.name.startswith("_"):
                found[str(path.relative_to(folder / group).with_suffix(""))] = read(path)
    return found


def general(command: str = "run") -> dict[str, Setting]:
    """The settings without a group, those in parts of their own file by full name."""
    path = CONFIGS / f"{command}.yaml"
    found, part = dict[str, Setting](), ""
    settings = read(path).settings
    for line in path.read_text().splitlines():
        whole = re.fullmatch(r"(  )?(\w+): *(.*?)(?: +# *(.*))?", line)
        if whole is None:
            continue
        inside, name, default, about = whole.groups()
        if not inside:
            part = name
            if name in settings and default:
                found[name] = settings[name]
        elif part in settings:
            found[f"{part}.{name}"] = Setting(default, about or "")
    return found


def read(path: Path) -> Option:
    """A file of settings, with those it takes over from files beside it."""
    text = path.read_text()
    settings: dict[str, Setting] = {}
    if "# @package _global_" in text:  # overrides of whole runs are no settings of an option
        return Option(about=_about(text), settings={})
    others = (yaml.safe_load(text) or {}).get("defaults", ())
    for beside in (path.with_name(f"{one}.yaml") for one in others if isinstance(one, str)):
        if beside.is_file():
            settings |= read(beside).settings
    name, above = "", ""  # the setting read last; a comment that stands above the next one
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+): *(.*?)(?: +# *(.*))?", line)
        if found:
            name = found[1]
            # A file that takes a setting over may give it another default alone.
            about = above or found[3] or settings.get(name, Setting("", "")).about
            settings[name], above = Setting(found[2], about), ""
        elif line.startswith("#"):
            above = f"{above} {line[1:].strip()}".strip() if name else ""
        elif name and line.strip().startswith("#"):  # the comment goes on
            default, about = settings[name]
            settings[name] = Setting(default, f"{about} {line.strip()[1:].strip()}")
    return Option(
        about=_about(text),
        settings={
            name: one
            for name, one in settings.items()
            if name not in NO_SETTINGS or one.default == "???"
        },
    )


def _about(text: str) -> str:
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    return next((line for line in lines if not line.startswith("@")), "")


def usage(folders: Sequence[Path] = (), command: str = "run", head: str = HELP) -> str:
    """What `--help` prints: every option of every group, and every setting.

    Args:
        head: what it begins with.
    """
    lines = [head, "", "Settings without a group:"]
    for name, one in general(command).items():
        lines.append(_line(f"  {name}={one.default}", one.about))
    chosen: dict[str, str] = {}
    for one in yaml.safe_load((CONFIGS / f"{command}.yaml").read_text())["defaults"]:
        chosen |= one if isinstance(one, dict) else {}
    for group, known in groups(folders, command).items():
        lines += ["", f"{group}={chosen[group] or '...'}"]
        lines += [_line(f"  {name}", option.about) for name, option in known.items()]
        having: dict[tuple[str, str], list[str]] = {}
        for name, option in known.items():
            for setting, one in option.settings.items():
                having.setdefault((setting, one.default), []).append(name)
        for (setting, default), of in sorted(having.items()):
            likely = [known[name].settings.get(setting) for name in (*of, *known)]
            about = next((one.about for one in likely if one and one.about), "")
            whose = "" if len(of) == len(known) else f" [{', '.join(of)}]"
            lines.append(_line(f"    {group}.{setting}={default}", about + whose))
    return "\n".join(lines)


def _line(name: str, about: str) -> str:
    return f"{name:<{COLUMN}} {about}".rstrip()


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; the nearest is NAME` for a misspelled word, nothing if none is near.

    Args:
        prefix: of the name, which the word and those that are known are without.
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; the nearest is {prefix}{found[0]}" if found else ""


def no_option(group: str, option: str, known: Iterable[str]) -> str:
    """What is wrong with `group=option`; `known` are options that there are."""
    names = sorted(name for name in known if not name.startswith("_"))
    hint = nearest(option, names)
    if not hint and group in PATHS and re.search(r"[/.:]", option):
        hint = f"; a path is given as {PATHS[group]}={option}"
    return f"{group}={option}: no such option{hint}; there are {', '.join(names)}"


def no_setting(name: str, command: str = "run") -> str:
    """What is wrong with a setting that the options taken do not have."""
    group, _, rest = name.partition(".")
    rest = re.sub(r"^parts\.\w+\.", "", rest)  # a part has what a drafter has
    known = groups(command=command)
    having = [one for one, option in known.get(group, {}).items() if rest in option.settings]
    if having:
        return f"{name}: no such setting here, but of {group}={', '.join(having)}"
    if group in known and rest in ("name", "type", "kind"):
        return f"{name}: no such setting; an option is chosen by {group}=OPTION"
    of_groups = {
        f"{one}.{setting}": entry
        for one, by_name in known.items()
        for option in by_name.values()
        for setting, entry in option.settings.items()
    }
    every = general(command) | of_groups
    last = name.rpartition(".")[2]
    found = (one for one in every if one.rpartition(".")[2] == last)
    same = list(dict.fromkeys(_followed(one, every[one].default) for one in found))
    if not same and OTHER_NAMES.get(last) in every:
        same = [OTHER_NAMES[last]]
    if same and (not rest or len(same) == 1):
        return f"{name}: no such setting; there is {' and '.join(same)}"
    parts = [one for one in every if "." in one]
    if rest and group in known:  # by what stands behind the group, which all of them share
        own = [one.partition(".")[2] for one in parts if one.startswith(f"{group}.")]
        near = nearest(rest, own, f"{group}.")
    else:
        near = nearest(name, parts if rest else [*general(command), *known])
    return f"{name}: no such setting{near or f'; python -m specdec.{command} --help lists them'}"


def _followed(name: str, default: str) -> str:
    """The setting that one of this default follows unless it is given, as tree.batch does, and
    which is meant more often; else its own name."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", default)
    return found[1] if found else name

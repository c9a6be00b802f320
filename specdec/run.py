"""The command line: `python -m specdec.run drafter=small_llama`. The only file that knows Hydra.

A config becomes an `Experiment`. Whatever is wrong with it ends in one line on stderr and exit
code 2, before any model is loaded where that is possible.
"""

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from specdec.kernels.choose import Kernels
from specdec.lab.experiment import (
    CacheSettings,
    Experiment,
    Method,
    choose_device,
    choose_dtype,
    stop_tokens,
)
from specdec.lab.prompts import load_prompts
from specdec.lab.records import RunFolder
from specdec.lab.terminal import Live, show_summary, show_sweep
from specdec.models.paged import PagedLM
from specdec.protocols import AcceptanceRule, Drafter
from specdec.sampling import SamplingParams
from specdec.tree import Children

CONFIGS = str(Path(__file__).parent / "configs")
VOLATILE = frozenset({"resume", "tracker", "out"})  # may differ when a run is resumed
SCALARS: dict[str, Any] = {
    "max_new_tokens": int,
    "ignore_eos": bool,
    "batch_size": int,
    "seed": int,
    "dtype": str,
    "device": str,
    "baseline": bool,
    "resume": bool,
    "out": str,
}
RULES = "specdec.verifier"
PARTS = dict[str, Drafter]  # settings of this type are drafters in their turn
USER_FUNCTION = "specdec.drafters.user.UserFunction"  # what makes a drafter of a function
# What the jobs of this process came to: one, or all of a sweep.
_finished: list[tuple[list[str], dict[str, Any]]] = []
_refused: list[tuple[list[str], str]] = []


def main() -> None:
    """Console entry point."""
    transformers.utils.logging.set_verbosity_error()
    _finished.clear()
    _refused.clear()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to the handler below
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, for drafters of the user's own
    try:
        _hydra_main()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if len(_finished) + len(_refused) > 1:
        show_sweep(_finished, _refused, Console())
    sys.exit(2 if _refused else 0)


@hydra.main(config_path=CONFIGS, config_name="run", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    """One run; returns what a sweeper maximises: the speedup, or tokens/s without a baseline."""
    try:
        settings: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        summary = run(settings, Console())
    except (ValueError, OmegaConfBaseException) as error:
        _fail(error, _overrides())  # a sweep goes on with its other jobs
        return None
    return summary.get("speedup") or summary["tokens_per_second"]


def run(settings: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Decode as the resolved settings say, print the table and return the summary.

    Raises:
        ValueError: a setting that cannot be used; the message names it.
    """
    scalars = {name: _typed(name, settings[name], kind) for name, kind in SCALARS.items()}
    sampling = _build(SamplingParams, "sampling", settings["sampling"], seed=scalars["seed"])
    cache = _build(CacheSettings, "cache", settings["cache"])
    hydra_config = HydraConfig.get()
    choices = hydra_config.runtime.choices
    rule, children = _pair(settings, sampling)
    shape = {**settings["tree"], "children": children}
    tree = _build(get_class(shape["_target_"]), "tree", shape)
    # Refuses a depth that contradicts the tree, before a model is loaded.
    tree.levels(_typed("drafter.depth", settings["drafter"].get("depth"), int | None))
    wide = any(tree.width(level) > 1 for level in range(tree.levels(None) if tree.budget else 0))
    if rule.chains and wide and not sampling.greedy:
        raise ValueError(
            f"acceptance={rule.name}: judges chains alone, and a node of tree={choices['tree']} "
            f"may have several children; use tree=chain, or acceptance=traversal"
        )
    tracker = _build(get_class(settings["tracker"]["_target_"]), "tracker", settings["tracker"])
    device = choose_device(scalars["device"])
    dtype = choose_dtype(scalars["dtype"], device)
    kernels = _build(Kernels, "kernels", settings["kernels"]).settled(device, dtype)
    source = dict(settings["prompts"])
    chat = source.pop("chat")
    prompts = load_prompts(**source)
    out = Path(hydra_config.runtime.output_dir)
    folder = RunFolder(out, config=settings, resume=scalars["resume"], volatile=VOLATILE)

    path = str(settings["target"]["path"])
    target = PagedLM.load(path, dtype=dtype, device=device, setting="target.path", kernels=kernels)

    def verifier() -> Any:
        tree_verifier = get_class(f"{RULES}.verifier.TreeVerifier")
        return tree_verifier(target, prefill_chunk=cache.prefill_chunk)

    def method(name: str, group: Mapping[str, Any], rule: AcceptanceRule) -> Method:
        drafter = build_drafter(name, "drafter", group, target=target, tree=tree)
        return Method(drafter=drafter, rule=rule)

    baseline_rule = _rule("greedy" if sampling.greedy else "target_only")
    plain = {"_target_": f"{__package__}.drafters.none.NoDrafter"}
    experiment = Experiment(
        target=target,
        verifier=verifier,
        method=method(choices["drafter"], settings["drafter"], rule),
        baseline=method("none", plain, baseline_rule) if scalars["baseline"] else None,
        prompts=prompts,
        sampling=sampling,
        cache=cache,
        max_new_tokens=scalars["max_new_tokens"],
        batch_size=scalars["batch_size"],
        stop_tokens=stop_tokens(target, ignore_eos=scalars["ignore_eos"]),
        chat=chat,
        labels={
            "drafter": choices["drafter"],
            "target": path,
            "tree": choices["tree"],
            "children": children,
            "acceptance": rule.name,
            "kernels": kernels.impl,
        },
    )
    sweep = hydra_config.mode == RunMode.MULTIRUN
    overrides = _overrides()
    if sweep:
        console.rule(f"{hydra_config.job.num}: {' '.join(overrides)}", align="left")
    synthetic = experiment.method.synthetic
    name = " ".join(overrides) or str(choices["drafter"])
    tracker.start(
        config={**settings, "synthetic": True} if synthetic else settings,
        folder=out,
        group="-".join(out.parent.parts[-2:]) if sweep else None,
        name=f"SYNTHETIC {name}" if synthetic else name,
    )
    try:
        summary = experiment.run(folder, tracker, Live(console))
    except KeyboardInterrupt:
        done = sum(len(side.generations.records) for side in folder.sides)
        console.print(
            f"interrupted: {done} finished texts are in {out}; resume=true out={out} continues"
        )
        raise
    show_summary(summary, console)
    console.print(f"results in {out}")
    _finished.append((overrides, summary))
    return summary


def _pair(settings: Mapping[str, Any], sampling: SamplingParams) -> tuple[AcceptanceRule, str]:
    """The acceptance rule and how children are chosen, where the settings leave them open.

    Raises:
        ValueError: the pairing would change the distribution of outputs, and that was not asked
            for, or the drafter works with another rule only.
    """
    acceptance, children = settings["acceptance"], settings["tree"]["children"]
    rule: AcceptanceRule | None = None
    if acceptance["_target_"]:
        options = {name: value for name, value in acceptance.items() if name != "allow_lossy"}
        rule = _build(get_class(acceptance["_target_"]), "acceptance", options)
    drafter = settings["drafter"]
    only = getattr(_located("drafter", drafter)[0], "acceptance", None)
    if only is not None:
        if rule is not None and rule.name != only:
            raise ValueError(
                f"acceptance={rule.name}: {drafter['_target_']} works with acceptance={only} "
                f"alone; use acceptance=auto"
            )
        return _rule(only), "top_k" if children == "auto" else children
    if children == "auto":
        wanted = rule.needs_proposal if rule else _samples("drafter", drafter)
        kinds: list[Children] = ["sample", "sample_with_replacement"]
        if not wanted or sampling.greedy:
            kinds = ["top_k"]
        fitting = [kind for kind in kinds if not (rule and rule.lossy(kind, sampling))]
        children = (fitting or kinds)[0]
    if rule is None:
        sampled = children != "top_k"
        name = "greedy" if sampling.greedy else "recursive_rejection" if sampled else "target_only"
        rule = _rule(name)
    reason = rule.lossy(children, sampling)
    if reason and not _typed("acceptance.allow_lossy", acceptance["allow_lossy"], bool):
        raise ValueError(
            f"acceptance={rule.name}: not lossless, {reason}; use acceptance=auto, or "
            f"acceptance.allow_lossy=true to run it all the same"
        )
    return rule, children


def build_drafter(name: str | None, setting: str, settings: Any, **given: Any) -> Drafter:
    """A drafter, a function of the user's, or a composition with all its parts, which are called
    by the files of their classes."""
    kind, function = _located(setting, settings)
    target = settings["_target_"]
    try:
        drafter: Drafter = _build(kind, setting, settings, **given, **function)
    except ValueError as error:
        # A class knows its settings by their names outside of any composition.
        text = re.sub(r"\bdrafter\.(?!parts\b)", f"{setting}.", str(error))
        raise ValueError(text) from error
    drafter.name = name or target.split(".")[-2]
    if function:
        drafter.name += f" ({target})"
    return drafter


def _located(setting: str, settings: Any) -> tuple[type[Drafter], dict[str, Any]]:
    """The class of a drafter, and what it is given if `_target_` names a mere function.

    Raises:
        ValueError: it names nothing that drafts.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("_target_"), str):
        raise ValueError(f"{setting}={settings}: must be the settings of a drafter with _target_")
    target = settings["_target_"]
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:  # whatever importing a module of the user's raises
        raise ValueError(
            f"{setting}._target_={target}: cannot be imported, {type(error).__name__}: {error}; "
            f"it must be module.name, of an installed package or of a file in {Path.cwd()}"
        ) from error
    if isinstance(found, type) and issubclass(found, Drafter):
        return found, {}
    if isinstance(found, type) or not callable(found):
        raise ValueError(
            f"{setting}._target_={target}: must be a function, or a class derived from Drafter"
        )
    user: type[Drafter] = get_class(USER_FUNCTION)
    return user, {"function": found}


def _samples(setting: str, settings: Any) -> bool:
    """Whether children are best drawn from its probabilities: from those of all parts of a
    composition."""
    kind, _ = _located(setting, settings)
    hints = get_type_hints(kind.__init__)
    parts = {
        f"{setting}.{name}.{part}": value
        for name in settings
        if hints.get(name) == PARTS
        for part, value in _named(f"{setting}.{name}", settings[name]).items()
    }
    return all(_samples(*part) for part in parts.items()) if parts else kind.sampled_children


def _named(setting: str, parts: Any) -> Mapping[str, Any]:
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(f"{setting}={parts}: must be settings of drafters, by name")
    return parts


def _rule(name: str) -> AcceptanceRule:
    """A rule by its file in `verifier/`; its class is the name in camel case."""
    rule: AcceptanceRule = get_class(f"{RULES}.{name}.{name.title().replace('_', '')}")()
    return rule


def _build(kind: type, group: str, settings: Mapping[str, Any], **given: Any) -> Any:
    """An object from the settings of its config group, each checked against the constructor's
    types."""
    hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    checked = {}
    for name, value in settings.items():
        if name == "_target_":
            continue
        setting = f"{group}.{name}"
        if name not in hints or name in given:
            raise ValueError(f"{setting}={value}: {kind.__name__} has no such setting")
        if hints[name] == PARTS:
            checked[name] = {
                part: build_drafter(None, f"{setting}.{part}", own, **given)
                for part, own in _named(setting, value).items()
            }
        else:
            checked[name] = _typed(setting, value, hints[name])
    try:
        inspect.signature(kind).bind(**given, **checked)
    except TypeError as error:
        raise ValueError(
            f"{group}: cannot build {kind.__name__} of these settings, {error}"
        ) from None
    return kind(**given, **checked)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of that type.

    Raises:
        ValueError: it is not.
    """
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a folder called 7
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise ValueError(f"{name}={value}: {expected}") from None


def _overrides() -> list[str]:
    """What was asked for on the command line, of this job."""
    return [str(override) for override in HydraConfig.get().overrides.task]


def _fail(error: Exception, overrides: Sequence[str] = ()) -> None:
    """Print what is wrong in one line."""
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        text = f"{error.full_key}: must be given; its file in configs/ shows how"
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
    message = "; ".join(line for line in lines if line)
    _refused.append((list(overrides), message))
    print(f"error: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()

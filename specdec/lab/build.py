"""From settings to the objects they describe. Everything that can be refused without a model is
refused here, in one line that names the setting."""

import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from specdec.kernels.choose import Kernels
from specdec.lab.method import Method
from specdec.lab.options import CONFIGS, nearest, no_setting
from specdec.lab.values import shown, typed
from specdec.models.placement import Placement
from specdec.protocols import AcceptanceRule, Drafter, TreePolicy
from specdec.reasons import part_of
from specdec.request import CacheSettings
from specdec.sampling import SamplingParams
from specdec.tree import Children

Settings = Mapping[str, Any]
RULES = "specdec.verifier"
PARTS = dict[str, Drafter]  # settings of this type are drafters in their turn
USER_FUNCTION = "specdec.drafters.user.UserFunction"  # what makes a drafter of a function
PLAIN = {"_target_": "specdec.drafters.none.NoDrafter"}
# What `_target_` of a group must be derived from, and what it must have of its own.
KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "tree": (TreePolicy, ("levels", "width")),
    "acceptance": (AcceptanceRule, ("name", "lossy", "accept")),
}


def group_of(settings: Settings, name: str) -> Mapping[str, Any]:
    """The settings of a group.

    Raises:
        ValueError: there are none.
    """
    found = settings.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: must be given, {name}=OPTION; --help lists the options")
    return found


def method_of(settings: Settings) -> Method:
    """The method, whose drafter is not loaded yet.

    Raises:
        ValueError: a setting that cannot be used, a pairing that would change the distribution of
            outputs, or a tree that the drafter or the rule refuses.
    """
    sampling = sampling_of(settings)
    rule, children = _pair(settings, sampling)
    shape = {**group_of(settings, "tree"), "children": children}
    tree: TreePolicy = build(_kind("tree", shape), "tree", shape)
    choices = settings["choices"]
    wide = any(tree.width(level) > 1 for level in range(tree.levels(None) if tree.budget else 0))
    if rule.chains and wide and not sampling.greedy:
        raise ValueError(
            f"acceptance={rule.name}: judges chains alone, and a node of tree={choices['tree']} "
            f"may have several children; use tree=chain, or acceptance=traversal"
        )
    drafter = _drafter(choices["drafter"], "drafter", group_of(settings, "drafter"))
    drafter.check(tree)
    names = choices["drafter"], choices["tree"]
    return _method(settings, names, drafter, tree, rule, sampling, own_parts(settings))


def baseline_of(settings: Settings) -> Method:
    """Plain decoding with the same sampling."""
    sampling = sampling_of(settings)
    rule = _rule("greedy" if sampling.greedy else "target_only")
    tree: TreePolicy = pkgutil.resolve_name("specdec.drafters.trees.chain.Chain")(budget=0)
    drafter = _drafter("none", "drafter", PLAIN)
    return _method(settings, ("none", "none"), drafter, tree, rule, sampling, {})


def _method(
    settings: Settings,
    names: tuple[str, str],
    drafter: Drafter,
    tree: TreePolicy,
    rule: AcceptanceRule,
    sampling: SamplingParams,
    own: Mapping[str, str],
) -> Method:
    verifier, cache = pkgutil.resolve_name(f"{RULES}.verifier.TreeVerifier"), cache_of(settings)
    return Method(
        drafter=drafter,
        drafter_name=names[0],
        tree=tree,
        tree_name=names[1],
        rule=rule,
        sampling=sampling,
        verifier=partial(
            verifier, prefill_chunk=cache.prefill_chunk, prefill_beside=cache.prefill_beside
        ),
        own=own,
    )


def own_parts(settings: Settings) -> dict[str, str]:
    """What runs and is not told by the names of options, as `module.name (file)` by setting:
    classes and functions of the user's, and those that take the place of an option's own."""
    found = {}
    for group in ("drafter", "tree", "acceptance"):
        file = CONFIGS / group / f"{settings['choices'][group]}.yaml"
        usual = yaml.safe_load(file.read_text()).get("_target_") if file.is_file() else None
        for setting, target in _targets(group, settings[group]):
            what = imported(setting, target)
            ours = str(getattr(what, "__module__", "")).startswith("specdec.")
            if not ours or (setting == group and usual not in (None, target)):
                found[setting] = f"{target} ({_file_of(what)})"
    return found


def _targets(setting: str, settings: Any) -> Iterator[tuple[str, str]]:
    """Every `_target_` of these settings and of those in them."""
    if isinstance(settings, Mapping):
        if isinstance(settings.get("_target_"), str):
            yield setting, settings["_target_"]
        for name, value in settings.items():
            yield from _targets(f"{setting}.{name}", value)


def _file_of(what: Any) -> str:
    """Where a class or function is written, from the folder where one works."""
    try:
        path = Path(inspect.getfile(inspect.unwrap(what)))
    except TypeError:  # an object that is called, or built in
        module = sys.modules.get(str(getattr(what, "__module__", None)))
        path = Path(getattr(module, "__file__", None) or "built in")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def sampling_of(settings: Settings) -> SamplingParams:
    group = group_of(settings, "sampling")
    seed = typed("seed", settings.get("seed"), int)
    params: SamplingParams = build(SamplingParams, "sampling", group, seed=seed)
    return params


def cache_of(settings: Settings) -> CacheSettings:
    cache: CacheSettings = build(CacheSettings, "cache", group_of(settings, "cache"))
    return cache


def placement_of(settings: Settings) -> Placement:
    return Placement.named(
        device=typed("device", settings.get("device"), str),
        dtype=typed("dtype", settings.get("dtype"), str),
        kernels=build(Kernels, "kernels", group_of(settings, "kernels")),
    )


def _pair(settings: Settings, sampling: SamplingParams) -> tuple[AcceptanceRule, str]:
    """The acceptance rule and how children are chosen, where the settings leave them open.

    Raises:
        ValueError: the pairing would change the distribution of outputs, and that was not asked
            for, or the drafter works with another rule only.
    """
    acceptance, drafter = group_of(settings, "acceptance"), group_of(settings, "drafter")
    children = group_of(settings, "tree").get("children", "auto")
    allowed = typed("acceptance.allow_lossy", acceptance.get("allow_lossy", False), bool)
    rule: AcceptanceRule | None = None
    options = {name: value for name, value in acceptance.items() if name != "allow_lossy"}
    if options.get("_target_") is not None:
        rule = build(_kind("acceptance", options), "acceptance", options)
    elif options.keys() - {"_target_"}:
        unknown = min(options.keys() - {"_target_"})
        raise ValueError(
            f"acceptance.{unknown}={shown(options[unknown])}: acceptance=auto has no such setting"
        )
    only = _class_of("drafter", drafter)[0].acceptance
    if only is not None:
        if rule is not None and rule.name != only:
            raise ValueError(
                f"acceptance={rule.name}: drafter={settings['choices']['drafter']} works with "
                f"acceptance={only} alone; use acceptance=auto"
            )
        return _rule(only), "top_k" if children == "auto" else children
    if children == "auto":
        wanted = rule.needs_proposal if rule else _prefers_sampling("drafter", drafter)
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
    if reason and not allowed:
        raise ValueError(
            f"acceptance={rule.name}: not lossless, {reason}; use acceptance=auto, or "
            f"acceptance.allow_lossy=true to run it all the same"
        )
    return rule, children


def _rule(name: str) -> AcceptanceRule:
    """A rule by its file in `verifier/`; its class is the name in camel case."""
    kind = pkgutil.resolve_name(f"{RULES}.{name}.{name.title().replace('_', '')}")
    rule: AcceptanceRule = kind()
    return rule


def _drafter(name: str | None, setting: str, settings: Any) -> Drafter:
    """A drafter, a function of the user's, or a composition with all its parts, which are called
    by the files of their classes."""
    kind, function = _class_of(setting, settings)
    target = settings["_target_"]
    with part_of(setting):
        drafter: Drafter = build(kind, setting, settings, **function)
    drafter.name = name or target.split(".")[-2]
    if function:
        drafter.name += f" ({target})"
    return drafter


def _class_of(setting: str, settings: Any) -> tuple[type[Drafter], dict[str, Any]]:
    """The class of a drafter, and what it is given if `_target_` names a mere function.

    Raises:
        ValueError: it names nothing that drafts.
    """
    if not isinstance(settings, Mapping) or "_target_" not in settings:
        raise ValueError(
            f"{setting}={shown(settings)}: must be the settings of a drafter with _target_"
        )
    target = settings["_target_"]
    found = imported(setting, target)
    if isinstance(found, type) and issubclass(found, Drafter):
        return found, {}
    if isinstance(found, type) or not callable(found):
        raise ValueError(
            f"{setting}._target_={target}: must be a function, or a class derived from Drafter"
        )
    return pkgutil.resolve_name(USER_FUNCTION), {"function": found}


def _kind(group: str, settings: Settings) -> type:
    """The class of a tree policy or an acceptance rule.

    Raises:
        ValueError: `_target_` names none.
    """
    target = settings.get("_target_")
    found, (base, own) = imported(group, target), KINDS[group]
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(
            f"{group}._target_={target}: must be a class derived from {base.__name__}"
        )
    lacking = [name for name in own if getattr(found, name, None) is getattr(base, name, None)]
    if lacking:
        raise ValueError(f"{group}._target_={target}: lacks {', '.join(lacking)} of its own")
    return found


def imported(setting: str, target: Any) -> Any:
    """What `_target_` names: in this package, an installed one, or a file where one works.

    Raises:
        ValueError: it cannot be imported.
    """
    if not isinstance(target, str):
        raise ValueError(f"{setting}._target_={shown(target)}: must be module.name")
    try:
        return pkgutil.resolve_name(target)
    except (Exception, SystemExit) as error:  # whatever importing a user's module raises
        raise ValueError(
            f"{setting}._target_={target}: cannot be imported, {type(error).__name__}: {error}; "
            f"it must be module.name, of an installed package or of a file in {Path.cwd()}"
        ) from error


def _prefers_sampling(setting: str, settings: Any) -> bool:
    """Whether children are best drawn from its probabilities: from those of all parts of a
    composition."""
    return all(kind.sampled_children for kind in _kinds(setting, settings))


def shares_pages(settings: Settings) -> bool:
    """Whether sequences of a run share pages.

    Raises:
        ValueError: they are to, and the drafter needs hidden states of all of a prompt.
    """
    cache = cache_of(settings)
    reading = [k for k in _kinds("drafter", group_of(settings, "drafter")) if k.reads_states]
    whole = [kind.__name__ for kind in reading if not kind.page_successors]
    if cache.share and whole:
        raise ValueError(
            f"cache.share=true: {whole[0]} reads hidden states of whole prompts, and tokens found "
            f"in shared pages have none; use cache.share=null"
        )
    return cache.shares(states=bool(reading))


def _kinds(setting: str, settings: Any) -> list[type[Drafter]]:
    """The class of a drafter; of a composition those of its parts."""
    kind, _ = _class_of(setting, settings)
    hints = get_type_hints(kind.__init__)
    parts = {
        f"{setting}.{name}.{part}": value
        for name in settings
        if hints.get(name) == PARTS
        for part, value in _parts(f"{setting}.{name}", settings[name]).items()
    }
    found = [one for part in parts.items() for one in _kinds(*part)]
    return found if parts else [kind]


def _parts(setting: str, parts: Any) -> Mapping[str, Any]:
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(f"{setting}={shown(parts)}: must be settings of drafters, by name")
    return parts


def build(kind: type, group: str, settings: Settings, **given: Any) -> Any:
    """An object from the settings of its config group, each checked against the constructor's
    types. A setting left open (null) that it does not have is none.

    Args:
        group: "" for settings without one.
        given: further arguments, which are no settings.

    Raises:
        ValueError: a setting that it does not have, is missing, or has another type; or a
            parameter without a type.
    """
    hints, known = _parameters(kind)
    checked = {}
    for name, value in settings.items():
        if name == "_target_":
            continue
        setting = f"{group}.{name}" if group else name
        if name not in known and value is None:
            continue
        if name not in known or name in given:
            near = nearest(setting, (f"{group}.{one}" for one in known if one not in given))
            raise ValueError(
                f"{setting}={shown(value)}: {kind.__name__} has no such setting{near}"
            )
        if name not in hints:
            raise ValueError(
                f"{setting}={shown(value)}: {kind.__name__}.__init__ gives {name} no type; "
                f"annotate it, as in {name}: {type(value).__name__}"
            )
        if hints[name] == PARTS:
            checked[name] = {
                part: _drafter(None, f"{setting}.{part}", own)
                for part, own in _parts(setting, value).items()
            }
        else:
            checked[name] = typed(setting, value, hints[name])
    required = inspect.Parameter.empty
    for name, parameter in known.items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is required and name not in {**given, **checked}:
            raise ValueError(
                f"{f'{group}.{name}' if group else name}: must be given, "
                f"{kind.__name__} has no default of it"
            )
    return kind(**given, **checked)


def ungrouped(kind: type, settings: Settings, groups: Sequence[str], command: str = "run") -> Any:
    """An object from the settings without a group; nothing stands beside them but the groups.

    Raises:
        ValueError: a setting that cannot be used, or of a name that there is not.
    """
    for name in groups:
        group_of(settings, name)
    own = {n: value for n, value in settings.items() if n not in (*groups, "choices")}
    known = get_type_hints(kind)
    unknown = next((name for name in own if name not in known), None)
    if unknown is not None:
        raise ValueError(no_setting(unknown, command))
    return build(kind, "", own)


def _parameters(kind: type) -> tuple[Mapping[str, Any], Mapping[str, inspect.Parameter]]:
    """Types and parameters of a constructor; none where Python cannot tell."""
    make: Any = kind.__init__  # type: ignore[misc]
    try:
        return get_type_hints(make, include_extras=True), inspect.signature(kind).parameters
    except ValueError:
        return {}, {}

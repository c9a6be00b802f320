"""Settings that a run does not use, so that nobody takes its figures for theirs."""

from collections.abc import Iterator, Sequence

from specdec.lab.build import PLAIN, Settings
from specdec.lab.method import Method

FILTERS = ("top_k", "top_p", "min_p")
BY_MODE = {"drafter.min_match": "cascade", "drafter.reset": "bandit"}  # of drafter=compose
NEVER_IDLE = ("allow_lossy", "_target_")
TRITON = ("shared_prefix",)


def without_effect(
    settings: Settings, method: Method, kernels: str, words: Sequence[str]
) -> Iterator[str]:
    """A line for each setting that has no effect.

    Args:
        kernels: the implementation that computes.
        words: what was typed; what was not has its default, and needs no word.
    """
    typed: dict[str, str] = {}
    for word in words:
        name = word.partition("=")[0].lstrip("+")
        if typed.get(name, word) != word:
            yield f"{typed[name]}: has no effect, {word} comes after it"
        typed[name] = word
    tree, depth, greedy = method.tree, method.drafter.depth, method.sampling.greedy
    plain = settings["drafter"]["_target_"] == PLAIN["_target_"]
    as_greedy = greedy and method.rule.lossy(tree.children, method.sampling) is None
    for name, word in typed.items():
        group, _, setting = name.partition(".")
        last = setting.rpartition(".")[2]  # of a part of a composition
        reason = None
        if plain and group == "tree" and word != "tree.budget=0":
            reason = "drafter=none drafts nothing"
        elif last == "candidates" and tree.children == "top_k" and tree.budget:
            reason = "tree.children=top_k draws no children"
        elif name == "tree.budget" and depth is not None and tree.budget:
            levels = tree.levels(depth)
            if all(tree.width(level) == 1 for level in range(levels)) and levels < tree.budget:
                reason = f"drafter.depth={depth} leaves chains of {levels}"
        elif name == "tree.depth" and depth is not None and tree.budget:
            levels = tree.levels(depth)
            if levels != tree.levels(None):
                reason = f"drafter.depth={depth} makes trees of {levels} level{'s' * (levels > 1)}"
        elif name in BY_MODE and "parts" in settings["drafter"]:
            mode = settings["drafter"].get("mode", "cascade")
            reason = None if mode == BY_MODE[name] else f"drafter.mode={mode} does not ask for it"
        elif name == "drafter.confidence" and settings["drafter"].get("confidence"):
            fixed = tree.takes_all or tree.one_shape
            reason = "trees of one shape do not ask for it" if fixed else None
        elif group == "acceptance" and setting not in ("", *NEVER_IDLE) and as_greedy:
            reason = f"at temperature 0 acceptance={method.rule.name} is greedy"
        if reason:
            yield f"{word}: has no effect, {reason}"
    for name in FILTERS if greedy else ():
        if settings["sampling"].get(name) is not None:
            yield (f"sampling.{name}={settings['sampling'][name]}: has no effect at temperature 0")
    for name in TRITON if kernels == "reference" else ():
        if settings["kernels"].get(name):
            yield f"kernels.{name}={settings['kernels'][name]}: has no effect, Triton does not run"

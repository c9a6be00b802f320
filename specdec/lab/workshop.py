"""Workshop: methods and sessions from the words of `specdec.run`, which share their models; and
the options that studies have in common."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from specdec.lab.build import cache_of, method_of, placement_of
from specdec.lab.command import Positive, option
from specdec.lab.fingerprints import contents_of
from specdec.lab.method import Method
from specdec.lab.prompts import Asked, ask
from specdec.lab.session import OurSession, Session
from specdec.lab.settings import Settings, settings_of
from specdec.lab.setup import target_of
from specdec.models.load import Models
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.protocols import TreePolicy

PLAIN = "drafter=none tree.budget=0"
SETS = ("humaneval", "gsm8k", "mt_bench", "spec_bench")
NO_SETTINGS = ("out", "resume", "tracker", "record", "prompts", "baseline")  # of a method
SIZES = ("tree.budget", "tree.widths", "tree.width", "tree.depth")
BARE = ("tree.children", "acceptance")  # values that say what they are


def word(name: str, value: Any) -> str:
    """A setting of any value, as a word among words."""
    return shlex.quote(f"{name}={json.dumps(value, separators=(',', ':'))}")


def tree(kind: str, *sizes: int) -> str:
    """The words of a tree: chain BUDGET, static WIDTHS, dynamic BUDGET, WIDTH and DEPTH."""
    if kind == "static":
        return f"tree=static {word('tree.widths', sizes)}"
    names = ("budget", "width", "depth")
    return " ".join([f"tree={kind}", *map(word, (f"tree.{name}" for name in names), sizes)])


def name_of(words: str) -> str:
    """What tables call a method: `ngram chain 4, min_match 2`, `static 3,2,1, sample`."""
    said = dict(one.split("=", 1) for one in shlex.split(words))
    heads = [said.pop(group) for group in ("drafter", "tree") if group in said]
    sizes = ",".join(said.pop(name).strip("[]") for name in SIZES if name in said)
    rest = (
        value if name in BARE else f"{name.rpartition('.')[2]} {value}"
        for name, value in said.items()
    )
    return ", ".join([" ".join([*heads, sizes]).strip(), *rest])


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method of a study.

    Args:
        settings: what it is; it is measured again if they change.
        make: its session.
        entry: what the result file says of it from the start.
        tree: its policy, if it is ours.
        state: after what its drafter forgets: prompt, category, never; None if it learns nothing.
    """

    settings: Any
    make: Callable[[], Session]
    entry: dict[str, Any] = field(default_factory=dict)
    tree: TreePolicy | None = None
    state: str | None = None


class Workshop:
    """Makes methods and sessions that share their models.

    Args:
        words: settings of all of them.
        models: those of another workshop, to share.

    Raises:
        ValueError: a setting that cannot be used.
    """

    def __init__(self, *words: str, models: Models | None = None) -> None:
        self.words = words
        self._settings = self.settings("")
        self.models = models or Models(placement_of(self._settings))

    def having(self, words: str) -> "Workshop":
        """Another one with these settings beside its own and the same models."""
        return Workshop(*self.words, words, models=self.models)

    @cached_property
    def target(self) -> PagedLM:
        return target_of(self._settings).load(self.models, "target")

    def settings(self, words: str) -> Settings:
        return settings_of(" ".join([*self.words, words]))

    def method(self, words: str) -> Method:
        """Loaded."""
        method = method_of(self.settings(words))
        method.load(self.target, self.models)
        return method

    def session(self, method: str | Method, *, rows: int, longest: int) -> OurSession:
        """Of a method, in words or loaded.

        Args:
            rows: sequences decoded at a time.
            longest: tokens of a prompt and its output at most.
        """
        made = self.method(method) if isinstance(method, str) else method
        capacity = cache_of(self._settings).capacity(
            rows=rows,
            max_tokens=longest,
            device=self.target.device,
            states=made.drafter.reads_states,
        )
        return OurSession(made, self.target, capacity)

    def way(self, words: str, *, rows: int, longest: int, **entry: Any) -> Way:
        """A method of a study, checked as far as can be without a model."""
        settings = self.settings(words)
        method = method_of(settings)  # another one is made for the session, and goes with it
        known = {name: v for name, v in settings.items() if name not in NO_SETTINGS}
        return Way(
            settings={**known, "contents": contents_of(known)},
            make=partial(self.session, words, rows=rows, longest=longest),
            entry=entry,
            tree=method.tree,
            state=method.drafter.reset,
        )


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a program that decodes prompts of several sets."""

    humaneval: str | None = option(None, "JSONL file")
    gsm8k: str | None = option(None, "likewise")
    mt_bench: str | None = option(None, "likewise")
    spec_bench: str | None = option(None, "likewise")
    target: str = option("zoo:target", "model folder, hub id, zoo:NAME or standin:NAME")
    draft: str = option("zoo:draft", "likewise")
    quantize: Quantize = option("none", "of the target: none or fp8")
    device: str = option("auto", "auto, cpu or cuda", varies=True)
    dtype: str = option("float32", "of all models")
    tokens: Positive = option(64, "new ones, for each prompt")
    prompts: Positive = option(8, "of each set or category")
    batch: Positive = option(1, "sequences together")
    exact: bool = option(False, "kernels.exact of all models")
    cache_dtype: Literal["auto", "fp8_e4m3", "int8"] = option("auto", "cache.dtype of all models")

    def __post_init__(self) -> None:
        """Refuse to begin without prompts."""
        if not self.sets:
            raise ValueError(f"no prompts: give a file for one of {', '.join(SETS)}")

    @property
    def sets(self) -> dict[str, str | None]:
        """Files of prompts by set."""
        return {name: getattr(self, name) for name in SETS if getattr(self, name) is not None}

    def workshop(self, *words: str) -> Workshop:
        """With these models, and settings beside them."""
        placed = f"device={self.device} dtype={self.dtype} batch_size={self.batch}"
        placed += f" target.quantize={self.quantize} cache.dtype={self.cache_dtype}"
        exact = ["kernels.exact=true"] if self.exact else []
        return Workshop(word("target.path", self.target), placed, *exact, *words)

    def read(self, shop: Workshop) -> dict[str, list[Asked]]:
        """Prompts by set."""
        sets = ask(shop.target.tokenizer, self.sets, limit=self.prompts, take="by_category")
        for one in (one for of in sets.values() for one in of):
            shop.target.check_tokens(one.tokens, f"prompt {one.name}")
        return sets

    def batches(self, sets: dict[str, list[Asked]]) -> list[list[Asked]]:
        """Prompts that are decoded together."""
        size = self.batch
        return [of[i : i + size] for of in sets.values() for i in range(0, len(of), size)]

    def longest(self, sets: dict[str, list[Asked]]) -> int:
        """Tokens of a prompt and its output at most."""
        return max(len(one.tokens) for of in sets.values() for one in of) + self.tokens

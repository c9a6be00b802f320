"""One and the same query in many places: alone, in trees, in chains, in batches; and exact kernels
with faults in them.

Legend: T tokens of a text, HQ and HKV query and key-value heads, D columns of a head.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import exact, reference
from tests.kernels.attention_cases import Case, assemble, line_of, same

ROOT = Path(__file__).parents[2]
OTHER = -1  # in place of a token: one that is not of the text


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a layer computes of tokens: query [T, HQ, D], key and value [T, HKV, D]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def fork(self, after: int) -> "Text":
        """The same up to a position, other tokens from there on."""
        parts = {
            name: torch.cat([numbers[:after], numbers[after:].flip(0) * 0.5])
            for name, numbers in vars(self).items()
        }
        return Text(**parts)


def random_text(
    length: int,
    dtype: torch.dtype,
    *,
    group: int = 2,
    kv_heads: int = 1,
    key_dim: int = 16,
    value_dim: int | None = None,
    stored: torch.dtype | None = None,
    seed: int = 0,
) -> Text:
    """With `stored` keys and values are such as pages of that type hold."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    key = normal(length, kv_heads, key_dim)
    value = normal(length, kv_heads, key_dim if value_dim is None else value_dim)
    if stored is not None:
        key, value = reference.as_stored(key, stored), reference.as_stored(value, stored)
    return Text(query=normal(length, kv_heads * group, key_dim), key=key, value=value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence of a batch.

    Attributes:
        context: so many tokens of the text are committed.
        parents: [M], as those of `Case`.
        tokens: [M], the token of the text that each scratch row is, or OTHER.
    """

    text: Text
    context: int
    parents: list[int]
    tokens: list[int]


def chained(text: Text, context: int, count: int) -> Row:
    """The text goes on for `count` tokens."""
    tokens = list(range(context, context + count))
    return Row(text=text, context=context, parents=list(range(-1, count - 1)), tokens=tokens)


def in_tree(text: Text, position: int, parents: list[int], node: int) -> Row:
    """A tree in which one node is the token at a position, and its ancestors those before it."""
    line = line_of(parents, node)
    tokens = [OTHER] * len(parents)
    for back, row in enumerate(line):
        tokens[row] = position - back
    return Row(text=text, context=position - len(line) + 1, parents=parents, tokens=tokens)


def scene(rows: list[Row], *, first: int = 0, seed: int = 0, **how: Any) -> Case:
    """A call over these sequences, whose queries are the scratch rows from `first` on.

    Args:
        how: see `assemble`.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = []
    for name in ("query", "key", "value"):
        shape = len(rows), len(rows[0].parents), *getattr(rows[0].text, name).shape[1:]
        of_all = torch.randn(*shape, generator=generator).to(rows[0].text.key.dtype) * 2
        for place, row in enumerate(rows):
            for node, token in enumerate(row.tokens):
                if token != OTHER:
                    of_all[place, node] = getattr(row.text, name)[token]
        numbers.append(of_all)
    query, key, value = numbers
    return assemble(
        query=query[:, first:],
        contents=[
            [row.text.key[: row.context] for row in rows],
            [row.text.value[: row.context] for row in rows],
        ],
        trees=[key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()],
        parents=[row.parents for row in rows],
        first=first,
        **how,
    )


def alone(
    text: Text,
    position: int,
    options: dict[str, Any] | None = None,
    kernels: ModuleType = exact,
    **how: Any,
) -> Tensor:
    """[HQ, DV]: the token at a position when all before it is committed."""
    case = scene([chained(text, position, 1)], **how)
    return case.attend(kernels=kernels, **(options or {}))[0, 0]


def parted(
    text: Text,
    position: int,
    options: dict[str, Any] | None = None,
    kernels: ModuleType = exact,
    *,
    only: set[str] | None = None,
    **how: Any,
) -> list[str]:
    """The places in which the bits of a token are not those it has alone.

    Args:
        only: of these places; None is all of them.
        position: at least 210, so that what rows share is worth a pass.
        how: `page_size` and `stored` of all calls.
    """
    options = options or {}
    expected = alone(text, position, options, kernels, **how)
    page_size = how.setdefault("page_size", 16)
    deep = [-1, 0, 0, 1, 3, 2, 4, 6, 6]  # the last but one at a depth of 5
    ragged = [
        in_tree(text.fork(3), 130, deep, 8),
        chained(text.fork(9), 3, 9),
        in_tree(text, position, deep, 7),
    ]
    sharing = 192 // page_size
    family = [
        chained(text, position - 7, 1),
        chained(text, position, 1),
        chained(text.fork(sharing * page_size), position + 40, 1),
    ]
    count = 76  # the last of them reads keys of the scratch in pieces
    chain = chained(text, position - count + 2, count)
    places: dict[str, tuple[Case, int, int, bool]] = {
        "tree": (scene([in_tree(text, position, deep, 7)], **how), 0, 7, False),
        "batch": (scene(ragged, first=6, deck_seed=5, **how), 2, 1, False),
        "chain": (scene([chain], first=count - 3, chain=True, **how), 0, 1, False),
        "short chain": (
            scene([chained(text, position - 1, 3)], chain=True, max_context=2000, **how),
            0,
            1,
            False,
        ),
        "shared": (scene(family, alike=[0, sharing, sharing], **how), 1, 0, True),
    }
    found = {
        name: case.attend(kernels=kernels, shared_prefix=shared, **options)[row, query]
        for name, (case, row, query, shared) in places.items()
        if only is None or name in only
    }
    return [name for name, output in found.items() if not same(output, expected)]


def plant(folder: Path, *edits: tuple[str, str, str]) -> ModuleType:
    """`specdec.kernels.exact` with a fault in it.

    Args:
        folder: an empty one, for its source; the name of the module follows from it.
        edits: (name of a module, what stands in it, what is to stand there).
    """
    name = f"planted_{folder.name}"
    package = folder / name
    package.mkdir()
    kernels = ROOT / "kernels"
    files = [*(kernels / "exact").glob("*.py")]
    files += [kernels / "gpu" / f"{module}.py" for module in ("merge", "stream", "linear")]
    for file in files:
        source = file.read_text().replace("specdec.kernels.exact", name)
        for module in ("merge", "stream", "linear"):
            source = source.replace(f"specdec.kernels.gpu.{module} ", f"{name}.{module} ")
        for module, old, new in edits:
            if file.stem == module:
                assert old in source, old
                source = source.replace(old, new)
        (package / file.name).write_text(source)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))

"""Drafters that learn, and a scripted target that follows tables, so that what is to be learnt can
be worked out in plain Python."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specdec.decode import Decoder
from specdec.drafters.lookahead import Lookahead
from specdec.drafters.token_recycling import TokenRecycling
from specdec.models.paged import PagedLM
from specdec.observation import Observation
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.tree import Acceptance, TokenTree
from tests.decoding import FakeVerifier, decoder_of, requests_of

CPU = torch.device("cpu")

V = 40

SCORES = torch.rand(V, V, generator=torch.Generator().manual_seed(5))  # of the next token, by last

SMALL = SimpleNamespace(vocab_size=V, device=CPU)

Build = Callable[..., Any]


class Scripted(FakeVerifier):
    """A target whose next token depends on the last one alone."""

    def logits(self, context: StepContext, tree: TokenTree) -> Tensor:
        tree.check()
        return SCORES[tree.tokens]


def ranked(token: int, count: int) -> list[int]:
    """The scripted target's best tokens after this one."""
    return sorted(range(V), key=lambda after: -float(SCORES[token, after]))[:count]


def following(token: int, count: int) -> list[int]:
    """Its text after this token."""
    text = [token]
    for _ in range(count):
        text += ranked(text[-1], 1)
    return text[1:]


def decoder(
    drafter: Drafter,
    tree: TreePolicy | None = None,
    *,
    batch_size: int = 1,
    target: PagedLM | None = None,
    **more: Any,
) -> Decoder:
    """Over the scripted target, or a real one."""
    if target is None:
        drafter.load(SMALL, None)  # type: ignore[arg-type]
    return decoder_of(
        Scripted() if target is None else target,
        drafter,
        tree,
        rows=batch_size,
        max_tokens=200,
        **more,
    )


def spied(kind: type, **settings: Any) -> Any:
    """A drafter that notes its trees, row by row, and what was kept of them."""

    class Spied(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(**settings)
            self.trees: list[TokenTree] = []
            self.noted: list[tuple[list[int], list[list[int]], list[int]]] = []
            self.kept: list[list[int]] = []

        def draft(self, context: StepContext) -> TokenTree:
            tree: TokenTree = super().draft(context)
            tree.check()
            assert tree.nodes <= self.tree.budget + 1
            if self.most_nodes is not None:
                assert tree.nodes <= self.most_nodes
            self.trees.append(tree)
            ids = [sequence.request.id for sequence in context.sequences]
            sizes = tree.size.tolist()
            rows = [row[:n] for row, n in zip(tree.tokens.tolist(), sizes, strict=True)]
            parents = [row[:n] for row, n in zip(tree.parents.tolist(), sizes, strict=True)]
            self.noted.append((ids, rows, parents))
            return tree

        def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
            super().commit(context, acceptance, seen)
            self.kept.append(acceptance.length.tolist())
            self.learnt()

        def learnt(self) -> None:
            """Called after each step."""

    return Spied()


PROMPTS = [[3, 7, 3, 9, 3, 7, 1, 3], [5, 6], [8], [11, 12, 13, 11, 12, 14, 11]]

KINDS = {"token_recycling": TokenRecycling, "lookahead": Lookahead}


def run(
    drafter: Drafter, prompts: Sequence[Sequence[int]], tree: TreePolicy | None = None, **more: Any
) -> list[list[int]]:
    new, categories = more.pop("new", 30), more.pop("categories", ())
    done = decoder(drafter, tree, **more).run(requests_of(prompts, new, categories))
    return [s.output_ids for s in sorted(done, key=lambda s: s.request.id)]

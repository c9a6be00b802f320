"""What acceptance takes by each rule: microseconds of `rule.accept` in a replayed CUDA graph, and
of the torch definition of the rule by the clock on the wall.

    python -m specdec.experiments.bench.run rules
    python -m specdec.experiments.bench.run rules device=cpu batches=1 vocabulary=1000 nodes=8

Trees have one shape for all sequences: a chain for rules of chains, else a bush. Children are
drawn from draft distributions that resemble the target, with replacement where the rule asks for
it. A rule is timed if its kernels keep what the definition keeps in float64. The JSON file is
written anew after every rule; on a CPU the definition is timed in place of the kernels, by the
clock.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from specdec.experiments.bench.clock import GraphClock, Timed, copies_beyond_cache
from specdec.experiments.bench.operation import Operation, measure, unlike
from specdec.kernels import reference
from specdec.lab.command import Positive, option
from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import SamplingParams, random_keys
from specdec.tree import Children, Proposal, TokenTree, random_parents
from specdec.verifier.block import Block
from specdec.verifier.greedy import Greedy
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical

RULES: tuple[tuple[AcceptanceRule, str, Children], ...] = (
    (Greedy(), "bush", "sample"),
    (TargetOnly(), "bush", "sample"),
    (RecursiveRejection(), "bush", "sample"),
    (Tokenwise(), "chain", "sample"),
    (KSeq(), "bush", "sample_with_replacement"),
    (Block(), "chain", "sample"),
    (Traversal(), "bush", "sample"),
    (Hsd(), "bush", "sample"),
    (MultiPath(), "bush", "sample_with_replacement"),
    (Typical(), "bush", "sample"),
    (Relaxed(), "bush", "sample"),
)
COMPARED = 64  # trees at least
DIFFERENT = 1  # of them at most: rounding may decide a close call
SPREAD = 0.5  # of the logarithm of target over draft
INSIDE = 0.85  # about the target's mass on the support of a draft distribution


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    device: Literal["cuda", "cpu"] = option("cuda", "the CPU times the definitions")
    batches: tuple[Positive, ...] = option((1, 8, 32), "sequences together")
    nodes: Positive = option(64, "of a tree")
    candidates: Positive = option(64, "of a draft distribution")
    vocabulary: Positive = option(128_256, "tokens")
    out: Path = option(Path("rule_steps.json"), "result file")


class Inputs:
    """Draft distributions of all nodes, and copies of the target's logits that take turns.

    Args:
        sizes: sequences, nodes of a tree, draft candidates of a node, vocabulary.
    """

    def __init__(self, *sizes: int, copies: int, dtype: torch.dtype, device: torch.device) -> None:
        self.batch, self.nodes, candidates, vocabulary = sizes
        self.device, self.host = device, torch.Generator().manual_seed(self.batch)
        shape = self.batch, self.nodes, candidates
        first = torch.randint(vocabulary, (*shape[:2], 1), generator=self.host)
        stride = max(1, vocabulary // candidates - 1)
        self.ids = (first + stride * torch.arange(candidates)) % vocabulary
        self.probs = (2.0 * torch.randn(shape, generator=self.host)).softmax(-1)
        spread = SPREAD * torch.randn(shape, generator=self.host)
        level = math.log(vocabulary * INSIDE / (1.0 - INSIDE)) + 0.5
        raised = (self.probs.log() + spread + level).to(device, dtype)
        generator = torch.Generator(device).manual_seed(self.batch)
        self.logits = [
            torch.randn(
                (*shape[:2], vocabulary), dtype=dtype, device=device, generator=generator
            ).scatter_(2, self.ids.to(device), raised)
            for _ in range(copies)
        ]

    def tree(self, shape: str, children: Children) -> TokenTree:
        """Trees of a shape, with children drawn anew."""
        batch, nodes = self.batch, self.nodes
        chain = list(range(-1, nodes - 1))
        bush = random_parents(nodes, torch.Generator().manual_seed(0))
        parents = {"chain": chain, "bush": bush}[shape]
        tokens = torch.zeros(batch, nodes, dtype=torch.int64)
        for parent in sorted(set(parents) - {-1}):
            born = [node for node in range(nodes) if parents[node] == parent]
            drawn = torch.multinomial(
                self.probs[:, parent],
                len(born),
                replacement=children == "sample_with_replacement",
                generator=self.host,
            )  # [B, children]
            tokens[:, born] = self.ids[:, parent].gather(1, drawn)
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        tree = TokenTree(
            tokens=tokens,
            parents=torch.tensor(parents, dtype=torch.int32).repeat(batch, 1),
            size=torch.full((batch,), nodes, dtype=torch.int32),
            depth=max(depths),
            proposal=Proposal(ids=self.ids, probs=self.probs, children=children),
        )
        tree.check()
        return tree.to(self.device)

    def context(self, kernels: ModuleType, step: int) -> StepContext:
        keys = random_keys(0, range(self.batch), [step] * self.batch, self.device)
        return StepContext(
            sequences=[],
            roots=torch.zeros(self.batch, dtype=torch.int64, device=self.device),
            sampling=SamplingParams(temperature=1.0),
            uniforms=partial(kernels.uniforms, keys),
            kernels=kernels,
            keys=keys,
        )

    def contexts(self, kernels: ModuleType) -> tuple[StepContext, StepContext]:
        """Of the kernels and of the definitions, which draw the same numbers as fast."""
        mine = self.context(kernels, 0)
        return mine, replace(self.context(reference, 0), uniforms=mine.uniforms)


def compare(
    rule: AcceptanceRule, inputs: Inputs, tree: TokenTree, kernels: ModuleType
) -> dict[str, Any]:
    """How many trees were compared with the definition in float64, how many of them differ, and
    the mean number of nodes kept.

    Raises:
        ArithmeticError: more than a close call may explain.
    """
    compared = differ = length = 0
    exact = inputs.logits[0].double()
    for step in range(-(-COMPARED // inputs.batch)):
        mine = rule.accept(inputs.context(kernels, step), tree, inputs.logits[0])
        wanted = rule.accept(inputs.context(reference, step), tree, exact)
        compared, differ = compared + len(mine.path), differ + int(unlike(mine, wanted).sum())
        length += int(mine.length.sum())
    if differ > DIFFERENT:
        raise ArithmeticError(f"wrong: {differ} of {compared} sequences differ")
    return {"compared": compared, "differ": differ, "length": length / compared}


def operation_of(
    rule: AcceptanceRule,
    inputs: Inputs,
    tree: TokenTree,
    kernels: ModuleType,
    found: dict[str, Any],
) -> Operation:
    """A rule beside its definition; `found` gets what `compare` says."""
    mine, plain = inputs.contexts(kernels)
    return Operation(
        lambda copy: rule.accept(mine, tree, inputs.logits[copy]),
        lambda: rule.accept(plain, tree, inputs.logits[0]),
        lambda: found.update(compare(rule, inputs, tree, kernels)),
    )


def rules(options: Options, result: dict[str, Any], save: Callable[[], None]) -> int:
    """Times of all rules, for each batch size, to result["batches"]; returns 1 if one has none.

    Raises:
        ValueError: more candidates than tokens.
    """
    if options.candidates > options.vocabulary:
        raise ValueError(
            f"candidates={options.candidates}: must be at most vocabulary={options.vocabulary}"
        )
    device = torch.device(options.device)
    kernels: ModuleType = reference
    clock: GraphClock | None = None
    if device.type == "cuda":
        from specdec.kernels import gpu

        kernels, clock = gpu, GraphClock(replays=options.replays)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result["settings"] |= {
        "temperature": 1.0,
        "dtype": str(dtype).removeprefix("torch."),
        "rules": {rule.name: [shape, children] for rule, shape, children in RULES},
    }
    result["batches"] = []
    for batch in options.batches:
        operations: dict[str, Any] = {}
        result["batches"].append(
            {"batch": batch, "nodes": options.nodes, "operations": operations}
        )
        size = batch * options.nodes * options.vocabulary * dtype.itemsize
        copies = copies_beyond_cache(size) if device.type == "cuda" else 1
        sizes = batch, options.nodes, options.candidates, options.vocabulary
        inputs = Inputs(*sizes, copies=copies, dtype=dtype, device=device)
        for rule, shape, children in RULES:
            found: dict[str, Any] = {}
            tree = inputs.tree(shape, children)
            operation = operation_of(rule, inputs, tree, kernels, found)
            operations[rule.name] = measure(operation, copies, clock) | found
            save()
    return int(any("us" not in o for r in result["batches"] for o in r["operations"].values()))

"""What a decoding step does besides running the model: tree structure, acceptance and commit, ours
in CUDA graphs beside the torch definitions as they run without one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.bench.cases import TREE_DEPTH, random_parents
from specdec.experiments.bench.clock import GraphClock, Timed, copies_beyond_cache
from specdec.experiments.bench.operation import Operation, measure, unlike
from specdec.kernels import reference
from specdec.lab.command import option
from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import (
    ACCEPT_STREAM,
    TOKEN_STREAM,
    SamplingParams,
    random_keys,
    uniforms,
)
from specdec.tree import Acceptance, Proposal, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly

# Llama-3-8B
LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 8, 128, 128_256
BATCHES, NODES, CANDIDATES, PAGE = (1, 8, 32), 64, 16, 64
ACCEPTED, COMMITTED = 5, 60  # the accepted nodes begin in one page and end in the next
RULES: tuple[AcceptanceRule, ...] = (Greedy(), TargetOnly(), RecursiveRejection())


@dataclass(frozen=True, kw_only=True)
class Options(Timed):
    out: Path = option(Path("kernel_steps.json"), "result file")


def steps(options: Options, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Times in us of the operations of one step, for each batch size, to result["batches"]."""
    from specdec.kernels import gpu

    clock = GraphClock(replays=options.replays)
    result["batches"] = []
    for batch in BATCHES:
        record: dict[str, Any] = {"batch": batch, "nodes": NODES, "operations": {}}
        result["batches"].append(record)
        copies = copies_beyond_cache(batch * NODES * VOCABULARY * 2)
        inputs = StepInputs(
            batch,
            copies=copies,
            vocabulary=VOCABULARY,
            layers=LAYERS,
            device=torch.device("cuda"),
        )
        for name, operation in operations(inputs, gpu):
            record["operations"][name] = measure(operation, copies, clock)
        save()


class StepInputs:
    """Trees, logits and caches as they meet in a step; copies of logits and scratch take turns.

    Every child carries a token of its parent's draft distribution and about as much of the
    target's mass as half the vocabulary, so that some nodes of most trees are kept.
    """

    def __init__(
        self, batch: int, *, copies: int, vocabulary: int, layers: int, device: torch.device
    ) -> None:
        """(Long because all is drawn from one generator, in this order.)"""
        host = torch.Generator().manual_seed(batch)
        lists = [random_parents(NODES, host) for _ in range(batch)]
        first = torch.randint(vocabulary, (batch, NODES, 1), generator=host)
        ids = (first + 997 * torch.arange(CANDIDATES)) % vocabulary
        tokens = torch.zeros(batch, NODES, dtype=torch.int64)
        for sequence, tree in enumerate(lists):
            for node, parent in enumerate(tree[1:], start=1):
                tokens[sequence, node] = ids[sequence, parent, tree[:node].count(parent)]
        probs = torch.rand(ids.shape, generator=host)
        self.tree = TokenTree(
            tokens=tokens.to(device),
            parents=torch.tensor(lists, dtype=torch.int32, device=device),
            size=torch.full((batch,), NODES, dtype=torch.int32, device=device),
            depth=TREE_DEPTH,
            proposal=Proposal(
                ids=ids.to(device),
                probs=(probs / probs.sum(-1, keepdim=True)).to(device),
                children="sample",
            ),
        )
        generator = torch.Generator(device).manual_seed(batch)

        def noise(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.bfloat16, device=device, generator=generator)

        rows = torch.arange(batch, device=device)[:, None]
        parents = self.tree.parents[:, 1:].long()
        self.logits = [noise(batch, NODES, vocabulary) for _ in range(copies)]
        for logits in self.logits:
            logits[rows, parents, self.tree.tokens[:, 1:]] += math.log(vocabulary)
        steps_of = [0] * batch
        drawn = {
            (stream, count): uniforms(0, range(batch), steps_of, stream, count).to(device)
            for stream, count in ((ACCEPT_STREAM, NODES), (TOKEN_STREAM, vocabulary))
        }
        self.context = StepContext(
            sequences=[],
            roots=self.tree.tokens[:, 0],
            sampling=SamplingParams(temperature=1.0),
            uniforms=lambda stream, count: drawn[stream, count],
            keys=random_keys(0, range(batch), steps_of, device),
        )

        pages = -(-(COMMITTED + NODES) // PAGE)
        order = torch.randperm(batch * pages, generator=host, dtype=torch.int32)
        self.page_table = order.view(batch, pages).to(device)
        self.start = torch.full((batch,), COMMITTED, dtype=torch.int32, device=device)
        self.pools = [noise(layers, batch * pages, KV_HEADS, PAGE, HEAD_DIM) for _ in "kv"]
        self.scratch = [
            [noise(layers, batch, KV_HEADS, NODES, HEAD_DIM) for _ in "kv"] for _ in range(copies)
        ]
        path = torch.rand(batch, NODES, generator=host).topk(ACCEPTED).indices.sort().values
        self.path = path.to(device)
        self.length = torch.full((batch,), ACCEPTED, device=device)


def operations(inputs: StepInputs, kernels: ModuleType) -> Iterator[tuple[str, Operation]]:
    """What a step does, then all of it for each rule."""
    mine = replace(inputs.context, kernels=kernels)
    yield "tree_structure", _tree_structure(inputs, kernels)
    for rule in RULES:
        yield rule.name, _rule(inputs, rule, mine)
    yield "commit_path", _move(inputs, kernels)
    for rule in RULES:
        ours = partial(_step, inputs, rule, mine)
        yield f"step, {rule.name}", Operation(ours, partial(_step, inputs, rule), lambda: None)


def _step(
    inputs: StepInputs, rule: AcceptanceRule, context: StepContext | None = None, copy: int = 0
) -> Acceptance:
    context = inputs.context if context is None else context
    context.kernels.tree_structure(inputs.tree.parents)
    kept = rule.accept(context, inputs.tree, inputs.logits[copy])
    context.kernels.commit_path(
        *inputs.pools,
        *inputs.scratch[copy],
        kept.path,
        kept.length,
        inputs.page_table,
        inputs.start,
    )
    return kept


def _tree_structure(inputs: StepInputs, kernels: ModuleType) -> Operation:
    parents = inputs.tree.parents

    def check() -> None:
        mine, wanted = (k.tree_structure(parents)._asdict() for k in (kernels, reference))
        for name, tensor in wanted.items():
            if not torch.equal(mine[name], tensor):
                raise ArithmeticError(f"wrong: {name} differ")

    return Operation(
        lambda _: kernels.tree_structure(parents),
        lambda: reference.tree_structure(parents),
        check,
    )


def _rule(inputs: StepInputs, rule: AcceptanceRule, context: StepContext) -> Operation:
    def ours(copy: int) -> Acceptance:
        return rule.accept(context, inputs.tree, inputs.logits[copy])

    def define() -> Acceptance:
        return rule.accept(inputs.context, inputs.tree, inputs.logits[0])

    def check() -> None:
        wrong = unlike(ours(0), define())
        if bool(wrong.any()):
            raise ArithmeticError(f"wrong: {int(wrong.sum())} of {len(wrong)} sequences differ")

    return Operation(ours, define, check)


def _move(inputs: StepInputs, kernels: ModuleType) -> Operation:
    def move(module: ModuleType, copy: int, pools: list[Tensor]) -> None:
        where = inputs.page_table, inputs.start
        module.commit_path(*pools, *inputs.scratch[copy], inputs.path, inputs.length, *where)

    def check() -> None:
        mine, wanted = ([pool.clone() for pool in inputs.pools] for _ in range(2))
        move(kernels, 0, mine)
        move(reference, 0, wanted)
        if not all(map(torch.equal, mine, wanted)):
            raise ArithmeticError("wrong: pages differ")

    return Operation(
        lambda copy: move(kernels, copy, inputs.pools),
        lambda: move(reference, 0, inputs.pools),
        check,
    )

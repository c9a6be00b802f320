"""What a decoding step does besides running the model: tree structure, acceptance and commit, ours
in CUDA graphs beside the torch definitions as they run without one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.bench.clock import GraphClock, Timed, copies_beyond_cache
from specdec.experiments.bench.operation import Operation, measure
from specdec.experiments.bench.rules import Inputs, operation_of
from specdec.kernels import reference
from specdec.lab.command import option
from specdec.protocols import AcceptanceRule, StepContext
from specdec.tree import Acceptance
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
            batch, copies=copies, vocabulary=VOCABULARY, layers=LAYERS, device=torch.device("cuda")
        )
        for name, operation in operations(inputs, gpu):
            record["operations"][name] = measure(operation, copies, clock)
        save()


class StepInputs(Inputs):
    """Trees, logits and caches as they meet in a step; copies of logits and scratch take turns."""

    def __init__(
        self, batch: int, *, copies: int, vocabulary: int, layers: int, device: torch.device
    ) -> None:
        dtype = torch.bfloat16
        super().__init__(
            *(batch, NODES, CANDIDATES, vocabulary), copies=copies, dtype=dtype, device=device
        )
        self.bush = self.tree("bush", "sample")

        def noise(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        pages = -(-(COMMITTED + NODES) // PAGE)
        order = torch.randperm(batch * pages, generator=self.host, dtype=torch.int32)
        self.page_table = order.view(batch, pages).to(device)
        self.start = torch.full((batch,), COMMITTED, dtype=torch.int32, device=device)
        self.pools = [noise(layers, batch * pages, KV_HEADS, PAGE, HEAD_DIM) for _ in "kv"]
        self.scratch = [
            [noise(layers, batch, KV_HEADS, NODES, HEAD_DIM) for _ in "kv"] for _ in range(copies)
        ]
        path = torch.rand(batch, NODES, generator=self.host).topk(ACCEPTED).indices.sort().values
        self.path = path.to(device)
        self.length = torch.full((batch,), ACCEPTED, device=device)


def operations(inputs: StepInputs, kernels: ModuleType) -> Iterator[tuple[str, Operation]]:
    """What a step does, then all of it for each rule."""
    mine, plain = inputs.contexts(kernels)
    yield "tree_structure", _tree_structure(inputs, kernels)
    for rule in RULES:
        yield rule.name, operation_of(rule, inputs, inputs.bush, kernels, {})
    yield "commit_path", _move(inputs, kernels)
    for rule in RULES:
        ours, define = (partial(_step, inputs, rule, context) for context in (mine, plain))
        yield f"step, {rule.name}", Operation(ours, define, lambda: None)


def _step(
    inputs: StepInputs, rule: AcceptanceRule, context: StepContext, copy: int = 0
) -> Acceptance:
    context.kernels.tree_structure(inputs.bush.parents)
    kept = rule.accept(context, inputs.bush, inputs.logits[copy])
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
    parents = inputs.bush.parents

    def check() -> None:
        mine, wanted = (k.tree_structure(parents)._asdict() for k in (kernels, reference))
        for name, tensor in wanted.items():
            if not torch.equal(mine[name], tensor):
                raise ArithmeticError(f"wrong: {name} differ")

    return Operation(
        lambda _: kernels.tree_structure(parents), lambda: reference.tree_structure(parents), check
    )


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

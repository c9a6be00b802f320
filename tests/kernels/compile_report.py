"""Compile the Triton kernels for an H100 or H200 on a machine that need not have one.

A function of `specdec.kernels.gpu` is called as usual, with small tensors in host memory; in place
of every launch its kernel is compiled for sm_90 with the arguments it was given, and what the
assembler reports about it is kept.

    python -m tests.kernels.compile_report        compiles what `calls` lists, prints JSON
    python -m tests.kernels.compile_report some   of that what differs in kind, see `differing`

It must not run under TRITON_INTERPRET, which takes the place of the compiler.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from specdec.kernels import gpu
from specdec.kernels.gpu.linear import gate
from specdec.kernels.layout import DraftedTrees
from specdec.tree import MOST_NODES
from tests.kernels.memory import DEVICE
from tests.kernels.sized_calls import attention_calls, exact_calls, product_calls

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class _NoDevice:
    """What the compiler asks the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launching(run: Callable[..., None]) -> Iterator[None]:
    """Within the block, a launch is a call of `run`."""
    launch = JITFunction.run
    triton.runtime.driver.set_active(_NoDevice())
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch


@contextmanager
def compiling(numbers: list[int] | None = None) -> Iterator[list[dict[str, Any]]]:
    """Within the block, launches compile, or those with these numbers; yields the list their
    reports are added to.

    A kernel that has been compiled for like arguments before in this process is reported again.
    """
    reports: list[dict[str, Any]] = []
    launch, count = JITFunction.run, itertools.count()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if numbers is not None and next(count) not in numbers:
            return
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        reports.append(report(self.__name__, compiled))

    with launching(compile_only):
        yield reports


def report(name: str, compiled: Any) -> dict[str, Any]:
    """Registers of a thread, bytes of stack and shared memory, and instructions by kind.

    Registers that do not fit are spilled to the stack.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        code = [str(CUOBJDUMP), "--dump-sass", file.name] if name == "ring_kernel" else ["true"]
        sass = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    found = {kind: int(value) for kind, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "waits": sass.count("WARPGROUP.DEPBAR"),  # for products by warp groups; of the ring alone
        "constants": _constants(compiled),
        "async_copies": len(re.findall(r"cp\.async\.(?:c[ag]|bulk\.tensor)", ptx)),
        "copies_before_wait": len(
            re.findall(r"cp\.async\.bulk\.tensor", ptx.partition("griddepcontrol.wait")[0])
        ),
        **{option: getattr(compiled.metadata, option) for option in OPTIONS},
    }


def _constants(compiled: Any) -> dict[str, int]:
    """Integer constants the kernel was compiled for, block sizes among them."""
    names = compiled.src.fn.arg_names
    found = {names[index]: value for (index, *_), value in compiled.src.constants.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}


# What is compiled


def move(
    stored: torch.dtype | None, kernels: ModuleType = gpu, device: torch.device = DEVICE
) -> list[Tensor]:
    """Every move of keys and values, once; all that is written to."""
    layers, pages, kv_heads, page_size, dim, nodes = 2, 9, 8, 64, 128, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator)
        return numbers.to(torch.bfloat16).to(device)

    pool = [torch.zeros(layers, pages, kv_heads, page_size, dim, device=device) for _ in range(2)]
    pool = [numbers.to(stored or torch.bfloat16) for numbers in pool]
    scales = [torch.ones(pool[0].shape[:-1], device=device) if stored else None for _ in range(2)]
    trees = [normal(layers, 2, kv_heads, nodes, dim) for _ in range(2)]
    new = normal(2, kv_heads, nodes - 3, dim)
    path = torch.tensor([[0, 2, 5, 11], [0, 1, 2, 3]], device=device)
    length = torch.tensor([4, 1], device=device)
    table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    start = torch.tensor([61, 0], dtype=torch.int32, device=device)
    kernels.write_tree(trees[0][1], trees[1][1], new, -new, 3, stored)
    for accepted, behind in ((path, 0), (None, 70)):
        kernels.commit_path(*pool, *trees, accepted, length, table, start + behind, *scales)
    quantised = kernels.quantise(new, stored) if stored else ()
    return [*pool, *trees, *(tensor for tensor in scales if tensor is not None), *quantised]


def structure(
    nodes: int, kernels: ModuleType = gpu, device: torch.device = DEVICE
) -> list[Tensor]:
    parents = torch.arange(nodes, dtype=torch.int32, device=device).repeat(2, 1) // 3 - 1
    parents[1, nodes // 2 :] = -2
    return list(kernels.tree_structure(parents))


def accept(
    rule: str, dtype: torch.dtype, repeats: bool = False, *, nodes: int = 16, vocab: int = 32_000
) -> list[Tensor]:
    """Of a chain of tokens 0 .. 15, which a target that is sure of each accepts to the end."""
    batch, support = 2, 64
    count = torch.arange(nodes, device=DEVICE)
    ids = torch.arange(support, device=DEVICE).repeat(batch, nodes, 1)
    tree = DraftedTrees(
        tokens=count.repeat(batch, 1),
        parents=(count - 1).int().repeat(batch, 1),
        size=torch.tensor([nodes, 0], dtype=torch.int32, device=DEVICE),
        depth=nodes - 1,
        draft_ids=ids,
        draft_probs=torch.full(ids.shape, 1 / support, device=DEVICE),
        repeats=repeats,
    )
    logits = torch.zeros(batch, nodes, vocab, dtype=dtype, device=DEVICE)
    logits[:, count, count + 1] = 100.0
    keys = torch.zeros(batch, 3, dtype=torch.int64, device=DEVICE)
    return list(gpu.RULES[rule](tree, logits, temperature=0.8, keys=keys, streams=(0, 1)))


def judge(
    support: int,
    dtype: torch.dtype,
    repeats: bool = False,
    kernels: ModuleType = gpu,
    device: torch.device = DEVICE,
    *,
    nodes: int = 16,
) -> list[Tensor]:
    """What rules compute that are not one kernel, once each, of a tree of 16 nodes with three
    children each; and of an idle row."""
    batch, vocab = 2, 32_000
    generator = torch.Generator().manual_seed(support)
    node = torch.arange(nodes)
    parents = (node - 1) // 3
    first = torch.randint(vocab, (batch, nodes, 1), generator=generator)
    ids = (first + 997 * torch.arange(support)) % vocab
    tokens = ids[:, parents.clamp(min=0), (node - 1) % min(3, support)].to(device)
    draft = torch.rand(ids.shape, generator=generator)
    draft = (draft / draft.sum(-1, keepdim=True)).to(device)
    logits = torch.randn(batch, nodes, vocab, generator=generator)
    logits.scatter_add_(2, ids, torch.full(ids.shape, 5.0))
    logits, ids = logits.to(device, dtype), ids.to(device)
    parents = parents.int().repeat(batch, 1).to(device)
    size = torch.tensor([nodes, 0], dtype=torch.int32, device=device)
    coins = torch.rand(batch, nodes, generator=generator, dtype=torch.float64) ** 0.1
    law = kernels.target_law(logits, size, temperature=0.8, entropy=True)
    target = kernels.masses(logits, law, ids)
    last, left, chance = kernels.traverse(
        tokens, parents, size, ids, draft, target, coins.to(device), repeats=repeats
    )
    token = kernels.draw_rest(
        logits,
        law,
        torch.tensor([4, 0], device=device),
        size.long(),
        ids=ids[:, 4],
        taken=target[:, 4] / 2,
        keys=torch.zeros(batch, 3, dtype=torch.int64, device=device),
        stream=1,
    )
    count = torch.tensor([3, 7], device=device)[:, None].expand(batch, nodes)
    divisor = kernels.divisor(draft, target, count)
    laws = [law.top, law.total, law.entropy]
    found = [tensor[:1] for tensor in (*laws, left, chance, divisor)]
    return [last, token, *found]


def process(
    dtype: torch.dtype, kernels: ModuleType = gpu, device: torch.device = DEVICE
) -> list[Tensor]:
    """What `generate` does to logits, of a tree of 16 nodes with three children each and of an
    idle row, which have just got three tokens and none."""
    batch, nodes, vocab = 2, 16, 32_000
    generator = torch.Generator().manual_seed(1)
    parents = ((torch.arange(nodes) - 1) // 3).int().repeat(batch, 1).to(device)
    tokens = torch.randint(vocab, (batch, nodes), generator=generator).to(device)
    logits = torch.randn(batch, nodes, vocab, generator=generator).to(device, dtype)
    table = (torch.arange(2 * vocab).view(2, vocab) % 5).int().to(device)
    rows, length = torch.tensor([1, 2], device=device), torch.tensor([3, 0], device=device)
    seen = torch.zeros(3, vocab // 32, dtype=torch.int32, device=device)
    counts = torch.zeros(3, 2, dtype=torch.int32, device=device)
    kernels.note_tokens(seen, counts, rows, tokens[:, :4], length)
    options = {"penalty": 1.1, "bias": -table[0].float(), "not_before": table}
    found = kernels.process_logits(logits, tokens, parents, rows, seen, counts, **options)
    return [found, seen, counts]


def draft(count: int, dtype: torch.dtype) -> list[Tensor]:
    """What a drafter computes at a level, and once a tree, after logits of 3 nodes."""
    logits = torch.zeros(3, 128_256, dtype=dtype, device=DEVICE)
    ids, probs = gpu.top_tokens(logits, count)
    scores = gpu.extend(torch.zeros(1, 3, dtype=torch.float64, device=DEVICE), probs[None])
    offered = scores.flatten(1)
    chosen = gpu.best(offered, 4)
    nodes = gpu.compact(ids.view(1, -1), ids.view(1, -1), chosen, 3)
    keys = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    return [*nodes, gpu.places(chosen, 3), gpu.uniforms(keys, 2, 3 * count)]


def grow(offered: int, nodes: int) -> list[Tensor]:
    """What makes a tree of so many offered nodes."""
    tokens = torch.zeros(2, offered, dtype=torch.int64, device=DEVICE)
    chosen = gpu.best(tokens.double(), nodes)
    return [*gpu.compact(tokens, tokens - 1, chosen, nodes), gpu.places(chosen, nodes)]


def between(splits: int, stored: torch.dtype | None, **norms: Tensor) -> list[Tensor]:
    """What stands between products, once each."""
    kv_heads, heads, nodes, dim = 8, 32, 5, 128
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    residual, weight = torch.zeros(nodes, 4096, **bf16), torch.ones(4096, **bf16)
    parts = torch.zeros(splits, nodes, 4096, device=DEVICE)
    joined = torch.zeros(splits, nodes, (heads + 2 * kv_heads) * dim, device=DEVICE)
    cos, sin = torch.ones(2, 1, nodes, dim, **bf16)
    trees = torch.zeros(2, 1, kv_heads, nodes, dim, **bf16)
    query = gpu.rotate_and_write(
        joined, cos, sin, trees[0], trees[1], 0, query_heads=heads, stored=stored, **norms
    )
    return [
        *gpu.add_norm(residual, None, weight, 1e-5),
        *gpu.add_norm(residual, parts, weight, 1e-5, weight),
        gate(joined, torch.bfloat16),
        query,
    ]


def calls() -> dict[str, Callable[[], object]]:
    """One call of every kind, by name."""
    found: dict[str, Callable[[], object]] = {
        f"attention: {name}": call for name, call in attention_calls().items()
    }
    for nodes in (1, 64, 256, MOST_NODES + 1):
        found[f"trees: {nodes} nodes"] = partial(structure, nodes)
    for nodes in (256, MOST_NODES + 1):
        for rule in gpu.RULES:
            for dtype in (torch.bfloat16, torch.float32):
                call = partial(accept, rule, dtype, nodes=nodes, vocab=128_256)
                found[f"accept: {rule}, {dtype}, {nodes} nodes"] = call
        found[f"rules: {nodes} nodes"] = partial(judge, 64, torch.bfloat16, nodes=nodes)
    for offered in (1 << 8, 1 << 11, 1 << 13, 1 << 15):
        found[f"draft: {offered} offered"] = partial(grow, offered, MOST_NODES)
    for stored in (None, torch.float8_e4m3fn, torch.int8):
        found[f"cache: pages of {stored}"] = partial(move, stored)
    for rule in gpu.RULES:
        found[f"accept: {rule}"] = partial(accept, rule, torch.bfloat16)
    found["accept: float32"] = partial(accept, "recursive_rejection", torch.float32)
    found["accept: repeats"] = partial(accept, "recursive_rejection", torch.bfloat16, repeats=True)
    for support in (5, 64, 1024):
        found[f"rules: {support} candidates"] = partial(judge, support, torch.bfloat16)
    found["rules: float32, repeats"] = partial(judge, 64, torch.float32, True)
    for dtype in (torch.bfloat16, torch.float32):
        found[f"process: {dtype}"] = partial(process, dtype)
    for count in (1, 8, 64):
        found[f"draft: {count} tokens"] = partial(draft, count, torch.bfloat16)
    found["draft: float32"] = partial(draft, 8, torch.float32)
    found |= product_calls() | exact_calls()
    head = torch.ones(128, dtype=torch.bfloat16, device=DEVICE)
    found["between: plain"] = partial(between, 1, None)
    found["between: norms"] = partial(
        between, 4, torch.float8_e4m3fn, query_norm=head, key_norm=head
    )
    return found


def facets(call: Callable[[], object]) -> list[set[tuple[str, str, str]]]:
    """What each of its launches is in kind, as (kernel, parameter, value): the types of tensors,
    which of them are left out, options on or off, and how many rows a program takes; not sizes."""
    found = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        kinds = set()
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            value = getattr(value, "base", value)  # of a descriptor
            kind = value.dtype if isinstance(value, Tensor) else value
            number = isinstance(kind, int | float) and not isinstance(kind, bool)
            if name == "BLOCK_M" or not number:
                kinds.add((self.__name__, name, str(kind)))
        found.append(kinds)

    with launching(note):
        call()
    return found


def differing() -> dict[str, list[int]]:
    """Few launches that have between them every facet of all: by call, the numbers of its own."""
    launches = {
        (name, number): kinds
        for name, call in calls().items()
        for number, kinds in enumerate(facets(call))
    }
    left = set[tuple[str, str, str]]().union(*launches.values())
    chosen = defaultdict(list)
    while left:
        name, number = max(launches, key=lambda launch: len(launches[launch] & left))
        chosen[name].append(number)
        left -= launches[name, number]
    return chosen


def compile_call(name: str, numbers: list[int] | None = None) -> list[dict[str, Any]]:
    """Reports of the call's launches, or of those with these numbers."""
    with compiling(numbers) as reports:
        calls()[name]()
    return [{"call": name, **found} for found in reports]


def main() -> None:
    torch.set_num_threads(1)
    chosen = differing() if "some" in sys.argv[1:] else dict.fromkeys(calls())
    # A fork has imported torch and Triton already; nothing is compiled before it.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("fork")) as workers:
        entries = workers.map(compile_call, chosen, chosen.values())
        found = [entry for call in entries for entry in call]
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

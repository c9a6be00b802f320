"""Benchmarks of attention without a GPU: inputs, masks, the gate, arithmetic; and on one."""

import math
import multiprocessing
import os
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import attention as kernel_attention
from specdec.experiments.bench import clock as gpu_clock
from specdec.experiments.bench import peers
from specdec.experiments.bench.cases import Case, Shape, ancestors_of
from specdec.experiments.bench.clock import GraphClock
from specdec.experiments.bench.peers import Contender
from specdec.kernels import reference
from specdec.kernels.gpu import plan
from specdec.tree import RANDOM_DEPTH, random_parents
from tests.experiments.benched import DEVICE, ScriptedClock, small_case

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


# Arithmetic


@pytest.mark.parametrize(
    ("shape", "us"),
    list(
        zip(
            kernel_attention.SHAPES,
            [2.8, 11.0, 29.4, 43.6, 58.9, 87.7, 118, 118, 177, 29.4, 58.8, 118],
            strict=True,
        )
    ),
    ids=str,
)
def test_roof(shape: Shape, us: float) -> None:
    assert shape.roof_us(4.57e12, 790e12) == pytest.approx(us, rel=0.01)


def test_grid_covers_every_combination() -> None:
    assert len(set(kernel_attention.GRID)) == 2 * 3 * 5 * 6
    assert Shape.of((32, 131072, 128, 64)) in kernel_attention.GRID


def test_a_shape_of_sizes() -> None:
    assert Shape.of((1, 2, 3)) == Shape(batch=1, context=2, nodes=3)
    assert Shape.of((1, 2, 3, 64, 4)) == Shape(batch=1, context=2, nodes=3, heads=64, kv_heads=4)
    with pytest.raises(ValueError, match="batch,context,nodes"):
        Shape.of((1, 2))


def test_shares_compile_every_variant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Process:
        exitcode = 0

        def __init__(self, target: Any, args: Any) -> None:
            self.share = args

        def start(self) -> None:
            started.append(self.share)

        def join(self, seconds: float) -> None: ...

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", Process)
    assert peers.compile_ahead(kernel_attention.SHAPES[:2], 64)["faults"] == []
    _, _, _, of = started[0]
    assert started == [(kernel_attention.SHAPES[:2], 64, number, of) for number in range(of)]

    class Recorded:
        def __init__(self, options: dict[str, Any]) -> None:
            compiled.append(options)

        def start(self) -> Any:
            return list

    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(peers, "Case", lambda shape, **sizes: shape)
    monkeypatch.setattr(peers, "Contiguous", lambda case: case)
    monkeypatch.setattr(peers, "flex", lambda data, options: Recorded(options))
    for number in range(3):
        peers.compile_share(kernel_attention.SHAPES[:1], 64, number, 3)
    wanted = [one for of in peers.flex_options(kernel_attention.SHAPES[0]).values() for one in of]
    assert sorted(map(str, compiled)) == sorted(map(str, wanted))


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a share that fails")
def test_a_share_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    fork = multiprocessing.get_context("fork")  # which need not import torch again
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    found = peers.compile_ahead(kernel_attention.SHAPES[:1], 64)
    assert (found["processes"], found["faults"]) == (1, ["exit 1"])


def test_read_kernel_reads_everything_once() -> None:
    data = torch.randint(2**31, (8 * 64,), dtype=torch.int32)
    for programs in (8, 3):
        out = torch.empty(programs)
        gpu_clock.read_kernel[(programs,)](out, data, 8, programs, BLOCK=64)
        blocks = data.numpy().reshape(8, 64)
        lanes = [
            np.bitwise_xor.reduce(blocks[first::programs], axis=0) for first in range(programs)
        ]
        expected = np.array([lane.max() for lane in lanes], dtype=np.float32)
        assert np.array_equal(out.numpy(), expected)


# Inputs


def test_trees_are_as_deep_as_they_should_be() -> None:
    generator = torch.Generator().manual_seed(3)
    deepest = []
    for nodes in (1, 2, 64, 128):
        parents = random_parents(nodes, generator)
        seen = ancestors_of(parents)
        for node in range(nodes):
            path = [node]
            while parents[path[-1]] >= 0:
                assert parents[path[-1]] < path[-1]
                path.append(parents[path[-1]])
            assert path[-1] == 0
            assert sorted(path) == seen[node].nonzero()[:, 0].tolist()
        deepest.append(int(seen.sum(-1).max()) - 1)
    assert deepest[-1] == RANDOM_DEPTH


def test_pages_hold_context_and_tree() -> None:
    case = small_case(nodes=20)  # more than a page
    for copy in range(2):
        for pool, tree, whole in zip(
            (case.key_pages[copy], case.value_pages[copy]),
            (case.key_tree[copy], case.value_tree[copy]),
            case.contiguous(copy),
            strict=True,
        ):
            for sequence, head, token in product(range(2), range(2), (0, 17, 191)):
                page = int(case.layout().page_table[sequence, token // 16])
                row = pool[page, head, token % 16]
                assert torch.equal(whole[sequence, head, token], row)
            assert torch.equal(whole[:, :, 192:], tree)
            assert whole.is_contiguous()
    assert sorted(case.pages.flatten().tolist()) == list(range(2 * (12 + 2)))
    assert case.pages.flatten().tolist() != list(range(2 * (12 + 2)))


def test_context_must_fill_its_pages() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        small_case(context=100)


def test_checked_sequences_are_spread() -> None:
    assert small_case(batch=5, context=16).checked == [0, 1, 2, 3, 4]
    case = small_case(batch=5, context=16)
    case.shape = Shape(batch=5, context=1 << 17, nodes=1)
    assert case.checked == [0, 4]


def test_expected_answer_is_the_definition() -> None:
    case = small_case(context=32, nodes=4, batch=2)
    keys, values = (tensor.double() for tensor in case.contiguous(0))
    mask, answer = case.mask(), case.expected[0]
    for sequence, node, head in product(range(2), range(4), range(4)):
        query = case.query[sequence, head, node].double()
        seen = [key for key in range(36) if mask[sequence, 0, node, key]]
        scores = [float(query @ keys[sequence, head // 2, key]) / 32**0.5 for key in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        shares = torch.tensor(weights, dtype=torch.float64).to(DEVICE) / sum(weights)
        wanted = (shares[:, None] * values[sequence, head // 2, seen]).sum(0)
        assert torch.allclose(answer[sequence, node, head].double(), wanted, atol=1e-5)


# The gate


def attend(case: Case, **changes: Any) -> Tensor:
    layout = case.layout()
    for name, value in changes.items():
        setattr(layout, name, value)
    return reference.tree_attention(
        case.query,
        case.key_pages[0],
        case.value_pages[0],
        case.key_tree[0],
        case.value_tree[0],
        layout,
        scale=case.scale,
    )


@pytest.fixture(scope="module")
def long_case() -> Case:
    return small_case(batch=1, context=8192, nodes=16, copies=1, heads=8, head_dim=64)


def test_right_answer_passes(long_case: Case) -> None:
    assert long_case.error(attend(long_case)) <= long_case.expected[1]


def test_no_bit_of_the_mask_can_be_wrong(long_case: Case) -> None:
    right = long_case.layout().ancestors
    assert right is not None
    for node, other in ((0, 5), (7, 0), (15, 15), (15, 1)):
        wrong = right.clone()
        wrong[0, node, 0] ^= 1 << other
        error = long_case.error(attend(long_case, ancestors=wrong))
        assert error > 2 * long_case.expected[1], (node, other)


def test_no_page_can_be_wrong(long_case: Case) -> None:
    table = long_case.layout().page_table.clone()
    table[0, 100] = table[0, 101]
    assert long_case.error(attend(long_case, page_table=table)) > long_case.expected[1]


def test_missing_rows_are_infinitely_wrong(long_case: Case) -> None:
    out = attend(long_case)
    out[0, 3, 2, 1] = float("nan")
    assert long_case.error(out) == float("inf")


# Measuring


def method(name: str, out: Tensor) -> Contender:
    return Contender(name, lambda: lambda copy: out, lambda tensor: tensor)


def test_only_right_answers_are_timed(long_case: Case) -> None:
    right = attend(long_case)

    def broken() -> Any:
        raise RuntimeError("no such backend")

    variants = [
        method("wrong", right * 1.1),
        Contender("broken", broken, lambda tensor: tensor),
        method("slow", right),  # 9 us
        method("fast", right),  # looks like 4 us, is 5
        method("slower", right),  # looks like 8 us
    ]
    found = kernel_attention.measure(long_case, variants, ScriptedClock(9, 4, 5, 8))
    assert (found["us"], found["variant"]) == (5, "fast")
    assert found["variants"]["slow"]["us"] == 9
    assert found["variants"]["slower"] == {"us": 8, "rough": True}
    assert found["variants"]["wrong"].keys() == {"fault"}
    assert "relative error" in found["variants"]["wrong"]["fault"]
    assert found["variants"]["broken"] == {"fault": "RuntimeError: no such backend"}


def test_a_wrong_replay_gets_no_time(long_case: Case) -> None:
    outputs = iter([attend(long_case), attend(long_case) * float("nan")])
    variant = Contender("stale", lambda: lambda copy: next(outputs), lambda tensor: tensor)
    found = kernel_attention.measure(long_case, [variant], ScriptedClock(1))
    assert "us" not in found
    assert "inf" in found["variants"]["stale"]["fault"]


def test_a_fault_in_making_variants_is_recorded(long_case: Case) -> None:
    def variants() -> Any:
        yield method("one", attend(long_case))
        raise MemoryError("too large")

    found = kernel_attention.measure(long_case, variants(), ScriptedClock(3))
    assert (found["us"], found["fault"]) == (3, "MemoryError: too large")


# Ours and peers


def test_whatever_runs_here_is_right(measured: dict[str, Any]) -> None:
    methods = measured["methods"]
    assert list(methods) == [
        *("ours", "ours + plan", "ours, no split", "sdpa", "sdpa + gather"),
        *("flex default", "flex tuned", "flex split"),
    ]
    for name, found in methods.items():
        if DEVICE.type == "cpu" or not name.startswith("flex"):  # compiled, it has its limits
            assert found.get("error", 1.0) <= measured["allowed_error"], (name, found)
            assert found["us"] == 1.0
    math_forms = {name for name in methods["sdpa"]["variants"] if name.startswith("math")}
    assert len(math_forms) == 4
    for name in math_forms:
        assert "us" in methods["sdpa"]["variants"][name]
    assert len(methods["sdpa + gather"]["variants"]) == 2
    ours = methods["ours"]
    assert ours["of_roof"] == pytest.approx(measured["roof_us"] / ours["us"])
    assert ours["gb_per_s"] == pytest.approx(2 * 2 * 2 * 69 * 32 * 2 / 1e-6 / 1e9)
    assert ours["tflop_per_s"] == pytest.approx(4 * 2 * 5 * 4 * 32 * 69 / 1e-6 / 1e12)


def test_a_single_node_needs_no_mask() -> None:
    case = small_case(nodes=1, context=64, copies=1)
    variants = list(peers.sdpa(peers.Contiguous(case)))
    assert all("no mask" in variant.name for variant in variants)
    assert any(variant.name.startswith("flash") for variant in variants)
    found = kernel_attention.measure(case, variants, ScriptedClock())
    assert sum("us" in variant for variant in found["variants"].values()) >= 2


def test_layers_share_a_plan_and_calls_do_not() -> None:
    layouts = []
    alone = []

    def attention(*inputs: Any, **options: Any) -> Tensor:
        layouts.append(inputs[5])
        alone.append(plan.processors(DEVICE) == 1)
        return inputs[0]

    for name, (variant,) in kernel_attention.ours(small_case(context=16), attention).items():
        layouts.clear()
        alone.clear()
        call = variant.start()
        call(0)
        call(1)
        variant.start()(0)
        shared = name != "ours + plan"
        assert (layouts[0] is layouts[1]) == shared
        assert layouts[0] is not layouts[2]
        assert alone == [name == "ours, no split"] * 3


@pytest.mark.parametrize(("context", "nodes"), [(256, 64), (192, 9), (128, 1), (64, 5)])
def test_block_mask_equals_the_dense_mask(context: int, nodes: int) -> None:
    case = small_case(context=context, nodes=nodes, copies=1)
    mask, dense = peers.block_mask(case), case.mask()
    keys, blocks = context + nodes, -(-(context + nodes) // 128)
    b, q, k = torch.meshgrid(
        *(torch.arange(size, device=DEVICE) for size in (2, nodes, keys)), indexing="ij"
    )
    assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), q, k), dense[:, 0])

    assert mask.full_kv_indices is not None
    assert mask.full_kv_num_blocks is not None
    orders = (mask.kv_indices[0, 0, 0].tolist(), mask.full_kv_indices[0, 0, 0].tolist())
    masked = orders[0][: int(mask.kv_num_blocks)]
    full = orders[1][: int(mask.full_kv_num_blocks)]
    assert sorted(masked + full) == list(range(blocks))
    for block in full:
        assert bool(dense[..., block * 128 : block * 128 + 128].all())
        assert (block + 1) * 128 <= keys
    assert len(full) == context // 128
    for order in orders:
        assert sorted(order) == list(range(blocks))


@pytest.mark.parametrize("shape", kernel_attention.SHAPES, ids=str)
def test_flex_options_fill_the_gpu(shape: Shape) -> None:
    options = peers.flex_options(shape)
    assert options["flex default"] == [{}]
    assert 1 <= len(options["flex tuned"]) <= 2
    assert len(options["flex split"]) <= 5
    for option in options["flex split"]:
        rows = shape.nodes * 4
        programs = shape.batch * 8 * math.ceil(rows / option["BLOCK_M"]) * option["SPLIT_KV"]
        assert 66 <= programs <= 4 * 132


# On a GPU


@pytest.mark.gpu
@needs_gpu
def test_everything_is_measured_on_a_gpu() -> None:
    clock = GraphClock(calls=4, replays=3)
    result: dict[str, Any] = {"shapes": [], "ceilings": {"read": 4e12, "compute": 8e14}}
    saved: list[None] = []
    kernel_attention.run(
        [Shape(batch=2, context=256, nodes=8), Shape(batch=1, context=256, nodes=1)],
        kernel_attention.beside_peers,
        clock,
        result,
        partial(saved.append, None),
        page_size=64,
    )
    assert len(saved) == 2
    for record in result["shapes"]:
        for name in (
            "ours",
            "ours + plan",
            "ours, no split",
            "sdpa",
            "sdpa + gather",
            "flex tuned",
        ):
            assert record["methods"][name].get("us", 0) > 0, (name, record["methods"][name])


@pytest.mark.gpu
@needs_gpu
def test_ceilings_are_those_of_a_gpu() -> None:
    clock = GraphClock(calls=2, replays=3)
    read, tried = gpu_clock.read_ceiling(clock, gigabytes=1)
    assert 1e11 < read < 2e13
    assert len(tried) == 15
    assert 1e13 < gpu_clock.compute_ceiling(clock, size=4096) < 5e15

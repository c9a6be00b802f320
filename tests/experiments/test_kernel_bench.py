"""The kernel benchmark without a GPU: inputs, masks, the gate, arithmetic, files, tables."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.experiments.bench import attention as kernel_attention
from specdec.experiments.bench import clock as gpu_clock
from specdec.experiments.bench import elementwise, operation, peers, rules, run, steps
from specdec.experiments.bench.cases import (
    TREE_DEPTH,
    Case,
    Shape,
    ancestors_of,
    random_parents,
)
from specdec.experiments.bench.clock import GraphClock, Timing
from specdec.experiments.bench.peers import Method
from specdec.experiments.figures import draw, kernels
from specdec.kernels import gpu, reference
from specdec.lab.command import parse, write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def small_case(
    *, batch: int = 2, context: int = 192, nodes: int = 9, copies: int = 2, **sizes: int
) -> Case:
    shape = Shape(
        batch=batch,
        context=context,
        nodes=nodes,
        **{"heads": 4, "kv_heads": 2, "head_dim": 32, **sizes},
    )
    return Case(shape, copies=copies, page_size=16, dtype=torch.bfloat16, device=DEVICE)


class ScriptedClock(GraphClock):
    """Runs the calls and says they took what was planned, in turn."""

    def __init__(self, *us: float) -> None:
        super().__init__()
        self.us = list(us)

    def time(self, start: Any, copies: int, *, quick: bool = False) -> Timing:
        call = start()
        output, *_ = [call(copy) for copy in range(copies)]
        us = self.us.pop(0) if self.us else 1.0
        return Timing(us, us, us, output)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The record of a shape of which everything runs here, as the benchmark writes them."""
    case = small_case(context=64, nodes=5, copies=1)
    record: dict[str, Any] = {**asdict(case.shape), "methods": {}}
    columns = kernel_attention.beside_peers(gpu.tree_attention)(case, record["methods"])
    ceilings = {"read": 4e12, "compute": 8e14}
    kernel_attention.fill(record, case, columns, ScriptedClock(), ceilings)
    return record


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
    assert shape.roof_us(**kernel_attention.FIXED, itemsize=2) == shape.roof_us(4.57e12, 790e12)


def test_grid_covers_every_combination() -> None:
    assert len(set(kernel_attention.GRID)) == 2 * 3 * 5 * 5
    assert Shape.of((32, 131072, 128, 64)) in kernel_attention.GRID


def test_shape_survives_the_command_line() -> None:
    for shape in kernel_attention.GRID:
        assert Shape.of(shape.sizes) == shape
    with pytest.raises(ValueError, match="batch,context,nodes"):
        Shape.of((1, 2))


def test_shares_compile_every_variant_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command)

        def wait(self, seconds: float) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert peers.compile_ahead(kernel_attention.SHAPES[:2], 64)["faults"] == []
    assert started[0][:3] == [sys.executable, "-m", "specdec.experiments.bench.peers"]
    shares = [parse(peers.Share, command[3:]) for command in started]
    assert [share.number for share in shares] == list(range(shares[0].of))
    assert all(
        share.shapes == ((1, 2048, 64, 32, 8), (1, 8192, 64, 32, 8)) and share.page_size == 64
        for share in shares
    )


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
    assert deepest[-1] == TREE_DEPTH


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


def method(name: str, out: Tensor) -> Method:
    return Method(name, lambda: lambda copy: out, lambda tensor: tensor)


def test_only_right_answers_are_timed(long_case: Case) -> None:
    right = attend(long_case)

    def broken() -> Any:
        raise RuntimeError("no such backend")

    variants = [
        method("wrong", right * 1.1),
        Method("broken", broken, lambda tensor: tensor),
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
    variant = Method("stale", lambda: lambda copy: next(outputs), lambda tensor: tensor)
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

    def attention(*inputs: Any, **options: Any) -> Tensor:
        layouts.append(inputs[5])
        return inputs[0]

    for name, (variant,) in kernel_attention.ours(small_case(context=16), attention).items():
        layouts.clear()
        call = variant.start()
        call(0)
        call(1)
        variant.start()(0)
        shared = name != "ours + plan"
        assert (layouts[0] is layouts[1]) == shared
        assert layouts[0] is not layouts[2]


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


# Steps and elementwise operations


def test_steps_agree_with_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "NODES", 10)
    monkeypatch.setattr(operation, "wall_us", lambda call: 1.0)
    inputs = steps.StepInputs(2, copies=1, vocabulary=300, layers=1, device=DEVICE)
    inputs.tree.check()
    names = []
    for name, found in steps.operations(inputs, gpu):
        names.append(name)
        assert "us" in operation.measure(found, 1, ScriptedClock()), name
    assert len(names) == 1 + 3 + 2 + 3
    lengths = steps.RULES[2].accept(inputs.context, inputs.tree, inputs.logits[0]).length
    assert int(lengths.max()) > 1  # otherwise nothing was walked


def test_steps_that_disagree_get_no_time() -> None:
    inputs = steps.StepInputs(2, copies=1, vocabulary=300, layers=1, device=DEVICE)

    class Wrong:
        RULES = gpu.RULES

        @staticmethod
        def tree_structure(*given: Any, **options: Any) -> Any:
            right = reference.tree_structure(*given, **options)
            return right._replace(depths=right.depths + 1)

        @staticmethod
        def commit_path(*given: Any) -> None:
            given[0].zero_()

    for name, found in steps.operations(inputs, Wrong):  # type: ignore[arg-type]
        if name in ("tree_structure", "commit_path"):
            assert "wrong" in operation.measure(found, 1, ScriptedClock())["fault"], name


def test_elementwise_functions() -> None:
    torch.manual_seed(0)
    hidden, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total, normal = elementwise.add_norm(hidden, residual, weight)
    for row in range(3):
        values = [float(h + r) for h, r in zip(hidden[row], residual[row], strict=True)]
        root = math.sqrt(sum(value**2 for value in values) / 8 + 1e-5)
        assert total[row].tolist() == pytest.approx(values)
        wanted = [value / root * float(w) for value, w in zip(values, weight, strict=True)]
        assert normal[row].tolist() == pytest.approx(wanted, rel=1e-5)

    angle = torch.randn(3, 4).repeat(1, 2)
    key_tree, value_tree = torch.zeros(2, 2, 3, 8)
    joined = torch.randn(3, (4 + 2 * 2) * 8)
    query = elementwise.rotate_and_write(key_tree, value_tree, joined, angle.cos(), angle.sin())
    heads = joined.view(3, 8, 8).transpose(0, 1)
    turned = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(
        torch.ones(3, 4), angle[:, :4]
    )
    rotated = torch.cat([turned.real, turned.imag], -1)
    assert torch.allclose(query, rotated[:4], atol=1e-6)
    assert torch.allclose(key_tree, rotated[4:6], atol=1e-6)
    assert torch.equal(value_tree, heads[6:])

    gate, up = torch.randn(2, 3, 5)
    product_ = elementwise.swiglu(torch.cat([gate, up], -1))
    assert torch.allclose(product_, gate * torch.sigmoid(gate) * up)


def test_compiled_functions_are_compared() -> None:
    arguments = (torch.randn(3, 8),)

    def wrong(joined: Tensor) -> Tensor:
        return elementwise.swiglu(joined) * 1.1

    check = elementwise._check_compiled
    check(elementwise.swiglu, elementwise.swiglu, arguments)
    with pytest.raises(ArithmeticError, match="relative difference"):
        check(wrong, elementwise.swiglu, arguments)


# Files


def made_up(measured: dict[str, Any], part: str) -> dict[str, Any]:
    missing = measured | {
        "nodes": 7,
        "methods": {"ours": {"variants": {"": {"fault": "X: y [z]"}}}},
    }
    return {
        "part": part,
        "command": "python -m specdec.experiments.bench.run attention",
        "page_size": 64,
        "ceilings": {"read": 4.5e12, "compute": 7.9e14},
        "hardware": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "shapes": [measured, measured | {"context": 2048}, missing],
    }


@pytest.mark.parametrize("part", ["attention", "grid"])
def test_results_become_a_table_and_a_plot(
    part: str, measured: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / f"kernel_{part}.json"
    write(path, made_up(measured, part))
    result = json.loads(path.read_text())
    assert "4.50 TB/s, 790 TFLOP/s" in kernels.TABLES[part](result)
    assert any("nodes 7, heads 4: ours: X: y [z]" in line for line in kernels.faults(result))
    assert draw.main([str(path)]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_was_cut_short_says_so_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rules.json"

    def fail(options: Any, result: dict[str, Any], save: Any) -> int:
        result["batches"] = [{"batch": 1, "operations": {"greedy": {"us": 1, "torch_us": 2}}}]
        result["settings"] |= {"temperature": 1.0, "dtype": "float32"}
        raise RuntimeError("gone")

    monkeypatch.setattr(rules, "rules", fail)
    assert run.main(["rules", "device=cpu", f"out={out}"]) == 1
    shown = capsys.readouterr().out
    assert "1.0 (2)" in shown
    assert "stopped: RuntimeError: gone" in shown
    assert json.loads(out.read_text())["fault"] == "RuntimeError: gone"


def test_tables_of_operations() -> None:
    result = {
        "command": "",
        "batches": [
            {"batch": 1, "nodes": 64, "operations": {"greedy": {"us": 21.5, "torch_us": 800.0}}},
            {"batch": 8, "operations": {"greedy": {"fault": "ArithmeticError: wrong"}}},
        ],
    }
    assert "| greedy | 21.5 (800) |  |" in kernels.steps(result)
    assert list(kernels.faults(result)) == ["batch 8: greedy: ArithmeticError: wrong"]
    rows = [{"rows": 64, "operations": {"SwiGLU product": {"us": 3.0, "torch_us": 20.0}}}]
    text = kernels.elementwise({"command": "", "rows": rows, "floor": {"1 programs": 1.25}})
    assert "| us (torch) | rows 64 |" in text
    assert "1.2 (1 programs)" in text


def test_table_of_attention(measured: dict[str, Any]) -> None:
    table = kernels.attention(made_up(measured, "attention")).splitlines()
    header, _, *lines = table[-5:]
    assert "NVIDIA H200" in table[0]
    assert header.count("|") == lines[0].count("|") == lines[2].count("|")
    assert lines[1].startswith("| 2, 2048, 5 | 1.0 |")
    assert lines[2].startswith("| 2, 64, 7 |  |")


def test_benchmarks_import_no_tools_of_the_runner() -> None:
    code = "import sys; from specdec.experiments.bench import attention, elementwise, rules, run"
    code += "; from specdec.experiments.bench import steps; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"hydra", "omegaconf", "wandb", "datasets", "transformers"}.isdisjoint(
        done.stdout.split()
    )


def test_without_a_gpu_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["attention", "shapes=[[1,2048,64]]"]) == 2
    assert "error: attention: needs an NVIDIA GPU" in capsys.readouterr().err
    assert run.main(["attentive"]) == 2
    assert "attentive: no such part; there are attention, grid" in capsys.readouterr().err
    for words in (["--help"], ["attention", "--help"], ["anatomy", "-h"]):
        assert run.main(words) == 0
    assert "page_size=64" in capsys.readouterr().out


# On a GPU


@pytest.mark.gpu
@needs_gpu
def test_everything_is_measured_on_a_gpu() -> None:
    clock = GraphClock(calls=4, replays=3)
    result: dict[str, Any] = {"shapes": [], "ceilings": {"read": 4e12, "compute": 8e14}}
    saved: list[None] = []
    kernel_attention.run(
        [Shape(batch=2, context=256, nodes=8), Shape(batch=1, context=256, nodes=1)],
        kernel_attention.beside_peers(gpu.tree_attention),
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

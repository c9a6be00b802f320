"""Every kernel compiles for an H100 or H200, keeps its numbers in registers, and multiplies on the
tensor cores. No GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPILLED = 8  # bytes: a word or two set aside outside of all loops cost nothing
# Of exact attention over long chains in quantised pages or wide heads: a prefill's keys of the
# scratch, read in the loop behind that of the pages.
SPILLED_BY_PREFILL = 64
SHARED_MEMORY = 227 * 1024  # bytes a program may have on an H100
ATTENTION = ("attention_kernel", "context_kernel")  # what reads whole blocks of pages
TENSOR_ROWS = 64  # of a product by a warp group, the fastest way of a Hopper GPU

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler needs Linux")


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def reports(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the compiler says of the launches of the calls in `compile_report`. By default of those
    that differ in kind: every kernel with every type, option and number of rows that it is
    launched with, each once. Whether every size fits is a slow test, for it compiles minutes."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_report", request.param],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def name(report: dict[str, Any]) -> str:
    return f"{report['call']}: {report['kernel']}"


def test_all_kinds_of_kernels_are_compiled(reports: list[dict[str, Any]]) -> None:
    kinds = {report["call"].split(":")[0] for report in reports}
    assert kinds == {
        "accept",
        "attention",
        "between",
        "cache",
        "draft",
        "exact",
        "exact product",
        "process",
        "product",
        "rules",
        "trees",
    }
    assert len({report["kernel"] for report in reports}) >= 10


def test_registers_suffice(reports: list[dict[str, Any]]) -> None:
    def allowed(report: dict[str, Any]) -> int:
        chain = report["kernel"] == "context_kernel" and report["constants"].get("CAUSAL")
        return SPILLED_BY_PREFILL if chain else SPILLED

    assert [name(report) for report in reports if report["stack"] > allowed(report)] == []


def test_shared_memory_suffices(reports: list[dict[str, Any]]) -> None:
    too_large = [name(report) for report in reports if report["shared"] > SHARED_MEMORY]
    assert too_large == []


def products(reports: list[dict[str, Any]], *, wide: bool) -> list[dict[str, Any]]:
    """Launches of attention kernels in a 16-bit type, with large or with small row blocks."""
    return [
        report
        for report in reports
        if report["kernel"] in ATTENTION
        and "float32" not in report["call"]
        and (report["constants"]["BLOCK_M"] >= TENSOR_ROWS) == wide
    ]


def test_many_rows_are_multiplied_by_warp_groups(reports: list[dict[str, Any]]) -> None:
    """Of both 16-bit types, whatever type the pages hold."""
    found = products(reports, wide=True)
    assert len(found) >= 3
    assert [name(report) for report in found if not report["wgmma"]] == []


def test_few_rows_are_multiplied_by_tensor_cores_too(reports: list[dict[str, Any]]) -> None:
    found = products(reports, wide=False)
    assert found
    assert [name(report) for report in found if not report["wgmma"] + report["mma"]] == []


def test_pages_are_on_their_way_while_others_are_multiplied(reports: list[dict[str, Any]]) -> None:
    attention = [report for report in reports if report["kernel"] in ATTENTION]
    assert [name(report) for report in attention if not report["async_copies"]] == []


def streams(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches that read a weight in a 16-bit type."""
    return [
        report
        for report in reports
        if report["kernel"] in ("stream_kernel", "ring_kernel") and "float32" not in report["call"]
    ]


def test_weights_are_multiplied_by_warp_groups_for_any_number_of_rows(
    reports: list[dict[str, Any]],
) -> None:
    found = streams(reports)
    assert {report["kernel"] for report in found} == {"stream_kernel", "ring_kernel"}
    assert {report["constants"]["BLOCK_M"] for report in found} == {16, 64, 128, 256}
    assert [name(report) for report in found if not report["wgmma"]] == []


def test_weights_are_on_their_way_while_others_are_multiplied(
    reports: list[dict[str, Any]],
) -> None:
    assert [name(report) for report in streams(reports) if not report["async_copies"]] == []


def test_weights_are_sent_for_before_earlier_kernels_have_ended(
    reports: list[dict[str, Any]],
) -> None:
    """With the ring: its whole first round of weights stands before the wait."""
    for report in reports:
        if report["kernel"] == "ring_kernel":
            constants = report["constants"]
            tiles = constants["STAGES"] * (1 + constants["WITH_GATE"])
            assert report["copies_before_wait"] >= tiles, name(report)


def test_products_of_the_ring_do_not_wait_for_each_other(reports: list[dict[str, Any]]) -> None:
    """One wait in the loop, one behind it. The assembler puts in others where operands in
    registers are in its way."""
    found = [report for report in reports if report["kernel"] == "ring_kernel"]
    assert any("float8" in report["call"] for report in found)
    assert [name(report) for report in found if report["waits"] > 2] == []


def test_kernels_of_a_layer_start_early(reports: list[dict[str, Any]]) -> None:
    found = [
        report
        for report in reports
        if report["call"].split(":")[0] in ("product", "exact product", "between")
    ]
    assert [name(report) for report in found if not report["launch_pdl"]] == []

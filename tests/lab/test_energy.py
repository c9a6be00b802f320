"""Energy against a card of known power; and what a run says where there is none."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from specdec.lab import energy
from specdec.lab import experiment as experiments
from specdec.lab.energy import EnergyLine, Meter, energy_of
from specdec.lab.records import RecordSettings
from specdec.lab.terminal import show_summary
from specdec.request import Decoding
from tests.lab import scripted
from tests.lab.scripted import decode
from tests.running import lines

CUDA = torch.device("cuda")


class Card(ModuleType):
    """A library with one card, which uses 300 W while it works and 100 W otherwise."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.now = self.millijoules = 0.0
        self.busy, self.counts, self.open = False, True, 0
        self.failing = ""

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.millijoules += seconds * self.watts * 1e3

    @property
    def watts(self) -> float:
        return 300.0 if self.busy else 100.0

    def clock(self) -> float:
        return self.now

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1-2-3"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.counts:
            raise self.NVMLError_NotSupported
        if self.failing:
            raise self.NVMLError(self.failing)
        return int(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return int(self.watts * 1e3)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    made = Card()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(energy, "wait", lambda device: None)
    properties = SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    yield made
    assert made.open == 0


@pytest.fixture
def told(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """With a clock of its own."""
    clock = SimpleNamespace(perf_counter=card.clock, sleep=card.sleep)
    monkeypatch.setattr(energy, "time", clock)
    return card


def work(card: Card, seconds: float) -> None:
    card.busy = True
    card.sleep(seconds)
    card.busy = False


def test_joules_are_those_of_what_was_decoded(told: Card) -> None:
    """12 s at 300 W in two parts; what lies between is not in it."""
    meter = Meter(CUDA)
    meter.rest()
    with meter.running():
        work(told, 4.0)
    told.sleep(100.0)
    with meter.running():
        work(told, 8.0)
    line = meter.close(tokens=900)
    assert line == EnergyLine(joules=3600.0, seconds=12.0, tokens=900, idle_watts=100.0)
    assert energy_of([asdict(line)])["energy"] == {**asdict(line), "joules_per_token": 4.0}


def test_an_interruption_is_measured_up_to_it(told: Card) -> None:
    meter = Meter(CUDA)

    with suppress(KeyboardInterrupt), meter.running():
        work(told, 4.0)
        raise KeyboardInterrupt
    line = meter.close(tokens=3)
    assert line is not None
    assert line.joules == 1200.0


def test_processes_add_up() -> None:
    lines = [
        {"joules": 1000.0, "seconds": 6.0, "tokens": 100, "idle_watts": 90.0},
        {"joules": 2000.0, "seconds": 12.0, "tokens": 200, "idle_watts": 120.0},
    ]
    found = energy_of(lines)["energy"]
    assert found == {
        "joules": 3000.0,
        "seconds": 18.0,
        "tokens": 300,
        "idle_watts": 110.0,
        "joules_per_token": 10.0,
    }


def test_less_than_ten_seconds_are_no_figure() -> None:
    line = {"joules": 1000.0, "seconds": 9.9, "tokens": 100, "idle_watts": 90.0}
    found = energy_of([line])
    assert found == {"energy": None, "energy_reason": "9.9 s of decoding; a figure takes 10"}


def test_a_card_without_a_counter_is_sampled(card: Card) -> None:
    """By the real clock, for a fifth of a second at 300 W."""
    card.counts = False
    meter = Meter(CUDA)
    card.busy = True
    time.sleep(0.1)
    with meter.running():
        time.sleep(0.2)
    line = meter.close(tokens=1)
    assert line is not None
    assert line.joules / line.seconds == pytest.approx(300.0, rel=0.01)
    assert line.seconds == pytest.approx(0.2, abs=0.1)


def test_what_fails_on_the_way_is_the_reason(told: Card) -> None:
    meter = Meter(CUDA)
    with meter.running():
        work(told, 20.0)
        told.failing = "GPU is lost"
    assert meter.reason == "NVML: GPU is lost"
    assert meter.close(tokens=5) is None


def test_without_the_library_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # cannot be imported
    meter = Meter(CUDA)
    assert "pynvml" in str(meter.reason)
    with meter.running():
        pass
    assert meter.close(tokens=5) is None
    assert energy_of([], meter.reason)["energy_reason"] == meter.reason


def test_a_run_without_a_gpu_says_that_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And goes on, as one of a sweep over devices must."""
    monkeypatch.setattr(experiments, "OurSession", scripted.Session)
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    summary = decode(tmp_path / "o", record=RecordSettings(energy=True), console=console)
    reason = "device=cpu is no NVIDIA GPU"
    assert f"record.energy=true: energy is not measured, {reason}" in printed.getvalue()
    for side in (summary, summary["baseline"]):
        assert (side["energy"], side["energy_reason"]) == (None, reason)
    assert not (tmp_path / "o/energy.jsonl").exists()
    assert "energy" not in decode(tmp_path / "other")


def test_a_run_on_a_card_has_its_energy(
    card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step takes five seconds of a card's clock: 7 tokens of 10 texts, two at a time. What a
    resumption decodes is added; a process that was cut off has measured what it did."""
    clock = SimpleNamespace(perf_counter=card.clock, sleep=card.sleep)
    monkeypatch.setattr(energy, "time", clock)
    monkeypatch.setattr(experiments, "OurSession", scripted.Session)
    monkeypatch.setattr(Meter, "__init__", partialmethod(with_card, Meter.__init__))
    decoded = scripted.Decoder.step
    stop_at, counted = 21, 0  # the first sequence of the eleventh step

    def step(self: scripted.Decoder, sequence: Decoding) -> int:
        nonlocal stop_at, counted
        stop_at -= 1
        if not stop_at:
            raise KeyboardInterrupt
        work(card, 5.0)
        new = decoded(self, sequence)
        counted += new
        return new

    monkeypatch.setattr(scripted.Decoder, "step", step)
    record = RecordSettings(energy=True)
    with suppress(KeyboardInterrupt):
        decode(tmp_path / "o", record=record)
    summary = decode(tmp_path / "o", resume=True, record=record)
    for side, folder in ((summary["baseline"], "o/baseline"), (summary, "o")):
        used = lines(tmp_path / folder / "energy.jsonl")
        found = side["energy"]
        assert len(used) == 1 + (folder != "o")
        assert found["joules"] == sum(line["joules"] for line in used)
        assert found["joules"] == pytest.approx(300.0 * found["seconds"])
        assert found["idle_watts"] == pytest.approx(100.0)
        assert found["tokens"] >= side["tokens"]  # what was cut off was decoded twice
        assert found["joules_per_token"] == found["joules"] / found["tokens"]
    assert found["tokens"] == summary["tokens"]
    assert counted == summary["energy"]["tokens"] + summary["baseline"]["energy"]["tokens"]
    printed = io.StringIO()
    own = {"drafter": "none", "tree": "chain", "acceptance": "greedy"}
    show_summary({**summary, **own, "lossless": NOTHING}, Console(file=printed, width=200))
    assert f"{found['joules_per_token']:.3g}" in printed.getvalue()


NOTHING = {"verdict": "not checked", "reason": ""}


def with_card(self: Meter, begin: Callable[..., None], device: torch.device) -> None:
    begin(self, CUDA)

"""Energy: what a GPU uses while it decodes, by NVIDIA's management library (NVML), and what it
uses when it has nothing to do.

It is that of the whole card, by the clock and not by events: records and whatever else the host
does between steps are in it, prompts too, warming up is not.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from pydantic import TypeAdapter

from specdec.lab.session import wait

LEAST_SECONDS = 10.0  # of decoding: the counter of a card moves in steps of up to 0.1 s
IDLE_SECONDS, SETTLING = 1.0, 0.5  # after work a card takes a while to use less
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyLine:
    """A line of energy.jsonl: what one process has measured of a side.

    Args:
        joules: of the card while it decoded, for
        seconds: by the clock, and
        tokens: so many, also of texts that were not finished.
        idle_watts: before, with models loaded and nothing to do.
    """

    joules: float
    seconds: float
    tokens: int
    idle_watts: float


ENERGY: TypeAdapter[Any] = TypeAdapter(EnergyLine)


class Gpu:
    """Joules that a card has used since some moment: by its own counter, which those since Volta
    have, else by samples of its power.

    Raises:
        Exception: whatever stands in the way, the package pynvml, the library or the card.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        # NVML counts cards that CUDA_VISIBLE_DEVICES hides.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._sampled, self._watts, self._at = 0.0, 0.0, 0.0
        self._ended = Event()
        self._sampler: Thread | None = None
        try:
            self._counter()
        except pynvml.NVMLError_NotSupported:
            self._watts, self._at = self._power(), time.perf_counter()
            self._sampler = Thread(target=self._sample, daemon=True)
            self._sampler.start()

    def joules(self) -> float:
        if self._sampler is None:
            return self._counter()
        return self._sampled + self._watts * (time.perf_counter() - self._at)

    def close(self) -> None:
        self._ended.set()
        if self._sampler is not None:
            self._sampler.join()
        self._nvml.nvmlShutdown()

    def _counter(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def _power(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                watts = self._power()
            except self._nvml.NVMLError:  # the last one goes on
                continue
            now = time.perf_counter()
            self._sampled += self._watts * (now - self._at)
            self._watts, self._at = watts, now


class Meter:
    """Measures one side of a run, and costs it nothing if that is not possible.

    Attributes:
        reason: why there is no measurement; None: there is, as far as one knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = None
        self._device, self._gpu = device, None
        self._joules = self._seconds = self._idle = 0.0
        if device.type != "cuda":
            self.reason = f"device={device} is no NVIDIA GPU"
            return
        with self._careful():
            self._gpu = Gpu(device)

    def rest(self) -> None:
        """Measure what the card uses when it has nothing to do; takes a second and a half."""
        with self._careful():
            if self._gpu is not None and not self.reason:
                wait(self._device)
                time.sleep(SETTLING)
                before, begun = self._gpu.joules(), time.perf_counter()
                time.sleep(IDLE_SECONDS)
                self._idle = (self._gpu.joules() - before) / (time.perf_counter() - begun)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is decoded within counts."""
        gpu, before, begun = self._gpu, 0.0, time.perf_counter()
        with self._careful():
            if gpu is not None and not self.reason:
                wait(self._device)
                before, begun = gpu.joules(), time.perf_counter()
        try:
            yield
        finally:
            with self._careful():
                if gpu is not None and not self.reason:
                    wait(self._device)
                    self._joules += gpu.joules() - before
                    self._seconds += time.perf_counter() - begun

    def close(self, tokens: int) -> EnergyLine | None:
        """What was measured, while so many tokens were decoded; None: nothing."""
        if self._gpu is None:
            return None
        with self._careful():
            self._gpu.close()
        self._gpu = None
        if self.reason or not tokens:
            return None
        return EnergyLine(
            joules=self._joules, seconds=self._seconds, tokens=tokens, idle_watts=self._idle
        )

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """Whatever goes wrong is the reason, and the run goes on."""
        try:
            yield
        except Exception as error:
            self.reason = f"NVML: {' '.join(str(error).split()) or type(error).__name__}"


def obstacle(device: torch.device) -> str | None:
    """Why there will be no measurement; None: nothing stands in the way."""
    meter = Meter(device)
    meter.close(tokens=0)
    return meter.reason


def energy_of(lines: Sequence[Mapping[str, Any]], reason: str | None = None) -> dict[str, Any]:
    """What a summary says of the energy of a side.

    Args:
        lines: of energy.jsonl.
        reason: why the last process has measured nothing, if so.

    Returns:
        energy: joules, idle_watts, seconds, tokens, joules_per_token; None with `energy_reason`.
    """
    total = {
        "joules": sum(line["joules"] for line in lines),
        "idle_watts": sum(line["idle_watts"] * line["seconds"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
    }
    seconds = total["seconds"]
    if not lines:
        reason = reason or "nothing was measured"
    elif seconds < LEAST_SECONDS:
        reason = f"{seconds:.1f} s of decoding; a figure takes {LEAST_SECONDS:g}"
    else:
        total["idle_watts"] /= seconds
        return {"energy": {**total, "joules_per_token": total["joules"] / total["tokens"]}}
    return {"energy": None, "energy_reason": reason}

"""Ranks: the processes that share a target, one to a GPU, and how they stay together.

All of them run the same loop on the same numbers, and each decides by itself. What they decide by
is the same on all: sums are in the order of ranks, random numbers a function of seed, sequence and
step, and whatever a machine may answer differently is asked of one rank or agreed on here. That
it stays so is looked at every few steps, over a store that works when nothing else does any more.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import zip_longest
from typing import Any, Protocol, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from specdec.reasons import first_line

T = TypeVar("T")
EVERY = 64  # steps between two looks whether all ranks have decoded the same
WAIT = 300.0  # seconds that a rank waits for another
PAUSE = 0.005  # seconds between two looks whether it has come


class Landed(Protocol):
    """A sequence to which a step has given its new tokens."""

    request: Any
    tokens: list[int]
    steps: int
    accepted_lengths: list[int]


class RanksError(RuntimeError):
    """Ranks no longer agree, or one of them is gone; one line."""


class Ranks:
    """This process among those that share a target.

    Args:
        rank: of this process, from 0.
        size: how many there are; 1: it is alone, and nothing below does anything.
        store: what they tell each other over when collective operations fail; all on one host.
        wait: seconds that it waits for another.
    """

    def __init__(
        self, *, rank: int = 0, size: int = 1, store: Any = None, wait: float = WAIT
    ) -> None:
        self.rank, self.size, self.wait = rank, size, wait
        self._store = store
        self._steps: list[list[Any]] = []  # that others have not been told of
        self._untried: list[tuple[str, list[list[Any]]]] = []  # and what they were not held to
        self._last: list[Any] = []  # step
        self._hash = 0  # of all steps
        self._count = 0
        self._processes: dict[int, int] = {}
        self.parted = False  # known to have, and why is being said
        self.since: float | None = None  # when the last step has landed, if more are to come
        if size > 1:
            self.tell("process", str(os.getpid()))
            self._processes = {one: int(self.hear("process", one)) for one in self.others}

    @property
    def others(self) -> list[int]:
        return [one for one in range(self.size) if one != self.rank]

    # What all have

    def gather(self, part: Tensor) -> Tensor:
        """[W, *] the parts of all ranks, in their order; on a GPU nobody waits for it.

        Raises:
            RanksError: a rank does not take part.
        """
        every = part.new_empty(self.size, *part.shape)
        # Bytes: backends do not know all types.
        sent, found = part.contiguous().view(torch.uint8), every.flatten(0, 1).view(torch.uint8)
        self._together(lambda: _all_gather(found, sent), None if part.is_cuda else found.nbytes)
        return every

    def least(self, number: int) -> int:
        """The smallest of the numbers that the ranks have."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        self._together(lambda: dist.all_reduce(found, dist.ReduceOp.MIN), -1)
        return int(found)

    def first(self, value: T) -> T:
        """What rank 0 has, which all others get a copy of."""
        if self.size == 1:
            return value
        found = [value]
        device = torch.device("cpu")
        self._together(lambda: dist.broadcast_object_list(found, src=0, device=device), -2)
        return found[0]

    def _together(self, operation: Callable[[], Any], what: int | None) -> None:
        """Do what all do.

        Args:
            what: it is, in a number. On the host all say it beforehand, and what they have
                decoded: gloo ends a process whose others do something else. None leaves it out.
        """
        try:
            if what is not None:
                mine = torch.tensor([what, self._hash])
                every = mine.new_empty(2 * self.size)
                _all_gather(every, mine)
                unlike = (every.view(-1, 2) != mine).any(1).nonzero()
                if len(unlike):
                    raise RuntimeError(f"rank {int(unlike[0])} does something else")
            operation()
        except RuntimeError as error:
            self.parted = True
            self.compare()  # says more, if there is more to be said
            raise RanksError(
                f"target.tp={self.size}: ranks no longer do the same {self._place()}, as rank "
                f"{self.rank} sees it: {first_line(error)}"
            ) from error

    def _place(self) -> str:
        """How far this one has come."""
        if not self._last:
            return "before the first step"
        request, step, _ = self._last
        return f"after step {step} of request {request}"

    # Whether all do the same

    def landed(self, sequences: Sequence[Landed]) -> None:
        """A step has given these sequences their new tokens.

        Raises:
            RanksError: as `compare`, every `EVERY` steps.
        """
        if self.size == 1:
            return
        self.since = time.monotonic()
        step = [(s.request.id, s.steps, s.tokens[-s.accepted_lengths[-1] :]) for s in sequences]
        self._last = [*step[0][:2], crc32(repr(step).encode())]
        self._steps.append(self._last)
        self._hash = crc32(repr(self._last).encode(), self._hash)
        if len(self._steps) >= EVERY:
            self._tell_steps()
            self._compare(1)  # others may not have come as far as this: nobody waits

    def ended(self) -> None:
        """All that was asked for is decoded.

        Raises:
            RanksError: as `compare`.
        """
        if self.size > 1:
            self.compare()
            self.since = None

    def compare(self) -> None:
        """Whether all ranks have decoded the same since they were last compared.

        Raises:
            RanksError: one has not; it names the step and the rank.
        """
        self._tell_steps()
        self._compare(0)

    def _tell_steps(self) -> None:
        name, self._count = f"steps{self._count}", self._count + 1
        self.tell(name, json.dumps(self._steps))
        self._untried.append((name, self._steps))
        self._steps = []

    def _compare(self, left: int) -> None:
        """What the others have told with what they were told, but for the last so many times."""
        while len(self._untried) > left:
            name, mine = self._untried.pop(0)
            for one in self.others:
                for ours, theirs in zip_longest(mine, json.loads(self.hear(name, one))):
                    if ours != theirs:
                        request, step, _ = ours or theirs
                        raise RanksError(
                            f"target.tp={self.size}: ranks have parted in step {step} of request "
                            f"{request}: rank {max(one, self.rank)} has decoded other tokens than "
                            f"rank {min(one, self.rank)}"
                        )

    # Over the store

    def tell(self, what: str, text: str) -> None:
        """Leave a text for the others."""
        self._store.set(f"{what}.{self.rank}", text)

    def hear(self, what: str, rank: int) -> str:
        """What another rank has left, as soon as it has.

        Raises:
            RanksError: it has failed, is gone, or does not come.
        """
        begun = time.monotonic()
        while not self._told(what, rank):
            self.check()
            if time.monotonic() - begun > 2 * self.wait:  # its collective ends before
                raise RanksError(
                    f"target.tp={self.size}: rank {rank} has not come to where rank {self.rank} "
                    f"waits {self._place()} within {2 * self.wait:g} s"
                )
            time.sleep(PAUSE)
        found: bytes = self._store.get(f"{what}.{rank}")
        return found.decode()

    def check(self) -> None:
        """Raise RanksError if another rank has failed, saying why, or is gone."""
        for one, process in self._processes.items():
            self.parted |= self._told("failed", one) or not runs(process)
            if self._told("failed", one):
                raise RanksError(f"rank {one}: {self._store.get(f'failed.{one}').decode()}")
            if not runs(process):
                raise RanksError(f"rank {one}: its process {process} ended without a word")

    def _told(self, what: str, rank: int) -> bool:
        with suppress(RuntimeError):  # a store whose host is gone
            return bool(self._store.check([f"{what}.{rank}"]))
        return False

    @property
    def leader(self) -> int | None:
        """The process of rank 0; None: it is this one."""
        return self._processes.get(0)


def _all_gather(every: Tensor, part: Tensor) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(every, part)


def runs(process: int) -> bool:
    """Whether there is such a process on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


ALONE = Ranks()
_joined = [ALONE]  # of this process


def here() -> Ranks:
    """This process among those that share a target."""
    return _joined[-1]


def join(store: Any, *, rank: int, size: int, device: str = "cpu", wait: float = WAIT) -> Ranks:
    """Join the others; `device` is where they compute: cpu, or cuda with this process's GPU being
    the current one.

    Args:
        store: of torch.distributed, that all of them reach.
    """
    gpu = device == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=PrefixStore("torch", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=wait),
    )
    told = PrefixStore("specdec", store)
    _joined.append(Ranks(rank=rank, size=size, store=told, wait=wait))
    return here()


def leave() -> None:
    """As if it had never joined."""
    del _joined[1:]
    if dist.is_initialized():
        dist.destroy_process_group()

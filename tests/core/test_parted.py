"""Ranks that part: whatever one of them decides otherwise than the others ends all of them, in one
line that names rank and step, and none waits for ever."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.decode import Decoder
from specdec.drafters.ngram import NGram
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.lab.led import led
from specdec.models.load import load_model
from specdec.models.placement import free_memory
from specdec.protocols import Drafter, StepContext
from specdec.ranks import ALONE, EVERY, Ranks, RanksError
from specdec.sampling import SamplingParams
from specdec.tree import Acceptance, TokenTree
from tests.decoding import decoder_of, requests_of
from tests.models.tiny import disturbed, save, tiny
from tests.ranks import together

PROMPTS = [[3, 1, 4, 1, 5, 3, 1, 4], [9, 2, 6], [5, 3, 5, 8], [9, 3]]
NEW, WAIT = 20, 2.0
PARTED = r"target.tp=2: ranks have parted in step \d+ of request \d: rank 1 has decoded other"
UNLIKE = (
    r"ranks no longer do the same (before the first step|after step \d+ of request \d), "
    r"as rank 0 sees it: rank 1 does something else"
)


@dataclass(kw_only=True)
class Setting:
    """What a rank decodes with; a plant changes that of one of them."""

    prompts: list[list[int]]
    new: int = NEW
    rows: int = 2
    sampling: SamplingParams
    stops: tuple[int, ...] = ()
    pages: int | None = None
    led: bool = True
    hook: Callable[[int, Acceptance], Acceptance] = lambda step, kept: kept
    draft: str = "draft"


def other_token(at: int, step: int, kept: Acceptance) -> Acceptance:
    return replace(kept, next_token=(kept.next_token + 1) % 96) if step == at else kept


def shorter(step: int, kept: Acceptance) -> Acceptance:
    return replace(kept, length=torch.ones_like(kept.length)) if step > 2 else kept


def act(what: Callable[[], Any], at: int, step: int, kept: Acceptance) -> Acceptance:
    if step == at:
        what()
    return kept


def fail() -> None:
    raise ValueError("planted")


def hook(what: Callable[..., Acceptance]) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, hook=what)


def having(**changes: Any) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, **changes)


SAMPLED = SamplingParams(temperature=1.0, seed=3)
PLANTS: dict[str, tuple[Callable[[Setting], Setting], str]] = {
    **{f"token {n}": (hook(partial(other_token, n)), PARTED) for n in (0, 1, 2, 4, 7)},
    "shorter": (hook(shorter), PARTED),
    "draft": (having(draft="target"), PARTED),  # its texts are the same, its steps are not
    "seed": (having(sampling=replace(SAMPLED, seed=4)), PARTED),
    "temperature": (having(sampling=replace(SAMPLED, temperature=0.5)), PARTED),
    "greedy": (having(sampling=SamplingParams(temperature=0.0, seed=3)), PARTED),
    "stops": (having(stops=tuple(range(40))), f"{PARTED}|{UNLIKE}"),
    "limit": (having(new=NEW - 5), f"{PARTED}|{UNLIKE}"),
    "prompt": (having(prompts=[[7, *PROMPTS[0][1:]], *PROMPTS[1:]]), PARTED),
    "order": (having(prompts=PROMPTS[::-1]), f"{PARTED}|{UNLIKE}"),
    "rows": (having(rows=1), f"{PARTED}|{UNLIKE}"),
    "pages": (having(pages=3), f"{PARTED}|{UNLIKE}"),
    "one more": (having(prompts=[*PROMPTS, [8, 8]]), f"{PARTED}|{UNLIKE}"),
    "exception": (hook(partial(act, fail, 3)), "rank 1: planted"),
    "death": (hook(partial(act, lambda: os._exit(9), 3)), "rank 1: its process .* without a word"),
    "hang": (
        hook(partial(act, lambda: time.sleep(600), 3)),
        "rank 1 has not come to where rank 0",
    ),
}


class Coin(NGram):
    """As a drafter of the user's may be: each process for itself."""

    def draft(self, context: StepContext) -> TokenTree:
        if int.from_bytes(os.urandom(1), "big") % 2:
            return TokenTree.roots(context.roots)
        return super().draft(context)


def hooked(decoder: Decoder, change: Callable[[int, Acceptance], Acceptance]) -> None:
    accept, count = decoder.rule.accept, iter(range(10_000))
    decoder.rule.accept = lambda *given: change(next(count), accept(*given))  # type: ignore


def decoded(
    models: Path,
    plant: Callable[[Setting], Setting] | None,
    host: bool,
    ranks: Ranks,
) -> list[list[int]]:
    setting = Setting(prompts=PROMPTS, sampling=SAMPLED)
    if plant is not None and ranks.rank == 1:
        setting = plant(setting)
    target = load_model(str(models / "target"), ranks=ranks)
    drafter: Drafter = Coin() if host else SmallLlama(path=str(models / setting.draft))
    decoder = decoder_of(
        target,
        led(drafter) if setting.led else drafter,
        Chain(budget=3),
        sampling=setting.sampling,
        rows=setting.rows,
        max_tokens=40,
        stop_tokens=setting.stops,
        pages=setting.pages,
    )
    hooked(decoder, setting.hook)
    try:
        done = {s.request.id: s for s in decoder.run(requests_of(setting.prompts, setting.new))}
    except ValueError as error:
        ranks.tell("failed", str(error))
        time.sleep(0.5)
        raise
    return [done[i].output_ids for i in sorted(done)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(tiny("llama"), folder / "target")
    save(disturbed(tiny("llama"), 0.1), folder / "draft")
    return folder


@pytest.mark.some(1)
@pytest.mark.parametrize("name", PLANTS)
def test_planted_differences_are_reported(models: Path, tmp_path: Path, name: str) -> None:
    plant, said = PLANTS[name]
    begun = time.monotonic()
    found = together(tmp_path, partial(decoded, models, plant, False), wait=WAIT)[0]
    assert isinstance(found, RanksError), found
    assert re.search(said, str(found)), found
    assert "\n" not in str(found)
    assert time.monotonic() - begun < 30


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_what_is_no_difference_is_none(models: Path, tmp_path: Path, late: bool) -> None:
    """Neither a rank that is slow, nor a drafter on the host that draws numbers of its own."""
    slow = hook(partial(act, lambda: time.sleep(WAIT / 2), 3)) if late else None
    first, second = together(tmp_path, partial(decoded, models, slow, not late), wait=WAIT)
    assert first == second
    assert not late or first == decoded(models, None, False, ALONE)


@pytest.mark.slow
def test_a_host_drafter_that_nobody_leads_is_reported(models: Path, tmp_path: Path) -> None:
    work = partial(unled, models)
    found = together(tmp_path, work, wait=WAIT)[0]
    assert isinstance(found, RanksError), found


def unled(models: Path, ranks: Ranks) -> Any:
    target = load_model(str(models / "target"), ranks=ranks)
    decoder = decoder_of(target, Coin(), Chain(budget=3), sampling=SAMPLED)
    for _ in range(20):
        list(decoder.run(requests_of(PROMPTS, NEW)))


def agreed(ranks: Ranks) -> tuple[int, int, bool]:
    least = ranks.least(5 - ranks.rank)
    free = free_memory(torch.device("cpu"))
    return least, ranks.first(ranks.rank), ranks.least(free) == free


def test_what_all_have(tmp_path: Path) -> None:
    assert together(tmp_path, agreed) == [(4, 0, True)] * 2
    assert (ALONE.least(3), ALONE.first("x"), ALONE.leader) == (3, "x", None)
    ALONE.landed([])
    ALONE.ended()
    assert EVERY == 64

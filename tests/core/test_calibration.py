"""Costs of this machine: measured, kept, found again, and never those of another in silence."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec import calibration
from specdec.calibration import (
    about,
    costs_of,
    loop_costs,
    loop_prompts,
    loop_seconds,
    unlike,
)
from specdec.costs import CostTable
from specdec.drafters.trees.chain import Chain
from specdec.kernels.choose import Kernels
from specdec.lab.prompts import Asked
from specdec.lab.workshop import Workshop
from specdec.models.fingerprint import fingerprint
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.passes import step_seconds
from specdec.protocols import Drafter, Loaded
from specdec.rates import AcceptanceRates
from specdec.request import Capacity
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
TABLE = {
    "verify": {"batch": [1], "nodes": [1, 5], "context": [9], "seconds": [[[0.01], [0.02]]]},
    "draft": {"batch": [1], "width": [1, 4], "context": 9, "seconds": [[0.001, 0.002]]},
    "loop": {"batch": [1], "level": [0.0], "start": [0.001], "step": [0.002]},
}


def chain(levels: int) -> Chain:
    return Chain(budget=levels)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loaded:
    """A run of tiny models, with an empty cache of tables."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    drafter = Drafter()
    drafter.own_model = PagedLM(tiny_llama(1, 1))
    return Loaded(
        target=PagedLM(tiny_llama(0, 2)),
        drafter=drafter,
        capacity=Capacity(rows=1, max_tokens=40),
        decoder=lambda tree, capacity: pytest.fail("nothing is measured here"),
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was measured, in place of doing it."""
    found: list[dict[str, Any]] = []

    def fake(run: Loaded, **grid: Any) -> dict[str, Any]:
        found.append(grid)
        return TABLE

    monkeypatch.setattr(calibration, "_measured", fake)
    return found


def ask(run: Loaded, costs: str = "auto", batch: int = 1, budget: int = 4) -> tuple[Any, str]:
    return costs_of(run, costs, batch=batch, context=None, budget=budget, chain=chain)


def test_a_table_is_measured_once(run: Loaded, measured: list[Any], tmp_path: Path) -> None:
    table, note = ask(run)
    assert note.startswith("measured now, on this machine with these models")
    assert measured[0] | {"chain": None} == {
        "batch": 1, "context": 20, "budget": 4, "chain": None
    }  # fmt: skip
    (path,) = (tmp_path / "cache/costs").iterdir()
    assert str(path) in note
    again, note = ask(run)
    assert (len(measured), note.startswith("measured before")) == (1, True)
    assert again.verify(1, 5, 9) == table.verify(1, 5, 9) == 0.02
    assert not unlike(again, run)
    ask(run, "measure")
    assert len(measured) == 2
    ask(run, batch=2)
    ask(run, budget=3)
    run.drafter.depth = 3
    ask(run)
    assert len(measured) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1}', "\x00"])
def test_a_spoilt_file_is_measured_anew(
    run: Loaded, measured: list[Any], tmp_path: Path, text: str
) -> None:
    ask(run)
    (path,) = (tmp_path / "cache/costs").iterdir()
    path.write_text(text)
    assert ask(run)[1].startswith("measured now")
    assert json.loads(path.read_text())["about"] == about(run.target, run.drafter.own_model)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_where_nothing_can_be_kept_it_says_so(
    run: Loaded, measured: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "not kept" in ask(run)[1]
    assert "not kept" in ask(run)[1]
    assert len(measured) == 2


def test_other_models_threads_or_types_are_other_costs(
    run: Loaded, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = ask(run)
    other = PagedLM(tiny_llama(5, 2))
    half = PagedLM(tiny_llama(0, 2).bfloat16())
    for change, what in (({"target": other}, "models"), ({"target": half}, "dtype")):
        changed: Any = SimpleNamespace(**{
            "target": run.target, "drafter": run.drafter, "capacity": run.capacity, **change
        })  # fmt: skip
        assert unlike(table, changed) == f"of other {what}"
        ask(changed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert unlike(table, run) == "of other machine"
    ask(run)
    assert len(measured) == 4
    table.about = None
    assert "does not say" in unlike(table, run)


def test_exact_mode_has_costs_of_its_own(run: Loaded, measured: list[Any]) -> None:
    for count, exact in enumerate((False, True, False), 1):
        run.target.kernels = Kernels(impl="triton", exact=exact)
        table, _ = ask(run)
        assert len(measured) == min(count, 2)
        run.target.kernels = Kernels(impl="triton", exact=not exact)
        assert unlike(table, run) == "of other kernels"


def test_a_packaged_table_of_this_machine_is_taken(
    run: Loaded, measured: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "costs"
    folder.mkdir()
    here = about(run.target, run.drafter.own_model)
    folder.joinpath("mine.json").write_text(json.dumps({**TABLE, "about": here}))
    monkeypatch.setattr(calibration, "DATA", tmp_path)
    monkeypatch.setattr("specdec.tables.DATA", tmp_path)
    assert ask(run)[1] == "the table mine, of this machine and these models"
    assert ask(run, batch=2)[1].startswith("measured now")  # it knows one sequence alone
    here["dtype"] = "float64"
    folder.joinpath("mine.json").write_text(json.dumps({**TABLE, "about": here}))
    assert ask(run)[1].startswith("measured now")


def test_a_fingerprint_is_of_the_weights_wherever_they_lie() -> None:
    model = tiny_llama(0, 1).bfloat16()
    mark = fingerprint(PagedLM(model))
    assert mark == fingerprint(PagedLM(model.float()))
    others = {fingerprint(PagedLM(tiny_llama(*one))) for one in ((1, 1), (0, 2))}
    assert len(others | {mark}) == 3


class Caches:
    """A clock, and caches that hold the weights of the model that ran last, alone: another one
    takes `cold` seconds longer, and half of that in its second pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cold: float = 0.0) -> None:
        self.now, self.cold = 0.0, cold
        self.order = list[str]()
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> Any:
        def done() -> None:
            last = [one[0] == name[0] for one in self.order[-2:]]
            lacking = 0.0 if last == [True, True] else 0.5 if last[-1:] == [True] else 1.0
            self.now += seconds + self.cold * lacking
            self.order.append(name)

        return done


def test_passes_are_timed_where_they_stand_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = Caches(monkeypatch, cold=2.0)
    root, level, tree = (caches.call(*one) for one in (("d0", 1.0), ("d1", 3.0), ("v", 10.0)))
    plain = caches.call("v1", 8.0)
    steps = [([], plain), ([root, level, level, level], tree)]
    found = step_seconds(steps, CPU, replays=3)
    # Three levels after a root that paid for most of the cold, and a target that finds the draft's
    # weights; a plain step finds its own.
    assert found == [(0.0, 8.0), (pytest.approx((4.0 + 3.0 + 3.0) / 3), 12.0)]
    one = ["v1", "d0", "d1", "d1", "d1", "v"]
    assert caches.order == one + 3 * (["v1"] * 2 + one[1:] * 2)
    assert step_seconds([([level], tree)], CPU, replays=3) == [(5.0, 12.0)]  # it is all there is


def test_steps_take_turns_and_the_last_are_left_out_if_time_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches = Caches(monkeypatch)
    many = [([], caches.call(f"{number}", 1.0)) for number in range(9)]
    assert len(step_seconds(many, CPU, replays=3, within=11.0)) == 6
    assert len(step_seconds(many, CPU, replays=1, within=0.0)) == 3


def test_what_the_loop_adds() -> None:
    # Drafts of 5 and 11 ms for 1 and 4 levels: 2 a level, 3 for the first. The rest, of 3 and 9
    # ms, is 1 and 2 for each level.
    found = loop_costs((0.005, 0.003), (0.011, 0.009), (1, 4))
    wanted = {"level": 0.002, "start": 0.003, "accept": 0.002, "step": 0.001}
    assert found == pytest.approx(wanted)
    noise = loop_costs((0.005, 0.002), (0.004, 0.001), (1, 4))
    assert noise == pytest.approx({"level": 0.0, "start": 0.005, "accept": 0.0, "step": 0.0015})
    single = loop_costs((0.005, 0.001), (0.005, 0.001), (1, 1))
    assert single == pytest.approx({"level": 0.005, "start": 0.0, "accept": 0.0, "step": 0.001})


def test_the_loop_is_timed_until_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only steps of all sequences together count, however many texts there is time for."""
    shop = Workshop("target=zoo device=cpu")
    words = "drafter=small_llama tree=chain tree.budget=4 sampling=sample"
    session = shop.session(words, rows=2, longest=80)
    prompts, batches = loop_prompts(shop.target, 2), list[int]()
    run = session.decoder.run

    def watched(requests: Any, on_step: Any = None) -> Any:
        def seen(step: Any) -> None:
            batches.append(len(step.requests))
            seconds = 1.0 if len(step.requests) == 2 else 50.0
            step.seconds.update(draft=seconds, accept=seconds, commit=0.0, other=0.0)
            on_step(step)

        return run(requests, on_step=seen if on_step else None)

    monkeypatch.setattr(session.decoder, "run", watched)
    assert loop_seconds(session.decoder, prompts, 16) == (1.0, 1.0)
    assert {1, 2} == {*batches}
    every = len(batches)
    loop_seconds(session.decoder, prompts, 16, within=0.0)
    assert len(batches) - every < every / 2


def test_costs_of_the_built_in_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured in earnest: whole, and the random numbers of the process are left alone."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    shop = Workshop("target=zoo device=cpu")
    words = "drafter=small_llama tree=cost_aware tree.budget=4 tree.costs=measure"
    session = shop.session(words, rows=2, longest=96)
    notes = session.notes()["chosen_by"]
    assert notes["tree.rates"] == "zoo, measured with these models"
    assert notes["tree.costs"].startswith("measured now")
    assert "times plain decoding expected" in notes["tree.shape"]
    assert torch.equal(before, torch.get_rng_state())
    (path,) = (tmp_path / "costs").iterdir()
    table = CostTable.of(json.loads(path.read_text()))
    assert (table.verify_batches, table.most_nodes, table.most_width) == ([1], 5, 4)
    assert 0 < table.draft(1, 1, 48) < table.verify(1, 1, 48)


def test_rates_of_another_drafter_or_other_models_say_so(run: Loaded) -> None:
    for name in ("zoo", "eagle3", "zoo_ngram"):
        rates = AcceptanceRates.load(name, children="top_k", temperature=0.0)
        assert f"{name}, measured with " in rates.origin(run)
        assert "NOT with this drafter and these models" in rates.origin(run)
    pair = Loaded(
        target=load_model("zoo:target"),
        drafter=Drafter(),
        capacity=run.capacity,
        decoder=run.decoder,
    )
    pair.drafter.name = "ngram"
    assert rates.origin(pair) == "zoo_ngram, measured with these models"
    pair.drafter.name = "pld"
    assert "measured with ngram for zoo:target, NOT with" in rates.origin(pair)
    given = AcceptanceRates(values=[[0.5]])
    assert given.origin(pair) == "given, which does not say of which models it is"


def test_a_draft_that_is_never_asked_reads_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Workshop("target=zoo device=cpu")
    session = shop.session("drafter=small_llama tree=chain tree.budget=0", rows=1, longest=32)
    drafter: Any = session.method.drafter
    monkeypatch.setattr(drafter.model, "start", lambda *_: pytest.fail("it read the prompt"))
    asked = [Asked(0, "0", [5, 6, 7])]
    plain = shop.session("drafter=none tree.budget=0", rows=1, longest=32)
    assert session.decode(asked, 6).outputs == plain.decode(asked, 6).outputs

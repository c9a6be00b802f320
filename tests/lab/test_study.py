"""Studies with sessions that follow a script: who is asked when, and what an entry keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.lab.prompts import Asked
from specdec.lab.session import Decoded
from specdec.lab.study import NOTHING_COMPARED, Study, spend
from specdec.lab.workshop import Way, Workshop, name_of, tree, word
from specdec.reasons import FailedError

NEW = 5
PROMPTS = [Asked(0, "humaneval/0", [1, 2]), Asked(1, "humaneval/1", [3])]


class Scripted:
    """A session that says what it is told, or fails."""

    def __init__(self, name: str, log: list[str], token: int | None = 1) -> None:
        self.name, self.log, self.token = name, log, token

    def warm_up(self, tokens: list[int]) -> None:
        self.log.append(f"{self.name} warms up with {len(tokens)}")

    def decode(self, batch: Any, new: int) -> Decoded:
        if self.token is None:
            raise RuntimeError("out of luck")
        self.log.append(f"{self.name} {batch[0].id}")
        outputs = [[self.token] * new for _ in batch]
        return Decoded(seconds=float(new), outputs=outputs, passes=[new] * len(batch))

    def notes(self) -> dict[str, Any]:
        return {"graphs": {"obstacle": None}}


def way(name: str, log: list[str], *, settings: Any = None, **options: Any) -> Way:
    token = options.pop("token", 1)
    make = lambda: Scripted(name, log, token)  # noqa: E731
    return Way(settings=settings or name, make=make, **options)


def study(entries: dict[str, Any], save: Any = lambda: None, **options: Any) -> Study:
    return Study(
        entries=entries,
        batches=[[asked] for asked in PROMPTS],
        turn=spend(NEW),
        target=None,  # type: ignore[arg-type]
        save=save,
        **options,
    )


def asked(log: list[str]) -> list[str]:
    return [line for line in log if "warms" not in line]


def test_a_full_gpu_ends_a_study_in_one_line() -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 126.00 MiB. GPU 0 has")

    ways = {"none": replace(way("none", []), make=full)}
    said = "the memory of the GPU is full, 126.00 MiB more were needed; those that take turns "
    with pytest.raises(FailedError, match=f"^{said}are held together: lower batch, or"):
        study({}).in_turns(ways)


def test_methods_take_turns_and_a_fault_ends_its_own_alone() -> None:
    log: list[str] = []
    entries: dict[str, Any] = {}
    ways = {name: way(name, log) for name in ("none", "fast")}
    ways["bad"] = way("bad", log, token=None)

    def note(entry: dict[str, Any], fault: Exception) -> None:
        entry["fault"] = str(fault)

    rounds: list[int] = []

    def save() -> None:
        rounds.append(entries["none"]["rounds"])
        if len(rounds) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(entries, save, repeats=2, fault=note).in_turns(ways)
    assert rounds == [1, 2, 3]
    assert log[:3] == ["none warms up with 2", "fast warms up with 2", "bad warms up with 2"]
    assert asked(log) == ["none 0", "fast 0", "fast 1", "none 1", "none 1000", "fast 1000"]
    assert entries["bad"]["fault"] == "out of luck"
    assert entries["fast"]["graphs"] == {"obstacle": None}

    log.clear()
    study(entries, repeats=2, fault=note).in_turns(ways)
    assert asked(log) == ["fast 1001", "none 1001"]  # the round that was missing
    log.clear()
    study(entries, repeats=2, fault=note).in_turns(ways)
    assert log == []
    with pytest.raises(RuntimeError, match="out of luck"):
        study({}).in_turns(ways)


def test_methods_that_take_turns_begin_again_together() -> None:
    log: list[str] = []
    entries: dict[str, Any] = {}
    ways = {name: way(name, log) for name in ("none", "fast")}
    study(entries).in_turns(ways)
    for changed in (
        {"none": ways["none"], "fast": way("fast", log, settings="other")},
        {"none": ways["none"]},
    ):
        log.clear()
        study(entries).in_turns(changed)
        assert list(entries) == list(changed)
        assert len(asked(log)) == 2 * len(changed)


def test_of_others_what_is_missing_is_measured_and_equals_once() -> None:
    log: list[str] = []
    entries: dict[str, Any] = {}
    ways = {
        "none": way("none", log),
        "one": way("one", log, entry={"axis": "tree"}),
        "twin": way("twin", log, settings="one", entry={"axis": "rule"}),
        "other": way("other", log, token=2),
    }
    study(entries).one_by_one(ways)
    assert asked(log) == ["none 0", "none 1", "one 0", "one 1", "other 0", "other 1"]
    assert entries["twin"] == {**entries["one"], "axis": "rule"}
    taken = entries["one"]["prompts"]["humaneval/1"]
    text = taken.pop("text")
    assert taken == {"tokens": NEW, "steps": NEW, "seconds": 0}
    texts = {name: entry["prompts"]["humaneval/1"].get("text") for name, entry in entries.items()}
    assert texts["twin"] == text != texts["other"]

    log.clear()
    ways["other"] = way("other", log, settings="new")
    study(entries, plain="none").one_by_one(ways)
    assert asked(log) == ["none 0", "none 1", "other 0", "other 1"]
    assert entries["other"]["agreement"] == {**NOTHING_COMPARED, "checked": 2, "identical": 2}


@pytest.mark.parametrize(("state", "first"), [("prompt", "one 1"), ("never", "one 0")])
def test_what_learns_from_prompt_to_prompt_begins_again(state: str, first: str) -> None:
    log: list[str] = []
    entries: dict[str, Any] = {}
    ways = {"one": way("one", log, state=state)}

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(entries, stop).one_by_one(ways)
    log.clear()
    study(entries).one_by_one(ways)
    assert asked(log)[0] == first


# Words


def test_names_are_made_of_words() -> None:
    assert name_of(f"drafter=ngram {tree('chain', 4)} drafter.min_match=2") == (
        "ngram chain 4, min_match 2"
    )
    assert name_of(f"{tree('static', 3, 2, 1)} tree.children=sample") == "static 3,2,1, sample"
    assert name_of(f"{tree('dynamic', 32, 8, 6)} acceptance=traversal") == (
        "dynamic 32,8,6, traversal"
    )


def test_words_say_what_is_in_a_value() -> None:
    shop = Workshop("target=zoo", "sampling.temperature=1.0")
    path = "/a folder/of='many'=\"kinds\", [really]"
    settings = shop.settings(f"drafter=small_llama {word('drafter.path', path)}")
    assert settings["drafter"]["path"] == path
    settings = shop.having("seed=3").settings(f"drafter=none {tree('static', 2, 1)}")
    assert (settings["tree"]["widths"], settings["seed"]) == ([2, 1], 3)
    assert settings["sampling"]["temperature"] == 1.0
    with pytest.raises(ValueError, match=r"tree\.budget=-1"):
        shop.way("tree=chain tree.budget=-1", rows=1, longest=8)

"""experiments/studies/drafters.py with the zoo pair on a CPU: grids, records and tables."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.cache import PagedKVCache
from specdec.experiments.figures import drafters as tables
from specdec.experiments.studies import drafters
from specdec.experiments.tools import retokenize
from specdec.lab.build import method_of
from specdec.lab.command import parse
from specdec.lab.settings import settings_of
from specdec.lab.workshop import name_of

pytestmark = pytest.mark.usefixtures("load_once")
TEXTS = ("def fibonacci(n):\n    ", "class Stack:\n    def __init__(self", "import os\n\n\ndef ")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    code = [{"task_id": f"a/{i}", "prompt": text} for i, text in enumerate(TEXTS)]
    talk = [
        {"question_id": 80 + i, "category": "writing" if i < 2 else "roleplay", "turns": [text]}
        for i, text in enumerate(("Tell me of the sea.", "And of the sky.", "Who are you?"))
    ]
    tasks = [*talk, {"question_id": 99, "category": "qa", "turns": ["Where is Rome?"]}]
    for name, records in {"humaneval": code, "mt_bench": talk, "spec_bench": tasks}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def words_of(files: Path, out: Path, *more: str) -> list[str]:
    sets = [f"{name}={files}/{name}.jsonl" for name in ("humaneval", "mt_bench", "spec_bench")]
    return [*sets, "device=cpu", "tokens=8", "prompts=2", f"out={out}", *more]


@pytest.mark.some(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grid", ["budgets", "speed"])
def test_grids_keep_budgets_and_lose_nothing(grid: str, temperature: float) -> None:
    options = parse(
        drafters.Options,
        [f"grid={grid}", "out=x", "gsm8k=z", "datastore=y", "other_draft=zoo:draft"],
    )
    names = [name for name in drafters.FAST if name not in drafters.HEADS[1:]]
    found = [
        (name, budget, tree)
        for name in names
        for budget, tree in drafters.methods(grid, temperature, name)
    ]
    assert len({(name, name_of(tree)) for name, _, tree in found}) == len(found)
    for name, budget, tree in found[:: 1 if grid == "speed" else 5]:
        words = f"{drafters.drafter_words(name, options)} {tree}"
        method = method_of(settings_of(f"{words} sampling.temperature={temperature}"))
        assert grid == "speed" or method.tree.budget <= budget
        assert method.tree.levels(None) > 0
    wanted = set(names) - set(drafters.TIMED) if grid == "budgets" else set(names)
    if grid == "speed" and temperature:
        wanted = {name for name in names if drafters.FAST[name][1]}
    assert {name for name, _, _ in found} == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_of_one_tree_of_each_drafter(temperature: float) -> None:
    for name, shapes in drafters.FAST.items():
        found = list(drafters.methods("texts", temperature, name, 32))
        wanted = shapes[bool(temperature)][:1]
        assert [shape.split(" tree.children")[0] for _, shape in found] == list(wanted)


def test_wide_trees_of_a_large_batch_are_of_few_rows() -> None:
    for batch, budgets in ((1, [7, 16, 32, 64, 127, 255]), (8, [4, 8, 16, 64, 127, 255])):
        for temperature in (0.0, 1.0):
            found = drafters.methods("wide", temperature, "dspark", batch)
            assert [budget for budget, _ in found] == budgets
    found = drafters.methods("wide", 0.0, "dspark", 32)
    assert [budget for budget, _ in found] == [4, 8, 16, 64]
    assert not list(drafters.methods("wide", 0.0, "pld", 32))
    asked = drafters.methods("wide", 0.0, "dspark", 32, budgets=(127, 255))
    assert [budget for budget, _ in asked] == [4, 127, 255]


def test_trees_are_no_deeper_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["pld", "eagle3", "dspark", "small_llama drafter.path=zoo:draft"]
    assert {drafters.deepest(f"drafter={words}") for words in said} == {8}
    monkeypatch.setattr(drafters, "levels_of", lambda path, kinds: 4)
    assert drafters.deepest("drafter=medusa drafter.path=a_head") == 4
    assert drafters.deepest("drafter=small_llama drafter.path=a_model") == 8
    shapes = list(drafters.methods("wide", 1.0, "dflash", depth=7))
    assert all("tree.depth=7" in shape for _, shape in shapes[1:])


def test_a_head_of_two_names_has_the_trees_of_the_first_word() -> None:
    given = 'heads=["eagle3 fp8=zoo:eagle3,quantize=fp8", "mtp few=a,vocabulary=9"]'
    options = parse(drafters.Options, ["grid=wide", "out=x", "gsm8k=z", given])
    for name, own in (("eagle3 fp8", {"quantize": "fp8"}), ("mtp few", {"vocabulary": 9})):
        found = settings_of(drafters.drafter_words(name, options))["drafter"]
        assert own.items() <= found.items()
        kind = name.partition(" ")[0]
        for grid in ("budgets", "speed", "texts", "wide"):
            for temperature in (0.0, 1.0):
                for batch in (1, 32):
                    both = (drafters.methods(grid, temperature, n, batch) for n in (name, kind))
                    mine, theirs = map(list, both)
                    assert mine == theirs
                    assert mine
    assert settings_of(drafters.drafter_words("eagle3", options))["drafter"]["quantize"] == "none"
    with pytest.raises(ValueError, match=r'^drafters=mtp: needs heads=\["mtp=FOLDER"\]'):
        drafters.drafter_words("mtp", options)
    with pytest.raises(ValueError, match=r"^heads=pld fp8=a: must begin with one of eagle3"):
        drafters.model_words("eagle3", "", ["pld fp8=a"])
    with pytest.raises(ValueError, match=r"^heads=mtp=b: mtp=a has this name already; .*other=b"):
        drafters.model_words("eagle3", "", ["eagle3=c", "mtp=a", "mtp=b"])


@pytest.mark.slow
def test_from_prompts_to_tables(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafters, "DYNAMIC", {8: drafters.DYNAMIC[8]})
    out = tmp_path / "lengths.json"
    words = words_of(files, out, "grid=budgets", "drafters=[small_llama,pld,compose cascade]")
    assert drafters.main(words) == 0
    result = json.loads(out.read_text())
    assert result["sets"] == {
        "humaneval": ["humaneval/a/0", "humaneval/a/1"],
        "mt_bench": ["writing/80", "roleplay/82"],  # one of each category
        "spec_bench": ["qa/99"],  # what is MT-Bench's is there already
    }
    for name, part in result["parts"].items():
        for entry in part.values():
            tokens = [prompt["tokens"] for prompt in entry["prompts"].values()]
            assert tokens == [8] * 5
            assert all(prompt["seconds"] > 0 for prompt in entry["prompts"].values())
        if name == "T=0":
            assert part["none: chain 1"]["prompts"]["qa/99"]["steps"] == 8
            compared = [entry["agreement"] for entry in part.values() if entry["budget"]]
            assert all(one["checked"] == one["identical"] == 5 for one in compared)
            composed = part["compose cascade: dynamic 8,3,4"]
            assert composed["sources"]["small_llama"][0] > 0
            assert (composed["state"], part["none: chain 1"]["state"]) == ("prompt", None)
    text = tables.drafter_lengths(result | {"datastore": {"tokens": 1e6, "sources": ["a"]}})
    assert "| drafter | state | T=0, 8 | T=1, 8 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `small_llama` | none |"))
    part = result["parts"]["T=0"]
    steps = sum(one["steps"] for one in part["small_llama: dynamic 8,3,4"]["prompts"].values())
    assert row.split(" | ")[2] == f"{40 / steps:.2f}"

    assert drafters.main([*words, "resume=true"]) == 0
    assert json.loads(out.read_text())["parts"] == result["parts"]  # nothing was missing


@pytest.mark.slow
def test_speeds_take_turns_and_compare(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert retokenize.main(["keep=6000", f"out={other}"]) == 0
    out = tmp_path / "speed.json"
    names = ["early_exit", "early_exit anew", "translated", "eagle3", "eagle3 fp8"]
    more = ["grid=speed", f"other_draft={other}", "temperatures=0", f"drafters={names}"]
    more += ['heads=["eagle3 fp8=zoo:eagle3,quantize=fp8"]']
    assert drafters.main(words_of(files, out, *more)) == 0
    result = json.loads(out.read_text())
    part: dict[str, Any] = result["parts"]["T=0"]
    resumed, anew = (part[f"{name}: dynamic 24,6,3"] for name in names[:2])
    assert resumed["verbs"]["verify"] < anew["verbs"]["verify"]
    steps = [sum(p["steps"] for p in one["prompts"].values()) for one in (resumed, anew)]
    assert steps[0] == steps[1]
    lines = tables.drafter_speed(result).splitlines()
    assert sum(line.startswith("| 0 | `") for line in lines) == 6
    assert sum("`eagle3 fp8`" in line for line in lines) == 1
    assert "of the weights" not in lines[-1]
    result["settings"] |= {"target": "standin:llama3_8b", "exit_layer": 10}
    assert tables.drafter_speed(result).endswith("29.1% of the weights that a pass reads.")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["grid=speed"], "no prompts: give a file for one of"),
        (["grid=speed", "humaneval=x", "drafters=rest"], "drafters=rest: needs datastore"),
        (["grid=speed", "humaneval=x", "drafters=nobody"], "drafters=nobody: there are"),
        (["grid=wide", "humaneval=x", "drafters=dflash"], 'needs heads=["dflash=FOLDER"]'),
        (["grid=wide", "humaneval=x", "budgets=[127,128]"], "budgets=128: there are 8, 16, 32"),
        (
            ["grid=speed", "humaneval=x", "budgets=[8]"],
            "budgets=[8]: are of grid=wide, not of speed",
        ),
        (["grid=none", "humaneval=x"], "grid=none: must be 'budgets', 'speed', 'texts' or 'wide'"),
    ],
)
def test_mistakes_are_named(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drafters.main([*more, f"out={tmp_path}/o.json"]) == 2
    assert message in capsys.readouterr().err


def test_results_of_several_batches_make_one_table() -> None:
    def result(batch: int, seconds: float) -> dict[str, Any]:
        prompts = {one: {"tokens": 8, "steps": 4, "seconds": seconds} for one in ("a", "b")}
        agreement = {"checked": 2, "identical": 2, "divergences": []}
        head = {"drafter": "head", "verbs": {}, "prompts": prompts, "agreement": agreement}
        slow = {one: {"tokens": 8, "steps": 8, "seconds": 4.0} for one in ("a", "b")}
        plain = {**head, "drafter": "none", "prompts": slow}
        return {
            "settings": {"target": "t", "draft": "d", "dtype": "float32", "tokens": 8}
            | {"batch": batch},
            "hardware": {"cpu": "c"},
            "command": f"python batch={batch}",
            "sets": {"humaneval": ["a", "b"]},
            "parts": {"T=0": {"none: chain 1": plain, "head: chain 4": head}},
        }

    one, eight = result(1, 1.0), result(8, 2.0)
    page = tables.drafter_speed(one, eight, files=("one", "eight"))
    assert "batch 1 and 8, " in page
    for file in ("one", "eight"):
        assert f"results/{file}.json" in page
    rows = [line.split(" | ") for line in page.splitlines() if "`head`" in line]
    assert [(row[0], row[3], row[5]) for row in rows] == [
        ("| 1", "8", "4.00 (4.00 to 4.00)"),
        ("| 8", "4", "2.00 (2.00 to 2.00)"),
    ]
    assert "translated" not in page
    for file in (one, eight):
        for entry in file["parts"]["T=0"].values():
            texts = {"a": "same", "b": str(file["settings"]["batch"])}
            entry["prompts"] = {
                name: {**taken, "text": texts[name]} for name, taken in entry["prompts"].items()
            }
    texts = tables.drafter_texts(one, eight, files=("one", "eight")).splitlines()
    assert texts[-1].split("|")[1:-1] == [
        " 0 ",
        " `head`: chain 4 ",
        *2 * [" 2 of 2 "],
        " 1 of 2 ",
    ]
    assert "| T | drafter |" in tables.drafter_speed(one)
    one["sets"] = {"humaneval": ["a"], "gsm8k": ["b"]}
    assert "gsm8k" not in tables.drafter_speed(one), "a column of one prompt says little"


def test_wide_trees_stand_beside_their_chain() -> None:
    def entry(drafter: str, budget: int, steps: int, seconds: float) -> dict[str, Any]:
        prompts = {one: {"tokens": 8, "steps": steps, "seconds": seconds} for one in ("a", "b")}
        return {"drafter": drafter, "budget": budget, "verbs": {}, "prompts": prompts}

    part = {
        "none: chain 1": entry("none", 0, 8, 4.0),
        "head: chain 7": entry("head", 7, 4, 2.0),
        "head: static 2,1": entry("head", 16, 4, 1.6),
        "head: static 3": entry("head", 16, 2, 1.0),
        "head: static 4": entry("head", 64, 2, 1.25),
    }
    settings = {"target": "t", "draft": "d", "dtype": "float32", "tokens": 8, "batch": 1}
    result = {
        "settings": settings,
        "hardware": {"cpu": "c"},
        "command": "python",
        "sets": {"humaneval": ["a", "b"]},
        "parts": {"T=1": part},
    }
    rows = [line.split(" | ") for line in tables.drafter_wide(result).splitlines()]
    assert rows[-1] == [
        "| 1",
        "1",
        "`head`",
        "4 (2.00)",
        "8 (4.00)",
        "6 (4.00)",
        "4.00 (4.00 to 4.00)",
        "2.00 (2.00 to 2.00) |",
    ]
    # A larger batch without 64 nodes, which accept no more than 16; these give 5 tokens a second
    # there, and the chain 12.8.
    some = {name: part[name] for name in list(part)[:3]}
    some["head: chain 7"] = entry("head", 7, 4, 0.625)
    more = {**result, "settings": {**settings, "batch": 8}, "parts": {"T=1": some}}
    page = tables.drafter_wide(result, more, files=("a", "b"))
    assert page.endswith("they would reach 0.39 to 0.39 of the fastest.")


def test_texts_over_quantised_pages_are_of_those_pages(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    opened = PagedKVCache.open

    def open_(cache: PagedKVCache, *where: Any, **what: Any) -> int:
        seen.add(cache.kv_dtype)
        return opened(cache, *where, **what)

    monkeypatch.setattr(PagedKVCache, "open", open_)
    out = tmp_path / "texts.json"
    words = words_of(
        files, out, "grid=texts", "temperatures=0", "drafters=pld", "cache_dtype=int8"
    )
    assert drafters.main(words) == 0
    assert seen == {torch.int8}
    result = json.loads(out.read_text())
    text = tables.drafter_texts(result)
    assert "in float32 with keys and values in int8 on one" in text
    assert "| 0 | `pld`: chain 16 | 5 of 5 |" in text

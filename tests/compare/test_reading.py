"""Folders are read as they were written, whatever a crash or an older version left of them."""

import json
from pathlib import Path

import pytest
import yaml

from specdec.compare.read import find
from specdec.compare.sums import Conversation, Sums, read_side, total
from specdec.compare.words import words_of
from specdec.lab.metrics import summarise
from specdec.lab.settings import settings_of
from tests.compare.folders import job, run, texts, write


def test_sums_are_those_of_a_runs_own_summary(tmp_path: Path) -> None:
    side = texts([1.5, 2.0, 3.0, 4.0], turns=2)
    write(tmp_path, side)
    found, figures = read_side(tmp_path), summarise(*side)
    whole = total(found.values())
    assert len(found) == 4
    assert whole.texts == whole.decoded == 8
    assert whole.tokens == figures["tokens"]
    assert whole.passes == pytest.approx(figures["steps"])
    assert whole.seconds == pytest.approx(figures["seconds"])
    assert whole.tokens / whole.steps == figures["mean_accepted_length"]["pooled"]
    assert whole.lengths / whole.decoded == figures["mean_accepted_length"]["per_request"]
    assert whole.drafted / whole.steps == figures["drafted_per_step"]


def test_a_steps_time_belongs_to_its_sequences_alike(tmp_path: Path) -> None:
    generations, steps = texts([2.0, 2.0], tokens=4)
    both = [
        {name: one[name] + other[name] if name != "seconds" else {"verify": 1.0} for name in one}
        for one, other in zip(steps[:2], steps[2:], strict=True)
    ]
    write(tmp_path, (generations, both))
    sums = list(read_side(tmp_path).values())
    assert [one.seconds for one in sums] == [1.0, 1.0]
    assert [one.passes for one in sums] == [1.0, 1.0]


def test_texts_of_a_killed_run_count_if_all_their_steps_are_there(tmp_path: Path) -> None:
    generations, steps = texts([2.0, 2.0, 2.0])
    write(tmp_path, (generations, steps[:-1]))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"requests": [2000], "se')  # what the crash left of a line
    assert [key.id for key in read_side(tmp_path)] == ["0", "1"]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, texts([2.0, 2.0]))
    path = tmp_path / "steps.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{", *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"steps\.jsonl: line 4 is no record"):
        read_side(tmp_path)
    path.write_text("\n".join([*lines[:2], '{"requests": []}']) + "\n")
    with pytest.raises(ValueError, match="line 3 is no record, it has not all of requests"):
        read_side(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"steps\.jsonl: cannot be read, No such file"):
        read_side(tmp_path)


def test_prompts_without_a_hash_get_the_same(tmp_path: Path) -> None:
    generations, steps = texts([2.0])
    write(tmp_path / "new", (generations, steps))
    write(tmp_path / "old", ([{**generations[0]} | {"prompt_hash": None}], steps))
    assert read_side(tmp_path / "old").keys() == read_side(tmp_path / "new").keys()


def test_degenerate_texts_are_counted(tmp_path: Path) -> None:
    generations, steps = texts([2.0, 2.0], tokens=24)
    generations[1]["output_ids"] = [5] * 24
    write(tmp_path, (generations, steps))
    first, second = read_side(tmp_path).values()
    assert (first.loops, second.loops) == (0, 1)
    assert (second.loop_tokens, second.loop_steps) == (24, 12)
    assert first.loop_tokens == 0


def test_sums_add_up() -> None:
    one, other = Sums(tokens=2, steps=1), Sums(tokens=3, steps=2)
    one.depths[2, 1] = other.depths[2, 1] = 4
    whole = total([one, other])
    assert (whole.tokens, whole.steps, whole.depths[2, 1]) == (5, 3, 8)
    assert one.tokens == 2


def test_conversations_are_named() -> None:
    assert Conversation("math", "3", "ab").name == "math/3"
    assert Conversation("", "3", "ab").name == "3"


def test_a_sweep_is_its_subfolders_and_its_ledger(tmp_path: Path) -> None:
    run(tmp_path / "b", texts([2.0]), plain=texts([1.0]))
    run(tmp_path / "a", texts([2.0]))
    write(tmp_path / "baselines" / "f00", texts([1.0]))
    job(tmp_path, 0, "drafter=pld tree=chain", "refused", reason="tree.budget=0: must be 1")
    job(tmp_path, 1, "drafter=ngram tree=chain", "finished", folder="a", shared=True)
    job(tmp_path, 2, "drafter=rest tree=chain", "failed")
    job(tmp_path, 3, "drafter=rest tree=chain", "finished", folder="b")
    found = find([tmp_path])
    assert [one.name for one in found.runs] == ["a", "b"]
    assert [one.shared for one in found.runs] == [True, False]
    assert found.left_out == {"drafter=pld": "refused: tree.budget=0: must be 1"}
    assert [one.shared for one in find([tmp_path / "a", tmp_path / "b"]).runs] == [True, False]


def test_shared_plain_decoding_is_found(tmp_path: Path) -> None:
    write(tmp_path / "baselines" / "f00", texts([1.0, 1.0]))
    anchor = {"used": True, "seconds": [1.0, 1.02], "reference": [1.01]}
    for name in ("a", "b"):
        shared = {"baseline_from": "../baselines/f00", "anchor": anchor}
        run(tmp_path / name, texts([2.0, 2.0]), **shared)
    one, other = find([tmp_path]).runs
    assert one.plain is other.plain
    assert total((one.plain or {}).values()).tokens == 24
    assert one.plain_name == other.plain_name


def test_older_runs_are_read_from_their_settings(tmp_path: Path) -> None:
    run(tmp_path / "a", texts([2.0]))
    (tmp_path / "a" / "identity.json").unlink()
    config = {
        "schema": 1,
        "choices": {"drafter": "pld"},
        "drafter": {"own_text": True},
        "seed": 3,
        "dtype": "auto",
        "resolved": {"dtype": "float32"},
        "out": "x",
        "contents": {"target.path": "f00d"},
    }
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(config))
    (found,) = find([tmp_path / "a"]).runs
    assert found.unverified
    assert found.settings == {"drafter.own_text": True, "seed": 3, "dtype": "float32"}
    assert found.seed == 3


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"summary.json": "{"}, "summary.json: cannot be read"),
        ({"summary.json": "[]"}, "summary.json: is no JSON object"),
        ({"identity.json": None, "config.yaml": "a: ["}, "config.yaml: cannot be read"),
        ({"identity.json": None}, "config.yaml: cannot be read"),
        ({"generations.jsonl": ""}, "no run that can be used; .*no text is finished"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, damage: dict[str, str | None], said: str
) -> None:
    folder = run(tmp_path / "a", texts([2.0]))
    for name, text in damage.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        find([folder])


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no run"):
        find([tmp_path])


WORDS = "drafter=pld tree=cost_aware tree.depth=3 sampling=sample batch_size=4 tree.batch=2"


def test_words_make_the_same_settings_again(tmp_path: Path) -> None:
    settings = settings_of(f"{WORDS} out={tmp_path / 'a'} tracker=none")
    folder = run(tmp_path / "a", texts([2.0]))
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    (found,) = find([folder]).runs
    words = words_of(found)
    assert sorted(words) == sorted(WORDS.split())
    again = settings_of([*words, f"out={tmp_path / 'a'}", "tracker=none"])
    assert again == settings

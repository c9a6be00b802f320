"""A run of a model that brings generation settings: it obeys them, as its baseline and its check
do, says so, and is refused where it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.lab.lossless import compare
from specdec.lab.reading import Reading
from specdec.lab.witness import Witness, own_logits
from specdec.models.generation import processors_of
from specdec.models.load import load_model, zoo_path
from specdec.sampling import SamplingParams
from tests.running import QUICK, lines, outputs, summary_of

pytestmark = pytest.mark.usefixtures("load_once")
Command = Callable[..., tuple[int, str, str]]
OWN = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
TEXTS = [
    {"text": "It was a dark night, and the old captain"},
    {"text": "for i in range(10):\n    print(i)\nfor j in range(10):\n", "max_new_tokens": 5},
    {"text": "def fibonacci(n):\n    "},
]


def folder_with(folder: Path, **settings: Any) -> Path:
    """The smaller built-in model with generation settings of its own."""
    folder.mkdir()
    for file in zoo_path("draft").iterdir():
        (folder / file.name).symlink_to(file)
    path = folder / "generation_config.json"
    base = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**base, **settings}))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(tmp_path_factory.mktemp("models") / "own", **OWN)


@pytest.fixture(scope="module")
def words(own: Path) -> list[str]:
    prompts = own.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in TEXTS))
    return [*QUICK, "target=hf", f"target.path={own}", "prompts=file", f"prompts.path={prompts}"]


def test_a_run_obeys_and_says_so(
    specdec: Command, words: list[str], own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    code, printed, _ = specdec(*words, "drafter=ngram", "batch_size=2", f"out={out}")
    assert code == 0
    assert "sampling: the model's own repetition_penalty=1.3 is obeyed\n" in printed
    unused = ["do_sample=True", "temperature=0.6", "top_p=0.9"]
    assert f"sampling: the model's own {', '.join(unused)} are not used\n" in printed
    summary = summary_of(out)
    obeyed = {"obeyed": ["repetition_penalty=1.3"], "not_used": unused}
    assert summary["generation_config"] == obeyed
    assert summary["lossless"]["identical"] == summary["lossless"]["checked"] == 3
    records = lines(out / "generations.jsonl")
    assert sorted(len(record["output_ids"]) for record in records) == [5, 10, 10]
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    for record in records:
        done = model.generate(
            torch.tensor([record["prompt_ids"]]),
            do_sample=False,
            max_new_tokens=len(record["output_ids"]),
        )
        assert done[0, len(record["prompt_ids"]) :].tolist() == record["output_ids"]

    # Of a text that was half done nothing is left but its prompt.
    whole, file = outputs(out), out / "generations.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    code, _, _ = specdec(*words, "drafter=ngram", "batch_size=2", f"out={out}", "resume=true")
    assert (code, outputs(out)) == (0, whole)

    # Without it the texts are others.
    plain = ("sampling.processors=none", "baseline=false", f"out={tmp_path}/p")
    code, printed, _ = specdec(*words, "drafter=ngram", *plain)
    assert (code, "repetition_penalty=1.3 are not used" in printed) == (0, True)
    assert outputs(tmp_path / "p") != whole


def test_the_check_is_about_the_processed_law(
    specdec: Command, words: list[str], own: Path, tmp_path: Path
) -> None:
    """And sees that texts do not follow the model's own."""
    out = tmp_path / "o"
    sampled = ("sampling=sample", "prompts.samples=10", "max_new_tokens=16", "baseline=false")
    code, _, _ = specdec(*words, "drafter=ngram", "batch_size=8", *sampled, f"out={out}")
    assert code == 0
    records, target = lines(out / "generations.jsonl"), load_model(str(own))
    warm = SamplingParams(temperature=1.0)
    config = target.model.generation_config
    processors = processors_of(config, warm, ends=[0], vocab=target.vocab_size)
    found = Reading(Witness(target, processors=processors), warm).read(records)
    assert found["p_value"] > 1e-3
    assert Reading(Witness(target), warm).read(records)["p_value"] < 1e-5


def test_a_divergence_is_weighed_by_processed_logits(own: Path) -> None:
    target = load_model(str(own))
    processors = processors_of(
        target.model.generation_config, SamplingParams(), ends=[0], vocab=target.vocab_size
    )
    prompt = target.tokenizer(str(TEXTS[0]["text"])).input_ids
    base = {"prompt": 0, "sample": 0, "turn": 0, "prompt_ids": prompt}
    mine, theirs = [*prompt[-3:], 99], [*prompt[-3:], 98]
    (found,) = compare(
        [{**base, "output_ids": mine}],
        [{**base, "output_ids": theirs}],
        Witness(target, processors=processors),
    )["divergences"]
    logits = next(own_logits(target, prompt, mine))[3].clone()
    for token in {*prompt, *mine[:3]}:
        logits[token] *= 1.3 if logits[token] < 0 else 1 / 1.3
    first, second = logits.topk(2).values.tolist()
    assert found["logit_gap"] == pytest.approx(float(logits[98] - logits[99]), abs=1e-4)
    assert found["top2_gap"] == pytest.approx(first - second, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "sampling.processors=model: num_beams=4"),
        ({"eos_token_id": "</s>"}, "ignore_eos=false: eos_token_id='</s>'"),
        ({"eos_token_id": [0, "</s>"]}, "ignore_eos=false: eos_token_id=[0, '</s>']"),
    ],
    ids=str,
)
def test_what_cannot_be_obeyed_is_refused_in_one_line(
    specdec: Command, words: list[str], tmp_path: Path, settings: Any, message: str
) -> None:
    model = folder_with(tmp_path / "model", **settings)
    code, _, error = specdec(*words, f"target.path={model}", f"out={tmp_path}/o")
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_texts_end_at_stop_strings(specdec: Command, words: list[str], tmp_path: Path) -> None:
    """Those of the settings, or of the model, which the settings replace."""
    model = folder_with(tmp_path / "stops", stop_strings=["a", "e"])

    def texts(*more: str) -> list[str]:
        out = tmp_path / f"o{len(more)}"
        code, _, _ = specdec(
            *words, f"target.path={model}", "drafter=ngram", "baseline=false", *more, f"out={out}"
        )
        assert code == 0
        records = lines(out / "generations.jsonl")
        return [record["text"] for record in records if record["finish_reason"] == "stop"]

    ended = texts()
    assert ended
    for text in ended:
        assert {"a", "e"} & {*text}
    given = texts('stop_strings=["o"]', "seed=1")
    assert given
    for text in given:
        assert "o" in text
    assert texts("stop_strings=[]", "seed=1", "ignore_eos=true") == []


@pytest.mark.parametrize(
    "word", ['stop_strings=[""]', "stop_strings=3", "sampling.processors=some"]
)
def test_settings_out_of_range(specdec: Command, word: str, tmp_path: Path) -> None:
    code, _, error = specdec(*QUICK, word, f"out={tmp_path}/o")
    assert code == 2
    assert error.startswith(f"error: {word.partition('=')[0]}")
    assert error.count("\n") == 1

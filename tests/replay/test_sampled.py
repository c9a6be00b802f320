"""Replay against runs above temperature 0, of models so small that they make thousands of texts:
what an error in replay, or a rule that keeps too much, would show."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from specdec.experiments.studies import replay as study
from specdec.replay.survival import SAMPLED
from tests.tiny import tiny_llama

VOCAB, PROMPTS, TOKENS = 24, 24, 8
NOISE = 0.12  # of the draft's weights
FEW, MANY = 25, 40  # samples of each prompt in a run; of the record twice as many
QUICK = (("chain", 4, "sample", "block"), ("static", 8, "sample", "traversal"))


def saved(model: transformers.LlamaForCausalLM, folder: Path) -> str:
    """A folder with a model and a tokenizer that splits at spaces."""
    tokens = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> study.Options:
    """Of the pair: short texts, whose ends weigh heavily."""
    folder = tmp_path_factory.mktemp("sampled")
    target = tiny_llama(seed=0, layers=2, vocab=VOCAB)
    draft = copy.deepcopy(target)
    torch.manual_seed(5)
    with torch.no_grad():
        for weights in draft.parameters():
            weights += torch.randn_like(weights) * NOISE * (weights.ndim > 1)
    path = folder / "prompts.jsonl"
    prompts = (
        " ".join(f"t{(7 * i + 3 * j) % VOCAB}" for j in range(3 + i % 7)) for i in range(PROMPTS)
    )
    path.write_text("\n".join(json.dumps({"prompt": one}) for one in prompts))
    return study.Options(
        target=saved(target, folder / "target"),
        draft=saved(draft, folder / "draft"),
        path=str(path),
        prompts=PROMPTS,
        tokens=TOKENS,
        batch=256,
        record=folder / "record",
        out=folder / "replay.json",
    )


def compared(options: study.Options, samples: int, which: str) -> list[dict[str, Any]]:
    """What the study finds."""
    folder = options.record.with_name(f"record{samples}")
    record = study.record_of(replace(options, samples=2 * samples, record=folder))
    runs = study.runs_of(replace(options, samples=samples))
    wanted = study.wanted("six" if which == "quick" else which, record)
    if which == "quick":
        wanted = [one for one in wanted if tuple(one.labels.values()) in QUICK]
    return study.corrected([study.compared(one, record, runs) for one in wanted])


def test_runs_are_as_replayed(options: study.Options) -> None:
    found = compared(options, FEW, "quick")
    assert len(found) == len(QUICK)
    assert min(one["holm"] for one in found) >= 0.01


@pytest.mark.slow
def test_every_rule_and_policy_is_as_replayed(options: study.Options) -> None:
    """One by one, and together: runs are independent, and all may be off by what the record has
    by chance, a third of a percent."""
    found = compared(options, MANY, "every")
    assert {"chain", "static", "dynamic", "threshold"} <= {one["tree"] for one in found}
    assert {one["acceptance"] for one in found} == set(SAMPLED)
    assert min(one["holm"] for one in found) >= 0.01
    apart = np.log([one["ratio"][0] for one in found])
    assert abs(apart.mean()) < 0.012

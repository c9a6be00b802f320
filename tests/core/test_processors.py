"""What `generate` does to logits, and where it ends a text: the loop with tiny models gives the
tokens of transformers' own `generate`, and at temperature 1 the processed law."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.experiments.studies.rule_laws import (
    Law,
    Tokens,
    distance,
    drawn_trees,
    emitted_law,
    extend_law,
    token_trees,
)
from specdec.kernels import reference
from specdec.models.generation import processors_of
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.processors import Processing, Processors
from specdec.protocols import AcceptanceRule
from specdec.request import Decoding, Request
from specdec.sampling import SamplingParams
from specdec.stop_strings import StopStrings
from specdec.verifier.coins import CoinRule
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.relaxed import Relaxed
from specdec.verifier.synthetic import Synthetic
from specdec.verifier.typical import Typical
from tests.core.generated import DEVICE, TREES, Pair, drafter_of
from tests.decoding import decoder_of, outputs_of, requests_of
from tests.models.tiny import VOCABULARY, disturbed, save, tiny
from tests.tiny import MODEL_VOCAB, PROMPT, tiny_llama
from tests.verifier.laws import ALPHA, RULES, chi_square, draws_of, logits_table, shaped

GREEDY = SamplingParams()
NEW, END = 16, 40
PROMPTS = [[7, 8, 9, 7, 8], [50, 3, 61, 50], [5], [90, 91, 90, 91, 12, 13]]  # more than rows
PLANS = [
    *((drafter, tree, 3) for drafter in ("small_llama", "ngram") for tree in TREES),
    ("small_llama", "dynamic", 1),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.8, "sequence_bias": [[[11], -2.0], [[12], 3.0]]},
    "suppressed": {"suppress_tokens": [*range(0, 90, 3), 500]},
    "begin": {"begin_suppress_tokens": list(range(0, 96, 2))},
    "bad_words": {"bad_words_ids": [[t] for t in range(1, 90, 2)], "eos_token_id": [END]},
    "new_tokens": {"min_new_tokens": 9, "min_length": 99},
    "length": {"min_length": 14},
}
SETTINGS["all"] = {k: v for settings in SETTINGS.values() for k, v in settings.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A target whose texts soon repeat and often have the token `END`, and the folder of a draft
    that agrees with it now and then."""
    target = tiny("llama").to(DEVICE)
    with torch.no_grad():
        target.lm_head.weight[END] *= 2.5
    return target, save(disturbed(target, 0.3), tmp_path_factory.mktemp("draft"))


@pytest.fixture(scope="module")
def target(models: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> PagedLM:
    """The same over a paged cache, from a folder that has a tokenizer."""
    folder = save(models[0], tmp_path_factory.mktemp("target"))
    return load_model(str(folder), Placement(device=DEVICE))


def generate(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    tokenizer = settings.pop("tokenizer", None)
    model.generation_config = GenerationConfig(
        **{"eos_token_id": [END], "pad_token_id": 0, "do_sample": False, **settings}
    )
    done = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=NEW,
        tokenizer=tokenizer,
    )
    output: list[int] = done[0, len(prompt) :].tolist()
    return output


def obeyed(settings: dict[str, Any], sampling: SamplingParams = GREEDY) -> Processors:
    return processors_of(GenerationConfig(**settings), sampling, ends=[END], vocab=VOCABULARY)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_are_those_of_generate(
    models: tuple[Any, Path], target: PagedLM, name: str
) -> None:
    """With drafters, trees and batches; rows are used more than once."""
    settings = SETTINGS[name]
    wanted = [generate(models[0], prompt, **settings) for prompt in PROMPTS]
    assert wanted != [generate(models[0], prompt) for prompt in PROMPTS]
    for drafter, tree, rows in PLANS if name == "all" else PLANS[1:2]:
        decoder = decoder_of(
            target,
            drafter_of(drafter, models[1]),
            TREES[tree]("top_k"),
            rows=rows,
            stop_tokens=[END],
            processors=obeyed(settings),
        )
        assert outputs_of(decoder, PROMPTS, NEW) == wanted, (drafter, tree, rows)


def test_the_check_s_definition_is_that_of_generate(models: tuple[Any, Path]) -> None:
    """Of every token of a text, whichever part of it is asked for."""
    prompt, processors = PROMPTS[0], obeyed(SETTINGS["all"])
    output = generate(models[0], prompt, **SETTINGS["all"])
    with torch.inference_mode():
        text = torch.tensor([prompt + output], device=DEVICE)
        logits = models[0](text).logits[0, len(prompt) - 1 : -1]
    for start in (0, 5):
        found = processors.of_text(logits[start:], prompt, output, start)
        assert found.argmax(-1).tolist() == output[start:]
    raw = Processors().of_text(logits, prompt, output, 0)
    assert torch.equal(raw, logits.float())


# --- laws

VOCAB = 3
LAW = Processors(vocab=VOCAB, repetition_penalty=1.7, bias={0: 0.5}, begin_suppress=[2])
TEXT = [1]  # whose last token is the root of `drawn_trees`


def processed_law(logits: Any, context: Tokens) -> np.ndarray:
    """By hand."""
    scores = np.array(logits(context), dtype=float)
    scores[0] += 0.5
    for token in {*TEXT, *context}:
        scores[token] *= 1.7 if scores[token] < 0 else 1 / 1.7
    if not context:
        scores[2] = -np.inf
    weights: np.ndarray = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_step_follows_the_processed_law(rule: CoinRule) -> None:
    """By enumeration of all trees and coins: what rules are shown at the nodes of a tree leads to
    the law of plain decoding with a penalty."""
    logits = logits_table(3, VOCAB)
    draft = partial(processed_law, logits_table(4, VOCAB))  # any will do
    children = draws_of(rule)[0]
    trees = drawn_trees(*shaped(rule, 2, 1), draft, children)
    tree = token_trees(trees, draft, children)
    processing = Processing(LAW, rows=1, device=torch.device("cpu"), kernels=reference)
    processing.join([Decoding(Request(id=0, prompt_ids=TEXT, max_new_tokens=4), 0, TEXT)])
    raw = np.zeros((len(trees), tree.nodes, VOCAB))
    for row, one in enumerate(trees):
        for node, context in enumerate(one.contexts):
            raw[row, node] = logits(context)
    rows = torch.zeros(len(trees), dtype=torch.int64)
    found = processing.process(rows, tree, torch.tensor(raw)).softmax(-1).numpy()
    shown = {
        context: found[row, node]
        for row, one in enumerate(trees)
        for node, context in enumerate(one.contexts)
    }
    wanted = partial(processed_law, logits)
    law = extend_law(emitted_law(rule, trees, tree, shown.__getitem__), wanted, 2)
    assert distance(law, extend_law({(): 1.0}, wanted, 2)) < 1e-9


def test_outputs_of_the_loop_follow_the_processed_law(tmp_path: Path) -> None:
    """Step after step, in rows that are used again: by counts, against all continuations."""
    model, count, warm = tiny_llama(seed=0, layers=2), 3, SamplingParams(temperature=1.0, seed=7)
    processors = Processors(vocab=MODEL_VOCAB, repetition_penalty=2.5, bias={6: 1.0})
    drafter = SmallLlama(path=str(save(tiny_llama(seed=1, layers=1), tmp_path)))
    decoder = decoder_of(
        PagedLM(copy.deepcopy(model)),
        drafter,
        Static(widths=[2, 1], children="sample"),
        RecursiveRejection(),
        sampling=warm,
        rows=32,
        max_tokens=len(PROMPT) + count,
        processors=processors,
    )

    def after(raw: Tensor, context: Tokens) -> list[float]:
        scores = processors.of_text(raw[None], PROMPT, context, len(context))
        shares: list[float] = scores[0].softmax(-1).tolist()
        return shares

    law: Law = {(): 1.0}
    for _ in range(count):
        contexts = list(law)
        with torch.inference_mode():
            raw = model(torch.tensor([[*PROMPT, *context] for context in contexts])).logits[:, -1]
        law = {
            (*context, token): law[context] * share
            for context, row in zip(contexts, raw.double(), strict=True)
            for token, share in enumerate(
                processors.of_text(row[None], PROMPT, context, len(context))[0]
                .softmax(-1)
                .tolist()
            )
        }
    counts = Counter(map(tuple, outputs_of(decoder, [PROMPT] * 1200, count)))
    assert chi_square(counts, law) > ALPHA


@pytest.mark.some(9)
@pytest.mark.parametrize(
    "rule", [*RULES, Greedy(), Typical(), Relaxed(), Synthetic()], ids=lambda rule: rule.name
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_rule_is_shown_processed_logits(
    models: tuple[Any, Path], target: PagedLM, rule: AcceptanceRule, temperature: float
) -> None:
    """Suppressed tokens are what the draft likes best, and do not come up."""
    suppressed = list(range(0, VOCABULARY, 2))
    drafting = not rule.synthetic  # which takes what is drafted
    decoder = decoder_of(
        target,
        drafter_of("small_llama" if drafting else "none", models[1]),
        Chain(budget=3, children="sample" if temperature else "top_k") if drafting else None,
        rule,
        temperature=temperature,
        processors=obeyed({"suppress_tokens": suppressed}),
    )
    assert not {*suppressed} & {*outputs_of(decoder, PROMPTS[:1], 12)[0]}


# --- stop strings


def test_texts_end_where_those_of_generate_do(zoo: Pair) -> None:
    """With strings inside of tokens, across tokens and begun by the prompt."""
    model = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32)
    model.to(DEVICE)
    tokenizer = zoo.target.tokenizer
    prompts = zoo.prompts[:3]
    texts = [tokenizer.decode(output) for output in zoo.outputs[:3]]
    sizes = zip(texts, (1, 4, 9), strict=True)
    inside = [text[len(text) // 4 :][:size] for text, size in sizes]
    begun = tokenizer.decode(prompts[0])[-2:] + texts[0][:2]
    for strings in (inside[:1], inside[1:], [begun, "\N{SNOWMAN}"]):
        wanted = [
            generate(model, p, stop_strings=strings, tokenizer=tokenizer, eos_token_id=None)
            for p in prompts
        ]
        assert min(map(len, wanted)) < NEW
        decoder = decoder_of(
            zoo.target,
            drafter_of("small_llama", zoo.draft),
            TREES["static"]("top_k"),
            rows=2,
            stop_strings=StopStrings(strings, tokenizer),
        )
        done = sorted(decoder.run(requests_of(prompts, NEW)), key=lambda s: s.request.id)
        assert [sequence.output_ids for sequence in done] == wanted, strings
        for sequence in done:
            assert sequence.finish_reason == "stop" or len(sequence.output_ids) == NEW


def test_a_character_of_several_tokens_ends_a_text(zoo: Pair) -> None:
    tokenizer = zoo.target.tokenizer
    ids = tokenizer("naïve é", add_special_tokens=False).input_ids
    stops = StopStrings(["é"], tokenizer)
    for cut in range(1, len(ids)):
        assert stops.end(ids[:cut], ids[cut:]) == len(ids) - cut
    assert stops.end(ids, tokenizer(" is", add_special_tokens=False).input_ids) is None


def test_an_empty_stop_string_is_refused(zoo: Pair) -> None:
    with pytest.raises(ValueError, match="stop_strings="):
        StopStrings(["a", ""], zoo.target.tokenizer)

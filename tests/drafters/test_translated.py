"""drafter=translated: what is proposed, and that nothing of it changes the outputs.

A draft of another tokenizer is made of the built-in one by `experiments/tools/retokenize.py`: the
same network, so that what corresponds, and what it should propose, is known by construction.
"""

import copy
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.translated import Translated
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.drafters.vocabulary import LONGEST, Vocabulary
from specdec.models.load import Models, load_model
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.request import Decoding
from specdec.tree import TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.decoding import decoder_of, loaded, requests_of
from tests.drafters.retokenized import (
    KEPT,
    STORIES,
    byte_level,
    check_spellings,
)
from tests.tiny import tiny_llama

NEW = 12

TEXTS = [
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "It was a dark night, and the old captain",
    "Größe, naïveté, 日本語のテキスト, 🙂🙃: the encyclopædia",
    "<|user|>\nName three uncharacteristically incomprehensible words.\n<|assistant|>\n",
]


def test_the_retokenized_pair_corresponds_as_it_was_made(
    target: PagedLM, drafts: dict[int, str], renamed: dict
) -> None:
    drafter = loaded(Translated(path=drafts[KEPT]), target)
    assert drafter.translation.pairs == renamed
    assert drafter.vocab_size == KEPT
    own = Vocabulary(drafter.lm.tokenizer, KEPT, name="draft")
    theirs = Vocabulary(target.tokenizer, target.vocab_size, name="target")
    check_spellings(drafter.translation, theirs, own)
    assert max(map(len, drafter.translation.spellings)) > 1


@pytest.mark.parametrize("counts", [[1, 4, 2, 3], [4, 4, 4, 4]])
def test_tokens_are_spelled_one_after_the_other(
    target: PagedLM, drafts: dict[int, str], counts: list[int]
) -> None:
    drafter = loaded(Translated(path=drafts[KEPT]), target)
    spellings = drafter.translation.spellings
    generator = torch.Generator().manual_seed(0)
    long = [i for i, ids in enumerate(spellings) if len(ids) == drafter._longest]
    tokens = torch.randint(target.vocab_size, (4, 4), generator=generator)
    tokens[1] = long[0]  # more than there is room for
    found, length = drafter._spell(tokens, torch.tensor(counts))
    assert found.shape == (4, drafter._spelled(4))
    for row, count in enumerate(counts):
        expected = [i for token in tokens[row, :count].tolist() for i in spellings[token]]
        expected = expected[-found.shape[1] :]
        assert found[row, : length[row]].tolist() == expected
        assert not found[row, length[row] :].any()


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


class Spy(Translated):
    """Notes what it drafts."""

    def draft(self, context: StepContext) -> TokenTree:
        tree = super().draft(context)
        self.seen.append((tree, [list(s.tokens) for s in context.sequences]))
        return tree

    seen: list[tuple[TokenTree, list[list[int]]]]


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None,
    prompts: Sequence[Sequence[int]],
    *,
    new: int = NEW,
    batch_size: int = 1,
    temperature: float = 0.0,
    pages: int | None = None,
) -> list[Decoding]:
    decoder = decoder_of(
        target,
        drafter,
        tree,
        RecursiveRejection() if temperature else None,
        temperature=temperature,
        rows=batch_size,
        max_tokens=max(map(len, prompts)) + new,
        page_size=4,
        pages=pages,
    )
    caches: Any = [decoder.verifier.cache]
    if isinstance(drafter, SmallLlama):
        caches.append(drafter.model.cache)
    finished = decoder.run(
        requests_of(prompts, new), on_step=lambda step: [cache.check() for cache in caches]
    )
    done = sorted(finished, key=lambda s: s.request.id)
    assert all(cache.free_pages == cache.pages for cache in caches)
    return done


def outputs(done: Sequence[Decoding]) -> list[list[int]]:
    return [sequence.output_ids for sequence in done]


def accepted_length(done: Sequence[Decoding]) -> float:
    return sum(len(s.output_ids) for s in done) / sum(s.steps for s in done)


@pytest.fixture(scope="module")
def prompts(target: PagedLM) -> list[list[int]]:
    return [target.tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def plain(target: PagedLM, prompts: list[list[int]]) -> list[list[int]]:
    return outputs(decode(target, NoDrafter(), None, prompts, batch_size=4))


TREES: dict[str, TreePolicy] = {
    "chain": Chain(budget=4),
    "static": Static(widths=[3, 2, 1]),
    "dynamic": Dynamic(budget=10, width=3, depth=4),
}


@pytest.mark.some(1)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", TREES)
def test_greedy_outputs_are_those_of_the_target(
    target: PagedLM,
    drafts: dict[int, str],
    prompts: list[list[int]],
    plain: list[list[int]],
    tree: str,
    batch_size: int,
) -> None:
    drafter = Translated(path=drafts[KEPT])
    done = decode(target, drafter, TREES[tree], prompts, batch_size=batch_size)
    assert outputs(done) == plain
    assert accepted_length(done) > 1.5


@pytest.mark.slow
def test_it_drafts_nearly_as_well_as_with_the_same_tokenizer(
    target: PagedLM, drafts: dict[int, str], prompts: list[list[int]]
) -> None:
    length = {}
    for keep, path in {8192: "zoo:draft", **drafts}.items():
        drafter = Translated(path=path, min_overlap=0.3)
        done = decode(target, drafter, TREES["dynamic"], prompts, new=32, batch_size=4)
        length[keep] = accepted_length(done)
    assert length[KEPT] > 0.85 * length[8192]
    assert length[3000] > 2


@pytest.mark.some(1)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_the_same_tokenizer_it_is_small_llama(
    target: PagedLM, prompts: list[list[int]], temperature: float
) -> None:
    tree = Static(widths=[2, 2], children="sample" if temperature else "top_k")
    spy = Spy(path="zoo:draft")
    seen, trees = [], []
    spy.seen = seen
    small = SmallLlama(path="zoo:draft")
    draft = small.draft

    def noting(context: StepContext) -> TokenTree:
        trees.append(draft(context))
        return trees[-1]

    small.draft = noting  # type: ignore[method-assign]
    same, expected = (
        outputs(decode(target, d, tree, prompts[:3], batch_size=3, temperature=temperature))
        for d in (spy, small)
    )
    assert same == expected
    for (mine, _), theirs in zip(seen, trees, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.parents, theirs.parents)
        assert mine.proposal is not None
        assert theirs.proposal is not None
        assert torch.equal(mine.proposal.ids, theirs.proposal.ids)
        assert torch.equal(mine.proposal.probs, theirs.proposal.probs)


def test_it_can_read_ahead(
    target: PagedLM, drafts: dict[int, str], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    """As in a composition: the tokens of a step are read at its end."""
    lengths = []
    for ahead in (False, True):
        drafter, tree = Translated(path=drafts[KEPT]), TREES["chain"]
        if ahead:
            drafter.join(tree.levels(None))
        done = decode(target, drafter, tree, prompts[1:3], batch_size=2)
        assert outputs(done) == plain[1:3]
        lengths.append([s.accepted_lengths for s in done])
    assert lengths[0] == lengths[1]


def test_rows_wait_for_pages(
    target: PagedLM, drafts: dict[int, str], prompts: list[list[int]], plain: list[list[int]]
) -> None:
    drafter = Translated(path=drafts[KEPT])
    longest = -(-(max(map(len, prompts)) + NEW) // 4)
    done = decode(target, drafter, TREES["chain"], prompts, batch_size=4, pages=longest * 3 // 2)
    assert outputs(done) == plain


def reference(model: Any, context: list[int], columns: Tensor) -> Tensor:
    """[S] float64, the draft's probabilities of the shared tokens after a context."""
    with torch.inference_mode():
        logits = model(torch.tensor([context])).logits[0, -1]
    return (logits[columns] / 0.8).softmax(-1)


@pytest.mark.some(1)
@pytest.mark.parametrize("candidates", [16, KEPT])
def test_it_proposes_the_drafts_distribution_over_shared_tokens(
    target: PagedLM, drafts: dict[int, str], prompts: list[list[int]], candidates: int
) -> None:
    tree = Static(widths=[2, 1], children="sample")
    drafter = Spy(path=drafts[KEPT], candidates=candidates)
    drafter.seen = []
    decode(target, drafter, tree, prompts[:3], batch_size=3, new=10, temperature=0.8)
    model = AutoModelForCausalLM.from_pretrained(drafts[KEPT], dtype=torch.float64)
    translated, spellings = drafter.translation, drafter.translation.spellings
    names, columns = (torch.tensor(part) for part in zip(*translated.pairs.items(), strict=True))
    place = {name: i for i, name in enumerate(names.tolist())}
    compared = respelled = 0
    for trees, sequences in drafter.seen[:6]:
        assert trees.proposal is not None
        for row, tokens in enumerate(sequences):
            prompt = next(p for p in prompts if tokens[: len(p)] == p)
            output = tokens[len(prompt) :]
            respelled += any(len(spellings[token]) > 1 for token in output)
            begin = translated.prompt(prompt, 10**6) + [i for t in output for i in spellings[t]]
            contexts = {0: begin}
            for node in range(int(trees.size[row])):
                if node:
                    token = int(trees.tokens[row, node])
                    contexts[node] = [
                        *contexts[int(trees.parents[row, node])],
                        translated.pairs[token],
                    ]
                probs = trees.proposal.probs[row, node].double()
                if not probs.any():
                    continue
                ids = trees.proposal.ids[row, node].tolist()
                every = reference(model, contexts[node], columns)
                expected = every[[place[i] for i in ids]]
                torch.testing.assert_close(probs, expected / expected.sum(), rtol=2e-4, atol=1e-7)
                assert expected.min() >= every.topk(len(ids)).values[-1] - 1e-7
                compared += 1
    assert compared > 20
    assert respelled


TINY = byte_level([*"abcdef", "ab", "cd"])

TINY_DRAFT = byte_level([*"cagbh", "ab", "bc", "d"])  # no e, f and cd

PROMPT = [3, 1, 6, 1, 5]


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "tree",
    [
        Static(widths=[2, 2], children="sample"),
        Chain(budget=2, children="sample_with_replacement"),
        Dynamic(budget=5, width=3, depth=2, children="sample"),
    ],
    ids=["static", "chain", "dynamic"],
)
def test_sampled_outputs_follow_the_target(tree: TreePolicy, tmp_path: Path) -> None:
    """All outputs of two tokens, their law worked out from passes of the untouched model."""
    model, count = tiny_llama(4, layers=2), 1600
    tiny_llama(1, layers=2).save_pretrained(tmp_path)
    TINY_DRAFT.save_pretrained(tmp_path)
    lm = PagedLM(copy.deepcopy(model), TINY)
    drafter = Translated(path=str(tmp_path))
    done = decode_many(lm, drafter, tree, count)
    assert (drafter.vocab_size, drafter.translation.ordinary) == (5, 8)
    with torch.inference_mode():
        first = model(torch.tensor([PROMPT])).logits[0, -1].double().softmax(-1)
        longer = torch.tensor([[*PROMPT, token] for token in range(8)])
        second = model(longer).logits[:, -1].double().softmax(-1)
    expected = (count * first[:, None] * second).flatten()
    counts = Counter(a * 8 + b for a, b in done)
    observed = torch.tensor([counts[i] for i in range(64)], dtype=torch.float64)
    often = expected >= 8
    parts = [(x[often].tolist(), float(x[~often].sum())) for x in (observed, expected)]
    (seen, rare_seen), (wanted, rare) = parts
    assert stats.chisquare([*seen, rare_seen], [*wanted, rare]).pvalue > 1e-5
    # Tokens that the draft lacks come as often as they should.
    lacking = observed.view(8, 8)[[4, 5, 7]].sum()
    share = float(first[[4, 5, 7]].sum())
    assert stats.binomtest(int(lacking), count, share).pvalue > 1e-5
    assert share > 0.1


def decode_many(lm: PagedLM, drafter: Drafter, tree: TreePolicy, count: int) -> list[list[int]]:
    decoder = decoder_of(
        lm,
        drafter,
        tree,
        RecursiveRejection(),
        temperature=1.0,
        seed=5,
        rows=64,
        max_tokens=len(PROMPT) + 2,
        page_size=4,
    )
    done = list(decoder.run(requests_of([PROMPT] * count, 2)))
    assert accepted_length(done) > 1.05
    return outputs(done)


@pytest.mark.some(1)
@pytest.mark.parametrize("context", [16, 32])
def test_a_text_beyond_the_drafts_context_stays_lossless(
    target: PagedLM,
    drafts: dict[int, str],
    prompts: list[list[int]],
    plain: list[list[int]],
    context: int,
    tmp_path: Path,
) -> None:
    for file in Path(drafts[KEPT]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["max_position_embeddings"] = context
    (tmp_path / "config.json").write_text(json.dumps(config))
    highest = 0

    class Watched(Translated):
        def load(self, target: PagedLM, models: Models) -> None:
            super().load(target, models)
            begin = self.lm._begin

            def watching(cache: Any, layout: Any, *rest: Any) -> Any:
                nonlocal highest
                highest = max(highest, int(layout.positions.max()))
                return begin(cache, layout, *rest)

            self.lm._begin = watching

    drafter, tree = Watched(path=str(tmp_path)), TREES["dynamic"]
    done = decode(target, drafter, tree, prompts, batch_size=2)
    assert outputs(done) == plain
    assert drafter.model.cache.max_tokens == context
    assert highest == context - 1


def test_a_row_that_is_full_drafts_on(target: PagedLM, drafts: dict[int, str]) -> None:
    """Texts that take more than twice as many tokens in the draft."""
    prompt = target.tokenizer("a b").input_ids

    class Wordy(Translated):
        def _match(self, target: PagedLM) -> None:
            super()._match(target)
            self.translation.spellings = [[5] * LONGEST for _ in range(target.vocab_size)]
            self._spellings = torch.full((target.vocab_size, LONGEST), 5)
            self._sizes = torch.full((target.vocab_size,), LONGEST)
            self._longest = LONGEST

    drafter = Wordy(path=drafts[KEPT])
    done = decode(target, drafter, TREES["chain"], [prompt], new=12)
    assert outputs(done) == outputs(decode(target, NoDrafter(), None, [prompt], new=12))


def test_a_small_overlap_is_refused(target: PagedLM, drafts: dict[int, str]) -> None:
    options: dict[str, Any] = {"path": drafts[3000]}
    with pytest.raises(ValueError, match=r"min_overlap=0.5; choose a draft") as refusal:
        loaded(Translated(**options), target)
    shared = 3000 - 16
    assert f"its 3000 tokens include {shared} (36.5%) of the target's 8176" in str(refusal.value)
    assert f"drafter.path={drafts[3000]}: " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert loaded(Translated(**options, min_overlap=0.36), target).vocab_size == 3000
    for value in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"drafter.min_overlap={value}: must be from 0 to 1"):
            Translated(**options, min_overlap=value)


def test_stories_have_too_few_tokens_in_common(
    target: PagedLM, prompts: list[list[int]], plain: list[list[int]]
) -> None:
    """A trained model of the sentencepiece kind: refused, and lossless if one insists."""
    if not STORIES.is_dir():
        pytest.skip(f"no model in {STORIES}")
    options: dict[str, Any] = {"path": str(STORIES)}
    with pytest.raises(ValueError, match=r"its 512 tokens include \d+ \(\d\.\d%\)"):
        loaded(Translated(**options), target)
    drafter = Translated(**options, min_overlap=0.0)
    assert (
        outputs(decode(target, drafter, Chain(budget=2), prompts[:2], batch_size=2)) == plain[:2]
    )


def test_no_token_in_common_is_refused(tmp_path: Path) -> None:
    tiny_llama(1, layers=2).save_pretrained(tmp_path)
    byte_level([*"ABCDEFGH"]).save_pretrained(tmp_path)
    lm = PagedLM(tiny_llama(0, layers=2), TINY)
    with pytest.raises(ValueError, match=r"include 0 \(0.0%\) of the target's 8"):
        loaded(Translated(path=str(tmp_path), min_overlap=0.0), lm)

"""The real loop with real models: what comes out of it follows the target."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor

from specdec.drafters.ngram import NGram
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.experiments.studies.rule_laws import Tokens
from specdec.flight import Step
from specdec.models.paged import PagedLM
from specdec.protocols import AcceptanceRule, StepContext, TreePolicy
from specdec.sampling import SamplingParams
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from specdec.verifier.typical import Typical
from tests.decoding import decoder_of, requests_of
from tests.drafters.learning import Scripted
from tests.tiny import MODEL_VOCAB, PROMPT, tiny_llama
from tests.verifier.laws import ALPHA, chi_square, exact_law


@dataclass(frozen=True)
class Models:
    """A target over the paged cache, an untouched copy of it, and a folder with a draft model."""

    target: PagedLM
    plain: transformers.LlamaForCausalLM
    draft_path: str


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder: Path = tmp_path_factory.mktemp("draft")
    model = tiny_llama(seed=0, layers=2)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(MODEL_VOCAB)}, unk_token="t0"))
    for name, saved in {"other": tiny_llama(seed=1, layers=1), "same": model}.items():
        saved.save_pretrained(folder / name)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        tokenizer.save_pretrained(folder / name)
    return Models(PagedLM(copy.deepcopy(model)), model, str(folder / "other"))


def decoded(
    models: Models,
    rule: CoinRule,
    tree: TreePolicy,
    params: SamplingParams,
    requests: int,
    count: int,
) -> tuple[dict[Tokens, int], float]:
    """How often each output came up, and the drafted tokens accepted per step."""
    drafter = SmallLlama(path=models.draft_path)
    decoder = decoder_of(
        models.target,
        drafter,
        tree,
        rule,
        sampling=params,
        rows=64,
        max_tokens=len(PROMPT) + count,
        page_size=4,
    )
    counts: dict[Tokens, int] = {}
    accepted, steps = 0, 0

    def note(step: Step) -> None:
        nonlocal accepted, steps
        accepted += sum(step.accepted)
        steps += len(step.accepted)

    queue = requests_of([PROMPT] * requests, count)
    for sequence in decoder.run(queue, on_step=note):
        output = tuple(sequence.output_ids)
        assert len(output) == count
        counts[output] = counts.get(output, 0) + 1
    assert decoder.verifier.cache is not None
    decoder.verifier.cache.check()
    drafter.model.cache.check()
    assert sum(counts.values()) == requests
    return counts, accepted / steps


WARM = SamplingParams(temperature=1.0, seed=7)
NUCLEUS = SamplingParams(temperature=1.0, top_p=0.8, seed=8)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("rule", "tree", "params", "count"),
    [
        (RecursiveRejection(), Chain(budget=2, children="sample"), WARM, 3),
        (RecursiveRejection(), Static(widths=[2, 2], children="sample"), WARM, 3),
        (
            RecursiveRejection(),
            Static(widths=[2, 2], children="sample_with_replacement"),
            WARM,
            2,
        ),
        (RecursiveRejection(), Dynamic(budget=5, width=3, depth=2, children="sample"), WARM, 3),
        (
            RecursiveRejection(),
            Dynamic(budget=4, width=3, depth=2, children="sample_with_replacement"),
            NUCLEUS,
            2,
        ),
        (RecursiveRejection(), Static(widths=[2, 1], children="sample"), NUCLEUS, 3),
        (Block(), Chain(budget=3, children="sample"), WARM, 3),
        (KSeq(), Static(widths=[2, 2], children="sample_with_replacement"), WARM, 2),
        (MultiPath(), Static(widths=[2, 2], children="sample_with_replacement"), WARM, 2),
        (Traversal(), Static(widths=[2, 2], children="sample"), WARM, 3),
        (Hsd(), Static(widths=[1, 2], children="sample"), WARM, 3),
        (
            Traversal(),
            Dynamic(budget=4, width=3, depth=2, children="sample_with_replacement"),
            NUCLEUS,
            2,
        ),
        (TargetOnly(), Static(widths=[2, 2], children="top_k"), WARM, 3),
        (TargetOnly(), Dynamic(budget=5, width=3, depth=2, children="top_k"), NUCLEUS, 2),
    ],
    ids=lambda value: getattr(value, "name", None) or type(value).__name__,
)
def test_outputs_of_the_loop_follow_the_target(
    tiny_models: Models, rule: AcceptanceRule, tree: TreePolicy, params: SamplingParams, count: int
) -> None:
    counts, accepted = decoded(tiny_models, rule, tree, params, requests=2200, count=count)
    expected = exact_law(tiny_models.plain, params, count)
    assert chi_square(counts, expected) > ALPHA
    first: dict[Tokens, int] = {}
    for tokens, times in counts.items():
        first[tokens[:1]] = first.get(tokens[:1], 0) + times
    assert chi_square(first, exact_law(tiny_models.plain, params, 1)) > ALPHA
    assert accepted > 0.2


def test_the_statistical_test_sees_a_lossy_pair(tiny_models: Models) -> None:
    """Recursive rejection on top-k children, which is not lossless, fails the test above."""
    tree = Static(widths=[2, 1], children="top_k")
    counts, _ = decoded(tiny_models, RecursiveRejection(), tree, WARM, requests=1500, count=2)
    assert chi_square(counts, exact_law(tiny_models.plain, WARM, 2)) < ALPHA


@pytest.mark.parametrize("params", [WARM, NUCLEUS], ids=["plain", "top_p"])
@pytest.mark.parametrize(
    "tree",
    [
        Chain(budget=3, children="sample"),
        Static(widths=[2, 1, 2], children="sample"),
        Static(widths=[1, 2, 2], children="sample_with_replacement"),
    ],
    ids=["chain", "tree", "with_replacement"],
)
def test_a_draft_equal_to_the_target_is_always_accepted(
    tiny_models: Models, tree: TreePolicy, params: SamplingParams
) -> None:
    """So its positions and its view of the tree are right, level by level, and after a step what
    it has committed."""
    same = replace(tiny_models, draft_path=str(Path(tiny_models.draft_path).parent / "same"))
    _, accepted = decoded(same, RecursiveRejection(), tree, params, requests=200, count=8)
    assert accepted > 2.99


@pytest.mark.parametrize(
    ("rule", "children"),
    [
        *((rule, "sample") for rule in (RecursiveRejection(), Traversal(), TargetOnly())),
        *((rule, "sample") for rule in (Tokenwise(), Block(), Typical())),
        *((rule, "sample_with_replacement") for rule in (KSeq(), MultiPath())),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_random_number_is_used_twice(rule: AcceptanceRule, children: Any) -> None:
    """Not by two sequences, by two steps, by draft and rule, by two levels of a draft, or by the
    coins of a rule and its draw of a token: what must be independent is."""
    chain = Chain(budget=3, children=children)
    tree = chain if rule.chains else Static(widths=[2, 2, 1], children=children)
    drafter = NGram()
    decoder = decoder_of(Scripted(), drafter, tree, rule, temperature=1.0, rows=2)
    asked: list[tuple[int, Tensor]] = []

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(context: StepContext, *more: Any) -> Any:
            def uniforms(stream: int, count: int) -> Tensor:
                asked.append((stream, context.uniforms(stream, count)))
                return asked[-1][1]

            return call(replace(context, uniforms=uniforms), *more)

        owner.__dict__[name] = watched

    watch(drafter, "draft")
    watch(rule, "accept")
    try:
        done = list(decoder.run(requests_of([[3, 7, 3, 9, 3, 7, 1, 3], [5, 6, 5]], 12)))
    finally:
        del rule.__dict__["accept"]
    assert max(sequence.steps for sequence in done) > 2
    levels = {stream for stream, _ in asked if stream >= 2}
    assert len(levels) == 3
    assert {stream for stream, _ in asked} - levels == ({1} if rule.name == "typical" else {0, 1})
    numbers = [number for _, found in asked for number in found.flatten().tolist()]
    assert len(set(numbers)) == len(numbers)

"""Drafts with rows for fewer tokens than the target, or for more: outputs stay the target's."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from specdec.drafters.compose import Compose
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.translated import Translated
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.experiments.studies.rule_laws import Tokens
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter, StepContext, TreePolicy
from specdec.sampling import SamplingParams
from specdec.tree import TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.traversal import Traversal
from tests.decoding import decoder_of, outputs_of, requests_of
from tests.tiny import MODEL_VOCAB, PROMPT, tiny_llama
from tests.verifier.laws import ALPHA, chi_square, exact_law

ROWS = {"fewer": 5, "more": 11}  # of the draft
TEXTS = [PROMPT, [7, 6, 7, 2, 5, 7], [6]]  # with tokens that the smaller draft has no row for
TREES = [Chain(budget=3), Static(widths=[3, 2]), Dynamic(budget=6, width=3, depth=3)]


def tokenizer(words: int) -> transformers.PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({f"t{i}": i for i in range(words)}, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table)


@pytest.fixture(scope="module")
def plain() -> transformers.LlamaForCausalLM:
    return tiny_llama(seed=0, layers=2)


@pytest.fixture(scope="module")
def target(plain: transformers.LlamaForCausalLM) -> PagedLM:
    return PagedLM(copy.deepcopy(plain), tokenizer(MODEL_VOCAB))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("drafts")
    for name, rows in ROWS.items():
        tiny_llama(seed=1, layers=1, vocab=rows).save_pretrained(folder / name)
        tokenizer(MODEL_VOCAB).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ROWS}


def drafter_of(kind: str, path: str) -> Drafter:
    if kind == "compose":
        return Compose(parts={"ngram": NGram(), "model": SmallLlama(path=path, candidates=4)})
    return (SmallLlama if kind == "small_llama" else Translated)(path=path)


@pytest.mark.some(4)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["small_llama", "translated", "compose"])
@pytest.mark.parametrize("tree", TREES, ids=["chain", "static", "dynamic"])
def test_greedy_outputs_are_those_of_plain_decoding(
    kind: str, tree: TreePolicy, rows: str, target: PagedLM, paths: dict[str, str]
) -> None:
    expected = outputs_of(decoder_of(target, NoDrafter(), rows=2, max_tokens=48), TEXTS, 24)
    assert any(token >= ROWS["fewer"] for text in expected for token in text)
    drafter = drafter_of(kind, paths[rows])
    got = outputs_of(decoder_of(target, drafter, tree, rows=2, max_tokens=48), TEXTS, 24)
    assert got == expected


class Spy(SmallLlama):
    trees: list[TokenTree]

    def draft(self, context: StepContext) -> TokenTree:
        self.trees.append(super().draft(context))
        return self.trees[-1]


@pytest.mark.parametrize("rows", ROWS)
def test_proposals_are_the_drafts_own_over_tokens_of_both(
    rows: str, target: PagedLM, paths: dict[str, str]
) -> None:
    """Renormalised after the cut, and of the prompt as the draft reads it."""
    drafter = Spy(path=paths[rows], candidates=MODEL_VOCAB)
    drafter.trees = []
    tree = Static(widths=[2], children="sample")
    decoder = decoder_of(target, drafter, tree, RecursiveRejection(), temperature=0.7)
    outputs_of(decoder, TEXTS[1:2], 1)
    proposal = drafter.trees[0].proposal
    assert proposal is not None
    both = min(MODEL_VOCAB, ROWS[rows])
    read = torch.tensor([[min(token, ROWS[rows] - 1) for token in TEXTS[1]]])
    with torch.inference_mode():
        logits = tiny_llama(seed=1, layers=1, vocab=ROWS[rows])(read).logits[0, -1, :both]
    expected = (logits.double() / 0.7).softmax(-1)
    found = torch.zeros(both, dtype=torch.float64)
    found[proposal.ids[0, 0]] = proposal.probs[0, 0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "rows"), [("small_llama", "fewer"), ("small_llama", "more"), ("translated", "fewer")]
)
def test_sampled_outputs_follow_the_target(
    kind: str,
    rows: str,
    target: PagedLM,
    plain: transformers.LlamaForCausalLM,
    paths: dict[str, str],
) -> None:
    """All outputs of two tokens, their law worked out from passes of the untouched model."""
    params = SamplingParams(temperature=1.0, seed=11)
    rule = RecursiveRejection() if kind == "small_llama" else Traversal()
    tree = Static(widths=[2, 2], children="sample")
    decoder = decoder_of(
        target, drafter_of(kind, paths[rows]), tree, rule, sampling=params, rows=64, max_tokens=8
    )
    counts: dict[Tokens, int] = {}
    for sequence in decoder.run(requests_of([PROMPT] * 1000, 2)):
        outcome = tuple(sequence.output_ids)
        counts[outcome] = counts.get(outcome, 0) + 1
    assert chi_square(counts, exact_law(plain, params, 2)) > ALPHA


@pytest.mark.parametrize("kind", ["small_llama", "translated"])
@pytest.mark.parametrize("grown", ["draft", "target"])
def test_tokens_that_no_model_has_a_row_for_do_not_matter(
    kind: str, grown: str, plain: transformers.LlamaForCausalLM, tmp_path: Path
) -> None:
    """A token was added to one tokenizer, and the weights were not resized."""
    tiny_llama(seed=1, layers=1).save_pretrained(tmp_path)
    tokenizer(MODEL_VOCAB + 2 * (grown == "draft")).save_pretrained(tmp_path)
    target = PagedLM(copy.deepcopy(plain), tokenizer(MODEL_VOCAB + 2 * (grown == "target")))
    expected = outputs_of(decoder_of(target, NoDrafter(), max_tokens=48), TEXTS, 16)
    drafter = drafter_of(kind, str(tmp_path))
    assert outputs_of(decoder_of(target, drafter, TREES[1], max_tokens=48), TEXTS, 16) == expected

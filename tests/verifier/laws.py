"""Rules, laws written out naively, and a test of counts against a law."""

import numpy as np
import torch
import transformers
from scipy import stats

from specdec.experiments.studies.rule_laws import (
    Counts,
    DrawnTree,
    Law,
    Table,
    Tokens,
    add_outcomes,
    context_for,
    target_at_nodes,
    widths,
)
from specdec.protocols import AcceptanceRule
from specdec.sampling import SamplingParams, probabilities
from specdec.tree import Children, TokenTree
from specdec.verifier.block import Block
from specdec.verifier.coins import CoinRule
from specdec.verifier.hsd import Hsd
from specdec.verifier.k_seq import KSeq
from specdec.verifier.multi_path import MultiPath
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.tokenwise import Tokenwise
from specdec.verifier.traversal import Traversal
from tests.tiny import PROMPT

ALPHA = 1e-6  # how often a statistical test may fail by chance; the seeds are fixed anyway
RULES = (
    TargetOnly(),
    RecursiveRejection(),
    Tokenwise(),
    KSeq(),
    Block(),
    Traversal(),
    Hsd(),
    MultiPath(),
)


def draws_of(rule: CoinRule) -> list[Children]:
    """Ways of sampling children that a rule is lossless for."""
    drawn: tuple[Children, ...] = ("sample", "sample_with_replacement")
    params = SamplingParams(temperature=1.0)
    return [children for children in drawn if rule.lossy(children, params) is None]


def shaped(rule: CoinRule, *numbers: int) -> tuple[Counts, int]:
    """Children by level, one each for rules for chains; and how many levels."""
    chain = getattr(rule, "chains", False)
    return widths(*(1 if chain else number for number in numbers)), len(numbers)


def depth_first(tree: DrawnTree) -> DrawnTree:
    """The same tree with its nodes in depth-first order; siblings stay in order."""

    def below(node: int) -> list[int]:
        children = [child for child, parent in enumerate(tree.parents) if parent == node]
        return [node, *(one for child in children for one in below(child))]

    order = below(0)
    return DrawnTree(
        tree.probability,
        tuple(tree.tokens[i] for i in order),
        tuple(order.index(tree.parents[i]) if i else -1 for i in order),
        tuple(tree.contexts[i] for i in order),
    )


def likely_law(
    rule: AcceptanceRule,
    trees: list[DrawnTree],
    tree: TokenTree,
    logits: Table,
    sampling: SamplingParams,
) -> Law:
    """Law of the new tokens of one step under a rule that tosses no coins and leaves the next
    token to the target.

    Args:
        logits: of the target.
    """
    at_nodes = target_at_nodes(trees, logits)
    accepted = rule.accept(context_for(sampling, len(trees)), tree, at_nodes)
    rows = torch.arange(len(trees))
    last = accepted.path[rows, accepted.length - 1]
    mass = probabilities(at_nodes[rows, last], sampling)
    mass = mass * torch.tensor([one.probability for one in trees])[:, None]
    law: Law = {}
    add_outcomes(law, tree.tokens, accepted.path, accepted.length, mass)
    return law


def logits_table(seed: int, vocab: int) -> Table:
    """Random logits after each context."""

    def at(context: Tokens) -> np.ndarray:
        return 1.5 * np.random.default_rng([seed, *(t + 1 for t in context)]).normal(size=vocab)

    return at


def split_table(vocab: int, *, low: bool) -> Table:
    """Uniform over the lower or the upper part of the vocabulary, so the two never overlap."""
    probs = np.zeros(vocab)
    chosen = slice(None, vocab // 2) if low else slice(vocab // 2, None)
    probs[chosen] = 1.0
    return lambda context: probs / probs.sum()


def naive_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, then min-p, one token at a time."""
    scores = logits / params.temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    if params.top_k is not None:
        ranked = ranked[: params.top_k]
    if params.top_p is not None:
        total, mass, kept = sum(probs[t] for t in ranked), 0.0, []
        for token in ranked:
            if kept and mass >= params.top_p * total:
                break
            kept.append(token)
            mass += probs[token]
        ranked = kept
    if params.min_p is not None:
        ranked = [t for t in ranked if probs[t] >= params.min_p * probs[ranked[0]]]
    out = np.zeros_like(probs)
    out[ranked] = probs[ranked]
    return out / out.sum()


def chi_square(counts: dict[Tokens, int], expected: Law) -> float:
    """p-value of counts against a law, cells that are expected fewer than 8 times merged."""
    total = sum(counts.values())
    assert all(expected.get(key, 0.0) > 0 for key in counts), "an impossible outcome came up"
    observed, wanted, rare = [], [], [0.0, 0.0]
    for key, probability in expected.items():
        if probability * total >= 8:
            observed.append(counts.get(key, 0))
            wanted.append(probability * total)
        else:
            rare[0] += counts.get(key, 0)
            rare[1] += probability * total
    if rare[1] >= 8:
        observed.append(rare[0])
        wanted.append(rare[1])
    elif wanted:
        observed[-1] += rare[0]
        wanted[-1] += rare[1]
    assert len(observed) > 1
    return float(stats.chisquare(observed, wanted).pvalue)


def exact_law(model: transformers.LlamaForCausalLM, params: SamplingParams, count: int) -> Law:
    """From forward passes of the untouched model over every continuation of the prompt."""
    law: Law = {(): 1.0}
    for _ in range(count):
        contexts = list(law)
        with torch.inference_mode():
            inputs = torch.tensor([[*PROMPT, *context] for context in contexts])
            logits = model(input_ids=inputs).logits[:, -1].double().numpy()
        law = {
            (*context, token): law[context] * float(probability)
            for context, row in zip(contexts, logits, strict=True)
            for token, probability in enumerate(naive_probabilities(row, params))
            if probability > 0
        }
    return law

"""A made-up language whose chains are verified with a fault, for tests of what finds it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY, CONTEXTS, DEPTH = 64, 40, 3
Array = NDArray[np.float64]


def world(generator: np.random.Generator) -> tuple[Array, Array]:
    """Laws [CONTEXTS, VOCABULARY] of target and draft."""
    scores = 2.0 * generator.normal(size=(CONTEXTS, VOCABULARY))
    other = scores + generator.normal(size=scores.shape)
    target, draft = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in (scores, other))
    return target, draft


def chain(
    generator: np.random.Generator, target: Array, draft: Array, tokens: int, fault: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Tokens that token-wise speculative sampling of chains yields, the contexts they were drawn
    in, and their places in their steps.

    Args:
        fault: none; residual: after a rejection p is drawn from; eager: accepts at 1.1 p / q; cut:
            the rule is told q before the cut to 8 candidates.
    """
    drawn, contexts, places, context, place = [], [], [], 0, 0
    for _ in range(tokens):
        p, q = target[context], draft[context]
        kept, token = False, int(generator.choice(VOCABULARY, p=p))  # the bonus
        if place < DEPTH:
            law = q
            if fault == "cut":
                law = q * (q >= np.sort(q)[-8])
            token = int(generator.choice(VOCABULARY, p=law / law.sum()))
            factor = 1.1 if fault == "eager" else 1.0
            kept = bool(generator.random() < factor * p[token] / q[token])
            if not kept:
                rest = p if fault == "residual" else np.maximum(p - q, 0.0)
                token = int(generator.choice(VOCABULARY, p=rest / rest.sum()))
        drawn.append(token)
        contexts.append(context)
        places.append(place)
        context, place = (7 * context + token) % CONTEXTS, place + 1 if kept else 0
    return np.array(drawn), np.array(contexts), np.array(places)

"""A head that names fewer tokens: `drafter.vocabulary`, so that fewer rows of its output matrix
are read (FR-Spec, Zhao et al. 2025, arXiv 2502.14856; of MTP layers FastMTP, Cai et al. 2025).

It never drafts the others. Its probabilities are the softmax over what is left, and rules are told
those, so that lossless ones stay lossless.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.flash2 import Flash2Head
from specdec.heads.host import Host
from specdec.heads.medusa import MedusaHeads
from specdec.heads.spark import SparkHead
from specdec.reasons import first_line

MEND = "give a .json file with a list of token ids, a number of tokens, or null for all"


def ids_of(vocabulary: int | str) -> Sequence[int]:
    """The target's ids of what may be named, ascending: the lowest so many, or those of a file.

    Raises:
        ValueError: no number from 1 on and no .json file with a list of ids, each of them once.
    """
    setting = f"drafter.vocabulary={vocabulary}"
    if isinstance(vocabulary, int):
        if vocabulary < 1:
            raise ValueError(f"{setting}: must be at least 1, or null for all tokens")
        return range(vocabulary)
    path = Path(vocabulary).expanduser()
    if path.suffix != ".json":
        raise ValueError(f"{setting}: is no number of tokens and no .json file; {MEND}")
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{setting}: cannot be read, {error.strerror}; {MEND}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{setting}: is not JSON ({first_line(error)}); {MEND}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{setting}: holds no list of token ids; {MEND}")
    for one in found:
        if type(one) is not int or one < 0:
            raise ValueError(f"{setting}: holds {json.dumps(one)[:40]}, which is no id; {MEND}")
    ids = sorted(found)
    again = next((one for one, later in pairwise(ids) if one == later), None)
    if again is not None:
        raise ValueError(f"{setting}: names token {again} twice; name each once")
    return ids


@torch.no_grad()
def narrow(head: Any, vocabulary: int | str | None, host: Host, *, name: str) -> None:
    """Leave a head, of the size that it runs at, those of its tokens that `vocabulary` names;
    None: all.

    Rows that come first stay where they are, so that a number costs no memory where the matrix is
    the target's own. Of rows that are there for their cost alone (`widen.py`) as many stay as a
    head of such a vocabulary has.

    Args:
        host: the target.
        name: of the head, for messages.

    Raises:
        ValueError: as `ids_of`; tokens that the target does not have, or none that the head names.
    """
    if vocabulary is None:
        return
    ids, setting = ids_of(vocabulary), f"drafter.vocabulary={vocabulary}"
    if ids[-1] >= host.vocab_size:
        number = isinstance(vocabulary, int)
        said = "" if number else f"names token {ids[-1]}, and "
        mend = "choose fewer, or null for all" if number else "leave it out"
        raise ValueError(f"{setting}: {said}{host.name} has {host.vocab_size} tokens; {mend}")
    known = torch.arange(head.drafts) if head.names is None else head.names.cpu()
    rows = torch.isin(known, torch.tensor(ids)).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(
            f"{setting}: names none of the {head.drafts} tokens that {name} can; choose others, "
            f"or null for all"
        )
    if not _first(rows):
        head.names = known[rows].to(host.device)
    head.drafts, every = len(rows), head.config.vocab_size
    if every > len(known):
        others = torch.ones(every, dtype=torch.bool).index_fill(0, rows, False).nonzero()[:, 0]
        rows = torch.cat([rows, others[: min(every, len(ids)) - len(rows)]])
    for module, part in _by_token(head):
        weight: Tensor = getattr(module, part)
        kept = weight[: len(rows)] if _first(rows) else weight[rows.to(weight.device)]
        setattr(module, part, nn.Parameter(kept, requires_grad=False))
    for one in (head, *getattr(head, "later", ())):
        one.config = replace(one.config, vocab_size=len(rows))
        one.lm_head = head.lm_head


def _first(rows: Tensor) -> bool:
    """Whether they are the first ones, in order."""
    return torch.equal(rows, torch.arange(len(rows)))


def _by_token(head: Any) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of the parameters that have a row for each token that it can name."""
    outputs = (head.lm_head, *head.lm_heads) if isinstance(head, MedusaHeads) else (head.lm_head,)
    yield from ((output, "weight") for output in outputs if output is not None)
    if isinstance(head, SparkHead) and head.markov_head is not None:
        yield head.markov_head.markov_w2, "weight"
    if isinstance(head, Flash2Head):
        yield head.candidate_selector, "successor_codebook"

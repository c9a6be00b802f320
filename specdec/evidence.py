"""Evidence: what the verifying pass said where a token was chosen, in four numbers, to be compared
with what another pass says of the same text."""

import base64
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.request import Decoding

NUMBERS = ("logit", "first", "second", "log_sum_exp")
AT_ONCE = 1 << 24  # logits


def numbers_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """[..., 4] of `NUMBERS`, for logits [..., V] and the tokens [...] that were chosen by them."""
    own = logits.gather(-1, tokens[..., None])
    best = logits.topk(2, dim=-1).values
    return torch.cat([own, best, logits.logsumexp(-1, keepdim=True)], dim=-1)


def evidence_of(kept: Tensor, tokens: Tensor) -> Tensor:
    """[B, n, 4] float64: of logits [B, n, V], as the rule saw them, at the nodes that tokens
    [B, n] were chosen at. In parts, so that little of them is held in float32."""
    rows, chosen = kept.flatten(0, 1), tokens.flatten()
    size = max(1, AT_ONCE // rows.shape[1])
    parts = zip(rows.split(size), chosen.split(size), strict=True)
    numbers = torch.cat([numbers_of(part.float(), own) for part, own in parts])
    return numbers.view(*tokens.shape, -1).double()


def evidence_line(sequence: Decoding) -> dict[str, Any]:
    """What is recorded of a sequence that has ended: 16 bytes a token, in letters."""
    numbers = np.array(sequence.evidence, dtype="<f4")
    letters = base64.b64encode(numbers.tobytes()).decode()
    return {"request": sequence.request.id, "row": sequence.row, "numbers": letters}


def numbers_in(letters: str) -> NDArray[np.float64]:
    """[n, 4] of what `evidence_line` has written.

    Raises:
        ValueError: these are no such letters.
    """
    found = np.frombuffer(base64.b64decode(letters, validate=True), dtype="<f4")
    return found.reshape(-1, len(NUMBERS)).astype(np.float64)

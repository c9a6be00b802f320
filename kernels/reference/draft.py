"""What a drafter reads off its logits: the most probable tokens, and random numbers to draw by.

Legend: B sequences, R rows, V vocabulary.
"""

import torch
from torch import Tensor

LOW = 2**32 - 1
SMALL = 1e-6  # temperatures below are so near 0 that quotients might overflow
LEAST = torch.finfo(torch.float32).tiny  # a divisor that float32 holds


def uniforms(keys: Tensor, stream: int, count: int) -> Tensor:
    """[B, count] float64 in [0, 1), a pure function of the arguments: the numbers of
    `specdec.sampling.uniforms`, to the bit (Philox 4x64-10, Salmon et al. 2011, as in numpy).

    Args:
        keys: [B, 3] int64, the bits of uint64 seed, sequence and step.
        stream: keeps draws for different purposes within a step apart.
    """
    left, right, step = keys[:, :, None].unbind(1)  # [B, 1] each
    block = torch.arange(1, -(-count // 4) + 1, device=keys.device)
    first = block.expand(len(keys), -1)
    second = torch.zeros_like(first)
    third, fourth = second + stream, second + step
    for _ in range(10):
        high, low = _product(first, 0xD2E7470EE14C6C93)
        high_too, low_too = _product(third, 0xCA5A826395121157)
        first, second = high_too ^ second ^ left, low_too
        third, fourth = high ^ fourth ^ right, low
        left = left + _signed(0x9E3779B97F4A7C15)
        right = right + _signed(0xBB67AE8584CAA73B)
    words = torch.stack([first, second, third, fourth], dim=2).flatten(1)[:, :count]
    return (words >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a product of unsigned 64-bit numbers, kept in int64.

    By hand on halves of 32 bits: no sum of these products exceeds 64 bits.
    """
    high, low = words >> 32 & LOW, words & LOW
    factor_high, factor_low = factor >> 32, factor & LOW
    middle = high * factor_low + (low * factor_low >> 32 & LOW)
    other = low * factor_high + (middle & LOW)
    upper = high * factor_high + (middle >> 32 & LOW) + (other >> 32 & LOW)
    return upper, words * _signed(factor)


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return word - 2**64 if word >= 2**63 else word


def top_tokens(
    logits: Tensor, count: int, *, temperature: float = 1.0, vocab: int | None = None
) -> tuple[Tensor, Tensor]:
    """The most probable tokens and their probabilities, in descending order.

    Args:
        logits: [R, V] bfloat16, float16 or float32.
        count: how many; of equal logits the lower id comes first.
        temperature: what the logits are divided by, above 0.
        vocab: only so many columns count; None for all.

    Returns:
        (ids [R, count] int64, probabilities [R, count] float32 among all tokens).

    Raises:
        ValueError: more tokens asked for than there are.
    """
    scores = logits[:, :vocab].float()
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(
            f"count={count}: must be from 1 to the {scores.shape[1]} tokens there are"
        )
    # Integers in the order of the scores, and of equals the lower id first.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    order = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32
    ids = (order - torch.arange(scores.shape[1], device=scores.device)).topk(count).indices
    return ids, over(scores, temperature).softmax(dim=1).gather(1, ids)


def over(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] over the temperature, above 0, up to what a softmax does not see. Near 0 a
    quotient would be infinite; less the largest logit they give the limit, where the most probable
    tokens share everything."""
    if temperature >= SMALL:
        return logits / temperature
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, LEAST)

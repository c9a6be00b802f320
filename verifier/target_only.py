"""Target-only acceptance: a coin per child, weighed by the target alone."""

import torch
from torch import Tensor

from specdec.sampling import SamplingParams
from specdec.tree import Children, TokenTree
from specdec.verifier.coins import CoinRule
from specdec.verifier.walk import at, one_of_siblings, walk


class TargetOnly(CoinRule):
    """Accept a child with the target's probability of it, given that its elder siblings were not
    the token.

    The same as drawing one token from the target and entering the child that carries it, so it is
    lossless however the children were chosen, and optimal for deterministic ones: the chance to
    accept is the target's mass on them. (SGLang's `tree_speculative_sampling_target_only`; EAGLE
    with q = 1.)
    """

    name = "target_only"

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        return None

    def judge(
        self, tree: TokenTree, target: Tensor, coins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        path, length, last = walk(tree, coins < child_probabilities(tree, target))
        return path, length, residual(tree, target, last)


def child_probabilities(tree: TokenTree, target: Tensor) -> Tensor:
    """[B, N] chance to accept each node once its parent is accepted and its elder siblings are
    not."""
    parent = tree.parents.long().clamp(min=0)
    mass = target[
        torch.arange(len(parent), device=parent.device)[:, None], parent, tree.tokens
    ]  # [B, N]
    return one_of_siblings(tree, mass)


def residual(tree: TokenTree, target: Tensor, node: Tensor) -> Tensor:
    """[B, V] unnormalised law of the next token after `node` ([B]), given that none of its
    children was taken."""
    (rest,) = at(node, target)
    child = tree.parents == node[:, None]  # [B, N]
    tried = torch.zeros_like(rest).scatter_add_(1, tree.tokens, child.to(rest.dtype)) > 0
    remaining = rest.masked_fill(tried, 0.0)
    # Rounding can leave nothing when the children hold all the mass; the target itself is then the
    # answer.
    return torch.where(remaining.sum(-1, keepdim=True) > 0, remaining, rest)

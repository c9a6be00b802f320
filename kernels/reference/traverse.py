"""What rules work out node by node: trees judged from their leaves, and the divisor of K-SEQ."""

import torch
from torch import Tensor


def traverse(
    tokens: Tensor,
    parents: Tensor,
    size: Tensor,
    ids: Tensor,
    draft: Tensor,
    target: Tensor,
    coins: Tensor,
    *,
    repeats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Traversal verification of trees (Weng et al. 2025, algorithm 2): the nodes are judged in
    post-order, each for the whole path that leads to it, and the first accepted one ends it.

    A node has a weight: the chance that the path to it may be kept. That of the root is 1, that of
    a child w * p(x) / q(x), at most 1, where w is its parent's. A rejected node leaves its parent
    with the weight m / (m + 1 - w) and the target max(w * p - q, 0) / m, where m is the mass of
    max(w * p - q, 0), and, where children are drawn without replacement, with q without the
    token, renormalised. (Long because it is the paper's loop, written out as one.)

    Args:
        tokens: [B, N] int64.
        parents: [B, N] int32, as in `specdec.tree.TokenTree`.
        size: [B] int32.
        ids: [B, N, K] int64, the support of each node's draft distribution.
        draft: [B, N, K] float, its probabilities, 0 for void entries.
        target: [B, N, K] float, the target's probabilities of the same tokens, 0 for void entries.
        coins: [B, N] float64 in [0, 1).
        repeats: children were drawn with replacement.

    Returns:
        (last [B] int64: the accepted node, 0 for an idle row;
        left [B, K]: what is left of the target on the support of that node, where all of it is
        left outside;
        chance [B, N]: what each coin was compared with, nan for nodes that were not judged.)
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    tiny = torch.finfo(target.dtype).tiny
    inside, draft = target.clone(), draft.clone()
    outside = (1.0 - inside.sum(-1)).clamp(min=0.0)  # [B, N]
    scale = torch.ones_like(outside)
    weight = torch.ones_like(outside)
    chance = torch.full_like(outside, float("nan"))
    waiting = parents >= 0  # not rejected yet
    node, last = torch.zeros_like(size, dtype=torch.int64), torch.zeros_like(rows)
    busy = size > 0
    parents = parents.long()
    while bool(busy.any()):
        children = (parents == node[:, None]) & waiting
        enters = busy & children.any(1)
        judged = busy & ~enters
        chance[rows, node] = torch.where(judged, weight[rows, node], chance[rows, node])
        accepted = judged & (coins[rows, node] < weight[rows, node])
        last = torch.where(accepted, node, last)
        busy = busy & ~accepted

        # Rejected nodes: their parents pay.
        rejected = judged & ~accepted
        parent = torch.where(rejected, parents[rows, node].clamp(min=0), node)
        w, p, q = weight[rows, parent][:, None], inside[rows, parent], draft[rows, parent]
        here = (ids[rows, parent] == tokens[rows, node][:, None]) & (q > 0)
        remaining = (w * p - q).clamp(min=0.0)
        beyond = w[:, 0] * outside[rows, parent]
        mass = remaining.sum(1) + beyond
        # Nothing left at weight 1 means that p equals q: but for rounding the node was accepted.
        paid = rejected & (mass + (1.0 - w[:, 0]) > 0)
        some = paid & (mass > 0)
        at = rows[paid], parent[paid]
        weight[at] = (mass / (mass + (1.0 - w[:, 0])))[paid]
        at = rows[some], parent[some]
        share = mass[some].clamp(min=tiny)
        inside[at] = remaining[some] / share[:, None]
        outside[at] = beyond[some] / share
        scale[at] *= w[some, 0] / share
        if not repeats:
            rest = q.masked_fill(here, 0.0)
            rest = rest / rest.sum(1, keepdim=True).clamp(min=tiny)
            draft[rows[rejected], parent[rejected]] = rest[rejected]
        waiting[rows[rejected], node[rejected]] = False

        # The others enter their next child.
        child = children.int().argmax(1)
        here = (ids[rows, node] == tokens[rows, child][:, None]) & (draft[rows, node] > 0)
        p, q = ((inside[rows, node] * here).sum(1), (draft[rows, node] * here).sum(1))
        ratio = torch.where(p > 0, weight[rows, node] * p / q.clamp(min=tiny), 0.0)
        weight[rows[enters], child[enters]] = ratio.clamp(max=1.0)[enters]
        node = torch.where(enters, child, parent)
    left = inside[rows, last] / scale[rows, last].clamp(min=tiny)[:, None]
    return last, left, chance


def divisor(draft: Tensor, target: Tensor, count: Tensor) -> Tensor:
    """The smallest divisor of K-SEQ that leaves a law for the next token (SpecTr, Sun et al.
    2023, section 4 and appendix): where b = sum(min(q, p / r)), the r in [1, count] at which
    1 - (1 - b)^count = r * b, from above.

    Args:
        draft: [B, N, K] float, draft probabilities of each node.
        target: [B, N, K] float, the target's of the same tokens.
        count: [B, N] draws of each node; those with less than 2 have divisor 1.

    Returns:
        [B, N].
    """
    draws = count.clamp(min=1).to(target.dtype)
    low, high = torch.ones_like(draws), draws
    for _ in range(60 if target.dtype == torch.float64 else 30):
        middle = (low + high) / 2
        overlap = torch.minimum(draft, target / middle[..., None]).sum(-1).clamp(max=1.0)
        # 1 - (1 - b)^n is -expm1(n * log1p(-b)) without the cancellation.
        enough = -torch.expm1(draws * torch.log1p(-overlap)) <= middle * overlap
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high

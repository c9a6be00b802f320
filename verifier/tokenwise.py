"""Token-wise speculative sampling: a chain, a coin per token."""

from specdec.verifier.recursive_rejection import RecursiveRejection


class Tokenwise(RecursiveRejection):
    """Speculative sampling of chains (Leviathan et al. 2023, algorithm 1; Chen et al. 2023): token
    x is accepted with probability min(1, p(x) / q(x)); after the first rejection the next token is
    drawn from the normalised positive part of p - q.

    Lossless for sampled children. It is recursive rejection where a node has one child, under the
    name of the baseline that rules for trees are measured against.
    """

    name = "tokenwise"
    kernel = "recursive_rejection"
    chains = True

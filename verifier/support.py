"""What rules share that weigh the target against the draft distribution: of the target they read
what it gives to the tokens a draft may propose, its support, and nothing else.

Outside the support the draft has no mass, so whatever such a rule takes off the target it takes
off there: the rest of the target is only rescaled.

Legend: B sequences, N nodes, V vocabulary, K draft candidates.
"""

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.protocols import StepContext
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, SamplingParams
from specdec.tree import Acceptance, Children, Proposal, TokenTree
from specdec.verifier.coins import CoinRule, scores_of
from specdec.verifier.walk import Path, at

ALL = 2.0  # more than a token can have


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Trees that are to be judged.

    Args:
        tree: the trees.
        proposal: the draft distribution of every node, in the type of `target`.
        target: [B, N, K], the target's mass on the support of every node, 0 for void entries.
        coins: [B, N] in [0, 1), one per node.
        kernels: the module that computes.
    """

    tree: TokenTree
    proposal: Proposal
    target: Tensor
    coins: Tensor
    kernels: ModuleType = reference

    @classmethod
    def of(
        cls, rule: str, tree: TokenTree, target: Tensor, coins: Tensor | None = None
    ) -> "Trial":
        """By the target's whole distributions, [B, N, V]; without coins they are all 0.

        Raises:
            ValueError: a tree with children carries no proposal.
        """
        proposal = proposal_of(tree, rule, target.dtype)
        inside = target.gather(2, proposal.ids).masked_fill(proposal.probs <= 0, 0.0)
        if coins is None:
            coins = target.new_zeros(tree.tokens.shape)
        return cls(tree, proposal, inside, coins)

    @property
    def repeats(self) -> bool:
        """Whether children were drawn with replacement."""
        return self.proposal.children == "sample_with_replacement"


class SupportRule(CoinRule):
    """A rule for sampled children, defined by its `verdict`.

    Attributes:
        draws: ways of sampling children that it is lossless for.
    """

    needs_proposal = True
    draws: tuple[Children, ...] = ("sample", "sample_with_replacement")

    def lossy(self, children: Children, sampling: SamplingParams) -> str | None:
        if children in self.draws or sampling.greedy:
            return None
        name = "top-k" if children == "top_k" else "distinct"
        draws = "draws" if "sample" in self.draws else "independent draws"
        return f"{self.name} takes {name} children for {draws} from the draft distribution"

    def verdict(self, trial: Trial) -> tuple[Path, Tensor]:
        """Judge the trees.

        Returns:
            (the paths; [B, K], what is left of the target on the support of the last node, where
            all of it is left outside.)
        """
        raise NotImplementedError

    def judge(
        self, tree: TokenTree, target: Tensor, coins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        trial = Trial.of(self.name, tree, target, coins)
        (path, length, last), left = self.verdict(trial)
        whole, ids, draft = at(last, target, trial.proposal.ids, trial.proposal.probs)
        change = torch.where(draft > 0, left - whole.gather(1, ids), 0.0)
        rest = whole.scatter_add(1, ids, change).clamp(min=0.0)
        # Rounding can leave nothing of the target, which is then the answer itself.
        return path, length, torch.where(rest.sum(-1, keepdim=True) > 0, rest, whole)

    def toss(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        kernels = context.kernels
        if kernels.LOOKS:  # the definition, which writes whole distributions out
            return super().toss(context, tree, logits)
        scores, temperature = scores_of(logits, context.sampling)
        proposal = proposal_of(tree, self.name, torch.float32)
        law = kernels.target_law(scores, tree.size, temperature=temperature)
        inside = kernels.masses(scores, law, proposal.ids).masked_fill(proposal.probs <= 0, 0.0)
        coins = context.uniforms(ACCEPT_STREAM, tree.nodes)
        trial = Trial(tree, proposal, inside, coins, kernels)
        (path, length, last), left = self.verdict(trial)
        ids, draft, before = at(last, proposal.ids, proposal.probs, inside)
        taken = torch.where(left > 0, before - left, ALL)
        next_token = kernels.draw_rest(
            scores,
            law,
            last,
            length,
            ids=ids,
            taken=taken.masked_fill(draft <= 0, 0.0),
            keys=context.keys,
            stream=TOKEN_STREAM,
        )
        return Acceptance(path=path, length=length, next_token=next_token)


def proposal_of(tree: TokenTree, rule: str, dtype: torch.dtype) -> Proposal:
    """The draft distributions of the trees.

    Raises:
        ValueError: a tree with children carries none.
    """
    if tree.proposal is not None:
        return replace(tree.proposal, probs=tree.proposal.probs.to(dtype))
    if tree.depth:
        raise ValueError(f"acceptance={rule}: the tree has no draft probabilities")
    nothing = tree.tokens.new_zeros(*tree.tokens.shape, 1)  # roots have no children to judge
    return Proposal(ids=nothing, probs=nothing.to(dtype), children="sample")

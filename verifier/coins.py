"""What rules that toss a coin for every node share: the target's distribution, the coins, the last
draw; and how a rule is handed to a kernel."""

from torch import Tensor

from specdec.kernels.layout import DraftedTrees
from specdec.protocols import StepContext
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, draw, filtered, probabilities
from specdec.tree import Acceptance, TokenTree


class CoinRule:
    """Accepts by `judge`, which a rule defines, and draws the next token from the law it leaves;
    or by the kernel of that name, where there is one."""

    name: str

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        if self.name in context.kernels.RULES:
            # At temperature 0 the target is certain, and every rule accepts what it would choose.
            name = "greedy" if context.sampling.greedy else self.name
            return accept_by_kernel(name, context, tree, logits)
        target = probabilities(logits, context.sampling)  # [B, N, V]
        coins = context.uniforms(ACCEPT_STREAM, tree.nodes)
        path, length, rest = self.judge(tree, target, coins)
        uniform = context.uniforms(TOKEN_STREAM, rest.shape[-1])
        return Acceptance(path=path, length=length, next_token=draw(rest, uniform))

    def judge(
        self, tree: TokenTree, target: Tensor, coins: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The walk without the last draw.

        Args:
            target: [B, N, V], the target's distribution at every node.
            coins: [B, N] in [0, 1), one per node.

        Returns:
            (path and length as in `Acceptance`; [B, V] unnormalised law of the next token.)
        """
        raise NotImplementedError


def accept_by_kernel(
    name: str, context: StepContext, tree: TokenTree, logits: Tensor
) -> Acceptance:
    """What the kernel of the rule `name` keeps."""
    sampling, proposal = context.sampling, tree.proposal
    temperature = sampling.temperature
    if sampling.filters and name != "greedy":  # the largest logit passes all of them
        logits, temperature = filtered(logits, sampling), 1.0
    drafted = DraftedTrees(
        tokens=tree.tokens,
        parents=tree.parents,
        size=tree.size,
        depth=tree.depth,
        draft_ids=None if proposal is None else proposal.ids,
        draft_probs=None if proposal is None else proposal.probs,
        repeats=proposal is not None and proposal.children == "sample_with_replacement",
    )
    path, length, next_token = context.kernels.RULES[name](
        drafted,
        logits,
        temperature=temperature,
        keys=context.keys,
        streams=(ACCEPT_STREAM, TOKEN_STREAM),
    )
    return Acceptance(path=path, length=length, next_token=next_token)

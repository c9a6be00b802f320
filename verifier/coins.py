"""What rules that toss a coin for every node share: the target's distribution, the coins, the last
draw; and how a rule is handed to a kernel."""

from torch import Tensor

from specdec.kernels.layout import DraftedTrees
from specdec.protocols import AcceptanceRule, StepContext
from specdec.sampling import (
    ACCEPT_STREAM,
    TOKEN_STREAM,
    SamplingParams,
    draw,
    filtered,
    probabilities,
)
from specdec.tree import Acceptance, TokenTree
from specdec.verifier.walk import at, walk


class CoinRule(AcceptanceRule):
    """Accepts by `judge`, which a rule defines, and draws the next token from the law it leaves;
    or by a kernel, where there is one. At temperature 0 the target is certain, and every such rule
    accepts what the target would choose.

    Attributes:
        kernel: the name of the kernel in `kernels.RULES`; empty for the rule's own.
    """

    kernel = ""

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        if context.sampling.greedy:
            return accept_greedily(context, tree, logits)
        kernel = self.kernel or self.name
        if kernel in context.kernels.RULES:
            return accept_by_kernel(kernel, context, tree, logits)
        return self.toss(context, tree, logits)

    def toss(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
        """As `accept`, above temperature 0 and without a kernel that does it all."""
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


def accept_greedily(context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
    """Keep what the target would have chosen itself, and its choice after that."""
    if "greedy" in context.kernels.RULES:
        return accept_by_kernel("greedy", context, tree, logits)
    choice = logits.argmax(dim=-1)  # [B, N]
    parent = tree.parents.long().clamp(min=0)
    path, length, last = walk(tree, tree.tokens == choice.gather(1, parent))
    return Acceptance(path=path, length=length, next_token=choice.gather(1, last[:, None])[:, 0])


def choose_after(context: StepContext, logits: Tensor, node: Tensor) -> Tensor:
    """[B] int64: the target's own token after `node` ([B]) of each tree, drawn from [B, N, V]
    logits; the most probable one at temperature 0."""
    (after,) = at(node, logits)
    if context.sampling.greedy:
        return after.argmax(-1)
    law = probabilities(after, context.sampling)
    return draw(law, context.uniforms(TOKEN_STREAM, law.shape[-1]))


def accept_by_kernel(
    name: str, context: StepContext, tree: TokenTree, logits: Tensor
) -> Acceptance:
    """What the kernel of the rule `name` keeps."""
    proposal, temperature = tree.proposal, 1.0
    if name != "greedy":  # the largest logit passes all filters
        logits, temperature = scores_of(logits, context.sampling)
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


def scores_of(logits: Tensor, sampling: SamplingParams) -> tuple[Tensor, float]:
    """Logits, and the temperature at which their softmax is what tokens are drawn from."""
    if sampling.filters:
        return filtered(logits, sampling), 1.0
    return logits, sampling.temperature

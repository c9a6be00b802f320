"""What rules that toss a coin for every node share: the target's distribution, the coins, the last
draw."""

from torch import Tensor

from specdec.protocols import StepContext
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, draw, probabilities
from specdec.tree import Acceptance, TokenTree


class CoinRule:
    """Accepts by `judge`, which a rule defines, and draws the next token from the law it
    leaves."""

    def accept(self, context: StepContext, tree: TokenTree, logits: Tensor) -> Acceptance:
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

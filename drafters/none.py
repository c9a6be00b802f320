"""drafter=none: plain autoregressive decoding, the baseline of every comparison."""

from specdec.protocols import Drafter, StepContext
from specdec.tree import TokenTree


class NoDrafter(Drafter):
    """Proposes the root alone, so each step is one pass of the target over one token."""

    on_device = True

    def draft(self, context: StepContext) -> TokenTree:
        return TokenTree.roots(context.roots)

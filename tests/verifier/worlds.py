"""Targets, drafts and shapes of trees that the claims about acceptance rules are tried on."""

from specdec.experiments.studies.acceptance_bounds import mixture
from specdec.experiments.studies.rule_laws import Counts, Table, Tokens, dirichlet_table, widths
from specdec.sampling import SamplingParams
from specdec.tree import Children
from specdec.verifier.coins import CoinRule
from tests.verifier.laws import RULES, split_table

WARM, COLD = SamplingParams(temperature=1.0), SamplingParams(temperature=0.0)
DRAWN: tuple[Children, ...] = ("sample", "sample_with_replacement")


def worlds(vocab: int) -> dict[str, tuple[Table, Table]]:
    """Target and draft by what is special about them."""
    target = dirichlet_table(1, vocab)
    zeros = 1 if vocab < 4 else 2
    return {
        "unrelated": (target, dirichlet_table(2, vocab)),
        "zeros_in_target": (dirichlet_table(3, vocab, zeros), dirichlet_table(4, vocab)),
        "zeros_in_draft": (dirichlet_table(5, vocab), dirichlet_table(6, vocab, zeros)),
        "zeros_in_both": (dirichlet_table(7, vocab, 1), dirichlet_table(8, vocab, zeros)),
        "equal": (target, target),
        "near": (target, mixture(target, dirichlet_table(2, vocab), 1e-6)),
        "disjoint": (split_table(vocab, low=True), split_table(vocab, low=False)),
        "one_token_in_target": (dirichlet_table(9, vocab, vocab - 1), target),
        "one_token_in_draft": (target, dirichlet_table(10, vocab, vocab - 1)),
    }


def ending(level: int, tokens: Tokens, place: int) -> int:
    """A chain that ends where its own last token says so."""
    return 1 if level == 0 else tokens[0] % 2


def uneven(level: int, tokens: Tokens, place: int) -> int:
    """Children by what the eldest of the level is."""
    return 2 if level == 0 else (tokens[0] + place) % 3


def youngest(level: int, tokens: Tokens, place: int) -> int:
    """The eldest is judged first, and has children by what the youngest is."""
    return 2 if level == 0 else (tokens[-1] + place) % 3


def cousins(level: int, tokens: Tokens, place: int) -> int:
    """On the last level each has children by what the other one's child is."""
    if level < 2:
        return 2 - level
    return tokens[1 - place] % 2 if len(tokens) == 2 else 1


def no_repeats(level: int, tokens: Tokens, place: int) -> int:
    """A token drawn again among its siblings is not grown further."""
    return 2 if level == 0 or tokens[place] not in tokens[:place] else 0


SHAPES: dict[str, tuple[Counts, int]] = {
    "one": (widths(1), 1),
    "three": (widths(3), 1),
    "chain_of_two": (widths(1, 1), 2),
    "chain_of_three": (widths(1, 1, 1), 3),
    "ending": (ending, 3),
    "two_one": (widths(2, 1), 2),
    "one_two": (widths(1, 2), 2),
    "two_two": (widths(2, 2), 2),
    "three_one": (widths(3, 1), 2),
    "two_one_one": (widths(2, 1, 1), 3),
    "uneven": (uneven, 2),
    "youngest": (youngest, 2),
    "cousins": (cousins, 3),
    "no_repeats": (no_repeats, 2),
}
CHAINS = ("one", "chain_of_two", "chain_of_three", "ending")


def rules_for(shape: str, children: Children) -> list[CoinRule]:
    """Those that are lossless for such trees."""
    return [
        rule
        for rule in RULES
        if rule.lossy(children, WARM) is None
        and (shape in CHAINS or not getattr(rule, "chains", False))
    ]

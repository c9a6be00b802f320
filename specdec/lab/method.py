"""Method: a way to decode, of which a run compares two and a study many."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.decode import Decoder
from specdec.lab.led import led
from specdec.prefixes import Prefixes
from specdec.processors import Processors
from specdec.protocols import AcceptanceRule, Drafter, Loaded, TreePolicy, Verifier
from specdec.request import Capacity
from specdec.sampling import SamplingParams

if TYPE_CHECKING:
    from specdec.models.load import Models
    from specdec.models.paged import PagedLM

MARKS = ("synthetic", "lossy")


def mark_of(record: Mapping[str, Any]) -> str:
    """SYNTHETIC or LOSSY, which stands beside every number of a method whose outputs are not the
    target's, or do not follow its distribution; else empty. `record` has the method's marks."""
    return next((mark.upper() for mark in MARKS if record.get(mark)), "")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What guesses, what shapes its trees, what is kept of them, and how tokens are chosen.

    Args:
        drafter_name, tree_name: the options of these groups; a rule knows its own name.
        verifier: makes a verifier of the target, and of the `prefixes` it shares, if any.
        own: what runs that these names do not tell, by setting: module, name and file of a class
            or function of the user's.
    """

    drafter: Drafter
    drafter_name: str
    tree: TreePolicy
    tree_name: str
    rule: AcceptanceRule
    sampling: SamplingParams
    verifier: "Callable[..., Verifier]"
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        """What summaries call its parts."""
        return {
            "drafter": self.drafter_name,
            "tree": self.tree_name,
            "children": self.tree.children,
            "acceptance": self.rule.name,
        }

    @property
    def marks(self) -> dict[str, bool]:
        """What records, summaries and trackers say of its outputs: nothing, `synthetic` (they are
        not meant to be the target's) or `lossy` (they do not follow its distribution)."""
        if self.rule.synthetic:
            return {"synthetic": True}
        lossy = self.rule.lossy(self.tree.children, self.sampling)
        return {"lossy": True} if lossy else {}

    @property
    def notes(self) -> dict[str, str]:
        """What drafter and tree policy have to say of themselves, by setting; of the latter once
        it is fitted."""
        tree = {f"tree.{name}": note for name, note in self.tree.notes.items()}
        return {**self.drafter.notes, **tree}

    def load(self, target: "PagedLM", models: "Models") -> None:
        """Load what the drafter needs; once, before `decoder`."""
        self.drafter.load(target, models)

    def processors(self, target: "PagedLM", stop_tokens: Collection[int]) -> Processors:
        """What is done to the target's logits.

        Raises:
            ValueError: the model asks for what cannot be done.
        """
        from specdec.models.generation import processors_of  # benches do without transformers

        config = target.model.generation_config
        return processors_of(config, self.sampling, ends=stop_tokens, vocab=target.vocab_size)

    def decoder(
        self,
        target: "PagedLM",
        capacity: Capacity,
        *,
        stop_tokens: Collection[int] = (),
        prefixes: Prefixes | None = None,
        **how: Any,
    ) -> Decoder:
        """A decoder of its own; one made before is of no use any more. The tree policy is fitted
        before.

        Args:
            prefixes: what it shares with decoders that it takes turns with.
            how: `stop_strings`, `trees` and `evidence` of `Decoder`.

        Raises:
            ValueError: as `processors`, or of the tree policy.
        """
        processors = self.processors(target, stop_tokens)

        def made(
            tree: TreePolicy, capacity: Capacity, shared: Prefixes | None = None, **rest: Any
        ) -> Decoder:
            return Decoder(
                verifier=self.verifier(target, **({} if shared is None else {"prefixes": shared})),
                drafter=led(self.drafter),
                tree=tree,
                rule=self.rule,
                sampling=self.sampling,
                capacity=capacity,
                processors=processors,
                **rest,
            )

        self.tree.fit(Loaded(target=target, drafter=self.drafter, capacity=capacity, decoder=made))
        return made(self.tree, capacity, prefixes, stop_tokens=stop_tokens, **how)

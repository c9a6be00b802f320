"""method=early_exit: the target itself learns to leave early (LayerSkip, Elhoushi et al. 2024,
section 4.1). It becomes another target, whose own quality is reported beside what it drafts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.lab.settings import word_of
from specdec.models.paged import PagedLM
from specdec.training.batches import Seen
from specdec.training.judge import Judge
from specdec.training.methods.causal import CausalTrainee, check_output, trained_copy
from specdec.training.teacher import final_norm
from specdec.training.trainee import (
    Lesson,
    Surroundings,
    TrainingMethod,
    check_choice,
    rooted,
)

LOSSES = ("kl", "ce")


@dataclass(frozen=True, kw_only=True)
class EarlyExit(TrainingMethod):
    """The target, trained to be left after some of its layers.

    Args:
        exit_layer: after how many; None is a third of them.
        loss: of the exit: kl to what all layers say, or ce to the text, as LayerSkip.
        weight: of that loss beside the target's own, which is ce.

    Raises:
        ValueError: a setting out of range.
    """

    drafter = "early_exit"
    exit_layer: int | None = None
    loss: str = "kl"
    weight: float = 0.25
    rate: float = 1e-4
    matrix_rate: float = 3e-4
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        if not self.weight > 0:
            raise ValueError(f"method.weight={self.weight}: must be above 0")

    def _layers(self, config: Any) -> int:
        """Layers before the exit of a target."""
        layers = config.get_text_config().num_hidden_layers
        found = max(1, layers // 3) if self.exit_layer is None else self.exit_layer
        if not 1 <= found < layers:
            raise ValueError(
                f"method.exit_layer={self.exit_layer}: must be from 1 to {layers - 1}, the target "
                f"has {layers} layers"
            )
        return found

    def check(self, target: PagedLM) -> None:
        config = target.model.config
        self._layers(config)
        check_output(config, "method=early_exit")

    def using(self, head: str, target: str, config: Any) -> list[str]:
        layer = f"drafter.exit_layer={self._layers(config)}"
        return ["target=hf", word_of("target.path", head), f"drafter={self.drafter}", layer]

    def make(self, surroundings: Surroundings) -> "ExitTrainee":
        target = surroundings.target
        target.check_in_part("method=early_exit")
        return ExitTrainee(
            trained_copy(target),
            surroundings,
            layers=self._layers(target.model.config),
            loss=self.loss,
            weight=self.weight,
        )


class ExitTrainee(CausalTrainee):
    """A target on its way."""

    is_target = True

    def __init__(
        self, model: Any, surroundings: Surroundings, *, layers: int, loss: str, weight: float
    ) -> None:
        super().__init__(model, surroundings.target.tokenizer)
        self.layers, self.weight = layers, weight
        self.judge, self.text = Judge.of(surroundings, loss), Judge.of(surroundings, "ce")

    def _outputs(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """What the output head reads after tokens 1 .. T, [B, T, H]: at the exit, and at the
        end."""
        out = self.module.base_model(
            input_ids=seen.tokens[:, :-1], use_cache=False, output_hidden_states=True
        )
        norm = final_norm(self.module)
        assert norm is not None
        return norm(out.hidden_states[self.layers][:, 1:]), out.last_hidden_state[:, 1:]

    def lesson(self, seen: Seen) -> Lesson:
        early, late = self._outputs(seen)
        with torch.no_grad():
            wanted = self.head(late)
        rest = ([wanted], [seen.labels], [seen.mask])
        own = self.text.judged([self.head], [late], *rest).loss[0]
        judged = self.judge.judged([self.head], [early], *rest)
        figures = {
            "nats": own.detach(),
            "exit/loss": judged.loss[0].detach(),
            "exit/overlap": judged.overlap[0],
            "exit/agrees": judged.agrees[0],
        }
        return Lesson(loss=own + self.weight * judged.loss[0], figures=figures)

    @torch.no_grad()
    def chains(self, seen: Seen, depth: int) -> tuple[Tensor, Tensor]:
        early, late = self._outputs(seen)
        agrees, overlap = self.judge.chances(self.head, early, self.head(late), seen.labels)
        return rooted([agrees] * depth), rooted([overlap] * depth)

    @torch.no_grad()
    def nats(self, seen: Seen) -> Tensor:
        _, late = self._outputs(seen)
        total = late.new_zeros((), dtype=torch.float64)
        for row, labels, mask in zip(late, seen.labels, seen.mask, strict=True):
            found = self.head(row).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
            total -= found[mask].double().sum()
        return total

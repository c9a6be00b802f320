"""What can be found out about a model at load: whether it can run over the paged cache, and how.

A few tokens run through its own attention and through ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from specdec.cache import KVShape
from specdec.kernels import reference
from specdec.kernels.layout import TreeLayout
from specdec.models.direct import DirectModel, can_run_directly
from specdec.models.hook import ATTENTION, NotFiniteError, UnsupportedError
from specdec.models.shards import whole
from specdec.ranks import ALONE, Ranks
from specdec.sampling import sound

PROBE_TOKENS = 8


class Probe:
    """Stands in for a `ForwardPass` at load: plain causal attention that notes which layers came
    by, and how.

    Args:
        shape: of keys and values, if they go straight to the scratch.
    """

    stored = None

    def __init__(self, shape: KVShape | None = None) -> None:
        self.shapes: dict[int, KVShape] = {}
        self.windows: dict[int, int | None] = {}
        self._shape = shape
        self._tree: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def provide(self, like: Tensor) -> Self:
        """A scratch for one layer at a time."""
        assert self._shape is not None
        size = 1, self._shape.kv_heads, PROBE_TOKENS
        self._tree = (
            like.new_zeros(*size, self._shape.key_dim),
            like.new_zeros(*size, self._shape.value_dim),
        )
        return self

    def scratch(self, layer: int) -> tuple[Tensor, Tensor, int]:
        return (*self._tree, 0)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._tree = key, value

    def attend(self, layer: int, query: Tensor, **options: Any) -> Tensor:
        if layer in self.shapes:
            raise UnsupportedError("a layer attends more than once")
        self.windows[layer] = options["window"]
        key, value = self._tree
        batch, kv_heads, rows, key_dim = key.shape
        self.shapes[layer] = KVShape(
            layers=1, kv_heads=kv_heads, key_dim=key_dim, value_dim=value.shape[-1]
        )
        positions = torch.arange(rows, device=query.device).expand(batch, -1)
        layout = TreeLayout(
            page_table=torch.zeros(batch, 1, dtype=torch.int32, device=query.device),
            context_lens=torch.zeros(batch, dtype=torch.int32, device=query.device),
            max_context=0,
            positions=positions,
            key_positions=positions,
        )
        no_page = (
            key.new_zeros(1, kv_heads, 1, key_dim),
            value.new_zeros(1, kv_heads, 1, value.shape[-1]),
        )
        return reference.tree_attention(query, *no_page, key, value, layout, **options)

    def store(self) -> None:
        """Nothing is kept."""


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 as such: rounded to TensorFloat32, as a process may have asked for, the
    two ways differ by more than attention of another kind would."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


@_exact()
@torch.inference_mode()
def probe(
    model: Any, positions: int, kernels: ModuleType, ranks: Ranks = ALONE
) -> tuple[KVShape, DirectModel | None]:
    """Run a few tokens through both the model's own attention and ours, which the model uses from
    then on.

    Args:
        positions: how many the model has.
        kernels, ranks: as of `DirectModel`.

    Returns:
        (the shapes of a rank's keys and values; the shorter way, None if there is none.)

    Raises:
        UnsupportedError: a layer was not reached, positions are absolute, the two disagree.
        NotFiniteError: its logits are NaN or infinite.
    """
    tokens = _probe_tokens(model)
    places = torch.arange(PROBE_TOKENS, device=model.device)[None]
    _leave_to_itself(model)
    own = model(input_ids=tokens, position_ids=places, use_cache=False).logits.float()
    if not bool(sound(own).all()):
        raise NotFiniteError
    model.set_attn_implementation(ATTENTION)

    def run(shift: int) -> tuple[Tensor, Probe]:
        paged = Probe()
        inputs = {"input_ids": tokens, "position_ids": places + shift, "use_cache": False}
        try:
            return model(**inputs, paged=paged).logits.float(), paged
        except TypeError as error:
            raise UnsupportedError(f"it refuses extra keywords ({error})") from None

    ours, found = run(0)
    shape = _common_shape(found, model.config.get_text_config(), positions)
    bound = 0.1 if model.dtype.itemsize == 2 else 1e-3
    if _distance(run(5)[0], ours) > bound:
        raise UnsupportedError("its positions are absolute (learned or sinusoidal), not rotary")
    if not _distance(ours, own) <= bound:
        raise UnsupportedError(
            "its own attention does more than scaling, soft-capping, windows and sinks"
        )
    if not can_run_directly(model, ranks):
        return shape, None
    windows = [_narrow(found.windows[layer], positions) for layer in range(shape.layers)]
    direct = DirectModel(model, windows, positions, kernels, ranks)
    direct.angles.reach(PROBE_TOKENS)
    out = direct(tokens, places, Probe(shape).provide(direct.embedding), "all")
    agrees = out is not None and _distance(out.float(), ours) <= bound
    return shape, direct if agrees else None


def _leave_to_itself(model: Any) -> None:
    model.set_attn_implementation("eager")
    if model.dtype == torch.float64:  # in which only this way of experts has products
        model.set_experts_implementation("eager")


def _probe_tokens(model: Any) -> Tensor:
    """[1, PROBE_TOKENS] int64 whose embeddings are not zero, as that of a padding token is: what
    becomes of zeros says nothing of attention."""
    rows = whole(model.get_input_embeddings().weight).any(1).nonzero()[:, 0]
    if not len(rows):
        raise UnsupportedError("its embeddings are all zero")
    place = torch.arange(PROBE_TOKENS, device=model.device)[None] * 7 % len(rows)
    return rows[place]


def _common_shape(found: Probe, config: Any, positions: int) -> KVShape:
    """The shape of all layers' keys and values.

    Raises:
        UnsupportedError: layers that were not reached, differ, or keep their window to themselves.
    """
    layers = config.num_hidden_layers
    if sorted(found.shapes) != list(range(layers)):
        raise UnsupportedError(
            f"only {len(found.shapes)} of its {layers} layers use the registered attention"
        )
    if len(set(found.shapes.values())) != 1:
        raise UnsupportedError("its layers differ in the shape of their keys and values")
    stated = _windows(config)
    if any(_narrow(found.windows[i], positions) != _narrow(stated[i], positions) for i in stated):
        raise UnsupportedError("its layers do not hand their sliding window on")
    return replace(found.shapes[0], layers=layers)


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of logits at the median token: one expert that flips at a near tie, as in
    mixtures of experts, moves a token far and says nothing about the attention. Logits of minus
    infinity are masked tokens, and zeros agree with zeros."""
    a, b = (x.masked_fill(x == float("-inf"), 0.0) for x in (a, b))
    least = torch.finfo(b.dtype).tiny
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=least)).median())


def check_config(config: Any) -> None:
    """Refuse by configuration what can be named without running the model."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("it is an encoder-decoder model")
    attention = getattr(config, "attn_config", None)
    if (
        getattr(config, "alibi", False)
        or getattr(attention, "alibi", False)
        or config.model_type == "bloom"
    ):
        raise UnsupportedError("it biases attention by distance (ALiBi)")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise UnsupportedError(
            f"layers of type {', '.join(sorted(kinds))} have no paged keys and values"
        )
    if not getattr(text, "max_position_embeddings", None):
        raise UnsupportedError("its configuration states no max_position_embeddings")


def sliding_windows(config: Any, positions: int) -> list[int | None]:
    """Of each layer of a model with so many positions; None where it hides nothing."""
    return [_narrow(window, positions) for window in _windows(config).values()]


def _windows(config: Any) -> dict[int, int | None]:
    """The sliding window each layer must hand on: one longer than the probe goes unnoticed
    there."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return {
        layer: window if kinds[layer] == "sliding_attention" else None for layer in range(layers)
    }


def _narrow(window: int | None, positions: int) -> int | None:
    """The window, None if it is as long as the context and hides nothing."""
    return None if window is None or window >= positions else window


def max_context(config: Any) -> int:
    """Positions the model has. LongRoPE turns all keys to other angles once a sequence outgrows
    the original context, the cached ones excepted, so it ends there."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [config.max_position_embeddings]
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
    return min(limits)

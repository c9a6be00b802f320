"""PagedLM: a transformers causal LM over a paged cache, without touching its modelling code.

transformers hands an extra keyword of `model(...)` on to the attention function of every layer.
One function is registered there; the keyword carries one `ForwardPass`, which knows the cache and
who sees whom.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec.cache import KVShape, PagedKVCache
from specdec.kernels import reference
from specdec.kernels.choose import AUTO, Kernels
from specdec.kernels.layout import TreeLayout
from specdec.models.direct import FAMILIES, DirectModel, Logits, can_run_directly
from specdec.models.forward import ForwardPass, passes
from specdec.models.standin import named_shape, standin

ATTENTION = "specdec_paged"
PROBE_TOKENS = 8
PREFILL_STEP = 16  # a prompt is padded to a multiple of this on a GPU


class _Probe:
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
            raise _UnsupportedError("a layer attends more than once")
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


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    paged: ForwardPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if paged is None:
        raise _UnsupportedError("its layers do not hand keywords on to the attention function")
    if attention_mask is not None:
        raise _UnsupportedError("it masks attention by itself")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    paged.write(layer, key, value)
    out = paged.attend(
        layer,
        query,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.contiguous(), None  # some models take a view of it


AttentionInterface.register(ATTENTION, _attention)


class _UnsupportedError(Exception):
    """Why a model cannot run over the paged cache."""


class PagedLM:
    """A decoder-only transformers model whose keys and values live in a `PagedKVCache`.

    Args:
        model: any transformers causal LM with rotary positions.
        tokenizer: its tokenizer, None if token ids are all that is needed.
        name: what error messages and records call it.
        kernels: which implementation computes its attention and moves its keys and values.

    Raises:
        ValueError: the model cannot run over a paged cache, the message names its architecture and
            the reason; or `kernels` cannot run on its device.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "model",
        kernels: Kernels = AUTO,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.kernels = kernels.settled(self.device, self.dtype)
        self._kernels = self.kernels.on(self.device)
        self._begin = passes(self.kernels, self._kernels)
        try:
            _check_config(model.config)
            self.config = model.config.get_text_config()
            self.max_context = _max_context(self.config)
            self.kv_shape = self._probe()
        except _UnsupportedError as reason:
            architecture = type(model).__name__
            raise ValueError(
                f"{name}: {architecture} cannot run over the paged cache: {reason}"
            ) from None
        self.layers: int = self.config.num_hidden_layers
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]

    def check_in_part(self, setting: str) -> None:
        """Raise ValueError, naming the setting that needs it, unless `forward_layers` can run."""
        if self._direct is None:
            raise ValueError(
                f"{setting}: layers of {type(self.model).__name__} cannot be run in part; choose "
                f"a target of {', '.join(FAMILIES)} with plain linear layers, or another drafter"
            )

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        setting: str = "path",
        kernels: Kernels = AUTO,
    ) -> Self:
        """Load a model and its tokenizer from a local folder or the Hugging Face hub; `zoo:NAME`
        is built in, `standin:NAME` is made from it (`specdec/models/standin.py`).

        Args:
            setting: the option that gave `path`, for error messages.
            kernels: as for the class.

        Raises:
            ValueError: nothing there, or nothing that can be run; one line that names the setting.
        """
        if path.startswith("standin:"):
            shape, zoo = named_shape(path.removeprefix("standin:"), setting)
            source = zoo_path(zoo)
            large = standin(source, shape, device=device, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
            return cls(large, tokenizer, name=f"{setting}={path}", kernels=kernels)
        where = (
            str(zoo_path(path.removeprefix("zoo:"), setting)) if path.startswith("zoo:") else path
        )
        if where.startswith(("/", ".", "~")) and not Path(where).expanduser().is_dir():
            raise ValueError(
                f"{setting}={path}: no such folder; give a model folder, a hub id or zoo:NAME"
            )
        where = str(Path(where).expanduser()) if where.startswith("~") else where
        try:
            config = AutoConfig.from_pretrained(where)
            _check_config(config)
            transformers.utils.logging.disable_progress_bar()
            model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(where)
        except _UnsupportedError as reason:
            kind = (config.architectures or [config.model_type])[0]
            raise ValueError(
                f"{setting}={path}: {kind} cannot run over the paged cache: {reason}"
            ) from None
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{setting}={path}: cannot be loaded as a causal LM: {first}"
            ) from None
        return cls(model.to(device), tokenizer, name=f"{setting}={path}", kernels=kernels)

    # Running

    def new_cache(
        self,
        *,
        rows: int,
        pages: int,
        page_size: int,
        max_tokens: int,
        kv_dtype: torch.dtype | None = None,
    ) -> PagedKVCache:
        """An empty cache for this model; arguments as in `PagedKVCache`."""
        return PagedKVCache(
            shape=self.kv_shape,
            rows=rows,
            pages=pages,
            page_size=page_size,
            max_tokens=max_tokens,
            dtype=self.dtype,
            device=self.device,
            kv_dtype=kv_dtype,
            kernels=self._kernels,
        )

    @torch.inference_mode()
    def forward(
        self,
        cache: PagedKVCache,
        rows: Sequence[int] | Tensor,
        tokens: Tensor,
        offsets: Tensor,
        *,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
        logits: Logits | Tensor = "all",
    ) -> Tensor | None:
        """One pass over draft nodes; their keys and values go to scratch rows first .. first + N -
        1.

        Over the kernels it waits for nothing and copies nothing from the host if `rows` is a
        tensor, so that it may be captured in a CUDA graph.

        Args:
            rows: [B] int64, the cache row of each sequence.
            tokens: [B, N] int64.
            offsets: [B, N] int64, position of each node counted from the end of its committed
                tokens.
            ancestors: [B, N, W] int32, bits over scratch rows; None for a causal chain.
            first: scratch row of node 0; rows before it were filled by earlier passes.
            key_offsets: [B, first + N], offsets of all scratch rows; None if `first` is 0.
            logits: of all nodes, of none, or of node [B] int64 of each sequence.

        Returns:
            [B, N, V], None or [B, V].
        """
        rows = torch.as_tensor(rows, device=self.device)
        layout = self._layout(cache, rows, offsets, ancestors, first, key_offsets)
        paged = self._begin(cache, layout, range(self.layers))
        out: Tensor | None = None
        if self._direct is not None:
            out = self._direct(tokens, layout.positions, paged, logits)
        else:
            inputs = {"input_ids": tokens, "position_ids": layout.positions, "use_cache": False}
            if isinstance(logits, str) and logits == "none":
                self.model.base_model(**inputs, paged=paged)
            else:
                every: Tensor = self.model(**inputs, paged=paged).logits
                out = every
                if isinstance(logits, Tensor):
                    out = every[torch.arange(len(rows), device=self.device), logits]
        paged.store()
        return out

    @torch.inference_mode()
    def forward_layers(
        self,
        cache: PagedKVCache,
        rows: Tensor,
        nodes: Tensor,
        offsets: Tensor,
        layers: range,
        *,
        ancestors: Tensor | None = None,
        first: int = 0,
        key_offsets: Tensor | None = None,
        logits: Logits = "all",
    ) -> tuple[Tensor | None, Tensor]:
        """As `forward`, through some layers alone, whose keys and values go to the scratch.

        Args:
            nodes: [B, N] int64 tokens, or [B, N, H] hidden states after the layers before.

        Returns:
            (what norm and output head make of the hidden states; [B, N, H] hidden states.)

        Raises:
            ValueError: the model can only be run as a whole.
        """
        self.check_in_part(self.name)
        assert self._direct is not None
        layout = self._layout(cache, rows, offsets, ancestors, first, key_offsets)
        paged = self._begin(cache, layout, layers)
        hidden, normal = self._direct.through(nodes, layout.positions, paged, layers)
        paged.store()
        return self._direct.logits(normal, logits), hidden

    def _layout(
        self,
        cache: PagedKVCache,
        rows: Tensor,
        offsets: Tensor,
        ancestors: Tensor | None,
        first: int,
        key_offsets: Tensor | None,
    ) -> TreeLayout:
        """Who sees whom, for new nodes at these offsets; there is room for them in the scratch."""
        lengths = cache.lengths.index_select(0, rows)
        # The kernels need a bound; the reference gathers that much, and is better off with less.
        longest = int(lengths.max()) if self._kernels is reference else cache.max_tokens
        # Draft nodes past the end of the context are never kept; they must not reach positions the
        # model does not have.
        positions = (lengths[:, None] + offsets).clamp(max=self.max_context - 1)
        cache.scratch(len(rows), first + offsets.shape[1])
        return TreeLayout(
            page_table=cache.page_table.index_select(0, rows),
            context_lens=lengths,
            max_context=longest,
            positions=positions,
            key_positions=positions if key_offsets is None else lengths[:, None] + key_offsets,
            first=first,
            ancestors=ancestors,
        )

    def append(self, cache: PagedKVCache, rows: Tensor, tokens: Tensor, length: Tensor) -> Tensor:
        """Commit the first `length` tokens of each sequence: [B, V] logits after the last of them.
        May be captured like `forward`.

        Args:
            rows: [B] int64, which share no partly filled page.
            tokens: [B, N] int64.
            length: [B] int64, at least 1.
        """
        chain = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        logits = self.forward(cache, rows, tokens, chain, logits=length - 1)
        cache.append(rows, None, length, tokens.shape[1])
        assert logits is not None
        return logits

    def extend(
        self, cache: PagedKVCache, rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        """Append tokens to each row and commit them: [B, V] logits after the last token of
        each."""
        logits = self._extend(cache, rows, tokens, logits=True)
        assert logits is not None
        return logits

    def prefill(
        self,
        cache: PagedKVCache,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        chunk: int = 512,
    ) -> None:
        """Append any number of tokens to each row, `chunk` at a time; a row may have none."""
        for start in range(0, max(map(len, tokens), default=0), chunk):
            parts = {
                row: part[start : start + chunk] for row, part in zip(rows, tokens, strict=True)
            }
            parts = {row: part for row, part in parts.items() if part}
            self._extend(cache, list(parts), list(parts.values()), logits=False)

    def _extend(
        self,
        cache: PagedKVCache,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        logits: bool,
    ) -> Tensor | None:
        sizes = [len(part) for part in tokens]
        width = max(sizes)
        if self._kernels is not reference:  # few sizes, so that few kernels are compiled
            width = -(-width // PREFILL_STEP) * PREFILL_STEP
        padded = torch.tensor(
            [[*part, *[0] * (width - len(part))] for part in tokens], device=self.device
        )
        chain = torch.arange(width, device=self.device).expand(len(rows), -1)
        length = torch.tensor(sizes, device=self.device)
        with cache.scratch_apart(len(rows), width):
            out = self.forward(cache, rows, padded, chain, logits=length - 1 if logits else "none")
            cache.commit(rows, None, length)
        return out

    # Loading

    @torch.inference_mode()
    def _probe(self) -> KVShape:
        """Run a few tokens through both the model's own attention and ours; the shapes of its keys
        and values.

        Raises:
            _UnsupportedError: a layer was not reached, positions are absolute, the two disagree.
        """
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        tokens = torch.arange(PROBE_TOKENS, device=self.model.device)[None] * 7 % vocabulary
        positions = torch.arange(PROBE_TOKENS, device=self.model.device)[None]
        self.model.set_attn_implementation("eager")
        own = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
        self.model.set_attn_implementation(ATTENTION)

        def run(shift: int) -> tuple[Tensor, _Probe]:
            probe = _Probe()
            inputs = {"input_ids": tokens, "position_ids": positions + shift, "use_cache": False}
            try:
                return self.model(**inputs, paged=probe).logits.float(), probe
            except TypeError as error:
                raise _UnsupportedError(f"it refuses extra keywords ({error})") from None

        ours, probe = run(0)
        layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(probe.shapes) != list(range(layers)):
            raise _UnsupportedError(
                f"only {len(probe.shapes)} of its {layers} layers use the registered attention"
            )
        if len(set(probe.shapes.values())) != 1:
            raise _UnsupportedError("its layers differ in the shape of their keys and values")
        if probe.windows != _windows(self.model.config.get_text_config()):
            raise _UnsupportedError("its layers do not hand their sliding window on")
        bound = 0.1 if self.model.dtype.itemsize == 2 else 1e-3
        if _distance(run(5)[0], ours) > bound:
            raise _UnsupportedError(
                "its positions are absolute (learned or sinusoidal), not rotary"
            )
        if not _distance(ours, own) <= bound:
            raise _UnsupportedError(
                "its own attention does more than scaling, soft-capping, windows and sinks"
            )
        self._direct: DirectModel | None = None
        if can_run_directly(self.model):
            windows = [probe.windows[layer] for layer in range(layers)]
            shorter = DirectModel(self.model, windows, self.max_context, self._kernels)
            there = _Probe(probe.shapes[0]).provide(shorter.embedding)
            out = shorter(tokens, positions, there, "all")
            if out is not None and _distance(out.float(), ours) <= bound:
                self._direct = shorter
        shape = probe.shapes[0]
        return KVShape(
            layers=layers,
            kv_heads=shape.kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
        )


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of logits at the median token: one expert that flips at a near tie, as in
    mixtures of experts, moves a token far and says nothing about the attention."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def _check_config(config: Any) -> None:
    """Refuse by configuration what can be named without running the model."""
    if getattr(config, "is_encoder_decoder", False):
        raise _UnsupportedError("it is an encoder-decoder model")
    attention = getattr(config, "attn_config", None)
    if (
        getattr(config, "alibi", False)
        or getattr(attention, "alibi", False)
        or config.model_type == "bloom"
    ):
        raise _UnsupportedError("it biases attention by distance (ALiBi)")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _UnsupportedError(
            f"layers of type {', '.join(sorted(kinds))} have no paged keys and values"
        )
    if not getattr(text, "max_position_embeddings", None):
        raise _UnsupportedError("its configuration states no max_position_embeddings")


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


def _max_context(config: Any) -> int:
    """Positions the model has. LongRoPE turns all keys to other angles once a sequence outgrows
    the original context, the cached ones excepted, so it ends there."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [config.max_position_embeddings]
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
    return min(limits)


def zoo_path(name: str, setting: str = "path") -> Path:
    """Folder of a built-in model.

    Raises:
        ValueError: no built-in model of that name.
    """
    zoo = Path(__file__).parents[1] / "zoo"
    if not (zoo / name / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in zoo.iterdir() if p.is_dir()))
        raise ValueError(f"{setting}=zoo:{name}: no such built-in model; there are {names}")
    return zoo / name

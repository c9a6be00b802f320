"""PagedLM: a transformers causal LM over a paged cache."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.cache import PagedKVCache, PageView
from specdec.kernels.choose import AUTO, Kernels
from specdec.kernels.layout import TreeLayout
from specdec.models.direct import FAMILIES, Logits
from specdec.models.forward import layout_of, passes
from specdec.models.hook import NotFiniteError, UnsupportedError
from specdec.models.placement import Placement
from specdec.models.probe import check_config, max_context, probe, sliding_windows
from specdec.models.quantised import quantisation_of, slow
from specdec.models.standin import Widening
from specdec.models.states import States, layers_of
from specdec.observation import Tap
from specdec.ranks import ALONE, Ranks

See = Callable[[Tensor, Tensor, Tensor, Tensor | None, Mapping[Tap, Tensor]], None]
PREFILL_STEP = 16  # a prompt is padded to a multiple of this on a GPU


class PagedLM:
    """A decoder-only transformers model whose keys and values live in a `PagedKVCache`.

    Args:
        model: any transformers causal LM with rotary positions.
        tokenizer: its tokenizer, None if token ids are all that is needed.
        name: what error messages and records call it.
        kernels: which implementation computes its attention and moves its keys and values.
        standin: of a stand-in, how it was made.
        path: folder, hub id or zoo:NAME of its files, if it was loaded from any.
        ranks: who shares its weights, which are then cut, each calling what is called here.

    Attributes:
        quantised: what its weights are quantised to or by; None if they are not.
        notes: what is to be known of how it was loaded and runs, a line each.

    Raises:
        ValueError: the model cannot run over a paged cache, the message names its architecture and
            the reason; it computes NaN; or `kernels` cannot run on its device.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str = "model",
        kernels: Kernels = AUTO,
        standin: Widening | None = None,
        path: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model.eval()
        self.tokenizer, self.name, self.standin, self.path = tokenizer, name, standin, path
        self.placement = Placement(device=model.device, dtype=model.dtype, kernels=kernels)
        self.device, self.dtype = self.placement.device, self.placement.dtype
        self.kernels = self.placement.kernels
        self._kernels = self.kernels.on(self.device)
        self.looks: bool = self._kernels.LOOKS  # whether the host may look at results for free
        self._begin = passes(self.kernels, self._kernels)
        try:
            check_config(model.config)
            self.config = model.config.get_text_config()
            self.max_context = max_context(self.config)
            self.kv_shape, self._direct = probe(model, self.max_context, self._kernels, ranks)
        except UnsupportedError as reason:
            architecture = type(model).__name__
            raise ValueError(
                f"{name}: {architecture} cannot run over the paged cache: {reason}"
            ) from None
        except NotFiniteError:
            raise ValueError(f"{name}: {self.not_finite}") from None
        if self.kernels.exact and self._direct is None:
            raise ValueError(
                f"kernels.exact=true: {name} is a {type(model).__name__}, which is not run by our "
                f"own products; choose one of {', '.join(FAMILIES)} with plain linear layers, or "
                f"kernels.exact=false"
            )
        self.quantised, self.notes = quantisation_of(model), list[str]()
        if self.quantised is not None and self._direct is None:
            self.notes.append(f"{name}: {slow(model, self.quantised)}")
        self.layers: int = self.config.num_hidden_layers
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        readable = model.get_input_embeddings().weight.shape[0]
        if readable < self.vocab_size:
            raise ValueError(
                f"{name}: its output head has {self.vocab_size} rows, its embedding {readable}: "
                f"it could not read all that it writes; take other weights"
            )

    @property
    def not_finite(self) -> str:
        """What to say if its logits are not numbers, or all minus infinity."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"NaN or infinite logits in {dtype}; choose another dtype, or other weights"

    def check_tokens(self, ids: Sequence[int], whose: str) -> None:
        """Raise ValueError, naming `whose` tokens they are, unless it has a row for each."""
        beyond = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if beyond is None:
            return
        text = "" if self.tokenizer is None else f" {self.tokenizer.decode([beyond])!r}"
        raise ValueError(
            f"{whose}: token {beyond}{text} is none of the {self.vocab_size} that {self.name} has "
            f"a row for; leave it out, or take weights that were resized to their tokenizer"
        )

    def check_in_part(self, setting: str) -> None:
        """Raise ValueError, naming the setting that needs it, unless `forward_layers` can run."""
        if self._direct is None:
            raise ValueError(
                f"{setting}: layers of {type(self.model).__name__} cannot be run in part; choose "
                f"a target of {', '.join(FAMILIES)} with plain linear layers, or another drafter"
            )

    def check_views(self, setting: str) -> None:
        """Raise ValueError, naming the setting that needs it, unless `forward` can leave pages
        out: a sliding window hides keys by how far behind they are, which a view changes."""
        if any(sliding_windows(self.config, self.max_context)):
            raise ValueError(
                f"{setting}: {self.name} has sliding windows of its own, which see no page of the "
                f"beginning; choose a target with full attention, or another drafter"
            )

    def check_taps(self, taps: Collection[Tap], setting: str) -> None:
        """Raise ValueError, naming the setting, unless it has these states to show."""
        beyond = [tap for tap in taps if tap != "normal" and not 0 <= tap <= self.layers]
        if beyond:
            raise ValueError(
                f"{setting}: reads the state after layer {beyond[0]}, and {self.name} has "
                f"{self.layers}; give layers from 0 (the embedding) to {self.layers}, or normal"
            )
        if self._direct is None and taps:
            try:
                layers_of(self.model)
            except ValueError as error:
                raise ValueError(f"{setting}: its hidden states cannot be read: {error}") from None

    # Running

    def new_cache(
        self,
        *,
        rows: int,
        pages: int,
        page_size: int,
        max_tokens: int,
        kv_dtype: torch.dtype | None = None,
        successors: int = 0,
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
            exact=self.kernels.exact,
            successors=successors,
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
        states: States | None = None,
        view: PageView | None = None,
    ) -> Tensor | None:
        """One pass over draft nodes; their keys and values go to scratch rows first .. first + N -
        1. (Long for what it is told.)

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
            states: what is to be kept on the way.
            view: of these rows, the pages that are seen; None for all. Not with sliding windows
                (`check_views`).

        Returns:
            [B, N, V], None or [B, V].
        """
        rows = torch.as_tensor(rows, device=self.device)
        layout = self._layout(cache, rows, offsets, ancestors, first, key_offsets, view)
        positions = layout.positions
        if view is not None:
            positions = positions + view.left_out[:, None]
        paged = self._begin(cache, layout, range(self.layers))
        out: Tensor | None = None
        if self._direct is not None:
            out = self._direct(tokens, positions, paged, logits, states)
        else:
            inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
            with (states or States()).of(self.model):
                if isinstance(logits, str) and logits == "none":
                    self.model.base_model(**inputs, paged=paged)
                else:
                    out = self.model(**inputs, paged=paged).logits
            if out is not None and isinstance(logits, Tensor):
                out = out[torch.arange(len(rows), device=self.device), logits]
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
        states: States | None = None,
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
        hidden, normal = self._direct.through(nodes, layout.positions, paged, layers, states)
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
        view: PageView | None = None,
    ) -> TreeLayout:
        """As `layout_of`, for this model."""
        if cache.exact != self.kernels.exact:
            raise ValueError(
                f"kernels.exact={str(self.kernels.exact).lower()}: {self.name} was given a cache "
                f"that is filled with the other setting; make it with new_cache"
            )
        if self._direct is not None:
            self._direct.angles.cover(cache, first + offsets.shape[1])
        return layout_of(
            cache,
            rows,
            offsets,
            ancestors,
            first,
            key_offsets,
            positions=self.max_context,
            looks=self.looks,
            view=view,
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
        *_, logits = self._extend(cache, rows, tokens, logits="last")
        assert logits is not None
        return logits

    def prefill(
        self,
        cache: PagedKVCache,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        chunk: int = 512,
        see: See | None = None,
        logits: bool = True,
        taps: Collection[Tap] = (),
    ) -> None:
        """Append any number of tokens to each row, `chunk` at a time; a row may have none.

        Args:
            see: called after each chunk, with its rows [B], tokens [B, N], how many of them count
                [B], if it wants `logits` those [B, N, V] after them, and the states [B, N, H] of
                `taps`.
        """
        for start in range(0, max(map(len, tokens), default=0), chunk):
            parts = {
                row: part[start : start + chunk] for row, part in zip(rows, tokens, strict=True)
            }
            parts = {row: part for row, part in parts.items() if part}
            states = States(taps if see is not None else ())
            padded, length, out = self._extend(
                cache,
                list(parts),
                list(parts.values()),
                logits="all" if see is not None and logits else "none",
                states=states,
            )
            if see is not None:
                see(
                    torch.tensor(list(parts), device=self.device),
                    padded,
                    length,
                    out,
                    states.found,
                )

    def _extend(
        self,
        cache: PagedKVCache,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        logits: Logits | Literal["last"],
        states: States | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append and commit: the tokens, padded to [B, N], how many of them count [B], and the
        logits of all, of none, or [B, V] of the last of each."""
        sizes = [len(part) for part in tokens]
        width = max(sizes)
        if not self._kernels.LOOKS:  # few sizes, so that few kernels are compiled
            width = -(-width // PREFILL_STEP) * PREFILL_STEP
        padded = torch.tensor(
            [[*part, *[0] * (width - len(part))] for part in tokens], device=self.device
        )
        chain = torch.arange(width, device=self.device).expand(len(rows), -1)
        length = torch.tensor(sizes, device=self.device)
        which = length - 1 if logits == "last" else logits
        with cache.scratch_apart(len(rows), width):
            out = self.forward(cache, rows, padded, chain, logits=which, states=states)
            cache.commit(rows, None, length)
        return padded, length, out

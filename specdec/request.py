"""What is decoded, and how much room it is given: requests, sequences on their way, capacity."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

KV_DTYPES = {"auto": None, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
PREFILL_CHUNK = 512  # prompt tokens that go through a model at a time, unless settings say else


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to decode.

    Args:
        id: what seeds its random numbers; unique in a run.
        prompt_ids: at least one token.
        max_new_tokens: decoding ends there at the latest.
        category: of prompts, for drafters that learn by category.
    """

    id: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    category: str | None = None

    @property
    def max_tokens(self) -> int:
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(slots=True, eq=False)
class Decoding:
    """A request being decoded: its tokens so far and what it has cost. `row` is its place in every
    cache."""

    request: Request
    row: int
    tokens: list[int]  # prompt and output; the last one has no keys and values yet
    steps: int = 0
    drafted: int = 0  # nodes proposed, the root not counted
    accepted_lengths: list[int] = field(default_factory=list)  # new tokens of each step
    found: int = 0  # tokens of the prompt that the target has found in shared pages
    finish_reason: str | None = None  # "stop", "length" or "context"
    evidence: list[list[float]] = field(default_factory=list)  # of each new token, if recorded

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much the caches of a run must hold.

    Args:
        rows: sequences at a time.
        max_tokens: the longest sequence.
        page_size: tokens of a page.
        pages: pages of each cache; None is enough for `rows` sequences of `max_tokens`, or what
            the memory of the GPU holds.
        kv_dtype: what the pages hold keys and values as; None for the type of each model.
        share: whether sequences share the pages of equal beginnings.
        successors: tokens after those of a page that must be equal too: `Drafter.page_successors`.

    Raises:
        ValueError: so few pages that not even one such sequence fits.
    """

    rows: int
    max_tokens: int
    page_size: int = 16
    pages: int | None = None
    kv_dtype: torch.dtype | None = None
    share: bool = True
    successors: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"batch_size={self.rows}: must be at least 1")
        needed = self.pages_of_a_row
        if self.pages is not None and self.pages < needed:
            raise ValueError(
                f"cache.pages={self.pages}: {self.max_tokens} tokens of a sequence need {needed}; "
                f"raise cache.pages or lower max_new_tokens"
            )

    @property
    def pages_of_a_row(self) -> int:
        return -(-self.max_tokens // self.page_size)

    @property
    def pool_pages(self) -> int:
        return self.rows * self.pages_of_a_row if self.pages is None else self.pages


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """How the paged caches are laid out.

    Args:
        page_size: tokens of a page; None is 128 on a GPU, whose kernels like large ones, else 16.
        pages: pages of each cache; None is enough for the whole batch, or what the memory of the
            GPU holds.
        prefill_chunk: prompt tokens of a sequence that go through a model at a time.
        prefill_beside: prompt tokens read per step on average while other rows decode, of what a
            prompt has beyond 4,096 (`specdec.cached_model`); None reads prompts whole.
        dtype: what the pages hold keys and values as: auto (the type of each model), fp8_e4m3 or
            int8.
        share: whether sequences share the pages of equal beginnings; None: unless the drafter
            reads hidden states of prompts, which it reads whole then.

    Raises:
        ValueError: a setting out of range.
    """

    page_size: int | None = None
    pages: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    prefill_beside: int | None = 64
    dtype: str = "auto"
    share: bool | None = None

    def __post_init__(self) -> None:
        for name in ("page_size", "pages", "prefill_chunk", "prefill_beside"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"cache.{name}={value}: must be at least 1")
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"cache.dtype={self.dtype}: must be {', '.join(KV_DTYPES)}")

    def shares(self, *, states: bool) -> bool:
        """Whether sequences share pages beside a drafter that reads hidden `states`, or not."""
        return not states if self.share is None else self.share

    def capacity(
        self, *, rows: int, max_tokens: int, device: torch.device, states: bool = False
    ) -> Capacity:
        """For so many sequences of so many tokens at most; `states` as in `shares`.

        Raises:
            ValueError: as of `Capacity`.
        """
        return Capacity(
            rows=rows,
            max_tokens=max_tokens,
            page_size=self.page_size or (128 if device.type == "cuda" else 16),
            pages=self.pages,
            kv_dtype=KV_DTYPES[self.dtype],
            share=self.shares(states=states),
        )

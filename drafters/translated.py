"""drafter=translated: a small causal language model with another tokenizer than the target's."""

from dataclasses import replace

import torch
from torch import Tensor

from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.vocabulary import Translation
from specdec.models.paged import PagedLM
from specdec.models.quantised import Quantize
from specdec.request import Capacity, Decoding, Request

STRETCH = 2  # draft tokens there is room for, for each of the target's


class Translated(SmallLlama):
    """Drafts with a causal LM of any tokenizer, by token-level intersection (TLI; Timor et al.
    2025, "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
    Heterogeneous Vocabularies", algorithm 4), here on trees.

    The draft's distribution is cut to the tokens that stand for the same bytes in both
    vocabularies, and renormalised. Children come from that distribution and the rule is told no
    other, so it is as lossless as any draft. A drafted token is one token to either model; only
    those that the target adds by itself may be unknown to the draft, which reads them spelled in
    tokens of its own. The prompt it reads in its own tokens anyway. What it has read decides how
    well it drafts, and nothing else.

    A text has another number of tokens to the draft. Its cache has room for twice the target's, as
    far as its context goes. A prompt that does not fit keeps its end; what is written when the
    room is used up is not read any more.

    Args:
        path: model folder, hub id, zoo:NAME or standin:NAME. With the target's own tokenizer it
            drafts what `SmallLlama` does.
        quantize, depth, candidates: as for `SmallLlama`.
        min_overlap: the draft must have at least this share of the target's tokens, special ones
            not counted.

    Raises:
        ValueError: a setting out of range, a tokenizer whose tokens cannot be compared, or too few
            tokens in common.
    """

    def __init__(
        self,
        *,
        path: str,
        quantize: Quantize = "none",
        depth: int | None = None,
        candidates: int = 64,
        min_overlap: float = 0.5,
    ) -> None:
        if not 0 <= min_overlap <= 1:
            raise ValueError(f"drafter.min_overlap={min_overlap}: must be from 0 to 1")
        super().__init__(path=path, quantize=quantize, depth=depth, candidates=candidates)
        self.min_overlap = min_overlap

    def _make_room(self, capacity: Capacity) -> None:
        tokens = min(STRETCH * capacity.max_tokens, self.lm.max_context)
        pages = None if capacity.pages is None else STRETCH * capacity.pages
        super()._make_room(replace(capacity, max_tokens=tokens, pages=pages))

    def _match(self, target: PagedLM) -> None:
        setting = f"drafter.path={self.path}"
        self.translation = Translation(
            target.tokenizer,
            self.lm.tokenizer,
            target_size=target.vocab_size,
            draft_size=self.lm.vocab_size,
            name=setting,
        )
        shared, ordinary = self.translation.shared, self.translation.ordinary
        if not shared or shared < self.min_overlap * ordinary:
            raise ValueError(
                f"{setting}: its {self.lm.vocab_size} tokens include {shared} "
                f"({shared / max(1, ordinary):.1%}) of the target's {ordinary}, and "
                f"drafter.min_overlap={self.min_overlap}; choose a draft with more tokens of the "
                f"target's, or lower drafter.min_overlap"
            )
        pairs = sorted(self.translation.pairs.items())
        spellings, device = self.translation.spellings, self.lm.device
        self.vocab_size = len(pairs)
        self._longest = max(map(len, spellings))
        # S shared tokens in the order of the target's ids: these, and the draft's. [S]
        self._names, self._columns = torch.tensor(pairs, device=device).T.contiguous()
        # Of all the target's: tokens of the draft that spell each [V, M], and how many.
        padded = [[*ids, *[0] * (self._longest - len(ids))] for ids in spellings]
        self._spellings = torch.tensor(padded, device=device)
        self._sizes = torch.tensor([len(ids) for ids in spellings], device=device)
        self._ends = torch.tensor([ids[-1] for ids in spellings], device=device)

    def _reread(self, sequence: Decoding) -> Decoding:
        coming = STRETCH * sequence.request.max_new_tokens
        room = self.model.cache.max_tokens
        tokens = self.translation.prompt(sequence.tokens, max(room - coming, room // 2, 1))
        request = Request(id=sequence.request.id, prompt_ids=tokens, max_new_tokens=coming)
        return Decoding(request, sequence.row, tokens)

    def _spelled(self, count: int) -> int:
        # All but the last of a step's tokens are drafted as a rule, and so one token each.
        return count - 1 + self._longest

    def _spell(self, tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        most = self._spelled(tokens.shape[1])
        place = torch.arange(tokens.shape[1], device=tokens.device)
        sizes = self._sizes[tokens].masked_fill(place >= count[:, None], 0)  # [B, n]
        end = sizes.cumsum(1)
        over = (end[:, -1:] - most).clamp(min=0)  # [B, 1]; of what is too long the end is kept
        piece = torch.arange(self._longest, device=tokens.device)
        place = (end - sizes - over)[..., None] + piece  # [B, n, M]
        spare = (piece >= sizes[..., None]) | (place < 0)
        place = place.masked_fill(spare, most).flatten(1)
        spelled = tokens.new_zeros(len(tokens), most + 1)
        spelled.scatter_(1, place, self._spellings[tokens].flatten(1))
        return spelled[:, :most], end[:, -1].clamp(max=most)

    def _own(self, tokens: Tensor) -> Tensor:
        # Trees that others began may hold tokens it lacks: it reads the end of their spelling.
        return self._ends[tokens]

    def _shared(self, logits: Tensor) -> Tensor:
        return logits.index_select(-1, self._columns)

    def _named(self, columns: Tensor) -> Tensor:
        return self._names[columns]

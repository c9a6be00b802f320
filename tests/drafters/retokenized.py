"""Drafts of another tokenizer than the target's: small tokenizers of both families, and the
built-in draft with fewer tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.drafters.vocabulary import LONGEST, Translation, Vocabulary

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"

KEPT = 6000


def wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bpe(tokens: Sequence[str], pairs: Sequence[str], **options: Any) -> models.BPE:
    """Of these tokens and of the merges "a b"."""
    merges = [tuple(pair.split(" ")) for pair in pairs]
    every = dict.fromkeys([*tokens, *("".join(merge) for merge in merges)])
    return models.BPE(vocab={t: i for i, t in enumerate(every)}, merges=merges, **options)


def byte_level(
    tokens: Sequence[str], pairs: Sequence[str] = (), *, prefix: bool = False, **special: str
) -> Any:
    backend = Tokenizer(bpe([*special.values(), *tokens], pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, **special)


def sentencepiece(tokens: Sequence[str], pairs: Sequence[str], *, prefix: bool = True) -> Any:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    model = bpe(
        ["<unk>", "<s>", "</s>", *bytes_, *tokens], pairs, unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def check_spellings(found: Translation, theirs: Vocabulary, own: Vocabulary) -> None:
    for i, spelling in enumerate(found.spellings):
        assert 1 <= len(spelling) <= LONGEST
        if i in found.pairs:
            assert spelling == [found.pairs[i]]
        elif i in theirs.bytes:
            spelled = b"".join(own.bytes[j] for j in spelling)
            whole = theirs.bytes[i]
            assert whole.endswith(spelled) if len(spelling) == LONGEST else spelled == whole

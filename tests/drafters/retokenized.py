"""Drafts of another tokenizer than the target's: small tokenizers of both families, and the
built-in draft with fewer tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.drafters.vocabulary import LONGEST, Translation, Vocabulary
from specdec.experiments.tools.retokenize import retokenize
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"

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


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Folders of the built-in draft with so many of its tokens."""
    folder = tmp_path_factory.mktemp("drafts")
    for keep in (KEPT, 3000):
        retokenize("zoo:draft", folder / str(keep), keep=keep, seed=0)
    return {keep: str(folder / str(keep)) for keep in (KEPT, 3000)}


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load_model("zoo:target")


@pytest.fixture(scope="module")
def renamed(drafts: dict[int, str]) -> dict[int, int]:
    """The new id of each kept token, by its old one; ordinary and special."""
    old = json.loads((zoo_path("draft") / "tokenizer.json").read_text())["model"]["vocab"]
    new = json.loads((Path(drafts[KEPT]) / "tokenizer.json").read_text())["model"]["vocab"]
    return {old[token]: i for token, i in new.items()}

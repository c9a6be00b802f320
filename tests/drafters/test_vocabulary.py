"""Vocabularies: which tokens of two tokenizers correspond, and how the others are spelled."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from specdec.drafters.vocabulary import LONGEST, Translation, Vocabulary, byte_alphabet
from specdec.models.load import zoo_path
from tests.drafters.retokenized import (
    STORIES,
    byte_level,
    check_spellings,
    sentencepiece,
    wrapped,
)

WORDS = ["Ġ t", "h e", "Ġt he", "c a", "ca t", "Ġ cat"]

GPT = byte_level(sorted(byte_alphabet()), WORDS, eos_token="<|endoftext|>")

PIECES = ["▁", *"abcdehimt", "é"]

LLAMA = sentencepiece(PIECES, ["h e", "▁ t", "▁t he", "m a", "ma t"])

GEMMA = sentencepiece(PIECES, ["h e", "▁ t", "▁t he", "▁ ▁"], prefix=False)


def translation(target: Any, draft: Any) -> Translation:
    return Translation(
        target, draft, target_size=len(target), draft_size=len(draft), name="drafter.path=X"
    )


def vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, len(tokenizer), name="drafter.path=X")


@pytest.mark.parametrize(
    ("tokenizer", "token", "meaning"),
    [
        (GPT, "Ġthe", b" the"),
        (GPT, "Ċ", b"\n"),
        (GPT, "Ã", b"\xc3"),
        (LLAMA, "▁the", b" the"),
        (LLAMA, "<0x0A>", b"\n"),
        (LLAMA, "é", "é".encode()),
        (GEMMA, "▁▁", b"  "),
    ],
)
def test_a_token_stands_for_bytes(tokenizer: Any, token: str, meaning: bytes) -> None:
    found = vocabulary(tokenizer)
    assert found.bytes[tokenizer.get_vocab()[token]] == meaning


def test_the_alphabet_is_that_of_the_tokenizers_library() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "".join(map(chr, range(1, 0x400))) + "日🙂"
    letters = "".join(backend.encode(text).tokens)
    assert bytes(byte_alphabet()[c] for c in letters) == text.encode()


def test_byte_level_and_sentencepiece_correspond_by_bytes() -> None:
    found = translation(GPT, LLAMA)
    theirs, own = GPT.get_vocab(), LLAMA.get_vocab()
    for a, b in {"Ġthe": "▁the", "Ġ": "▁", "he": "he", "Ċ": "<0x0A>", "Ã": "<0xC3>"}.items():
        assert found.pairs[theirs[a]] == own[b]
    # A letter that is a token of its own is not the byte token that nobody uses.
    assert found.pairs[theirs["a"]] == own["a"] != own["<0x61>"]
    assert found.pairs[theirs["<|endoftext|>"]] == own["</s>"]  # both end a text
    assert not {own["<unk>"], own["<s>"]} & set(found.pairs.values())
    assert not {theirs["Ġcat"], theirs["ca"]} & found.pairs.keys()
    assert len(set(found.pairs.values())) == len(found.pairs)
    assert found.ordinary == len(theirs) - 1
    assert found.shared == len(found.pairs) - 1
    back = translation(LLAMA, GPT)
    assert back.pairs == {b: a for a, b in found.pairs.items()}


@pytest.mark.parametrize("target", [GPT, LLAMA, GEMMA])
@pytest.mark.parametrize("draft", [GPT, LLAMA, GEMMA])
def test_every_token_is_spelled_by_its_bytes(target: Any, draft: Any) -> None:
    if target is not draft:
        check_spellings(translation(target, draft), vocabulary(target), vocabulary(draft))


def test_spellings_are_those_of_the_tokenizer() -> None:
    """Canonical ones where the bytes allow it, with and without a space before the word."""
    target = byte_level([*sorted(byte_alphabet()), "Ġmathe", "mathe", "Ġé", "Ã©Ã"])
    found, ids = translation(target, LLAMA), target.get_vocab()

    def spelled(token: str) -> list[str]:
        return LLAMA.convert_ids_to_tokens(found.spellings[ids[token]])

    assert spelled("Ġmathe") == ["▁", "mat", "he"]
    assert spelled("mathe") == ["mat", "he"]
    assert spelled("Ã©Ã") == ["é", "<0xC3>"]  # half a letter
    assert spelled("a") == ["a"]


def test_the_ends_of_long_spellings_are_kept() -> None:
    target = byte_level([*sorted(byte_alphabet()), "ab" * 20])
    draft = byte_level(sorted(byte_alphabet(), reverse=True))
    found = translation(target, draft)
    assert draft.convert_ids_to_tokens(found.spellings[-1]) == list("ab" * (LONGEST // 2))


def test_what_cannot_be_spelled_has_a_neutral_token() -> None:
    found = translation(byte_level(["a", "b", "c"]), byte_level(["Ġ", "b", "a"]))
    assert found.spellings == [[2], [1], [0]]  # a space
    found = Translation(GPT, LLAMA, target_size=len(GPT) + 3, draft_size=len(LLAMA), name="X")
    assert found.spellings[-1] == [LLAMA.unk_token_id]  # padding of the target's head


def test_equal_bytes_go_to_the_lower_id() -> None:
    target = sentencepiece(["▁", "A", "b"], [])
    draft = byte_level(sorted(byte_alphabet()))
    found, ids = translation(target, draft), target.get_vocab()
    assert found.pairs[ids["A"]] == draft.get_vocab()["A"]
    assert ids["<0x41>"] not in found.pairs
    assert found.spellings[ids["<0x41>"]] == [draft.get_vocab()["A"]]


def test_special_tokens_correspond_by_their_texts() -> None:
    letters = sorted(byte_alphabet())
    target = byte_level(letters, eos_token="<e>", bos_token="<b>", pad_token="<pad>")
    draft = byte_level(letters[::-1], pad_token="<pad>", bos_token="<e>", eos_token="<end>")
    found, ids = translation(target, draft), target.get_vocab()
    assert found.pairs[ids["<pad>"]] == draft.pad_token_id
    assert found.pairs[ids["<e>"]] == draft.bos_token_id  # its text goes before its role
    assert ids["<b>"] not in found.pairs
    assert draft.decode(found.spellings[ids["<b>"]]) == "<b>"


def test_prompts_are_encoded_anew() -> None:
    text = "the cat é\n🙂 mat"
    for target, draft in ((GPT, LLAMA), (LLAMA, GPT), (LLAMA, GEMMA)):
        ids = target(text, add_special_tokens=False).input_ids
        expected = draft(text, add_special_tokens=False).input_ids
        assert translation(target, draft).prompt(ids, 1000) == expected
        assert translation(target, draft).prompt(ids, 3) == expected[-3:]
    found = translation(LLAMA, GPT)
    ids = [LLAMA.bos_token_id, *LLAMA("the").input_ids, LLAMA.eos_token_id]
    assert found.prompt(ids, 10) == [*GPT("the").input_ids, GPT.eos_token_id]
    assert len(found.prompt([LLAMA.bos_token_id], 10)) == 1


def test_the_token_that_begins_a_text_stays_in_front() -> None:
    if not STORIES.is_dir():
        pytest.skip(f"no model in {STORIES}")
    draft = AutoTokenizer.from_pretrained(STORIES)
    target = AutoTokenizer.from_pretrained(zoo_path("target"))
    found, text = translation(target, draft), "Once upon a time there was a cat."
    every = draft(text).input_ids
    assert every[0] == draft.bos_token_id
    assert found.prompt(target(text).input_ids, 100) == every
    assert found.prompt(target(text).input_ids, 5) == [every[0], *every[-4:]]
    check_spellings(found, vocabulary(target), vocabulary(draft))


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (None, "it has no fast tokenizer"),
        (wrapped(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))), r"\(decoder: none\)"),
        ("wordpiece", "pieces of words"),
    ],
)
def test_tokenizers_that_cannot_be_compared_are_refused(tokenizer: Any, reason: str) -> None:
    if tokenizer == "wordpiece":
        backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
        backend.decoder = decoders.WordPiece()
        tokenizer = wrapped(backend)
    with pytest.raises(ValueError, match=f"drafter.path=X: .*{reason}.*; choose a model"):
        Translation(GPT, tokenizer, target_size=9, draft_size=9, name="drafter.path=X")

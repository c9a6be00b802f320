"""Which tokens of two tokenizers are the same, and how to say the others.

A token is the bytes it stands for. Byte-level BPE (GPT-2, Llama 3, Qwen) writes them in an
alphabet of 256 letters, one for each byte. The sentencepiece kind (Llama 2, Gemma) writes text
with "▁" for a space, and single bytes as <0x0A>; the space it puts before a text belongs to the
first token. Pieces of words (WordPiece) do not say where the spaces are, so they are refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LONGEST = 16  # tokens of a spelling at most


def byte_alphabet() -> dict[str, int]:
    """The letter of each byte in byte-level BPE (Radford et al. 2019, GPT-2): itself if it is
    printable in Latin-1, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class Vocabulary:
    """What the tokens of a fast tokenizer stand for.

    Args:
        tokenizer: of transformers, with a backend of the `tokenizers` library.
        size: ids from here on are none of the model's.
        name: for messages.

    Attributes:
        bytes: of each ordinary token, by id.
        special: the text of each special token, by id.
        ids: the token that stands for some bytes; of several the lowest, and one that is written
            as a text before one that is written as <0x41>, which models hardly ever use.
        beginning: what its tokenizer puts before a text, a token or none.

    Raises:
        ValueError: there is no telling which bytes its tokens stand for.
    """

    def __init__(self, tokenizer: Any, size: int, *, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{name}: it has no fast tokenizer, so its tokens cannot be compared; "
                f"choose a model with a tokenizer.json"
            )
        description = json.loads(backend.to_str())
        read = _reader(description, name)
        added = {token["id"]: token for token in description["added_tokens"]}
        special = {i for i, token in added.items() if token["special"]}
        special |= set(tokenizer.all_special_ids)
        self.tokenizer, self.size = tokenizer, size
        self.bytes: dict[int, bytes] = {}
        self.special: dict[int, str] = {}
        late: list[int] = []
        self.ids: dict[bytes, int] = {}
        for text, i in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
            if i >= size:
                continue
            if i in special:
                self.special[i] = text
                continue
            meaning = text.encode() if i in added else read(text)
            if meaning:
                self.bytes[i] = meaning
                if BYTE.fullmatch(text):
                    late.append(i)
                else:
                    self.ids.setdefault(meaning, i)
        for i in late:
            self.ids.setdefault(self.bytes[i], i)
        first = tokenizer("a").input_ids[:1]
        begins = first == [tokenizer.bos_token_id] and first[0] < size
        self.beginning: list[int] = first if begins else []

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without any that are put around it."""
        if not texts:
            return []
        every = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return [[i for i in ids if i < self.size] for ids in every]

    def spell(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Tokens that together stand for each piece: what the tokenizer makes of it, if that is
        true to the bytes, else the longest tokens that fit from left to right. Bytes that no token
        stands for are left out."""
        found: dict[bytes, list[int]] = {}
        for cut in (0, 1):  # many of the sentencepiece kind put a space before any text
            texts = {
                piece: text[cut:]
                for piece, text in _texts(pieces)
                if piece not in found and text.startswith(" " * cut)
            }
            for piece, ids in zip(texts, self.encode(list(texts.values())), strict=True):
                if b"".join(self.bytes.get(i, b"") for i in ids) == piece:
                    found[piece] = ids
        return [found.get(piece) or self._longest_first(piece) for piece in pieces]

    def _longest_first(self, piece: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(piece):
            ends = range(len(piece), at, -1)
            end = next((end for end in ends if piece[at:end] in self.ids), None)
            if end is not None:
                ids.append(self.ids[piece[at:end]])
            at = end or at + 1
        return ids


class Translation:
    """From the tokens of a target to those of a draft with another tokenizer. With the same one
    all tokens stay as they are.

    Args:
        target, draft: their tokenizers.
        target_size, draft_size: tokens the models know.
        name: of the draft, for messages.

    Attributes:
        pairs: the draft's id of each token that both have, by the target's id; one-to-one. Special
            tokens are the same if their texts are, and as those that end a text.
        ordinary: how many of the target's tokens are not special.
        shared: how many of these the draft has.
        spellings: each of the target's tokens in the draft's, from 1 to `LONGEST` of them; of a
            longer spelling the end. Special tokens that the draft does not have are spelled as
            texts. Where nothing at all fits stands the draft's token for the unknown, or a space.

    Raises:
        ValueError: as `Vocabulary`.
    """

    def __init__(
        self, target: Any, draft: Any, *, target_size: int, draft_size: int, name: str
    ) -> None:
        self.same = None not in (target, draft) and (
            target.get_vocab() == draft.get_vocab()
            or _with_rows(target, target_size) == _with_rows(draft, draft_size)
        )
        if self.same:
            both = min(target_size, draft_size)
            self.pairs = {i: i for i in range(both)}
            self.ordinary = self.shared = both
            self.spellings = [[min(i, both - 1)] for i in range(target_size)]
            return
        theirs = Vocabulary(target, target_size, name="target.path")
        own = Vocabulary(draft, draft_size, name=name)
        self._target, self._draft = theirs, own
        unknown = own.tokenizer.unk_token_id
        self._nothing = unknown if unknown in own.special else own.ids.get(b" ", 0)
        self.pairs = {i: own.ids[piece] for piece, i in theirs.ids.items() if piece in own.ids}
        self.ordinary, self.shared = len(theirs.bytes), len(self.pairs)
        texts = {text: i for i, text in own.special.items()}
        self.pairs |= {i: texts[text] for i, text in theirs.special.items() if text in texts}
        end, own_end = target.eos_token_id, draft.eos_token_id
        free = own.special.keys() - set(self.pairs.values())
        if end in theirs.special and end not in self.pairs and own_end in free:
            self.pairs[end] = own_end
        self.spellings = self._spellings()

    def _spellings(self) -> list[list[int]]:
        theirs, own = self._target, self._draft
        spelled = [[self._nothing] for _ in range(theirs.size)]
        pieces = theirs.bytes | {i: text.encode() for i, text in theirs.special.items()}
        pieces = {i: piece for i, piece in pieces.items() if i not in self.pairs}
        for i, ids in zip(pieces, own.spell(list(pieces.values())), strict=True):
            spelled[i] = ids[-LONGEST:] or spelled[i]
        for i, own_id in self.pairs.items():
            spelled[i] = [own_id]
        return spelled

    def prompt(self, ids: Sequence[int], most: int) -> list[int]:
        """Tokens of the target in tokens of the draft, at least 1 and at most `most`: their text
        is encoded anew, special tokens one by one. Of what is longer the end is kept, after the
        token that begins a text if the draft's tokenizer puts one there."""
        if self.same:
            return [self.spellings[i][0] for i in ids[-most:]]
        theirs, own = self._target, self._draft
        bos = theirs.tokenizer.bos_token_id
        if ids[0] == bos and (own.beginning or bos not in self.pairs):
            ids = ids[1:]
        body: list[int] = []
        for special, part in groupby(ids, key=theirs.special.__contains__):
            if special:
                body += [own_id for i in part for own_id in self.spellings[i]]
            else:
                text = theirs.tokenizer.decode(list(part), clean_up_tokenization_spaces=False)
                body += own.encode([text])[0]
        room = max(1, most - len(own.beginning))
        return [*own.beginning, *body[-room:]][-most:] or [self._nothing]


def _with_rows(tokenizer: Any, size: int) -> dict[str, int]:
    """The tokens that a model of so many rows has."""
    return {token: i for token, i in tokenizer.get_vocab().items() if i < size}


def _texts(pieces: Sequence[bytes]) -> Iterator[tuple[bytes, str]]:
    """Those that are whole characters."""
    for piece in pieces:
        try:
            yield piece, piece.decode()
        except UnicodeDecodeError:
            continue


def _reader(description: dict[str, Any], name: str) -> Callable[[str], bytes | None]:
    """What makes bytes of the text of a token, or None if it is not written in its alphabet."""
    decoder = description["decoder"] or {"type": "none"}
    parts = decoder.get("decoders", [decoder])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        letters = byte_alphabet()

        def byte_level(text: str) -> bytes | None:
            known = all(letter in letters for letter in text)
            return bytes(letters[letter] for letter in text) if known else None

        return byte_level
    if kinds & {"Metaspace", "ByteFallback"} or any(
        part["type"] == "Replace" and part["pattern"] == {"String": SPACE} for part in parts
    ):

        def sentencepiece(text: str) -> bytes:
            byte = BYTE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()

        return sentencepiece
    reason = f"no telling which bytes its tokens stand for (decoder: {decoder['type']})"
    if "WordPiece" in kinds:
        reason = "its tokens are pieces of words (WordPiece) that do not say where spaces are"
    raise ValueError(
        f"{name}: {reason}; choose a model with byte-level BPE or of the sentencepiece kind"
    )

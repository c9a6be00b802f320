"""Stop strings: texts that end an output."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


class StopStrings:
    """Finds the token that completes one of them, as `generate` does: the last tokens of the
    prompt are part of the text.

    Args:
        strings: at least one.

    Raises:
        ValueError: an empty one.
    """

    def __init__(self, strings: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        if not all(strings):
            raise ValueError(f"stop_strings={list(strings)}: must be texts that are not empty")
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # A token is a byte at least; and some tokenizers drop the space that a text begins with.
        self._window = 1 + max(len(string.encode()) for string in strings)

    def end(self, before: Sequence[int], new: Sequence[int]) -> int | None:
        """How many of the new tokens it takes; None: they complete none."""
        window = before[-self._window :]
        text = self._text([*window, *new])
        if not any(string in text for string in self.strings):
            return None
        known = self._text(window)
        for count in range(1, len(new) + 1):
            text = self._text([*window, *new[:count]])
            length = len(known.rstrip(UNFINISHED))
            for string in self.strings:
                if text.find(string, max(0, length - len(string) + 1)) >= 0:
                    return count
            known = text
        return None

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

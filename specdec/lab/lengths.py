"""Prompts that are too long for a target: left out, or cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from specdec.lab.prompts import Prompt, encode, told_by_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = ("refuse", "skip", "truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What is asked of a set.

    Args:
        skipped: prompts that are left out.
        truncated: prompts of which the last tokens are asked.
        told: a line about both, empty if there are none.
    """

    prompts: list[Prompt]
    skipped: int = 0
    truncated: int = 0
    told: str = ""


def fitted(
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context: int,
    max_new_tokens: int,
    chat: str,
    too_long: str,
) -> Fitted:
    """Leave out or cut every prompt whose first turn and a whole answer do not fit the context.

    Of a text that is told as it is, the last tokens are kept; through a chat template, whose
    beginning would be lost, none is cut.

    Args:
        prompts: of a set.
        context: of the target, in tokens.
        max_new_tokens: of a prompt that does not say.
        chat: as in `encode`.
        too_long: `refuse` leaves all of them to whoever decodes them, `skip` leaves out, and
            `truncate` cuts.

    Raises:
        ValueError: nothing is left, or a prompt cannot be cut.
    """
    if too_long == "refuse" or max_new_tokens >= context:
        return Fitted(prompts=list(prompts))
    kept, touched = [], []
    for prompt in prompts:
        room = context - (prompt.max_new_tokens or max_new_tokens)
        tokens = len(encode(tokenizer, prompt, chat=chat))
        if tokens <= room:
            kept.append(prompt)
            continue
        touched.append(prompt.id)
        if too_long == "truncate":
            if room < 1 or told_by_template(tokenizer, prompt, chat):
                raise ValueError(_uncut(prompt, tokens, room, chat))
            kept.append(replace(prompt, keep=room))
    if not kept:
        raise ValueError(
            f"prompts.too_long=skip leaves none of {len(prompts)} prompts: with max_new_tokens="
            f"{max_new_tokens} none fits the context of {context}; lower it"
        )
    count = {"skip": "skipped", "truncate": "truncated"}[too_long]
    told = f"prompts.too_long={too_long}: {len(touched)} of {len(prompts)} prompts {count}"
    return Fitted(
        prompts=kept, told=f"{told}: {_some(touched)}" if touched else "", **{count: len(touched)}
    )


def _uncut(prompt: Prompt, tokens: int, room: int, chat: str) -> str:
    where = f"prompts.too_long=truncate: prompt {prompt.id!r}"
    if room < 1:
        return f"{where} wants {prompt.max_new_tokens} new tokens, the whole context; use skip"
    return (
        f"{where} has {tokens} tokens of at most {room}, and cutting it would cut its chat "
        f"template (prompts.chat={chat}); use skip, or prompts.chat=never"
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")

"""Conversations: which turns of which prompts are still to be decoded, and what is recorded of
them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.decode import Decoder
from specdec.lab.prompts import Prompt, encode
from specdec.lab.records import Record
from specdec.request import Decoding, Request

MAX_TURNS = 1000  # of a conversation, and
MAX_PROMPTS = 1_000_000  # of a set: they keep request numbers apart


@dataclass(slots=True, kw_only=True)
class Conversation:
    """A prompt on its way.

    Args:
        sample: which of several of the same prompt.
        answers: to the turns that are decoded.
    """

    prompt: Prompt
    sample: int
    answers: list[str]

    @property
    def number(self) -> int:
        """Unique in a run."""
        return self.sample * MAX_PROMPTS + self.prompt.index

    @property
    def finished(self) -> bool:
        return len(self.answers) == len(self.prompt.turns)


def prompt_of(request: int) -> tuple[int, int, int]:
    """Index of the prompt, sample and turn of a request."""
    conversation, turn = divmod(request, MAX_TURNS)
    sample, index = divmod(conversation, MAX_PROMPTS)
    return index, sample, turn


class Conversations:
    """Which turns are still to be decoded; a turn sees the answers to the turns before it.

    Args:
        tokenizer: of the target.
        prompts: each is asked `samples` times.
        chat: as in `encode`.
        max_new_tokens: of a turn.
        finished: records of the turns that are not to be decoded.
        marks: what every record says of its text besides, as in `Method.marks`.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        chat: str,
        max_new_tokens: int,
        finished: Sequence[Record],
        marks: Mapping[str, bool],
    ) -> None:
        self.tokenizer, self.chat, self.max_new_tokens = tokenizer, chat, max_new_tokens
        self._marks = marks
        answers: dict[tuple[int, int], list[str]] = {}
        for record in sorted(finished, key=lambda g: int(g["turn"])):
            answers.setdefault((record["prompt"], record["sample"]), []).append(record["text"])
        conversations = (
            Conversation(
                prompt=prompt, sample=sample, answers=answers.get((prompt.index, sample), [])
            )
            for prompt in prompts
            for sample in range(samples)
        )
        self.open = {c.number: c for c in conversations if not c.finished}
        self.turns = sum(len(c.prompt.turns) - len(c.answers) for c in self.open.values())

    def begin(self, decoder: Decoder) -> Iterator[Record]:
        """Ask the next turn of every conversation; yields records of what is skipped."""
        for conversation in self.open.values():
            yield from self._ask(decoder, conversation, first=False)

    def finish(self, decoder: Decoder, sequence: Decoding) -> Iterator[Record]:
        """A turn is decoded: yields its record and, once the next one is asked, of what is
        skipped."""
        assert sequence.finish_reason is not None
        conversation = self.open[sequence.request.id // MAX_TURNS]
        record = self._record(conversation, sequence, sequence.finish_reason)
        conversation.answers.append(record["text"])
        yield {**record, "accepted_lengths": sequence.accepted_lengths}
        yield from self._ask(decoder, conversation, first=True)

    def _ask(
        self, decoder: Decoder, conversation: Conversation, *, first: bool
    ) -> Iterator[Record]:
        """The next turn, if there is one; a turn that no longer fits is skipped."""
        limit, context = decoder.capacity.max_tokens, decoder.verifier.max_context
        while not conversation.finished:
            turn = len(conversation.answers)
            ids = encode(
                self.tokenizer, conversation.prompt, chat=self.chat, answers=conversation.answers
            )
            request = Request(
                id=conversation.number * MAX_TURNS + turn,
                prompt_ids=ids,
                max_new_tokens=self.max_new_tokens,
                category=conversation.prompt.category,
            )
            if len(ids) < limit and (request.max_tokens <= limit or limit == context):
                decoder.submit(request, first=first)
                return
            skipped = Decoding(request, row=0, tokens=ids)
            yield self._record(conversation, skipped, "context")
            conversation.answers.append("")

    def _record(self, conversation: Conversation, sequence: Decoding, reason: str) -> Record:
        request, output, steps = sequence.request, sequence.output_ids, sequence.steps
        index, sample, turn = prompt_of(request.id)
        return {
            "request": request.id,
            "prompt": index,
            "sample": sample,
            "turn": turn,
            "id": conversation.prompt.id,
            "category": conversation.prompt.category,
            "prompt_ids": list(request.prompt_ids),
            "output_ids": output,
            "text": self.tokenizer.decode(output, skip_special_tokens=True),
            "finish_reason": reason,
            "tokens": len(output),
            "steps": steps,
            "drafted": sequence.drafted,
            "accepted_length": len(output) / steps if steps else 0.0,
            **self._marks,
        }

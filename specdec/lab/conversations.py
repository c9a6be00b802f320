"""Conversations: which turns of which prompts are still to be decoded, and what is recorded of
them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.decode import Decoder
from specdec.lab.prompts import Prompt, encode, prompt_hash
from specdec.lab.records import Record
from specdec.lab.repetition import repetition
from specdec.request import Decoding, Request

# A request number has these fields in decimal, the lowest first: it seeds random numbers, and has
# to fit 63 bits. What is longer than the first two goes on in the last two.
TURNS, PROMPTS, SAMPLES = 10**3, 10**6, 10**6
MORE_TURNS, MORE_PROMPTS = 100, 92


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
    def key(self) -> tuple[int, int]:
        """Unique in a run."""
        return self.prompt.index, self.sample

    @property
    def finished(self) -> bool:
        return len(self.answers) == len(self.prompt.turns)


def number_of(index: int, sample: int, turn: int) -> int:
    """The number of a request: of index of the prompt, sample and turn."""
    more_prompts, index = divmod(index, PROMPTS)
    more_turns, turn = divmod(turn, TURNS)
    more = more_prompts * MORE_TURNS + more_turns
    return ((more * SAMPLES + sample) * PROMPTS + index) * TURNS + turn


def prompt_of(request: int) -> tuple[int, int, int]:
    """Index of the prompt, sample and turn of a request."""
    rest, turn = divmod(request, TURNS)
    rest, index = divmod(rest, PROMPTS)
    more, sample = divmod(rest, SAMPLES)
    more_prompts, more_turns = divmod(more, MORE_TURNS)
    return more_prompts * PROMPTS + index, sample, more_turns * TURNS + turn


def check_numbers(prompts: Sequence[Prompt], samples: int) -> None:
    """Raise ValueError for more than there are request numbers."""
    if samples > SAMPLES:
        raise ValueError(f"prompts.samples={samples}: at most {SAMPLES}")
    for prompt in prompts:
        if prompt.index >= MORE_PROMPTS * PROMPTS:
            raise ValueError(
                f"prompts.limit: a run has at most {MORE_PROMPTS * PROMPTS} prompts; set it lower"
            )
        if len(prompt.turns) > MORE_TURNS * TURNS:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.turns)} turns; a conversation has at most "
                f"{MORE_TURNS * TURNS}"
            )


class Conversations:
    """Which turns are still to be decoded; a turn sees the answers to the turns before it.

    Args:
        tokenizer: of the target.
        vocab_size: tokens that the target has.
        prompts: each is asked `samples` times.
        chat: as in `encode`.
        max_new_tokens: of a turn, where its prompt does not say.
        finished: records of the turns that are not to be decoded.
        marks: what every record says of its text besides, as in `Method.marks`.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        *,
        vocab_size: int,
        samples: int,
        chat: str,
        max_new_tokens: int,
        finished: Sequence[Record],
        marks: Mapping[str, bool],
    ) -> None:
        self.tokenizer, self.chat, self.max_new_tokens = tokenizer, chat, max_new_tokens
        self.vocab_size, self._marks = vocab_size, marks
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
        self.open = {c.key: c for c in conversations if not c.finished}
        self.turns = sum(len(c.prompt.turns) - len(c.answers) for c in self.open.values())

    def begin(self, decoder: Decoder) -> Iterator[Record]:
        """Ask the next turn of every conversation; yields records of what is skipped."""
        for conversation in self.open.values():
            yield from self._ask(decoder, conversation, first=False)

    def finish(self, decoder: Decoder, sequence: Decoding) -> Iterator[Record]:
        """A turn is decoded: yields its record and, once the next one is asked, of what is
        skipped."""
        assert sequence.finish_reason is not None
        conversation = self.open[prompt_of(sequence.request.id)[:2]]
        record = self._record(
            conversation, sequence, sequence.finish_reason, stop_tokens=decoder.stop_tokens
        )
        conversation.answers.append(record["text"])
        yield {**record, "accepted_lengths": sequence.accepted_lengths}
        yield from self._ask(decoder, conversation, first=True)

    def _ask(
        self, decoder: Decoder, conversation: Conversation, *, first: bool
    ) -> Iterator[Record]:
        """The next turn, if there is one; a turn that no longer fits is skipped, and one that an
        answer, encoded anew, gave a token that the target does not have."""
        limit, context = decoder.capacity.max_tokens, decoder.verifier.max_context
        while not conversation.finished:
            turn = len(conversation.answers)
            ids = encode(
                self.tokenizer, conversation.prompt, chat=self.chat, answers=conversation.answers
            )
            request = Request(
                id=number_of(*conversation.key, turn),
                prompt_ids=ids,
                max_new_tokens=conversation.prompt.max_new_tokens or self.max_new_tokens,
                category=conversation.prompt.category,
            )
            known = max(ids) < self.vocab_size
            if known and len(ids) < limit and (request.max_tokens <= limit or limit == context):
                decoder.submit(request, first=first)
                return
            skipped = Decoding(request, row=0, tokens=ids)
            yield self._record(conversation, skipped, "context" if known else "unknown_token")
            conversation.answers.append("")

    def _record(
        self,
        conversation: Conversation,
        sequence: Decoding,
        reason: str,
        stop_tokens: Collection[int] = (),
    ) -> Record:
        request, output, steps = sequence.request, sequence.output_ids, sequence.steps
        # What ends an answer is no part of it, whether or not its tokenizer calls it special.
        said = output[:-1] if output and output[-1] in stop_tokens else output
        index, sample, turn = prompt_of(request.id)
        return {
            "request": request.id,
            "prompt": index,
            "sample": sample,
            "turn": turn,
            "id": conversation.prompt.id,
            "category": conversation.prompt.category,
            "prompt_ids": list(request.prompt_ids),
            "prompt_hash": prompt_hash(request.prompt_ids),
            "repetition": repetition(output),
            "output_ids": output,
            "text": _writable(self.tokenizer.decode(said, skip_special_tokens=True)),
            "finish_reason": reason,
            "tokens": len(output),
            "steps": steps,
            "drafted": sequence.drafted,
            "accepted_length": len(output) / steps if steps else 0.0,
            **self._marks,
        }


def _writable(text: str) -> str:
    """The text in characters that a file can hold: a tokenizer may make half a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")

"""An experiment: the same prompts through plain decoding and through speculation, recorded and
compared.

Built by `run.py` from a config, or by hand from Python; nothing here knows about Hydra.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.decode import Decoder, Step
from specdec.graphs import Graphs
from specdec.lab.environment import describe_environment
from specdec.lab.lossless import compare, follow
from specdec.lab.metrics import summarise
from specdec.lab.prompts import Prompt, encode
from specdec.lab.records import Record, RunFolder, Side
from specdec.lab.terminal import Live
from specdec.lab.tracking import Tracker
from specdec.models.paged import PagedLM
from specdec.protocols import (
    AcceptanceRule,
    Capacity,
    Decoding,
    Drafter,
    DraftError,
    Request,
    Verifier,
)
from specdec.sampling import SamplingParams

MAX_TURNS = 1000  # of a conversation; keeps request numbers of different prompts apart
WARM_UP_TOKENS = 8
KV_DTYPES = {"auto": None, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """How the paged caches are laid out.

    Args:
        page_size: tokens of a page; None is 128 on a GPU, whose kernels like large ones, else 16.
        pages: pages of each cache; None is enough for the whole batch, or what the memory of the
            GPU holds.
        prefill_chunk: prompt tokens of a sequence that go through a model at a time.
        dtype: what the pages hold keys and values as: auto (the type of each model), fp8_e4m3 or
            int8.

    Raises:
        ValueError: a setting out of range.
    """

    page_size: int | None = None
    pages: int | None = None
    prefill_chunk: int = 512
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("page_size", "pages", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"cache.{name}={value}: must be at least 1")
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"cache.dtype={self.dtype}: must be {', '.join(KV_DTYPES)}")

    @property
    def kv_dtype(self) -> torch.dtype | None:
        return KV_DTYPES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to decode: a drafter and the rule that judges what it drafts."""

    drafter: Drafter
    rule: AcceptanceRule

    @property
    def synthetic(self) -> bool:
        """Whether the rule makes outputs that are not the target's, and says so."""
        return bool(getattr(self.rule, "synthetic", False))


@dataclass(slots=True, kw_only=True)
class Experiment:
    """Everything one run needs; `run` does it.

    Args:
        target: the target model, with a tokenizer.
        verifier: makes a verifier of the target; each side of the comparison gets its own.
        method: what is studied.
        baseline: what it is compared to; None for no comparison.
        prompts: what is decoded.
        chat: when a chat template is applied: auto, always or never.
        labels: what the summary calls drafter, target, acceptance, tree and kernels.

    Raises:
        ValueError: a setting out of range, or a prompt that does not fit the target.
    """

    target: PagedLM
    verifier: Callable[[], Verifier]
    method: Method
    baseline: Method | None
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    cache: CacheSettings = field(default_factory=CacheSettings)
    max_new_tokens: int = 128
    batch_size: int = 1
    stop_tokens: Collection[int] = ()
    chat: str = "auto"
    labels: dict[str, str] = field(default_factory=dict)
    capacity: Capacity = field(init=False)
    _graphs: Graphs | None = field(init=False, default=None)  # of the side decoded last
    _resumed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        context = self.target.max_context
        longest = 0
        for prompt in self.prompts:
            ids = encode(self.target.tokenizer, prompt, chat=self.chat)
            if len(ids) >= context:
                raise ValueError(
                    f"prompt {prompt.id}: {len(ids)} tokens leave no room in the context of "
                    f"{context}; shorten it, or leave it out with prompts.limit"
                )
            later = len(prompt.turns) - 1
            if later:
                # Later turns hold answers that do not exist yet, and may grow when encoded anew.
                ids = encode(self.target.tokenizer, prompt, chat=self.chat, answers=[""] * later)
                longest = max(longest, 2 * (len(ids) + later * self.max_new_tokens))
            longest = max(longest, len(ids) + self.max_new_tokens)
        self.capacity = Capacity(
            rows=self.batch_size,
            max_tokens=min(longest, context),
            page_size=self.cache.page_size or (128 if self.target.device.type == "cuda" else 16),
            pages=self.cache.pages,
        )

    def run(self, folder: RunFolder, tracker: Tracker, live: Live) -> Record:
        """Decode everything that `folder` does not hold yet, and write its summary.

        An interruption (KeyboardInterrupt) writes the summary of what is finished and goes on its
        way.

        Returns:
            The summary.

        Raises:
            ValueError: the drafter failed; what is finished is written.
        """
        folder.begin()
        self._resumed = any(side.generations.records for side in folder.sides)
        reset, finished = self.method.drafter.reset, len(folder.main.generations.records)
        if finished and reset not in (None, "prompt"):
            live.console.print(
                f"resumed: what the {finished} finished texts taught the drafter "
                f"(drafter.reset={reset}) is missing",
                soft_wrap=True,
            )
        try:
            if self.baseline is not None and folder.baseline is not None:
                self._decode(self.baseline, folder.baseline, live, "baseline", lambda step: None)
            self._decode(self.method, folder.main, live, "speculative", tracker.step)
        except KeyboardInterrupt:
            self._finish(folder, tracker, interrupted=True)
            raise
        except DraftError as error:
            path = folder.write_error(error)
            self._finish(folder, tracker, interrupted=True)
            raise ValueError(
                f"{self._blame(error)}; the traceback is in {path}, and "
                f"resume=true out={folder.path} continues"
            ) from error
        finally:
            folder.close()
        return self._finish(folder, tracker, interrupted=False)

    def _finish(self, folder: RunFolder, tracker: Tracker, *, interrupted: bool) -> Record:
        summary = self._summarise(folder, interrupted=interrupted)
        folder.write_summary(summary)  # whatever becomes of the check, which takes passes
        summary["lossless"] = self._check(folder, interrupted=interrupted)
        folder.write_summary(summary)
        tracker.finish(summary, folder.main.generations.records)
        return summary

    def _blame(self, error: DraftError) -> str:
        """Which drafter failed on which prompts, and why, in one line."""
        ids = {prompt.index: prompt.id for prompt in self.prompts}
        failed = dict.fromkeys(ids[request // MAX_TURNS] for request in error.requests)
        which = "prompt" if len(failed) == 1 else "one of prompts"
        reason = " ".join(error.reason.split())
        return f"drafter={error.drafter} failed on {which} {', '.join(failed)}: {reason}"

    def _decode(
        self, method: Method, side: Side, live: Live, title: str, on_step: Callable[[Step], None]
    ) -> None:
        """Decode what one side of the comparison has not decoded yet."""
        queue = _Conversations(self, side.generations.records, synthetic=method.synthetic)
        if not queue.open:
            return
        decoder = Decoder(
            verifier=self.verifier(),
            drafter=method.drafter,
            rule=method.rule,
            sampling=self.sampling,
            max_context=self.target.max_context,
            device=self.target.device,
            kernels=self.target.kernels,
            batch_size=self.batch_size,
            stop_tokens=self.stop_tokens,
            max_tokens=self.capacity.max_tokens,
            page_size=self.capacity.page_size,
            pages=self.cache.pages,
            kv_dtype=self.cache.kv_dtype,
        )
        self._warm_up(decoder)
        self._graphs = decoder.graphs

        def record(step: Step) -> None:
            side.steps.append(step.record(), flush=False)
            on_step(step)
            live.step(step)

        with live.side(title, queue.turns):
            for conversation in queue.open.values():
                queue.submit(decoder, conversation, first=False)
            for generation in queue.skipped():
                side.generations.append(generation)
            for sequence in decoder.run(on_step=record):
                side.steps.flush()
                side.generations.append(queue.finish(sequence))
                queue.submit(decoder, queue.open[sequence.request.id // MAX_TURNS], first=True)
                for generation in queue.skipped():
                    side.generations.append(generation)
                live.finished()

    def _warm_up(self, decoder: Decoder) -> None:
        """A few tokens that are not recorded, so that the first prompt does not pay for lazy
        set-up."""
        ids = encode(self.target.tokenizer, self.prompts[0], chat=self.chat)
        try:
            decoder.warm_up(ids, min(WARM_UP_TOKENS, self.max_new_tokens))
        except DraftError as error:
            first = self.prompts[0].index * MAX_TURNS
            reason = f"{error.reason}, while warming up"
            raise DraftError(error.drafter, [first], reason) from error

    def _summarise(self, folder: RunFolder, *, interrupted: bool) -> Record:
        main = folder.main
        mine = main.generations.records
        summary: Record = {
            **self.labels,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "batch_size": self.batch_size,
            **summarise(mine, main.steps.records),
            "synthetic": self.method.synthetic,
            "state": {"reset": self.method.drafter.reset},
            "resumed": self._resumed,
            "interrupted": interrupted,
        }
        if self._graphs is not None:
            summary["graphs"] = {"counts": self._graphs.counts, "obstacle": self._graphs.obstacle}
        baseline = folder.baseline
        if baseline is not None:
            summary["baseline"] = summarise(baseline.generations.records, baseline.steps.records)
            theirs = summary["baseline"]["tokens_per_second"]
            summary["speedup"] = summary["tokens_per_second"] / theirs if theirs else None
        summary["lossless"] = {"refused": "the check was interrupted"}
        return {**summary, **describe_environment(self.target.device)}

    def _check(self, folder: RunFolder, *, interrupted: bool) -> Record:
        """What becomes of losslessness: texts against the baseline's, or the target's
        distributions."""
        if self.method.synthetic:
            return {"refused": "SYNTHETIC acceptance: outputs are not the target's"}
        mine, kv_dtype = folder.main.generations.records, self.cache.kv_dtype
        if self.sampling.greedy:
            theirs = folder.baseline.generations.records if folder.baseline is not None else []
            return compare(mine, theirs, self.target, kv_dtype=kv_dtype)
        if interrupted:
            return {"refused": "the run was interrupted"}
        try:
            return follow(mine, self.target, self.sampling, kv_dtype=kv_dtype)
        except torch.OutOfMemoryError:
            return {"refused": "no memory is left for passes over the texts"}


@dataclass(slots=True, kw_only=True)
class _Conversation:
    prompt: Prompt
    answers: list[str]


class _Conversations:
    """Which turns are still to be decoded; a turn sees the answers to the turns before it.

    Args:
        finished: records of the turns that are not.
        synthetic: mark every record as such.
    """

    def __init__(
        self, experiment: Experiment, finished: Sequence[Record], *, synthetic: bool = False
    ) -> None:
        self.experiment = experiment
        self._marks: Record = {"synthetic": True} if synthetic else {}
        self.tokenizer: Any = experiment.target.tokenizer
        answers: dict[int, list[str]] = {}
        for generation in sorted(finished, key=lambda g: int(g["turn"])):
            answers.setdefault(generation["prompt"], []).append(generation["text"])
        conversations = [
            _Conversation(prompt=prompt, answers=answers.get(prompt.index, []))
            for prompt in experiment.prompts
        ]
        self.open = {
            c.prompt.index: c for c in conversations if len(c.answers) < len(c.prompt.turns)
        }
        self.turns = sum(len(c.prompt.turns) - len(c.answers) for c in self.open.values())
        self._skipped: list[Record] = []

    def submit(self, decoder: Decoder, conversation: _Conversation, *, first: bool) -> None:
        """Ask the next turn, if there is one; a turn that no longer fits is recorded as
        skipped."""
        prompt, experiment = conversation.prompt, self.experiment
        while len(conversation.answers) < len(prompt.turns):
            turn = len(conversation.answers)
            ids = encode(
                self.tokenizer, prompt, chat=experiment.chat, answers=conversation.answers
            )
            request = Request(
                id=prompt.index * MAX_TURNS + turn,
                prompt_ids=ids,
                max_new_tokens=experiment.max_new_tokens,
                category=prompt.category,
            )
            limit = experiment.capacity.max_tokens
            if len(ids) < limit and (request.max_tokens <= limit or limit == decoder.max_context):
                decoder.submit(request, first=first)
                return
            self._skipped.append(self._record(request, [], steps=0, drafted=0, reason="context"))
            conversation.answers.append("")

    def skipped(self) -> list[Record]:
        """Turns skipped since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def finish(self, sequence: Decoding) -> Record:
        """The record of a decoded turn, whose answer the next turn will see."""
        assert sequence.finish_reason is not None
        record = self._record(
            sequence.request,
            sequence.output_ids,
            steps=sequence.steps,
            drafted=sequence.drafted,
            reason=sequence.finish_reason,
        )
        self.open[record["prompt"]].answers.append(record["text"])
        return {**record, "accepted_lengths": sequence.accepted_lengths}

    def _record(
        self, request: Request, output: list[int], *, steps: int, drafted: int, reason: str
    ) -> Record:
        index, turn = divmod(request.id, MAX_TURNS)
        prompt = self.open[index].prompt
        return {
            "request": request.id,
            "prompt": index,
            "turn": turn,
            "id": prompt.id,
            "category": prompt.category,
            "prompt_ids": list(request.prompt_ids),
            "output_ids": output,
            "text": self.tokenizer.decode(output, skip_special_tokens=True),
            "finish_reason": reason,
            "tokens": len(output),
            "steps": steps,
            "drafted": drafted,
            "accepted_length": len(output) / steps if steps else 0.0,
            **self._marks,
        }


def stop_tokens(target: PagedLM, *, ignore_eos: bool) -> list[int]:
    """The tokens that end a text, by the target's own generation settings; none with
    `ignore_eos`."""
    eos = None if ignore_eos else target.model.generation_config.eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]


def choose_device(name: str) -> torch.device:
    """auto is CUDA where there is some. A GPU chosen by number becomes the current one: Triton
    launches its kernels there.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device={name}: not available here; use auto, cpu or cuda") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: not a floating type of models.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name}: must be auto, float64, float32, bfloat16 or float16")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype

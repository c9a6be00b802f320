"""An experiment: the same prompts through plain decoding and through speculation, recorded and
compared.

Built by `run.py` from settings, or by hand from Python.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from specdec.flight import Step
from specdec.lab.conversations import Conversations, check_numbers, number_of, prompt_of
from specdec.lab.environment import describe_environment
from specdec.lab.fit import check_fit, check_memory
from specdec.lab.lossless import verdict
from specdec.lab.method import MARKS, Method, mark_of
from specdec.lab.metrics import speedup_interval, summarise
from specdec.lab.prompts import Prompt, encode
from specdec.lab.records import Record, RecordSettings, step_record
from specdec.lab.runs import SCHEMA, RunFolder, Side
from specdec.lab.session import OurSession
from specdec.lab.terminal import Live
from specdec.lab.tracking import Tracker, replay
from specdec.lab.witness import Witness
from specdec.models.generation import own_settings, stop_strings_of
from specdec.models.paged import PagedLM
from specdec.processors import Processors
from specdec.protocols import DraftError, LogitsError
from specdec.request import CacheSettings, Capacity
from specdec.stop_strings import StopStrings

WARM_UP_TOKENS = 8


@dataclass(slots=True, kw_only=True)
class Experiment:
    """Everything one run needs; `run` does it.

    Args:
        target: the target model, with a tokenizer.
        method: what is studied, loaded.
        baseline: what it is compared to, with the same sampling; None for no comparison.
        prompts: what is decoded.
        samples: how often each of them is.
        stop_tokens: what ends an output, and
        stop_strings: texts that do; None for those of the target's own generation settings.
        chat: when a chat template is applied: auto, always or never.
        label: what the summary calls the target.
        too_long: how many prompts of the set were `skipped` and `truncated`.
        record: what is recorded besides texts and steps.

    Raises:
        ValueError: a setting out of range, a prompt that does not fit the target, or a target that
            asks for what cannot be done to its logits.
    """

    target: PagedLM
    method: Method
    baseline: Method | None
    prompts: Sequence[Prompt]
    samples: int = 1
    cache: CacheSettings = field(default_factory=CacheSettings)
    max_new_tokens: int = 128
    batch_size: int = 1
    stop_tokens: Collection[int] = ()
    stop_strings: Sequence[str] | None = None
    chat: str = "auto"
    label: str = ""
    too_long: Mapping[str, int] = field(default_factory=dict)
    record: RecordSettings = field(default_factory=RecordSettings)
    capacity: Capacity = field(init=False)
    processors: Processors = field(init=False)
    _ends: StopStrings | None = field(init=False)
    _own: dict[str, list[str]] = field(init=False)  # generation settings of the target
    _notes: Record = field(init=False, default_factory=dict)  # of the side decoded last
    _resumed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        check_fit(self.target, self.method.tree, self.max_new_tokens)
        check_numbers(self.prompts, self.samples)
        config, sampling = self.target.model.generation_config, self.method.sampling
        self.processors = self.method.processors(self.target, self.stop_tokens)
        self._own = own_settings(config, sampling)
        strings = self.stop_strings
        if strings is None:
            strings = stop_strings_of(config, sampling)
        self._ends = StopStrings(strings, self.target.tokenizer) if strings else None
        self.capacity = self.cache.capacity(
            rows=self.batch_size, max_tokens=self._longest(), device=self.target.device
        )
        check_memory(self.target, self.method.tree, self.capacity)

    def _longest(self) -> int:
        """Tokens that a sequence may have.

        Raises:
            ValueError: a prompt that leaves no room for an answer, or has tokens that the target
                has no row for.
        """
        context = self.target.max_context
        longest = 0
        for prompt in self.prompts:
            ids = encode(self.target.tokenizer, prompt, chat=self.chat)
            self.target.check_tokens(ids, f"prompt {prompt.id!r}")
            if len(ids) >= context:
                raise ValueError(
                    f"prompt {prompt.id!r}: {len(ids)} tokens leave no room in the context of "
                    f"{context}; use prompts.too_long=skip or truncate, or shorten it"
                )
            later, new = len(prompt.turns) - 1, prompt.max_new_tokens or self.max_new_tokens
            if later:
                # Later turns hold answers that do not exist yet, and may grow when encoded anew.
                ids = encode(self.target.tokenizer, prompt, chat=self.chat, answers=[""] * later)
                self.target.check_tokens(ids, f"prompt {prompt.id!r}")
                longest = max(longest, 2 * (len(ids) + later * new))
            longest = max(longest, len(ids) + new)
        return min(longest, context)

    @property
    def resolved(self) -> dict[str, Any]:
        """What settings that may be left open have come to, by their names."""
        target = self.target
        return {
            "device": str(target.device),
            "dtype": str(target.dtype).removeprefix("torch."),
            "kernels.impl": target.kernels.impl,
            "acceptance": self.method.rule.name,
            "tree.children": self.method.tree.children,
            "cache.page_size": self.capacity.page_size,
        }

    def run(self, folder: RunFolder, tracker: Tracker, live: Live) -> Record:
        """Decode everything that `folder` does not hold yet, and write its summary.

        An interruption (KeyboardInterrupt) writes the summary of what is finished and goes on its
        way.

        Returns:
            The summary.

        Raises:
            ValueError: the drafter failed, or the target's logits are NaN; what is finished is
                written.
        """
        folder.begin()
        self._tell_own(live)
        self._resumed = any(side.generations.records for side in folder.sides)
        reset, finished = self.method.drafter.reset, len(folder.main.generations.records)
        if finished and reset not in (None, "prompt"):
            live.console.print(
                f"resumed: what the {finished} finished texts taught the drafter "
                f"(drafter.reset={reset}) is missing",
                soft_wrap=True,
            )
        for note in folder.notes:
            live.console.print(f"resumed: {note}", soft_wrap=True)
        replay(folder.main.steps.records, tracker)
        try:
            if self.baseline is not None and folder.baseline is not None:
                self._decode(self.baseline, folder.baseline, live, "baseline", lambda step: None)
            title = f"{mark_of(self.method.marks)} speculative".strip()
            self._decode(self.method, folder.main, live, title, tracker.step)
        except KeyboardInterrupt:
            self._finish(folder, tracker, interrupted=True)
            raise
        except (DraftError, LogitsError) as error:
            path = folder.write_error(error)
            self._finish(folder, tracker, interrupted=True)
            left = f"resume=true out={folder.path} continues"
            if isinstance(error, LogitsError):  # it would fail again
                left = f"{folder.finished} finished texts are in {folder.path}"
            raise ValueError(
                f"{self._blame(error)}; the traceback is in {path}, and {left}"
            ) from error
        return self._finish(folder, tracker, interrupted=False)

    def _tell_own(self, live: Live) -> None:
        """What becomes of generation settings that the target brings."""
        for what, own in self._own.items():
            if own:
                said = f"{', '.join(own)} {'is' if len(own) == 1 else 'are'}"
                live.console.print(
                    f"sampling: the model's own {said} {what.replace('_', ' ')}",
                    soft_wrap=True,
                    markup=False,
                )

    def _finish(self, folder: RunFolder, tracker: Tracker, *, interrupted: bool) -> Record:
        summary = self._summarise(folder, interrupted=interrupted)
        folder.write_summary(summary)  # whatever becomes of the check, which takes passes
        summary["lossless"] = self._check(folder, interrupted=interrupted)
        folder.write_summary(summary)
        tracker.finish(summary, folder.main.generations.records)
        return summary

    def _blame(self, error: DraftError | LogitsError) -> str:
        """What failed on which prompts, and why, in one line."""
        ids = {prompt.index: prompt.id for prompt in self.prompts}
        failed = dict.fromkeys(ids[prompt_of(request)[0]] for request in error.requests)
        which, reason = ", ".join(failed), " ".join(error.reason.split())
        if isinstance(error, LogitsError):
            return f"{self.target.name}: prompt {which}, {reason}: {self.target.not_finite}"
        prompts = "prompt" if len(failed) == 1 else "one of prompts"
        return f"drafter={error.drafter} failed on {prompts} {which}: {reason}"

    def _decode(
        self, method: Method, side: Side, live: Live, title: str, on_step: Callable[[Step], None]
    ) -> None:
        """Decode what one side of the comparison has not decoded yet."""
        queue = Conversations(
            self.target.tokenizer,
            self.prompts,
            vocab_size=self.target.vocab_size,
            samples=self.samples,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
            finished=side.generations.records,
            marks=method.marks,
        )
        if not queue.open:
            return
        trees = self.record.trees if method is self.method else 0  # plain ones are roots alone
        session = OurSession(
            method, self.target, self.capacity, self.stop_tokens, self._ends, trees
        )
        for name, note in method.tree.notes.items():
            live.console.print(f"tree.{name}: {note}", soft_wrap=True, markup=False)
        self._warm_up(session)
        try:
            self._run(session, queue, side, live, title, on_step)
        finally:
            self._notes = session.notes()  # and no more of it: its caches take much memory

    def _run(
        self,
        session: OurSession,
        queue: Conversations,
        side: Side,
        live: Live,
        title: str,
        on_step: Callable[[Step], None],
    ) -> None:
        decoder = session.decoder

        def record(step: Step) -> None:
            for tree in step.trees:
                side.trees.append(asdict(tree), flush=False)
            side.steps.append(step_record(step), flush=False)
            on_step(step)
            live.step(step)

        with live.side(title, queue.turns):
            for generation in queue.begin(decoder):
                side.generations.append(generation)
            for sequence in decoder.run(on_step=record):
                side.flush()
                for generation in queue.finish(decoder, sequence):
                    side.generations.append(generation)
                live.finished()

    def _warm_up(self, session: OurSession) -> None:
        """A few tokens that are not recorded, so that the first prompt does not pay for lazy
        set-up."""
        ids = encode(self.target.tokenizer, self.prompts[0], chat=self.chat)
        try:
            session.warm_up(ids, min(WARM_UP_TOKENS, self.max_new_tokens))
        except (DraftError, LogitsError) as error:
            error.requests = [number_of(self.prompts[0].index, 0, 0)]
            error.reason += ", while warming up"
            raise

    def _summarise(self, folder: RunFolder, *, interrupted: bool) -> Record:
        main = folder.main
        mine, sampling = main.generations.records, self.method.sampling
        summary: Record = {
            "schema": SCHEMA,
            **self.method.labels,
            **({"own": dict(self.method.own)} if self.method.own else {}),
            "target": self.label,
            "kernels": self.target.kernels.impl,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "generation_config": self._own,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "too_long": {"skipped": 0, "truncated": 0, **self.too_long},
            **summarise(mine, main.steps.records),
            **dict.fromkeys(MARKS, False),
            **self.method.marks,
            "state": {"reset": self.method.drafter.reset},
            "resumed": self._resumed,
            "interrupted": interrupted,
        }
        summary |= self._notes
        baseline = folder.baseline
        if baseline is not None:
            summary["baseline"] = summarise(baseline.generations.records, baseline.steps.records)
            theirs = summary["baseline"]["tokens_per_second"]
            summary["speedup"] = summary["tokens_per_second"] / theirs if theirs else None
            sides = ((side.generations.records, side.steps.records) for side in (main, baseline))
            summary["speedup_interval"] = speedup_interval(*sides)
        summary["lossless"] = _not_checked("the check was interrupted")
        return {**summary, **describe_environment(self.target.device)}

    def _check(self, folder: RunFolder, *, interrupted: bool) -> Record:
        """What becomes of losslessness."""
        rule, sampling = self.method.rule, self.method.sampling
        if rule.synthetic:
            return _not_checked("SYNTHETIC acceptance: outputs are not the target's")
        if interrupted:
            return _not_checked("the run was interrupted")
        baseline = folder.baseline
        try:
            return verdict(
                folder.main.generations.records,
                Witness(self.target, self.capacity.kv_dtype, self.processors),
                sampling,
                baseline=None if baseline is None else baseline.generations.records,
                lossy=rule.lossy(self.method.tree.children, sampling),
            )
        except torch.OutOfMemoryError:
            return _not_checked("no memory is left for passes over the texts")


def _not_checked(reason: str) -> Record:
    return {"verdict": "not checked", "reason": reason}


def stop_tokens(target: PagedLM, *, ignore_eos: bool) -> list[int]:
    """The tokens that end a text, by the target's own generation settings; none with
    `ignore_eos`.

    Raises:
        ValueError: they are no tokens.
    """
    eos = None if ignore_eos else target.model.generation_config.eos_token_id
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in found):
        raise ValueError(
            f"ignore_eos=false: eos_token_id={eos!r} of the model's generation_config is no "
            f"token; use ignore_eos=true, or write its number there"
        )
    return list(found)

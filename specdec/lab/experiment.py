"""An experiment: the same prompts through plain decoding and through speculation, recorded and
compared.

Built by `run.py` from settings, or by hand from Python.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdec.lab.audit import Evidence
from specdec.lab.baselines import SharedBaseline
from specdec.lab.conversations import check_numbers
from specdec.lab.course import Course
from specdec.lab.environment import describe_environment
from specdec.lab.fit import check_fit, check_memory
from specdec.lab.lossless import verdict
from specdec.lab.method import MARKS, Method
from specdec.lab.metrics import speedup_interval, summarise
from specdec.lab.progress import Live
from specdec.lab.prompts import Prompt, encode
from specdec.lab.records import Record, RecordSettings
from specdec.lab.runs import SCHEMA, RunFolder, Side
from specdec.lab.session import OurSession
from specdec.lab.templates import template_hash
from specdec.lab.tracking import Tracker
from specdec.lab.witness import Witness, drafts_of
from specdec.models.generation import own_settings, stop_strings_of
from specdec.models.paged import PagedLM
from specdec.prefixes import Prefixes
from specdec.processors import Processors
from specdec.request import CacheSettings, Capacity
from specdec.stop_strings import StopStrings

Records = tuple[list[Record], list[Record]]  # generations and steps


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
    own: dict[str, list[str]] = field(init=False)  # generation settings of the target
    _ends: StopStrings | None = field(init=False)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        check_fit(self.target, self.method.tree, self.max_new_tokens)
        check_numbers(self.prompts, self.samples)
        config, sampling = self.target.model.generation_config, self.method.sampling
        self.processors = self.method.processors(self.target, self.stop_tokens)
        self.own = own_settings(config, sampling)
        strings = self.stop_strings
        if strings is None:
            strings = stop_strings_of(config, sampling)
        self._ends = StopStrings(strings, self.target.tokenizer) if strings else None
        self.capacity = self.cache.capacity(
            rows=self.batch_size,
            max_tokens=self._longest(),
            device=self.target.device,
            states=self.method.drafter.reads_states,
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
            "cache.share": self.capacity.share,
            "chat_template": template_hash(target.tokenizer),
        }

    def run(
        self,
        folder: RunFolder,
        tracker: Tracker,
        live: Live,
        shared: SharedBaseline | None = None,
    ) -> Record:
        """Decode everything that `folder` does not hold yet, and write its summary.

        An interruption (KeyboardInterrupt) writes the summary of what is finished and goes on its
        way.

        Args:
            shared: plain decoding of the sweep that it belongs to.

        Returns:
            The summary.

        Raises:
            ValueError: the drafter failed, or the target's logits are NaN; what is finished is
                written.
        """
        return Course(self, folder, tracker, live, shared).run()

    def session(
        self,
        method: Method,
        *,
        longest: int | None = None,
        stops: bool = True,
        prefixes: Prefixes | None = None,
    ) -> OurSession:
        """A decoder of one of the two methods, or of both sides' plain decoding.

        Args:
            longest: tokens that a sequence may have; None for those of the run.
            stops: whether texts end before they are as long as they may be.
            prefixes: as in `Method.decoder`.
        """
        capacity = self.capacity
        if longest is not None:
            capacity = replace(capacity, max_tokens=longest)
        return OurSession(
            method,
            self.target,
            capacity,
            stop_tokens=self.stop_tokens if stops else (),
            stop_strings=self._ends if stops else None,
            trees=self.record.trees if method is self.method else 0,  # plain ones are roots alone
            evidence=self.record.evidence,
            prefixes=prefixes,
        )

    def summarise(self, side: Side, plain: Records | None) -> Record:
        """The figures of what a side holds, beside those of plain decoding."""
        mine, sampling = (side.generations.records, side.steps.records), self.method.sampling
        summary: Record = {
            "schema": SCHEMA,
            **self.method.labels,
            **({"own": dict(self.method.own)} if self.method.own else {}),
            "target": self.label,
            "quantised": self.target.quantised,
            "kernels": self.target.kernels.impl,
            "exact": self.target.kernels.exact,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "generation_config": self.own,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "too_long": {"skipped": 0, "truncated": 0, **self.too_long},
            **summarise(*mine),
            **dict.fromkeys(MARKS, False),
            **self.method.marks,
            "state": {"reset": self.method.drafter.reset},
        }
        if plain is not None:
            summary["baseline"] = summarise(*plain)
            theirs = summary["baseline"]["tokens_per_second"]
            summary["speedup"] = summary["tokens_per_second"] / theirs if theirs else None
            summary["speedup_interval"] = speedup_interval(mine, plain)
        summary["lossless"] = _not_checked("the check was interrupted")
        return {**summary, **describe_environment(self.target.device)}

    def check(
        self,
        side: Side,
        plain: Records | None,
        evidence: Sequence[Record] = (),
        *,
        interrupted: bool,
    ) -> Record:
        """What becomes of losslessness, plain decoding having left this evidence."""
        rule, sampling = self.method.rule, self.method.sampling
        if rule.synthetic:
            return _not_checked("SYNTHETIC acceptance: outputs are not the target's")
        if interrupted:
            return _not_checked("the run was interrupted")
        try:
            return verdict(
                side.generations.records,
                self._witness(),
                sampling,
                baseline=None if plain is None else plain[0],
                lossy=rule.lossy(self.method.tree.children, sampling),
                exact=self.target.kernels.exact,
                evidence=self._evidence(side, evidence),
            )
        except torch.OutOfMemoryError:
            return _not_checked("no memory is left for passes over the texts")

    def _evidence(self, side: Side, plain: Sequence[Record]) -> Evidence | None:
        """What was recorded, if anything was to be."""
        if not self.record.evidence:
            return None
        return Evidence(
            lines=side.evidence.records,
            page_size=self.capacity.page_size,
            stop_tokens=self.stop_tokens,
            baseline=plain,
        )

    def _witness(self) -> Witness:
        draft = None if self.method.sampling.greedy else self.method.drafter.own_model
        drafts = drafts_of(draft, self.target)
        return Witness(self.target, self.capacity.kv_dtype, self.processors, drafts)


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

"""Audit: does what the verifying pass said of each token agree with what another pass says of it?

Their differences are rounding if all is well, at any temperature. A wrong bit of a mask, a wrong
position or a stale row of the cache moves logits by orders of magnitude more, whatever became of
the tokens, so that nothing waits for a text to part from another. How much rounding does is
measured here and now, with this model: by decoding a text plainly.

The first tokens of texts that are beyond it are counted by what was known of them before they were
chosen (`strata`), which names most faults: one in the mask or the positions of trees leaves roots
alone, one in the commit begins at the second step of a text, one in pages where a page does or
where a text found some. What comes later in a text has met what that one left in the cache.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from specdec.evidence import numbers_in, numbers_of
from specdec.lab.bets import group_of, places_of
from specdec.lab.witness import Witness, noise, own_logits, precision

Record = Mapping[str, Any]
Array = NDArray[np.float64]
SUSPECT, BUG = 3.0, 10.0  # times what rounding was measured to do
PLAIN = 128  # tokens that it is measured by
APART = 30.0  # times what shapes of passes do, that plain decoding over pages may differ by
NAMED = 0.01  # chance by which a stratum has as many faults


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was recorded of texts.

    Args:
        lines: of evidence.jsonl, in the order in which texts ended.
        page_size: of the cache.
        stop_tokens: which end a text, so that none lies within one.
        baseline: lines of plain decoding.
    """

    lines: Sequence[Record]
    page_size: int
    stop_tokens: Collection[int] = ()
    baseline: Sequence[Record] = ()

    @cached_property
    def by_request(self) -> dict[int, Record]:
        return {line["request"]: line for line in self.lines}

    @cached_property
    def of_baseline(self) -> dict[int, Record]:
        return {line["request"]: line for line in self.baseline}

    @cached_property
    def later(self) -> set[int]:
        """Requests that were decoded in a row of the batch after others."""
        used: set[int] = set()
        found = set()
        for line in self.lines:
            if line["row"] in used:
                found.add(line["request"])
            used.add(line["row"])
        return found


class Stratum(NamedTuple):
    """Tokens with something in common, among which there are more faults than elsewhere.

    Attributes:
        name: what they have in common.
        faulty, tokens: how many are, of how many.
        chance: of so many, were faults at any tokens; of what is known of whole texts, in any
            texts.
    """

    name: str
    faulty: int
    tokens: int
    chance: float


class Risk(NamedTuple):
    """A text up to its first faulty token, the last one here if it is `faulty`.

    Attributes:
        tokens: what was known of each.
        whole: what was known of all of them.
    """

    tokens: tuple[tuple[str, ...], ...]
    whole: tuple[str, ...]
    faulty: bool


@dataclass(kw_only=True)
class Audit:
    """Compares texts with their evidence, one after the other as they are read.

    Args:
        evidence: what was recorded.
        witness: who reads them.
        best: whether each token must be the most probable one of its own pass.
    """

    evidence: Evidence
    witness: Witness
    best: bool = False
    texts: list[Record] = field(default_factory=list, init=False)
    apart: list[Array] = field(default_factory=list, init=False)  # [n] units between the passes
    not_best: int = field(default=0, init=False)

    @cached_property
    def rounding(self) -> float:
        """Units in the last place that rounding does, by the texts read so far."""
        return rounding_of(self.witness, self.texts)

    def add(self, text: Record, theirs: Tensor) -> None:
        """A text that was read: [n, 4] what the witness says of its tokens.

        Raises:
            ValueError: evidence of another text.
        """
        line = self.evidence.by_request.get(text["request"])
        if line is None:
            return
        numbers = _numbers(line, text)
        apart = units_between(numbers, theirs.cpu(), self.witness.target.dtype)
        if self.best:
            self.not_best += int((numbers[:, 0] < numbers[:, 1]).sum())
        self.texts.append(text)
        self.apart.append(apart)

    def at(
        self, text: Record, place: int, scores: Tensor, *, baseline: bool = False
    ) -> float | None:
        """By how many times what rounding does a pass was off at a token that it took for the
        best, by the witness's scores [V] there; infinite if it did not; None without evidence."""
        lines = self.evidence.of_baseline if baseline else self.evidence.by_request
        line = lines.get(text["request"])
        if line is None:
            return None
        numbers = _numbers(line, text)[place : place + 1]
        if numbers[0, 0] < numbers[0, 1]:
            return np.inf
        token = torch.tensor([text["output_ids"][place]], device=scores.device)
        theirs = numbers_of(scores[None], token).cpu()
        units = units_between(numbers, theirs, self.witness.target.dtype)
        return float(units[0]) / self.rounding

    def _strata(self, texts: Iterable[Record]) -> list[Stratum]:
        """Of tokens up to the first of each text that is too far apart: what that one leaves in
        the cache is met by all after it."""
        size, risks = self.evidence.page_size, []
        alike = begun_alike(texts, size)
        for text, apart in zip(self.texts, self.apart, strict=True):
            request, beyond = text["request"], np.flatnonzero(apart > SUSPECT * self.rounding)
            end = int(beyond[0]) + 1 if len(beyond) else len(apart)
            whole = [f"batch row {self.evidence.by_request[request]['row']}"]
            whole += ["in a row used before"] * (request in self.evidence.later)
            whole += ["begins like another text"] * (request in alike)
            tokens = tuple(strata(text, size)[:end])
            risks.append(Risk(tokens=tokens, whole=tuple(whole), faulty=len(beyond) > 0))
        return named(risks)

    def _worst(self) -> list[int] | None:
        """Request and place of the token that is furthest apart."""
        if not self.apart:
            return None
        largest = [float(apart.max()) for apart in self.apart]
        text = int(np.argmax(largest))
        return [self.texts[text]["request"], int(self.apart[text].argmax())]

    def report(self, texts: Sequence[Record]) -> dict[str, Any]:
        """What was found.

        Args:
            texts: all there are.

        Returns:
            verdict: clean, suspect (a token further apart than `SUSPECT` times what rounding
            does), bug (`BUG` times, a token that was not the best of its own pass, or a stop
            token within a text), or not checked. tokens, that were read; rounding, in units in
            the last place; largest, in multiples of it; suspects and bugs, tokens; strata, where
            they are; worst, request and place of the largest; not_best, tokens; stops, texts that
            go on after a stop token.
        """
        apart = np.concatenate([np.zeros(0), *self.apart]) / self.rounding
        beyond, bugs = apart > SUSPECT, apart > BUG
        ends = set(self.evidence.stop_tokens)
        stops = sum(not ends.isdisjoint(text["output_ids"][:-1]) for text in texts)
        wrong = bugs.any() or self.not_best or stops
        result = "clean" if len(apart) else "not checked"
        result = "bug" if wrong else "suspect" if beyond.any() else result
        return {
            "verdict": result,
            "tokens": len(apart),
            "rounding": self.rounding,
            "largest": float(apart.max()) if len(apart) else None,
            "suspects": int(beyond.sum()),
            "bugs": int(bugs.sum()),
            "strata": [s._asdict() for s in self._strata(texts)],
            "worst": self._worst(),
            "not_best": self.not_best,
            "stops": stops,
        }


def told(report: Record) -> str:
    """What was found, in words."""
    if report["stops"]:
        return f"{report['stops']} texts go on after a stop token"
    if report["not_best"]:
        return f"{report['not_best']} tokens are not what the verifying pass itself took for best"
    line = (
        f"the verifying pass differs from the model's own by up to {report['largest']:.2g} times "
        f"what rounding was measured to do"
    )
    if not report["suspects"]:
        return f"{line}, in {report['tokens']:,} tokens"
    where = ", ".join(
        f"{s['name']} ({s['faulty']} of {s['tokens']})" for s in report["strata"][:3]
    )
    return f"{line}, at {report['suspects']} of {report['tokens']:,} tokens: {where}"


def _numbers(line: Record, text: Record) -> Tensor:
    """[n, 4] float64: the evidence of a text."""
    numbers = numbers_in(line["numbers"])
    if len(numbers) != len(text["output_ids"]):
        raise ValueError(
            f"evidence.jsonl: {len(numbers)} tokens of request {text['request']}, whose text has "
            f"{len(text['output_ids'])}; delete its line, and its text is not audited"
        )
    return torch.from_numpy(numbers)


def units_between(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> Array:
    """[n] how far numbers [n, 4] of two passes lie apart: the largest difference of the four, in
    units in the last place of the largest of them. Where both are minus infinity they agree,
    where one is they are infinitely far apart."""
    same = mine == theirs
    gap = torch.where(same, 0.0, (mine - theirs).abs().nan_to_num(nan=torch.inf))
    size = theirs.abs().where(theirs.isfinite(), 0.0).amax(1).clamp(min=1e-9)
    unit = precision(dtype) * torch.exp2(size.log2().floor())
    found: Array = (gap.amax(1) / unit).numpy()
    return found


@torch.inference_mode()
def rounding_of(witness: Witness, texts: Sequence[Record]) -> float:
    """Units in the last place between plain decoding over pages and the witness, at the last
    tokens of the longest texts; no less than passes of its own differ by (`noise`), and no more
    than `APART` times that, for beyond it plain decoding is wrong itself."""
    ids = [[*text["prompt_ids"], *text["output_ids"]] for text in texts]
    ids.sort(key=len, reverse=True)
    shapes = max(1.0, noise(witness.target, ids[0], kv_dtype=witness.kv_dtype)) if ids else 1.0
    largest, left = shapes, PLAIN
    for tokens in ids:
        count = min(left, len(tokens) - 1)
        if count > 0:
            largest = max(largest, _plainly(witness, tokens[:-count], tokens[-count:]))
            left -= count
    return min(largest, APART * shapes)


def _plainly(witness: Witness, prompt: list[int], output: list[int]) -> float:
    """Units in the last place between the two, in one text."""
    target, kv_dtype = witness.target, witness.kv_dtype
    size = len(prompt) + len(output)
    cache = target.new_cache(
        rows=1, pages=-(-size // 16), page_size=16, max_tokens=size, kv_dtype=kv_dtype
    )
    cache.open(0, tokens=size)
    drawn = torch.tensor(output, device=target.device)
    fed = [prompt, *([token] for token in output[:-1])]
    mine = torch.stack([target.extend(cache, [0], [tokens])[0] for tokens in fed])
    theirs = torch.cat([*own_logits(target, prompt, output, kv_dtype=kv_dtype)])
    ours, others = (numbers_of(one.float(), drawn).double().cpu() for one in (mine, theirs))
    return float(units_between(ours, others, target.dtype).max())


def strata(text: Record, page_size: int) -> list[tuple[str, ...]]:
    """Of each token what was known of it before it was chosen, in words."""
    lengths = text.get("accepted_lengths") or [1] * len(text["output_ids"])
    before, found = len(text["prompt_ids"]) - 1, []
    page = kept = None  # of the step before: that of its root, and its tokens
    for step, length in enumerate(lengths):
        mine = before // page_size
        filled = "a page was begun" if page is not None and mine != page else "in the same page"
        after = (
            "after drafts were kept" if kept is not None and kept > 1 else "after none was kept"
        )
        which = ("first step", "second step")[step] if step < 2 else "later step"
        for place in places_of([length]):
            depth = "root" if place == 0 else "below the root"
            deeper = [f"depth {group_of(place)}"] * (place > 0)
            very = ["first token"] * (step == place == 0)
            found.append((depth, *deeper, *very, which, after, filled, f"page {mine}"))
        before, page, kept = before + length, mine, length
    return found


def begun_alike(texts: Iterable[Record], page_size: int) -> set[int]:
    """Requests whose prompts begin with a page that another's begins with."""
    by_page: dict[tuple[int, ...], list[int]] = {}
    for text in texts:
        if len(text["prompt_ids"]) > page_size:
            page = tuple(text["prompt_ids"][:page_size])
            by_page.setdefault(page, []).append(text["request"])
    return {request for alike in by_page.values() if len(alike) > 1 for request in alike}


def named(texts: Sequence[Risk]) -> list[Stratum]:
    """The strata that have more faults than chance gives them, the clearest first; "everywhere" if
    there are faults, and none has. What is known of a token is judged by tokens. What is known of
    a text is judged by texts, whose tokens are as few as its fault is early: a fault at all first
    tokens would else be one of any kind of text that has many."""
    wrong = sum(text.faulty for text in texts)
    if not wrong:
        return []
    sizes, hits = Counter[str](), Counter[str]()
    for text in texts:
        sizes.update(chain.from_iterable(text.tokens))
        sizes.update({name: len(text.tokens) for name in text.whole})
        hits.update((*text.tokens[-1], *text.whole) if text.faulty else ())
    total = sum(len(text.tokens) for text in texts)
    members = Counter(name for text in texts for name in text.whole)
    found = []
    for name, size in sizes.items():
        every, own = (len(texts), members[name]) if name in members else (total, size)
        chance = float(stats.hypergeom.sf(hits[name] - 1, every, wrong, own))
        found.append(Stratum(name, hits[name], size, chance))
    clear = [s for s in found if s.chance * len(found) < NAMED]
    order = sorted(clear, key=lambda s: (s.chance, -s.faulty / s.tokens))
    return order or [Stratum("everywhere", wrong, total, 1.0)]

"""Audit: does what the verifying pass said of each token agree with what another pass says of it?

Their differences are rounding if all is well, at any temperature. A wrong bit of a mask, a wrong
position or a stale row of the cache moves logits by orders of magnitude more, whatever became of
the tokens, so that nothing waits for a text to part from another. How much rounding does is
measured here and now, with this model: by decoding a text plainly.

The first tokens of texts that are beyond it are counted by what was known of them before they were
chosen (`strata`), which names most faults: one in the mask or the positions of trees leaves roots
alone, one in the commit begins at the second step of a text, one in pages where a page does. What
comes later in a text has met what that one left in the cache.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from specdec.evidence import numbers_in, numbers_of
from specdec.lab.draws import group_of, places_of
from specdec.lab.witness import Witness, noise, own_logits

Record = Mapping[str, Any]
Array = NDArray[np.float64]
SUSPECT, BUG = 3.0, 10.0  # times what rounding was measured to do
PLAIN = 128  # tokens that it is measured by
APART = 30.0  # times what shapes of passes do, that plain decoding over pages may differ by
NAMED = 0.01  # chance by which a stratum has as many faults


class Stratum(NamedTuple):
    """Tokens with something in common, among which there are more faults than elsewhere.

    Attributes:
        name: what they have in common.
        faulty, tokens: how many are, of how many.
        chance: of so many, were faults anywhere.
    """

    name: str
    faulty: int
    tokens: int
    chance: float


@dataclass(slots=True)
class Audit:
    """What was found, token by token."""

    rounding: float  # units in the last place
    page_size: int
    apart: list[Array] = field(default_factory=list)  # [n] units between the two passes
    labels: list[list[tuple[str, ...]]] = field(default_factory=list)
    where: list[tuple[int, int]] = field(default_factory=list)  # request, place in its output

    def add(self, text: Record, row: int, apart: Array) -> None:
        """Add a text whose tokens lie so far apart."""
        self.apart.append(apart)
        self.labels.append(strata(text, row, self.page_size)[: len(apart)])
        self.where += [(text["request"], i) for i in range(len(apart))]

    def _first(self) -> tuple[list[tuple[str, ...]], NDArray[np.bool_]]:
        """Tokens of each text up to the first that is too far apart, and whether it is that one:
        what it leaves in the cache is met by all after it."""
        labels, first = [], []
        for apart, names in zip(self.apart, self.labels, strict=True):
            beyond = np.flatnonzero(apart > SUSPECT * self.rounding)
            end = int(beyond[0]) + 1 if len(beyond) else len(apart)
            labels += names[:end]
            first += [False] * (end - 1) + [len(beyond) > 0]
        return labels, np.array(first, dtype=bool)

    def report(self) -> dict[str, Any]:
        """As in `audit`."""
        apart = np.concatenate([np.zeros(0), *self.apart]) / self.rounding
        beyond, bugs = apart > SUSPECT, apart > BUG
        worst = int(apart.argmax()) if len(apart) else None
        labels, first = self._first()
        result = "bug" if bugs.any() else "suspect" if beyond.any() else "clean"
        return {
            "verdict": result if len(apart) else "not checked",
            "tokens": len(apart),
            "rounding": self.rounding,
            "largest": float(apart.max()) if len(apart) else None,
            "suspects": int(beyond.sum()),
            "bugs": int(bugs.sum()),
            "strata": [s._asdict() for s in named(labels, first)],
            "worst": None if worst is None else list(self.where[worst]),
        }


def audit(
    texts: Sequence[Record],
    evidence: Sequence[Record],
    witness: Witness,
    *,
    page_size: int,
    stop_tokens: Collection[int] = (),
    most: int | None = None,
) -> dict[str, Any]:
    """Compare what was recorded of texts with what the witness says.

    Args:
        texts: generations.
        evidence: lines of evidence.jsonl.
        page_size: of the cache.
        stop_tokens: which end a text, so that none lies within one.
        most: tokens, prompts included, after which no further text is read.

    Returns:
        verdict: clean, suspect (a token further apart than `SUSPECT` times what rounding does),
        bug (`BUG` times, or a stop token within a text), or not checked. tokens, that were read;
        rounding, in units in the last place; largest, in multiples of it; suspects and bugs,
        tokens; strata, where they are; worst, request and place of the largest; stops, texts that
        go on after a stop token.
    """
    lines = {line["request"]: line for line in evidence}
    known = [t for t in texts if t["request"] in lines and t["output_ids"]]
    if most is not None:
        spent = accumulate(len(t["prompt_ids"]) + len(t["output_ids"]) for t in known)
        known = known[: 1 + sum(so_far < most for so_far in spent)]
    found = Audit(rounding=rounding_of(witness, known), page_size=page_size)
    for text in known:
        line = lines[text["request"]]
        found.add(text, line["row"], apart_of(text, numbers_in(line["numbers"]), witness))
    report = found.report()
    report["stops"] = sum(not set(stop_tokens).isdisjoint(t["output_ids"][:-1]) for t in texts)
    if report["stops"]:
        report["verdict"] = "bug"
    return report


def told(report: Record) -> str:
    """What was found, in words."""
    if report["stops"]:
        return f"{report['stops']} texts go on after a stop token"
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


def apart_of(text: Record, numbers: Array, witness: Witness) -> Array:
    """[n] how far the evidence [n, 4] of a text lies from what the witness says: the largest
    difference of the four numbers, in units in the last place of the largest of them."""
    if len(numbers) != len(text["output_ids"]):
        raise ValueError(
            f"evidence.jsonl: {len(numbers)} tokens of request {text['request']}, whose text has "
            f"{len(text['output_ids'])}; delete its line, and its text is not audited"
        )
    theirs = [numbers_of(seen.scores, seen.drawn) for seen in witness.follow(text)]
    return units_between(torch.from_numpy(numbers), torch.cat(theirs).cpu(), witness.target.dtype)


def units_between(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> Array:
    """[n] of numbers [n, 4] each. Where both are minus infinity they agree, where one is they are
    infinitely far apart."""
    same = mine == theirs
    gap = torch.where(same, 0.0, (mine - theirs).abs().nan_to_num(nan=torch.inf))
    size = theirs.abs().where(theirs.isfinite(), 0.0).amax(1).clamp(min=1e-9)
    unit = torch.finfo(dtype).eps * torch.exp2(size.log2().floor())
    found: Array = (gap.amax(1) / unit).numpy()
    return found


@torch.inference_mode()
def rounding_of(witness: Witness, texts: Sequence[Record]) -> float:
    """Units in the last place between plain decoding over pages and the witness, at the last
    tokens of the longest texts; 1 at least, and no more than `APART` times what passes of
    different shapes differ by, for beyond that plain decoding is wrong itself."""
    ids = [[*text["prompt_ids"], *text["output_ids"]] for text in texts]
    ids.sort(key=len, reverse=True)
    largest, left = 1.0, PLAIN
    for tokens in ids:
        count = min(left, len(tokens) - 1)
        if count > 0:
            largest = max(largest, _plainly(witness, tokens[:-count], tokens[-count:]))
            left -= count
    shapes = max(1.0, noise(witness.target, ids[0], kv_dtype=witness.kv_dtype)) if ids else 1.0
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


def strata(text: Record, row: int, page_size: int) -> list[tuple[str, ...]]:
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
            found.append(
                (depth, *deeper, which, after, filled, f"page {mine}", f"batch row {row}")
            )
        before, page, kept = before + length, mine, length
    return found


def named(labels: Sequence[tuple[str, ...]], faulty: NDArray[np.bool_]) -> list[Stratum]:
    """The strata that have more faults than chance gives them, the clearest first; "everywhere" if
    there are faults, and none has."""
    total, wrong = len(labels), int(faulty.sum())
    if not wrong:
        return []
    sizes = Counter(name for label in labels for name in label)
    hits = Counter(
        name for label, bad in zip(labels, faulty, strict=True) if bad for name in label
    )
    found = [
        Stratum(
            name, hits[name], size, float(stats.hypergeom.sf(hits[name] - 1, total, wrong, size))
        )
        for name, size in sizes.items()
    ]
    clear = [s for s in found if s.chance * len(found) < NAMED]
    order = sorted(clear, key=lambda s: (s.chance, -s.faulty / s.tokens))
    return order or [Stratum("everywhere", wrong, total, 1.0)]

"""Losslessness of outputs: the verdict of an independent pass over them, and at temperature 0 a
comparison with the baseline's, token for token, each divergence explained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.lab.audit import BUG, Audit, Evidence, told
from specdec.lab.bets import ALARM
from specdec.lab.reading import SAMPLE, Reading
from specdec.lab.witness import Witness
from specdec.sampling import SamplingParams

Record = Mapping[str, Any]


def verdict(
    texts: Sequence[Record],
    witness: Witness,
    sampling: SamplingParams,
    *,
    baseline: Sequence[Record] | None = None,
    lossy: str | None = None,
    exact: bool = False,
    evidence: Evidence | None = None,
    sample: int = SAMPLE,
) -> dict[str, Any]:
    """Whether texts are what the target would have decoded alone.

    They fail if at temperature 0 one of them parts from the baseline's by more than rounding; if
    a token among them is impossible; if above temperature 0 bets on them win what chance would let
    them win less often than `ALARM`; or if evidence says that there is a bug.

    Args:
        texts: generations; a sample of them is read.
        witness: reads them.
        baseline: generations of plain decoding, to compare with at temperature 0.
        lossy: why the texts need not be the target's; they are then described and fail in nothing.
        exact: logits do not depend on batch or tree (`kernels.exact`): rounding explains nothing
            between the texts and the baseline's.
        evidence: what was recorded of the verifying pass.
        sample: tokens that are read, prompts included.

    Returns:
        verdict: passed, suspect (passed, but evidence lies further apart than rounding is thought
            to do), failed, lossy, or not checked.
        reason: why, in words.
        At temperature 0 with a baseline what `compare` returns, always what `Reading.read` does,
        and evidence: what `Audit.report` does, if there is some.
    """
    audit = None
    if evidence is not None:
        audit = Audit(evidence=evidence, witness=witness, best=sampling.greedy and lossy is None)
    pairs = _pairs(texts, baseline) if sampling.greedy and baseline is not None else []
    noted = {pair.mine["request"]: pair.position for pair in pairs if pair.parted}
    reading = Reading(witness, sampling, audit, noted)
    report = reading.read(texts, sample)
    if sampling.greedy and baseline is not None:
        report = compare(texts, baseline, witness, audit, reading.scores) | report
    if audit is not None:
        report["evidence"] = audit.report(texts)
    result, reason = _judged(report, lossy, exact)
    return {"verdict": result, "reason": reason, **report}


def _judged(report: Record, lossy: str | None, exact: bool) -> tuple[str, str]:
    """Verdict and reason."""
    faults, said = _faults(report, exact), "; ".join(_said(report, exact))
    if not report["tokens"]:
        return "not checked", "there is no output"
    if lossy is not None:
        return "lossy", f"{lossy}; {'; '.join(faults) or 'no difference seen'}; {said}"
    if faults:
        return "failed", f"{'; '.join(faults)}; {said}"
    suspect = report.get("evidence", {}).get("verdict") == "suspect"
    return "suspect" if suspect else "passed", said


def _faults(report: Record, exact: bool) -> list[str]:
    """What speaks against the texts, in words."""
    found = []
    parted = sum(exact or not one["explained"] for one in report.get("divergences", ()))
    if parted:
        why = ", and kernels.exact=true leaves no rounding" if exact else " by more than rounding"
        found.append(f"{parted} outputs part from the baseline's{why}")
    if report.get("evidence", {}).get("verdict") == "bug":
        found.append(told(report["evidence"]))
    if report["impossible"]:
        found.append(f"{report['impossible']} tokens are none that the target could choose")
    if report["p_value"] is not None and report["p_value"] < ALARM:
        bet, place = report["bets"]["bet"], report["bets"]["place"]
        where = "all places" if place == "all" else f"place {place}"
        alone = ", ".join(report["bets"]["places"])
        alone = f"; those at {alone} are enough" * bool(alone)
        found.append(
            f"tokens are no draws from the target's distributions (a bet on {bet} at {where} of "
            f"a step{alone})"
        )
    return found


def _said(report: Record, exact: bool) -> list[str]:
    """What was looked at, in words."""
    said = []
    if "checked" in report:
        said.append(
            f"{report['identical']} of {report['checked']} outputs equal the baseline, token for "
            f"token"
        )
        if exact and report["identical"] == report["checked"]:
            said[-1] += ": equal bits"
        if report["left_out"]:
            said[-1] += f", {report['left_out']} left out whose conversations had parted before"
    line = f"{report['tokens']:,} tokens of {report['texts']} texts read by the model's own pass"
    if report["p_value"] is not None:
        line += f", p = {report['p_value']:.2g}"
    if report["edge"]:
        line += f"; rounding alone decided about {report['edge']} of them"
    evidence = report.get("evidence")
    if evidence is not None and evidence["verdict"] in ("clean", "suspect"):
        line += f"; {told(evidence)}"
    return [*said, line]


def compare(
    generations: Sequence[Record],
    baseline: Sequence[Record],
    witness: Witness,
    audit: Audit | None = None,
    scores: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """Compare outputs of the same prompts, and see whether rounding explains where they part.

    Args:
        audit: evidence, if some was recorded.
        scores: [V] what the witness says where outputs part, by request, as far as it is known.

    Returns:
        checked, how many outputs were compared. left_out, how many turns were not, because their
        conversation has diverged before: the two sides were asked different things. identical,
        how many of those compared are the same, token for token. divergences, one for each of the
        others: prompt, sample, turn, position of the first token that differs, token and
        baseline_token there, logit_gap (baseline_token less token), top2_gap (the most probable
        token less the next), bound (`Witness.units`), measured (by how many times what rounding
        does evidence is off there, of either side), and whether the gap is explained. Where an
        output has ended its token is None, and so are gaps, bound and measured.
    """
    pairs = _pairs(generations, baseline)
    asked = [pair for pair in pairs if pair.mine["prompt_ids"] == pair.theirs["prompt_ids"]]
    parted = [pair for pair in asked if pair.parted]
    return {
        "checked": len(asked),
        "left_out": len(pairs) - len(asked),
        "identical": len(asked) - len(parted),
        "divergences": [_divergence(pair, witness, audit, scores or {}) for pair in parted],
    }


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two outputs of the same turn."""

    mine: Record
    theirs: Record

    @property
    def parted(self) -> bool:
        return bool(self.mine["output_ids"] != self.theirs["output_ids"])

    @property
    def position(self) -> int:
        """Of the first token that differs."""
        mine, theirs = self.mine["output_ids"], self.theirs["output_ids"]
        both = enumerate(zip(mine, theirs, strict=False))
        return next((i for i, (a, b) in both if a != b), min(len(mine), len(theirs)))


def _pairs(generations: Sequence[Record], baseline: Sequence[Record]) -> list[_Pair]:
    reference = {_turn(record): record for record in baseline}
    return [_Pair(g, reference[_turn(g)]) for g in generations if _turn(g) in reference]


def _turn(generation: Record) -> tuple[str, int, int]:
    return generation["prompt"], generation["sample"], generation["turn"]


def _divergence(
    pair: _Pair, witness: Witness, audit: Audit | None, known: Mapping[int, Tensor]
) -> dict[str, Any]:
    """Where an output parts from another, and why."""
    mine, position = pair.mine, pair.position
    token, other = (
        ids[position] if position < len(ids) else None
        for ids in (mine["output_ids"], pair.theirs["output_ids"])
    )
    why: dict[str, Any] = dict.fromkeys(("logit_gap", "top2_gap", "bound", "measured"))
    why["explained"] = False
    if token is not None and other is not None:
        scores = known.get(mine["request"]) if known else None
        if scores is None:
            begun = {**mine, "output_ids": mine["output_ids"][: position + 1]}
            *_, last = witness.follow(begun)
            scores = last.scores[-1]
        why = _explanation(pair, scores, witness, audit)
    return {
        **{name: mine[name] for name in ("prompt", "sample", "turn")},
        "position": position,
        "token": token,
        "baseline_token": other,
        **why,
    }


def _explanation(
    pair: _Pair, scores: Tensor, witness: Witness, audit: Audit | None
) -> dict[str, Any]:
    """Whether rounding explains that two tokens were chosen where the witness has scores [V].

    Evidence does if each pass took its token for the best, and was off by e at most, what `BUG`
    allows. For with l what a pass said and w what the witness says, w(token) >= l(token) - e =
    max l - e >= max w - 2 e: whatever is assumed of layers, neither token is further from the best
    one than that. A side without evidence is judged by `Witness.bound`.
    """
    mine, theirs, place = pair.mine, pair.theirs, pair.position
    token, other = mine["output_ids"][place], theirs["output_ids"][place]
    gap = float(scores[other] - scores[token])
    first, second = scores.topk(2).values.tolist()
    drawn = torch.tensor([token], device=scores.device)
    bound = float(witness.bound(scores[None], drawn))
    explained, off = abs(gap) <= bound, None
    if audit is not None and (off := audit.at(mine, place, scores)) is not None:
        before = audit.at(theirs, place, scores, baseline=True)
        explained = off <= BUG and (-gap <= bound if before is None else before <= BUG)
        off = max(off, before or 0.0)
    return {
        "logit_gap": gap,
        "top2_gap": first - second,
        "bound": bound,
        "measured": off,
        "explained": explained,
    }

"""Losslessness of outputs: the verdict of an independent pass over them, and at temperature 0 a
comparison with the baseline's, token for token, each divergence explained."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from specdec.lab.audit import told
from specdec.lab.draws import ALARM, BETS, Draws, places_of, together
from specdec.lab.witness import Seen, Witness
from specdec.sampling import SEEDS, SamplingParams, probabilities

Record = Mapping[str, Any]
SAMPLE = 8192  # tokens that are read, prompts included


def verdict(
    texts: Sequence[Record],
    witness: Witness,
    sampling: SamplingParams,
    *,
    baseline: Sequence[Record] | None = None,
    lossy: str | None = None,
    exact: bool = False,
    evidence: Record | None = None,
    sample: int = SAMPLE,
) -> dict[str, Any]:
    """Whether texts are what the target would have decoded alone.

    They fail if at temperature 0 one of them parts from the baseline's by more than rounding; if a
    token among them is impossible; or if above temperature 0 all statistics of `draws.py` together
    are so far off that chance would do it less often than `ALARM`.

    Args:
        texts: generations; a sample of them is read, `SAMPLE` tokens.
        witness: reads them.
        baseline: generations of plain decoding, to compare with at temperature 0.
        lossy: why the texts need not be the target's; they are then described and fail in nothing.
        exact: logits do not depend on batch or tree (`kernels.exact`): rounding explains nothing
            between the texts and the baseline's.
        evidence: what `audit` found, if evidence was recorded. A bug fails.
        sample: tokens that are read, prompts included.

    Returns:
        verdict: passed, suspect (passed, but evidence lies further apart than rounding is thought
            to do), failed, lossy, or not checked.
        reason: why, in words.
        At temperature 0 with a baseline what `compare` returns, and always what `read` does.
    """
    report: dict[str, Any] = {}
    if sampling.greedy and baseline is not None:
        report |= compare(texts, baseline, witness)
    report |= read(texts, witness, sampling, sample)
    if evidence is not None:
        report["evidence"] = evidence
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
        tests = report["tests"]
        worst = min(tests, key=lambda name: tests[name])
        if worst == BETS:
            won = report["bets"]
            worst = f"a bet on {won['bet']} at place {won['place']} of a step"
        found.append(f"tokens are no draws from the target's distributions ({worst})")
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


def read(
    texts: Sequence[Record], witness: Witness, sampling: SamplingParams, sample: int = SAMPLE
) -> dict[str, Any]:
    """What an independent pass says of the tokens of a sample of texts.

    Returns:
        texts, tokens: how many were read.
        impossible: tokens of probability 0: not the most probable one at temperature 0, cut by a
            filter above it.
        edge: tokens that were so as well, but would not be if all tokens more probable were less
            so by no more than rounding (`Witness.units`).
        p_value: of all statistics together, and tests: of each (see `draws.py`); None and {} at
            temperature 0 or without tokens.
        bets: `Found` of `bets.py`, whose p_value is one of the tests.
    """
    draws, chosen = Draws(), _sample(texts, sample)
    tokens = impossible = edge = 0
    for text in chosen:
        lengths = text.get("accepted_lengths") or [1] * len(text["output_ids"])
        places = np.array(places_of(lengths))
        generator = np.random.default_rng([sampling.seed % SEEDS, text["request"]])
        shares = generator.random(len(places))
        start = 0
        for seen in witness.follow(text):
            law = probabilities(seen.scores, sampling)
            cut = law.gather(1, seen.drawn[:, None])[:, 0] == 0
            if cut.any():
                law[cut] = _within_rounding(seen, cut, witness, sampling)
            legal = law.gather(1, seen.drawn[:, None])[:, 0] > 0
            edge += int((cut & legal).sum())
            impossible += int((~legal).sum())
            end = start + len(law)
            if not sampling.greedy:
                kept = legal.cpu().numpy()
                share, place = shares[start:end][kept], places[start:end][kept]
                said = seen.draft
                draft = None if said is None else probabilities(said[legal], sampling)
                draws.add(law[legal], seen.drawn[legal], share, place, draft)
            start = end
        tokens += start
    tests = draws.tests()
    return {
        "texts": len(chosen),
        "tokens": tokens,
        "impossible": impossible,
        "edge": edge,
        "p_value": together(tests) if tests else None,
        "tests": tests,
        "bets": draws.bets.found(ALARM)._asdict() if tests else None,
    }


def _sample(texts: Sequence[Record], most: int) -> list[Record]:
    """Texts with output, picked whatever is in them, until there are so many tokens."""
    found, tokens = [], 0
    for place in np.random.default_rng(0).permutation(len(texts)):
        text = texts[place]
        if text["output_ids"] and tokens < most:
            found.append(text)
            tokens += len(text["prompt_ids"]) + len(text["output_ids"])
    return found


def _within_rounding(
    seen: Seen, rows: Tensor, witness: Witness, sampling: SamplingParams
) -> Tensor:
    """Laws of some rows if what stands before the drawn token there is less probable by as much as
    rounding may do."""
    scores, drawn = seen.scores[rows], seen.drawn[rows][:, None]
    before = (scores >= scores.gather(1, drawn)).scatter(1, drawn, False)
    return probabilities(scores - before * witness.bound(scores, drawn[:, 0])[:, None], sampling)


def compare(
    generations: Sequence[Record], baseline: Sequence[Record], witness: Witness
) -> dict[str, Any]:
    """Compare outputs of the same prompts, and see whether rounding explains where they part
    (`Witness.units`).

    Returns:
        checked, how many outputs were compared. left_out, how many turns were not, because their
        conversation has diverged before: the two sides were asked different things. identical,
        how many of those compared are the same, token for token. divergences, one for each of the
        others: prompt, sample, turn, position of the first token that differs, token and
        baseline_token there, logit_gap (baseline_token less token), top2_gap (the most probable
        token less the next), bound, and whether the gap is explained by it. Where an output has
        ended its token is None, and so are gaps and bound.
    """
    reference = {_turn(record): record for record in baseline}
    pairs = [(g, reference[_turn(g)]) for g in generations if _turn(g) in reference]
    asked = [(g, other) for g, other in pairs if g["prompt_ids"] == other["prompt_ids"]]
    parted = [(g, o["output_ids"]) for g, o in asked if g["output_ids"] != o["output_ids"]]
    return {
        "checked": len(asked),
        "left_out": len(pairs) - len(asked),
        "identical": len(asked) - len(parted),
        "divergences": [_divergence(*pair, witness) for pair in parted],
    }


def _turn(generation: Record) -> tuple[str, int, int]:
    return generation["prompt"], generation["sample"], generation["turn"]


def _divergence(generation: Record, theirs: Sequence[int], witness: Witness) -> dict[str, Any]:
    """Where an output parts from another, and why."""
    mine = generation["output_ids"]
    position = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    token, other = (ids[position] if position < len(ids) else None for ids in (mine, theirs))
    gap = top2_gap = bound = None
    if token is not None and other is not None:
        *_, last = witness.follow({**generation, "output_ids": mine[: position + 1]})
        scores = last.scores[-1:]
        gap = float(scores[0, other] - scores[0, token])
        first, second = scores[0].topk(2).values.tolist()
        top2_gap, bound = first - second, float(witness.bound(scores, last.drawn[-1:]))
    return {
        **{name: generation[name] for name in ("prompt", "sample", "turn")},
        "position": position,
        "token": token,
        "baseline_token": other,
        "logit_gap": gap,
        "top2_gap": top2_gap,
        "bound": bound,
        "explained": gap is not None and bound is not None and abs(gap) <= bound,
    }

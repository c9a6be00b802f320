"""The table of learned drafters on equal data."""

from typing import Any

from specdec.experiments.figures.drafters import best, plain_of
from specdec.experiments.figures.markdown import Result, device, interval, piece, source
from specdec.lab.metrics import summary
from specdec.lab.statistics import ratio

REFERENCE = "small_llama"
CHAIN = 7  # nodes of the chain among the trees, as in tables of the field


def ratio_to(part: dict[str, Any], drafter: str, budget: int) -> tuple[float, float, float] | None:
    """Accepted length of a drafter over that of `REFERENCE` with trees of the same budget, paired
    over prompts, with the ends of its interval; None if there is nothing to compare."""
    mine, theirs = (
        best(part, "accepted_length", drafter=name, budget=budget) for name in (drafter, REFERENCE)
    )
    if mine is None or theirs is None or drafter == REFERENCE:
        return None
    prompts = list(plain_of(part)["prompts"])
    steps = [[entry["prompts"][one]["steps"] for one in prompts] for _, entry in (theirs, mine)]
    return ratio(*steps).around  # of the same tokens


def learned(result: Result, file: str = "learned") -> str:
    """Accepted lengths by budget, and what they are over those of the reference."""
    settings, found = result["settings"], []
    prompts = sum(map(len, result["sets"].values()))
    found.append(
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, on one "
        f"{device(result)}: {prompts} prompts, {settings['tokens']} new tokens each, the same "
        f"trees for all ({source(result, file)}). Accepted lengths, pooled; at every budget "
        f"above temperature 0 the better of two trees:"
    )
    for name, part in result["parts"].items():
        entries = list(part.values())
        budgets = sorted({entry["budget"] for entry in entries} - {0})
        drafters = [one for one in dict.fromkeys(e["drafter"] for e in entries) if one != "none"]
        rows = []
        for drafter in drafters:
            cells = []
            for budget in budgets:
                hit = best(part, "accepted_length", drafter=drafter, budget=budget)
                if hit is None:
                    cells.append("")
                    continue
                plain = plain_of(part)
                length = summary(hit[1], plain, list(plain["prompts"]))["accepted_length"]
                gain = ratio_to(part, drafter, budget)
                cells.append(f"{length:.2f}" + (f"; {interval(*gain)}" if gain else ""))
            rows.append(
                [f"`{drafter}`" if drafter in (REFERENCE, "early_exit") else drafter, *cells]
            )
        heads = [name, *(f"chain of {b}" if b == CHAIN else f"{b} nodes" for b in budgets)]
        found.append(piece(f"{name}:", heads, rows))
    found.append(
        f"Behind the semicolon: over `{REFERENCE}`, paired over prompts, with its 95 % interval."
    )
    return "\n\n".join(found)

"""The tables of learned drafters on equal data."""

from collections.abc import Iterator
from typing import Any

from specdec.experiments.figures.drafters import best, plain_of
from specdec.experiments.figures.markdown import Result, device, interval, piece, source, table
from specdec.lab.metrics import summary
from specdec.lab.statistics import ratio

REFERENCE = "small_llama"
CHAIN = 7  # nodes of the chain among the trees, as in tables of the field
MIDDLE = 32  # nodes of the trees whose ratios the README shows
Part = dict[str, Any]


def ratio_to(part: Part, drafter: str, budget: int) -> tuple[float, float, float] | None:
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


def _length(part: Part, drafter: str, budget: int) -> str:
    """Pooled, with the better tree of the budget; empty if there is none."""
    hit = best(part, "accepted_length", drafter=drafter, budget=budget)
    if hit is None:
        return ""
    plain = plain_of(part)
    return f"{summary(hit[1], plain, list(plain['prompts']))['accepted_length']:.2f}"


def _rows_of(result: Result, temperature: str) -> Iterator[tuple[str, Part]]:
    """Each drafter at a temperature with the part it is in: methods of another target have parts
    of their own, named `T=0, METHOD`."""
    for name, part in result["parts"].items():
        if name.partition(", ")[0] == temperature:
            for drafter in dict.fromkeys(entry["drafter"] for entry in part.values()):
                if drafter != "none":
                    yield drafter, part


def _budgets(result: Result, temperature: str) -> list[int]:
    every = [
        entry["budget"]
        for name, part in result["parts"].items()
        if name.partition(", ")[0] == temperature
        for entry in part.values()
    ]
    return sorted({*every} - {0})


def _title(drafter: str) -> str:
    return f"`{drafter}`" if drafter in (REFERENCE, "early_exit") else drafter


def _heads(budgets: list[int]) -> list[str]:
    return [f"chain of {b}" if b == CHAIN else f"{b} nodes" for b in budgets]


def learned(result: Result, file: str = "learned") -> str:
    """Accepted lengths by budget, and what they are over those of the reference."""
    settings, found, compared = result["settings"], list[str](), False
    prompts = sum(map(len, result["sets"].values()))
    by_rates = any(": optimal" in name for part in result["parts"].values() for name in part)
    trees = "the same trees for all" + ", and one by rates of acceptance" * by_rates
    found.append(
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}, on one "
        f"{device(result)}: {prompts} prompts, {settings['tokens']} new tokens each, {trees} "
        f"({source(result, file)}){_elsewhere(result)}. Accepted lengths, pooled; at every budget "
        f"above temperature 0 the best of its trees:"
    )
    for temperature in dict.fromkeys(name.partition(", ")[0] for name in result["parts"]):
        budgets = _budgets(result, temperature)
        rows = []
        for drafter, part in _rows_of(result, temperature):
            cells = []
            for budget in budgets:
                gain = ratio_to(part, drafter, budget)
                compared |= gain is not None
                after = f"; {interval(*gain)}" if gain else ""
                cells.append(_length(part, drafter, budget) + after)
            rows.append([_title(drafter), *cells])
        found.append(piece(f"{temperature}:", [temperature, *_heads(budgets)], rows))
    if compared:
        said = f"Behind the semicolon: over `{REFERENCE}`, paired over prompts"
        found.append(f"{said}, with its 95 % interval.")
    return "\n\n".join([*found, *_trainings(result)])


def _elsewhere(result: Result) -> str:
    """Joined methods that were measured on another device."""
    return "".join(
        f"; {one['name']} on one {device(one)}"
        for one in result.get("joined", [])
        if "hardware" in one
    )


def _trainings(result: Result) -> Iterator[str]:
    """How the joined ones were trained, and what became of a target that was trained."""
    lines: list[str] = []
    data: dict[str, None] = {}
    for one in result.get("joined", []):
        if (training := one.get("training")) is None:
            continue
        settings, kept = training["settings"], training["best"]
        own = {key: settings["method"].get(key) for key in ("loss", "taps", "heads")}
        words = [f"method={settings['choices']['method']}"]
        words += [f"method.{key}={value}" for key, value in own.items() if value]
        line = f"`{' '.join(words)}`, "
        line += f"{training['tokens'] / 1e6:.0f} M tokens in {training['seconds']:.0f} s"
        if kept["tokens"] < training["tokens"]:
            line += f", the best of it after {kept['tokens'] / 1e6:.0f} M"
        if before := training.get("before"):
            nats = (
                f"{before[f'{kind}/nats']:.3f} nats a token of {text} before and "
                f"{kept[f'{kind}/nats']:.3f} after"
                for kind, text in (("corpus", "held-out text"), ("own", "its own text"))
            )
            line += f"; another target now, hence no ratio: {', '.join(nats)}"
        lines.append(f"- {one['name']}: {line}.")
        read = f"{training['corpus']['trained'] / 1e6:.1f} M tokens of texts"
        data[f"{read} and {training['own_texts']:,} texts of the target's own"] = None
    if lines:
        yield "\n".join([f"Trained on {' or '.join(data)}, half of each batch:", "", *lines])


def further(result: Result, file: str = "learned_further") -> str:
    """How the held-out accepted length of a head goes that is trained again."""
    path = result["settings"]["method"]["path"]
    about = (
        f"Accepted length on held-out text of `{path}`, trained again at a fresh head's rates "
        f"on one {device(result)}: chains of 7, texts of others and of the target's own, "
        f"temperatures 0 and 1 ({source(result, file)}):"
    )
    names = [f"{kind}/{how}" for kind in ("corpus", "own") for how in ("greedy", "sampled")]
    rows = [
        [f"{point['tokens'] / 1e6:.0f}", *(f"{point[name]:.2f}" for name in names)]
        for point in result["curve"]
    ]
    heads = ["M tokens", "T=0", "T=1", "own, T=0", "own, T=1"]
    return piece(about, heads, rows)


def learned_summary(result: Result) -> str:
    """The README's table: lengths by budget at temperature 0 and with `MIDDLE` nodes at 1, and
    there what they are over those of the reference."""
    cold, warm = "T=0", "T=1"
    budgets = _budgets(result, cold)
    parts = dict(_rows_of(result, warm))
    rows = []
    for drafter, part in _rows_of(result, cold):
        gains = [ratio_to(one, drafter, MIDDLE) for one in (part, parts[drafter])]
        first, second = (interval(*gain) if gain else "" for gain in gains)
        lengths = [_length(part, drafter, budget) for budget in budgets]
        also = _length(parts[drafter], drafter, MIDDLE)
        rows.append([_title(drafter), *lengths, first, also, second])
    heads = [
        *("accepted length at T=0", *_heads(budgets), f"{MIDDLE} over `{REFERENCE}`"),
        *(f"T=1, {MIDDLE} nodes", f"over `{REFERENCE}`"),
    ]
    return "\n".join(table(heads, rows))

"""The tables of what quantisation does to acceptance."""

from typing import Any

from specdec.experiments.figures.markdown import Result, interval, piece, source
from specdec.lab.statistics import product, ratio


def quantised(result: Result, file: str = "quantised") -> str:
    """Weights in float8, then pages."""
    settings = result["settings"]
    models = f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}"
    about = (
        f"{models}: {len(result['conversations'])} conversations, {settings['tokens']} new tokens "
        f"each, with 95 % jackknife intervals over conversations ({source(result, file)})."
    )
    return "\n\n".join([about, _weights(result), _pages(result)])


def _weights(result: Result) -> str:
    drafters = result["settings"]["drafters"]
    heads = ["temperature", "overlap, bf16", "overlap, fp8", "fp8 over bf16, same texts"]
    heads += [f"accepted length, {name}: bf16, fp8" for name in drafters]
    heads += ["same best token", "KL, fp8 from bf16, nats"]
    rows = []
    for temperature, found in result["weights"].items():
        plain, small = (found["texts"][name] for name in ("none", "fp8"))
        row = [temperature, _mean(plain, "none"), _mean(small, "fp8")]
        row.append(_around([plain["fp8"]], [plain["none"]], 3))
        for name in drafters:
            row.append(", ".join(_length(found["accepted"][name][of]) for of in ("none", "fp8")))
        row += [_mean(small, "agreement"), _mean(small, "divergence", 4)]
        rows.append(row)
    worst = max(
        abs(sum(of["fp8"]) - sum(of["none"])) / sum(of["tokens"])
        for found in result["weights"].values()
        for of in found["texts"].values()
    )
    about = (
        f"Weights in float8 (`target.quantize=fp8`): overlap is the chance that a token drawn "
        f"from the draft is accepted. Along the same texts it differs by {worst:.4f} at most. "
        f"The other overlaps and accepted lengths are of texts that each target writes itself, "
        f"and so differ by those texts too:"
    )
    return piece(about, heads, rows)


def _pages(result: Result) -> str:
    kinds = ("fp8_e4m3", "int8")
    heads = ["tokens before", "overlap, plain pages", *(f"overlap, {kind}" for kind in kinds)]
    heads += [f"same best token, {kind}" for kind in kinds]
    heads += [f"KL, {kind}, nats" for kind in kinds]
    rows = [
        [
            context,
            *(_mean(found[kind], "overlap") for kind in ("auto", *kinds)),
            *(_mean(found[kind], "agreement") for kind in kinds),
            *(_mean(found[kind], "divergence", 5) for kind in kinds),
        ]
        for context, found in result["pages"].items()
    ]
    about = (
        f"Pages of keys and values in float8 and int8 (`cache.dtype`), at temperature 1, target "
        f"and draft alike, by the length of the context ({result['settings']['pages']} "
        f"conversations):"
    )
    return piece(about, heads, rows)


def _mean(sums: Any, name: str, digits: int = 3) -> str:
    """By token."""
    return _around([sums[name]], [sums["tokens"]], digits)


def _length(found: Any) -> str:
    return interval(*ratio(found["tokens"], found["passes"]).around)


def _around(above: Any, below: Any, digits: int) -> str:
    value, low, high = product(above, below).around
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

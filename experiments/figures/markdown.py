"""Pieces of the generated pages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

Result = Mapping[str, Any]  # of a JSON file


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return [head, "|" + "---|" * len(heads), *body]


def piece(about: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table below what it is about."""
    return "\n".join([about, "", *table(heads, rows)])


def interval(value: float, low: float, high: float) -> str:
    """A figure and the ends of its interval."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def number(value: float | None, digits: int = 2) -> str:
    """Empty if nothing was measured."""
    return "" if value is None else f"{value:.{digits}f}"


def device(result: Result) -> str:
    """What it was measured on."""
    hardware = result["hardware"]
    name: str = hardware.get("gpu") or hardware["cpu"]
    return name


def weights_of(result: Result) -> str:
    """Of the target, behind its name, if they are not those of its files."""
    quantize = result["settings"].get("quantize", "none")
    return "" if quantize == "none" else f" with weights in {quantize}"


def source(result: Result, file: str) -> str:
    """The command of a result, the commit it ran at, and a link from `docs/results`."""
    commit = (result.get("git") or {}).get("commit")
    at = f" at {commit[:7]}" if commit else ""
    return f"`{result['command']}`{at}, [JSON](../../experiments/results/{file}.json)"


def show(text: str) -> None:
    """A piece of a page on the terminal."""
    Console(width=160).print(Markdown(text))

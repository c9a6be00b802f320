"""What a replay leaves: a table, replay.csv, replay.json, a page, and the profile of the best."""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table

from specdec.compare.read import REPLAY, REPLAY_SCHEMA
from specdec.lab.conversations import prompt_of
from specdec.lab.files import make_folder, replace_file, to_json
from specdec.lab.lines import tell
from specdec.lab.prompts import prompt_hash
from specdec.lab.values import flat
from specdec.replay.profile import Profile
from specdec.replay.record import write_json
from specdec.replay.replaying import Outcome, Replayer
from specdec.replay.survival import BY_PATH

SHOWN = 20  # rows of the table
DIGITS = 4  # of expected steps, nodes and seconds of a conversation
Row = dict[str, Any]


def oracle(replayer: Replayer, outcomes: Sequence[Outcome], rows: Sequence[Row]) -> dict[str, Any]:
    """The best choice at every place, and by how much every policy's best falls short of it."""
    best = replayer.oracle(outcomes)
    pace: dict[str, float] = {}
    for row in rows:
        pace[row["tree"]] = max(pace.get(row["tree"], 0.0), row["tokens_per_second"])
    regret = {policy: 1.0 - found / best for policy, found in pace.items()}
    return {"tokens_per_second": best, "regret": regret}


def profile_of(
    replayer: Replayer, outcomes: Sequence[Outcome], rows: Sequence[Row], name: str
) -> dict[str, Any]:
    """Of the best configuration."""
    place = [id(row) for row in rows].index(id(_best(rows)[0]))
    outcome, row = outcomes[place], rows[place]
    kept = np.minimum.accumulate(outcome.kept.sum(0))
    counts = kept - np.append(kept[1:], 0.0)
    tokens, some = replayer.count.astype(float), outcome.steps > 0
    categories = np.array(replayer.record.about["categories"])
    configuration = outcome.configuration
    exact = configuration.children == "top_k"  # else the mean of a text is known of sums alone
    profile = Profile.of_steps(
        {d + 1: float(count) for d, count in enumerate(counts) if count > 0},
        mean_per_request=float((tokens[some] / outcome.steps[some]).mean()) if exact else None,
        per_category={
            category: float(tokens[own].sum() / outcome.steps[own].sum())
            for category in dict.fromkeys(categories[some].tolist())
            if (own := some & (categories == category)).any()
        },
    )
    settings, shape = replayer.record.settings, configuration.shape
    return profile.write(
        method="draft_model" if name == "small_llama" else name,
        target=settings["target"]["path"],
        draft=settings["drafter"].get("path"),
        tree=shape is None or any(node[-1] for node in shape),
        blockwise=configuration.rule in BY_PATH,
        conditions={"replayed_from": replayer.record.path.name, **row},
    )


def result_of(
    replayer: Replayer,
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    options: Any,
) -> dict[str, Any]:
    """As replay.json has it: figures, and sums over conversations, by which `specdec compare`
    sets them beside runs.

    Args:
        settings: those of the record, with the drafter that was replayed.
        options: of the command.
    """
    record = replayer.record
    kept, contents, _ = record.about["identity"]
    drafter = flat({"drafter": settings["drafter"]}, empty=True)
    if drafter != flat({"drafter": record.settings["drafter"]}, empty=True):
        contents = {k: v for k, v in contents.items() if not k.startswith("drafter.")}
        kept = {k: v for k, v in kept.items() if not k.startswith("drafter.")} | drafter
    return {
        "schema": REPLAY_SCHEMA,
        "record": str(record.path),
        "tokens": int(replayer.count.sum()),
        "costs": replayer.table and options.costs,
        "batch": replayer.batch,
        "settings": kept,
        "contents": contents,
        "code": record.about["code"],
        "config": record.settings,
        "choices": settings["choices"],
        "command": command_of(options),
        "conversations": _conversations(replayer),
        "rows": [{**row, **_sums(replayer, one)} for row, one in zip(rows, outcomes, strict=True)],
    }


def command_of(options: Any) -> str:
    """The words of a replay, less where its files go."""
    words = ["specdec", "replay", *map(str, options.record)]
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name not in ("record", "out") and value != one.default:
            listed = isinstance(value, tuple)
            text = f"[{','.join(map(str, value))}]" if listed else str(value)
            words.append(f"{one.name}={text.lower() if isinstance(value, bool) else text}")
    return shlex.join(words)


def _conversations(replayer: Replayer) -> list[dict[str, Any]]:
    """In the order of the sums."""
    record, tokens = replayer.record, replayer.by_conversation(replayer.count.astype(float))
    requests = record.read("request").tolist()
    found: list[dict[str, Any]] = [{} for _ in tokens]
    for text, conversation in enumerate(replayer.conversations.tolist()):
        own = found[conversation]
        own.setdefault("texts", 0)
        own["texts"] += 1
        if not prompt_of(requests[text])[2]:
            own |= {
                "category": record.about["categories"][text],
                "id": record.about["ids"][text],
                "mark": prompt_hash(record.prompts[text]),
            }
    return [{**one, "tokens": int(count)} for one, count in zip(found, tokens, strict=True)]


def _sums(replayer: Replayer, outcome: Outcome) -> dict[str, Any]:
    """By conversation; and by depth, of trees of the whole depth."""
    reached = outcome.kept.sum(0)
    found: dict[str, Any] = {"acceptance_by_depth": _rounded(reached[1:] / reached[0])}
    for name, values in (
        ("steps", outcome.steps),
        ("nodes", outcome.nodes),
        ("seconds", outcome.seconds),
    ):
        if values is not None:
            found[name] = _rounded(replayer.by_conversation(values))
    return found


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return [
        float(f"{value:.{DIGITS}g}") if value < 1 else round(float(value), DIGITS)
        for value in values
    ]


def write(out: Path, result: dict[str, Any], rows: Sequence[Row], profile: dict[str, Any]) -> None:
    """The files, and the page of `specdec compare` of them."""
    make_folder(out)
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(out / "replay.csv", text.getvalue())
    replace_file(out / REPLAY, to_json(result) + "\n")
    write_json(out / "speculation_profile.json", profile)
    from specdec.compare import report  # draws, which takes a while to import
    from specdec.compare.comparing import compare

    report.write(compare([out]), out / "report.html")


def show(rows: Sequence[Row], result: dict[str, Any], console: Console) -> None:
    timed = "tokens_per_second" in rows[0]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    if any(row["low"] is not None for row in rows):
        table.caption = "under tokens/step its 95 % interval over conversations"
    titles = ["tree", "budget", "children", "acceptance", "tokens/step", "nodes/step"]
    for title in [*titles, *(["tokens/s"] if timed else [])]:
        # In a narrow terminal long names are folded; figures and what they are of stay whole.
        folded = title in ("children", "acceptance")
        side: JustifyMethod = "left" if folded or title == "tree" else "right"
        table.add_column(title, overflow="fold", no_wrap=not folded, justify=side)
    for row in _best(rows)[:SHOWN]:
        ends = "" if row["low"] is None else f"\n{row['low']:.2f}–{row['high']:.2f}"
        cells = [row["tree"], row["budget"], row["children"], row["acceptance"]]
        cells += [f"{row['tokens_per_step']:.3f}{ends}", f"{row['nodes_per_step']:.1f}"]
        cells += [f"{row['tokens_per_second']:.1f}"] if timed else []
        table.add_row(*map(str, cells))
    console.print(table)
    if len(rows) > SHOWN:
        tell(console, f"the best {SHOWN} of {len(rows)}")
    if "oracle" in result:
        found = result["oracle"]
        regret = ", ".join(f"{name} {share:.1%}" for name, share in found["regret"].items())
        tell(console, f"best choice at every place: {found['tokens_per_second']:.1f} tokens/s")
        tell(console, f"short of it: {regret}")


def _best(rows: Sequence[Row]) -> list[Row]:
    name = "tokens_per_second" if "tokens_per_second" in rows[0] else "tokens_per_step"
    return sorted(rows, key=lambda row: -float(row[name]))

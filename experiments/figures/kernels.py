"""Tables and plots of what `specdec.experiments.bench` measures; needs no GPU."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from specdec.compare.canvas import COLOURS, by_powers_of_two, canvas, save
from specdec.experiments.figures.markdown import (
    Result,
    device,
    number,
    piece,
    source,
    weights_of,
)

PEERS = {
    "ours, no split": "ours, not split",
    "sdpa": "SDPA",
    "sdpa + gather": "SDPA and page gather",
    "flex default": "FlexAttention",
    "flex tuned": "FlexAttention, tuned",
    "flex split": "and its `SPLIT_KV`",
}
METHOD_COLOURS = dict(
    zip(("ours", *PEERS), (COLOURS[i] for i in (0, 4, 1, 3, 6, 2, 7)), strict=True)
)
PIECES = {  # of a step: kernels by group, or verbs
    "weights": "#0072b2",
    "attention": "#d55e00",
    "layers": "#56b4e9",
    "rules, top tokens": "#009e73",
    "trees": "#e69f00",
    "cache": "#cc79a7",
    "copies": "#999999",
    "other torch": "#f0e442",
    "idle": "#dddddd",
    "prefill": "#117733",
    "draft": "#e69f00",
    "verify": "#0072b2",
    "accept": "#009e73",
    "commit": "#cc79a7",
    "other": "#999999",
}


def attention(result: Result) -> str:
    """Ours and its peers, a line for each shape."""
    first = result["shapes"][0]
    about = (
        f"Tree attention of one layer out of 32 that share a plan, {first['heads']} query and "
        f"{first['kv_heads']} key-value heads of {first['head_dim']}, bfloat16, pages of "
        f"{result['page_size']}, on one {device(result)}, torch "
        f"{result['versions']['torch']}, triton {result['versions']['triton']}: medians of CUDA "
        f"graph replays with keys and values out of the L2 cache. The roof is what reading the "
        f"keys and values once or the matrix products take at least ({_roof(result)}, both "
        f"measured in the same run). The others, as multiples of our time, "
        f"read contiguous keys and values, and their masks were made beforehand; with one node "
        f"SDPA is cuDNN's without a mask ({source(result, 'kernel_attention')}):"
    )
    rows = []
    for shape in result["shapes"]:
        methods = shape["methods"]
        ours = methods.get("ours", {})
        rows.append(
            [
                f"{shape['batch']}, {shape['context']}, {shape['nodes']}",
                number(ours.get("us"), 1),
                f"{ours['of_roof']:.0%}" if "of_roof" in ours else "",
                *(number(methods.get(name, {}).get("over_ours")) for name in PEERS),
            ]
        )
    heads = ["sequences, context, nodes", "ours, us", "of the roof", *PEERS.values()]
    return piece(about, heads, rows)


def grid(result: Result) -> str:
    """Ours, a line for each batch and context, a column for each size of the trees."""
    nodes = sorted({shape["nodes"] for shape in result["shapes"]})
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for shape in result["shapes"]:
        ours = shape["methods"].get("ours", {})
        row = found.setdefault(tuple(str(shape[k]) for k in ("heads", "batch", "context")), {})
        if "us" in ours:
            row[shape["nodes"]] = f"{ours['us']:.1f} ({ours['of_roof']:.0%})"
    about = (
        f"The same for more shapes, ours alone: us (of the roof, {_roof(result)}; "
        f"{source(result, 'kernel_grid')}):"
    )
    heads = ["heads", "sequences", "context", *(f"nodes: {count}" for count in nodes)]
    rows = ([*key, *(row.get(count, "") for count in nodes)] for key, row in found.items())
    return piece(about, heads, rows)


def steps(result: Result) -> str:
    """What a step does around the model."""
    records = result["batches"]
    about = (
        f"What a step does around the model, {records[0]['nodes']} nodes, a vocabulary of "
        f"128,256, temperature 1 (greedy: 0), a cache of the shape of Llama-3-8B; microseconds in "
        f"a CUDA graph, and of the torch rules by the clock ({source(result, 'kernel_steps')}):"
    )
    return piece(about, *_operations(records, "batch"))


def rules(result: Result) -> str:
    """Acceptance by rule."""
    settings = result["settings"]
    about = (
        f"Acceptance of trees of {settings['nodes']} nodes with {settings['candidates']} draft "
        f"candidates each, a vocabulary of {settings['vocabulary']:,}, {settings['dtype']} "
        f"logits, temperature {settings['temperature']:g}, on one {device(result)}: microseconds "
        f"in a CUDA graph, and of the torch definition by the clock "
        f"({source(result, 'rule_steps')}):"
    )
    return piece(about, *_operations(result["batches"], "batch"))


def elementwise(result: Result) -> str:
    """What torch.compile makes of small operations."""
    floor = ", ".join(f"{us:.1f} ({name})" for name, us in result["floor"].items())
    about = (
        f"What torch.compile makes of the small operations of a layer (hidden 4096, intermediate "
        f"14336), microseconds in a CUDA graph; a kernel that does next to nothing takes {floor} "
        f"({source(result, 'kernel_elementwise')}):"
    )
    return piece(about, *_operations(result["rows"], "rows"))


def taps(result: Result) -> str:
    """What keeping hidden states costs a verification."""
    settings = result["settings"]
    about = (
        f"Microseconds of a verification of `{settings['target']}` in {settings['dtype']}, "
        f"{settings['context']} tokens of context, on one {device(result)}: medians, sides in "
        f"turns ({source(result, 'taps')}):"
    )
    rows = []
    for record in result["batches"]:
        sides = (f"{statistics.median(us):.1f}" for us in record["us"].values())
        kept = ", ".join(map(str, record["taps"]))
        rows.append(
            [str(record["batch"]), str(record["nodes"]), kept, *sides, f"{record['ratio']:.4f}"]
        )
    return piece(about, ["batch", "nodes", "states after", "without", "with", "ratio"], rows)


def exact(*results: Result, files: Sequence[str] = ("exact",)) -> str:
    """What exact mode costs, and its bits: of one result, or the bits of a second."""
    result, compared = results[0], results[-1]
    settings = result["settings"]
    about = (
        f"`kernels.exact=true` on `{settings['target']}` in {settings['dtype']}, on one "
        f"{device(result)}. Microseconds of a pass over trees, {settings['context']} tokens of "
        f"context, medians, sides in turns; and the share that the larger of two roofs, weights "
        f"over read rate and operations over product rate, has of each "
        f"({source(result, files[0])}):"
    )
    rows = []
    for name, case in result["cases"].items():
        us = [statistics.median(case["us"][side]) for side in ("plain", "exact")]
        shares = [f"{case['roof_us'] / one:.2f}" for one in us]
        times = [f"{one:.0f}" for one in us]
        rows.append([name, times[0], times[1], f"{case['ratio']:.3f}", *shares])
    heads = ["batch x nodes", "plain", "exact", "ratio", "roof: plain", "roof: exact"]
    hashes = piece(
        "Hashes of logits that were compared with those of the same tokens decoded one by one, in "
        f"one batch, on one {device(compared)}, and how many of them differ "
        f"({source(compared, files[-1])}):",
        ["kind", "compared", "different"],
        [[kind, f"{a:,}", str(b)] for kind, (a, b) in compared["bits"].items()],
    )
    return "\n\n".join([piece(about, heads, rows), hashes])


def products(result: Result, name: str = "products") -> str:
    """Products by rows, and what launch parameters that were tried are worth."""
    about = (
        f"Microseconds of products with the weights of an 8B Llama, x in bfloat16, on one "
        f"{device(result)}; `roof` is the larger of weights over read rate and operations over "
        f"product rate ({source(result, name)}):"
    )
    kinds = ["bfloat16", *(["fp8"] if any("fp8" in one for one in result["products"]) else [])]
    rows = []
    for record, kind in product(result["products"], kinds):
        measured = record if kind == "bfloat16" else record["fp8"]
        us = dict(measured["us"])
        named = [us.pop(way, None) for way in ("cuBLAS", "ours")]
        best = min(us, key=lambda way: us[way], default=None)
        tried = "" if best is None else f"{us[best]:.1f}: {best.removeprefix('ours: ')}"
        cells = ("" if one is None else f"{one:.1f}" for one in named)
        share = "" if named[1] is None else f"{measured['roof_us'] / named[1]:.2f}"
        place = [record["weight"], kind, str(record["rows"])]
        rows.append([*place, f"{measured['roof_us']:.1f}", *cells, share, tried])
    heads = ["weight", "type", "rows", "roof", "cuBLAS", "ours", "roof: ours", "best of others"]
    return piece(about, heads, rows)


def _operations(records: list[dict[str, Any]], key: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a line for each operation, a column for each record: ours (torch)."""
    rows = []
    for name in dict.fromkeys(name for record in records for name in record["operations"]):
        found = [record["operations"].get(name, {}) for record in records]
        cells = (
            f"{one['us']:.1f} ({one['torch_us']:.0f})" if "us" in one else "" for one in found
        )
        rows.append([name, *cells])
    return ["us (torch)", *(f"{key} {record[key]}" for record in records)], rows


def anatomy(result: Result) -> str:
    """Milliseconds of a step: of kernels by group and of nothing, or of verbs where there are no
    kernels."""
    cases = {name: case for name, case in result["cases"].items() if "wall_ms" in case}
    parts = {name: _pieces(case) for name, case in cases.items()}
    names = list(dict.fromkeys(name for part in parts.values() for name in part))
    about = (
        f"Milliseconds of a step of `{result['settings']['target']}` with "
        f"`{result['settings']['draft']}` on one {device(result)}: by the clock, and of the time "
        f"in which kernels of a group ran (of those that overlap, the one that began first); idle "
        f"is the rest ({source(result, 'step_anatomy')}):"
    )
    rows = []
    for name, case in cases.items():
        idle = f"{case['host_gap']:.1%}" if "host_gap" in case else ""
        cells = (number(parts[name].get(piece)) for piece in names)
        rows.append([name, number(case["wall_ms"]), *cells, idle])
    return piece(about, ["step", "all", *names, "idle"], rows)


def long(result: Result, file: str = "long") -> str:
    """Passes by part, the loop with drafts over a part of the cache and without, and a prompt that
    is read beside rows that decode."""
    settings, cases = result["settings"], result["cases"]
    pages = settings["dtype"] if settings["kv"] == "auto" else settings["kv"]
    about = (
        f"`{settings['target']}`{weights_of(result)}, {settings['batch']} sequences of "
        f"{settings['context']} tokens, pages of type {pages}, "
        f"on one {device(result)}: milliseconds of a pass or a step, with drafts that are "
        f"accepted at a rate of {settings['rate']}; of `beside` a mean step while a prompt is "
        f"read, over one without ({source(result, file)}):"
    )
    parts = {name: _pieces(case) for name, case in cases.items() if "kernels" in case}
    names = list(dict.fromkeys(name for part in parts.values() for name in part))
    rows = []
    for name, case in cases.items():
        cells = (number(parts.get(name, {}).get(piece)) for piece in names)
        time = next(case[key] for key in ("ms", "step_ms", "mean_ms") if key in case)
        loop = (case.get(key) for key in ("tokens_per_second", "accepted_length"))
        over = case.get("over_none", case.get("stretch"))
        rows.append([name, number(time), *cells, *map(number, loop), number(over)])
    return piece(about, ["", "ms", *names, "tokens/s", "accepted", "over"], rows)


def _pieces(case: dict[str, Any]) -> dict[str, float]:
    if "kernels" not in case:
        verbs: dict[str, float] = case["verbs_ms"]
        return verbs
    return {name: group["own_ms"] for name, group in case["kernels"]["groups"].items()}


def faults(result: Result) -> Iterator[str]:
    """Everything without a time, and why."""
    if "fault" in result:
        yield f"stopped: {result['fault']}"
    yield from (f"compile: {fault}" for fault in result.get("compile_ahead", {}).get("faults", []))
    for record in (*result.get("shapes", []), *result.get("batches", []), *result.get("rows", [])):
        keys = ("batch", "context", "nodes", "heads", "rows")
        place = ", ".join(f"{key} {record[key]}" for key in keys if key in record)
        if "fault" in record:
            yield f"{place}: {record['fault']}"
        for name, method in (record.get("methods") or record.get("operations", {})).items():
            if "us" not in method:
                tried = [method, *method.get("variants", {}).values()]
                reasons = [one["fault"] for one in tried if "fault" in one]
                yield f"{place}: {name}: {'; '.join(dict.fromkeys(reasons)) or 'not measured'}"
    for record in result.get("products", []):
        for kind, measured in (("", record), ("fp8, ", record.get("fp8", {}))):
            for way, fault in measured.get("faults", {}).items():
                yield f"{record['weight']}, {kind}{record['rows']} rows: {way}: {fault}"
    for name, case in result.get("cases", {}).items():
        if "fault" in case:
            yield f"{name}: {case['fault']}"
        if "profile_fault" in case:
            yield f"{name}: not profiled: {case['profile_fault']}"
        if not case.get("adds_up", True):
            yield f"{name}: the verbs are {case['sum_over_clock']:.3f} of the clock"


def plot_attention(result: Result, path: Path) -> None:
    """A column of dots for each shape, a colour for each implementation."""
    shapes = result["shapes"]
    figure, ((axes,),) = canvas(1.0 + 0.75 * len(shapes), 4.2)
    for name, colour in METHOD_COLOURS.items():
        points = [
            (place, shape["methods"][name]["of_roof"])
            for place, shape in enumerate(shapes)
            if "of_roof" in shape["methods"].get(name, {})
        ]
        if points:
            size = 90 if name == "ours" else 36
            axes.scatter(*zip(*points, strict=True), s=size, c=colour, label=name, zorder=3)
    labels = [
        f"{shape['batch']}\n{_thousands(shape['context'])}\n{shape['nodes']}" for shape in shapes
    ]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_xlabel("sequences, context, nodes of each tree")
    axes.set_ylabel("fraction of the roof")
    _to_the_roof(axes)
    axes.set_title(_title(result), fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


def plot_grid(result: Result, path: Path) -> None:
    """A panel for each batch size and number of heads, a line for each size of the trees."""
    from matplotlib import colormaps

    shapes = [shape for shape in result["shapes"] if "of_roof" in shape["methods"].get("ours", {})]
    heads, batches, nodes, contexts = (
        sorted({shape[key] for shape in shapes}) for key in ("heads", "batch", "nodes", "context")
    )
    size = (1.5 + 3.0 * len(batches), 0.6 + 2.6 * len(heads))
    figure, panels = canvas(*size, len(heads), len(batches), sharex=True, sharey=True)
    colours = colormaps["viridis"].resampled(len(nodes) + 1)
    for row, many_heads in zip(panels, heads, strict=True):
        for axes, batch in zip(row, batches, strict=True):
            for index, size_of_tree in enumerate(nodes):
                line = sorted(
                    (shape["context"], shape["methods"]["ours"]["of_roof"])
                    for shape in shapes
                    if (shape["heads"], shape["batch"], shape["nodes"])
                    == (many_heads, batch, size_of_tree)
                )
                if line:
                    x, y = zip(*line, strict=True)
                    axes.plot(x, y, "o-", ms=4, color=colours(index), label=str(size_of_tree))
            axes.set_title(f"batch {batch}, {many_heads} heads", fontsize="medium")
            by_powers_of_two(axes, contexts, [_thousands(context) for context in contexts])
            _to_the_roof(axes)
    figure.supxlabel("context")
    figure.supylabel("fraction of the roof")
    figure.suptitle(_title(result), fontsize="medium")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, title="nodes", loc="outside right upper", frameon=False)
    save(figure, path)


def plot_anatomy(result: Result, path: Path) -> None:
    """A bar for each case, of what its step consists of: kernels, or verbs if there are none."""
    cases = {name: case for name, case in result["cases"].items() if "wall_ms" in case}
    figure, ((axes,),) = canvas(9, 1.6 + 0.45 * len(cases))
    for place, case in enumerate(cases.values()):
        pieces = _pieces(case)
        if "kernels" in case:
            idle = max(0.0, case["wall_ms"] - case["kernels"]["busy_ms"])
            pieces = {**pieces, "idle": idle}
        left = 0.0
        for name, ms in pieces.items():
            axes.barh(place, ms, left=left, color=PIECES[name], label=name)
            left += ms
        axes.annotate(
            f"{left:.2f}", (left, place), (3, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds of a step")
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False)
    axes.set_title(f"{result['settings']['target']} on {device(result)}", fontsize="medium")
    save(figure, path)


def _to_the_roof(axes: Any) -> None:
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _roof(result: Result) -> str:
    if "ceilings" not in result:
        return "nothing measured"
    read, compute = (result["ceilings"][key] / 1e12 for key in ("read", "compute"))
    return f"{read:.2f} TB/s, {compute:.0f} TFLOP/s"


def _title(result: Result) -> str:
    return f"Tree attention on one {device(result)}, roof of {_roof(result)}"


TABLES: dict[str, Callable[[Result], str]] = {  # by part of the benchmark
    "attention": attention,
    "grid": grid,
    "steps": steps,
    "rules": rules,
    "elementwise": elementwise,
    "anatomy": anatomy,
    "taps": taps,
    "exact": exact,
    "products": products,
    "long": long,
}
PLOTS: dict[str, Callable[[Result, Path], None]] = {
    "attention": plot_attention,
    "grid": plot_grid,
    "anatomy": plot_anatomy,
}

"""Tables of speed: on a CPU, end to end on a GPU, and of a pass over a tree."""

from typing import Any

from specdec.experiments.figures.markdown import Result, device, interval, number, source, table

ENTRIES = {  # by the beginning of a method's name
    "small_llama": "`small_llama`, {part}: {detail}",
    "ngram": "`ngram`: {detail}",
    "generate": "transformers `generate`",
    "assisted": "transformers assisted, {detail}",
    "prompt lookup": "transformers prompt lookup",
}


def cpu_speed(result: Result) -> str:
    """The table of `cpu_speed.py`."""
    hardware, versions = result["hardware"], result["versions"]
    lines = [
        f"Greedy decoding of {len(result['prompts'])} built-in prompts, "
        f"{result['tokens_per_output']:.0f} tokens each, one at a time, float32, "
        f"{hardware['threads']} threads of an {hardware['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; 95 % paired bootstrap intervals over prompts; "
        f"{result['outputs_unlike_transformers_generate']} outputs differ from those of "
        f"transformers' `generate` ({source(result, 'cpu_speed')}):",
        "",
    ]
    rows = (
        [
            name,
            number(method["tokens_per_second"], 0),
            number(method["accepted_length"]),
            interval(*method["speedup_over_none"]),
            interval(*method["speedup_over_generate"]),
        ]
        for name, method in result["methods"].items()
    )
    heads = ["method", "tokens/s", "accepted length", "over `none`", "over `generate`"]
    return "\n".join([*lines, *table(heads, rows)])


def end_to_end(result: Result) -> str:
    """The table of `end_to_end.py`: the fastest tree of each grid."""
    settings, versions = result["settings"], result["versions"]
    lines = [
        f"`{settings['target']}` in {settings['dtype']} on one {device(result)}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}; raw prompts of HumanEval "
        f"and MT-Bench ({settings['prompts']} each at batch 1, else the first of each file "
        f"together), {settings['tokens']} new tokens. Tokens/s is {settings['tokens'] - 1} over "
        f"the time of such a run less that of a run of one token, by the clock, which flatters "
        f"methods with few steps by up to 1 / steps; the next column, all tokens over the device "
        f"time of all steps, does not. Of each grid of trees the fastest is shown; over `none` in "
        f"the same turns, with 95 % paired bootstrap intervals over prompts (batch 1). Identical: "
        f"outputs equal to those of `none`, token for token; of the others, how many part at a "
        f"gap of logits within the rounding bound of `specdec/lab/lossless.py` "
        f"({source(result, 'end_to_end')}):",
        "",
    ]
    rows = []
    shown: set[tuple[Any, ...]] = set()
    parts = result["parts"].values()
    for part in sorted(parts, key=lambda part: (part["batch"], part["temperature"])):
        place = part["temperature"], part["batch"]
        methods = {name: one for name, one in part["methods"].items() if "figures" in one}
        if "none" in methods and place not in shown:
            shown.add(place)
            rows.append(_decoding(part, "`none`", methods["none"]))
        for beginning, label in ENTRIES.items():
            of_grid = [
                (one["figures"]["all"]["tokens_per_second"], name)
                for name, one in methods.items()
                if name.startswith(beginning)
            ]
            if of_grid:
                name = max(of_grid)[1]
                detail = name.removeprefix(beginning).strip(" ,")
                title = label.format(part=part["part"], detail=detail)
                rows.append(_decoding(part, title, methods[name]))
    heads = ["T, batch", "method", "tokens/s", "by steps", "HumanEval", "MT-Bench"]
    heads += ["accepted length", "over `none`", "identical", "explained"]
    return "\n".join([*lines, *table(heads, rows)])


def gain(found: dict[str, Any]) -> str:
    """The speedup over `none`, with its interval if there is one."""
    low, high = found["interval"]
    return interval(found["speedup"], low, high) if low < high else number(found["speedup"])


def _decoding(part: dict[str, Any], title: str, method: dict[str, Any]) -> list[str]:
    every, checked = method["figures"]["all"], method.get("agreement")
    cells = [
        f"{part['temperature']:g}, {part['batch']}",
        title,
        f"{every['tokens_per_second']:.0f}",
        number(every.get("step_tokens_per_second"), 0),
        *(
            number(method["figures"].get(name, {}).get("tokens_per_second"), 0)
            for name in ("humaneval", "mt_bench")
        ),
        number(every["accepted_length"]),
        "" if title == "`none`" else gain(every),
        f"{checked['identical']} of {checked['checked']}" if checked else "",
        "",
    ]
    if checked and checked["divergences"]:
        explained = sum(one["explained"] for one in checked["divergences"])
        cells[-1] = f"{explained} of {len(checked['divergences'])}"
    return cells


def calibrate(result: Result) -> str:
    """The table of `calibrate.py`: passes of the target at one context."""
    verify = result["verify"]
    context = min(verify["context"], key=lambda tokens: abs(tokens - 1024))
    place = verify["context"].index(context)
    lines = [
        f"A pass of `{result['settings']['target']}` over trees at a context of {context}, on one "
        f"{device(result)}: milliseconds, and in parentheses multiples of a plain step "
        f"({source(result, 'calibrate')}):",
        "",
    ]
    rows = []
    for batch, by_nodes in zip(verify["batch"], verify["seconds"], strict=True):
        line = [by_context[place] for by_context in by_nodes]
        cells = [
            f"{one * 1e3:.2f} ({one / line[0]:.2f})"
            if isinstance(one, float) and isinstance(line[0], float)
            else ""
            for one in line
        ]
        rows.append([str(batch), *cells])
    heads = ["batch", *(f"nodes: {nodes}" for nodes in verify["nodes"])]
    return "\n".join([*lines, *table(heads, rows)])

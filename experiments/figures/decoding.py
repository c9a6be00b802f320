"""Tables of speed on a CPU, and of what a pass over a tree costs."""

from specdec.experiments.figures.markdown import (
    Result,
    device,
    interval,
    number,
    piece,
    source,
    weights_of,
)


def cpu_speed(result: Result) -> str:
    """The table of `cpu_speed.py`."""
    hardware, versions = result["hardware"], result["versions"]
    about = (
        f"Greedy decoding of {len(result['prompts'])} built-in prompts, "
        f"{result['tokens_per_output']:.0f} tokens each, one at a time, float32, "
        f"{hardware['threads']} threads of an {hardware['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; 95 % jackknife intervals over prompts; "
        f"{result['outputs_unlike_transformers_generate']} outputs differ from those of "
        f"transformers' `generate` ({source(result, 'cpu_speed')}):"
    )
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
    return piece(about, heads, rows)


def calibrate(result: Result, name: str = "calibrate") -> str:
    """The table of `calibrate.py`: passes of the target at one context. The file has that name."""
    verify = result["verify"]
    context = min(verify["context"], key=lambda tokens: abs(tokens - 1024))
    place = verify["context"].index(context)
    about = (
        f"A pass of `{result['settings']['target']}`{weights_of(result)} over trees at a context "
        f"of {context}, on one {device(result)}: milliseconds, and in parentheses multiples of a "
        f"plain step ({source(result, name)}):"
    )
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
    return piece(about, heads, rows)

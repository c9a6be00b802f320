"""Write the measured tables of the README from the JSON files they come from.

python experiments/readme.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def cpu_speed(result: dict[str, Any]) -> str:
    """The table of `cpu_speed.py`."""
    hardware, versions = result["hardware"], result["versions"]
    lines = [
        f"Greedy decoding of {len(result['prompts'])} built-in prompts, "
        f"{result['tokens_per_output']:.0f} tokens each, one at a time, float32, "
        f"{hardware['threads']} threads of an {hardware['cpu']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; 95 % paired bootstrap intervals over prompts; "
        f"{result['outputs_unlike_transformers_generate']} outputs differ from those of "
        f"transformers' `generate` (`{result['command']}`, "
        f"[JSON](experiments/results/cpu_speed.json)):",
        "",
        "| method | tokens/s | accepted length | over `none` | over `generate` |",
        "|---|---|---|---|---|",
    ]
    for name, method in result["methods"].items():
        length = method["accepted_length"]
        cells = [
            name,
            f"{method['tokens_per_second']:.0f}",
            f"{length:.2f}" if length else "",
            *(
                "{:.2f} ({:.2f} to {:.2f})".format(*method[key])
                for key in ("speedup_over_none", "speedup_over_generate")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels(result: dict[str, Any]) -> str:
    """The table of `kernel_bench.py`."""
    read, compute = (result["ceilings"][key] / 1e12 for key in ("read", "compute"))
    first = result["shapes"][0]
    names = {
        "ours, no split": "ours, not split",
        "sdpa": "SDPA",
        "sdpa + gather": "SDPA and page gather",
        "flex default": "FlexAttention",
        "flex tuned": "FlexAttention, tuned",
        "flex split": "and its `SPLIT_KV`",
    }
    lines = [
        f"Tree attention of one layer out of 32 that share a plan, {first['heads']} query and "
        f"{first['kv_heads']} key-value heads of {first['head_dim']}, bfloat16, pages of "
        f"{result['page_size']}, on one {result['hardware']['gpu']}, torch "
        f"{result['versions']['torch']}, triton {result['versions']['triton']}: medians of CUDA "
        f"graph replays with keys and values out of the L2 cache. The roof is what reading the "
        f"keys and values once ({read:.2f} TB/s) or the matrix products ({compute:.0f} TFLOP/s) "
        f"take at least, both measured in the same run. The others, as multiples of our time, "
        f"read contiguous keys and values, and their masks were made beforehand; with one node "
        f"SDPA is cuDNN's without a mask "
        f"(`{result['command']}`, [JSON](experiments/results/kernel_attention.json)):",
        "",
        f"| sequences, context, nodes | ours, us | of the roof | {' | '.join(names.values())} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for shape in result["shapes"]:
        methods = shape["methods"]
        ours = methods["ours"]
        cells = [f"{shape['batch']}, {shape['context']}, {shape['nodes']}"]
        cells += [f"{ours['us']:.1f}", f"{ours['of_roof']:.0%}"] if "us" in ours else ["", ""]
        cells += [
            f"{methods[name]['over_ours']:.2f}" if "over_ours" in methods.get(name, {}) else ""
            for name in names
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernel_steps(result: dict[str, Any]) -> str:
    """The table of `kernel_bench.py --steps`."""
    records = result["batches"]
    lines = [
        f"What a step does around the model, {records[0]['nodes']} nodes, a vocabulary of "
        f"128,256, temperature 1 (greedy: 0), a cache of the shape of Llama-3-8B; microseconds in "
        f"a CUDA graph, and of the torch rules by the clock (`{result['command']}`, "
        f"[JSON](experiments/results/kernel_steps.json)):",
    ]
    return "\n".join([*lines, "", *_operations(records, "batch", "batch")])


def kernel_elementwise(result: dict[str, Any]) -> str:
    """The table of `kernel_bench.py --elementwise`."""
    floor = ", ".join(f"{us:.1f} ({name})" for name, us in result["floor"].items())
    lines = [
        f"What torch.compile makes of the small operations of a layer (hidden 4096, intermediate "
        f"14336), microseconds in a CUDA graph; a kernel that does next to nothing takes {floor} "
        f"(`{result['command']}`, [JSON](experiments/results/kernel_elementwise.json)):",
    ]
    return "\n".join([*lines, "", *_operations(result["rows"], "rows", "rows")])


def end_to_end(result: dict[str, Any]) -> str:
    """The table of `end_to_end.py`: the fastest tree of each grid."""
    settings, versions = result["settings"], result["versions"]
    lines = [
        f"`{settings['target']}` in {settings['dtype']} on one {_device(result)}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}; raw prompts of HumanEval "
        f"and MT-Bench ({settings['prompts']} each at batch 1, else the first of each file "
        f"together), {settings['tokens']} new tokens. Tokens/s is {settings['tokens'] - 1} over "
        f"the time of such a run less that of a run of one token, by the clock, which flatters "
        f"methods with few steps by up to 1 / steps; the next column, all tokens over the device "
        f"time of all steps, does not. Of each grid of trees the fastest is shown; over `none` in "
        f"the same turns, with 95 % paired bootstrap intervals over prompts (batch 1). Identical: "
        f"outputs equal to those of `none`, token for token; of the others, how many part at a "
        f"gap of logits within the rounding bound of `experiments/agreement.py`. Grids, prompts "
        f"and commands are in the [JSON](experiments/results/end_to_end.json) "
        f"(`python -m experiments.end_to_end`):",
        "",
        "| T, batch | method | tokens/s | by steps | HumanEval | MT-Bench | accepted length "
        "| over `none` | identical | explained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown: set[tuple[Any, ...]] = set()
    parts = result["parts"].values()
    for part in sorted(parts, key=lambda part: (part["batch"], part["temperature"])):
        place = part["temperature"], part["batch"]
        methods = {name: one for name, one in part["methods"].items() if "figures" in one}
        if "none" in methods and place not in shown:
            shown.add(place)
            lines.append(_decoding(part, "`none`", methods["none"]))
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
                lines.append(_decoding(part, title, methods[name]))
    return "\n".join(lines)


ENTRIES = {  # by the beginning of a method's name
    "small_llama": "`small_llama`, {part}: {detail}",
    "ngram": "`ngram`: {detail}",
    "generate": "transformers `generate`",
    "assisted": "transformers assisted, {detail}",
    "prompt lookup": "transformers prompt lookup",
}


def _decoding(part: dict[str, Any], title: str, method: dict[str, Any]) -> str:
    every, checked = method["figures"]["all"], method.get("agreement")
    length = every["accepted_length"]
    low, high = every["interval"]
    interval = f" ({low:.2f} to {high:.2f})" if low < high else ""
    cells = [
        f"{part['temperature']:g}, {part['batch']}",
        title,
        f"{every['tokens_per_second']:.0f}",
        f"{every['step_tokens_per_second']:.0f}" if every.get("step_tokens_per_second") else "",
        *(
            f"{method['figures'][name]['tokens_per_second']:.0f}"
            if name in method["figures"]
            else ""
            for name in ("humaneval", "mt_bench")
        ),
        f"{length:.2f}" if length else "",
        "" if title == "`none`" else f"{every['speedup']:.2f}{interval}",
        f"{checked['identical']} of {checked['checked']}" if checked else "",
        "",
    ]
    if checked and checked["divergences"]:
        explained = sum(one["explained"] for one in checked["divergences"])
        cells[-1] = f"{explained} of {len(checked['divergences'])}"
    return f"| {' | '.join(cells)} |"


def calibrate(result: dict[str, Any]) -> str:
    """The table of `calibrate.py`: passes of the target at one context."""
    verify = result["verify"]
    context = min(verify["context"], key=lambda tokens: abs(tokens - 1024))
    place = verify["context"].index(context)
    lines = [
        f"A pass of `{result['settings']['target']}` over trees at a context of {context}, on one "
        f"{_device(result)}: milliseconds, and in parentheses multiples of a plain step "
        f"(`{result['command']}`, [JSON](experiments/results/calibrate.json)):",
        "",
        f"| batch | {' | '.join(f'nodes: {nodes}' for nodes in verify['nodes'])} |",
        "|---|" + "---|" * len(verify["nodes"]),
    ]
    for batch, by_nodes in zip(verify["batch"], verify["seconds"], strict=True):
        line = [by_context[place] for by_context in by_nodes]
        cells = [
            f"{one * 1e3:.2f} ({one / line[0]:.2f})"
            if isinstance(one, float) and isinstance(line[0], float)
            else ""
            for one in line
        ]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def step_anatomy(result: dict[str, Any]) -> str:
    """The table of `step_anatomy.py`: milliseconds of kernels by group, and of nothing."""
    cases = {name: case for name, case in result["cases"].items() if "wall_ms" in case}
    profiled = [case["kernels"]["groups"] for case in cases.values() if "kernels" in case]
    groups = list(dict.fromkeys(name for groups in profiled for name in groups))
    lines = [
        f"Milliseconds of a step of `{result['settings']['target']}` with "
        f"`{result['settings']['draft']}` on one {_device(result)}: by the clock, and of the time "
        f"in which kernels of a group ran (of those that overlap, the one that began first); idle "
        f"is the rest (`{result['command']}`, "
        f"[JSON](experiments/results/step_anatomy.json)):",
        "",
        f"| step | {' | '.join(['all', *groups, 'idle'])} |",
        "|---|" + "---|" * (len(groups) + 2),
    ]
    for name, case in cases.items():
        found = case.get("kernels", {}).get("groups", {})
        cells = [f"{found[group]['own_ms']:.2f}" if group in found else "" for group in groups]
        idle = f"{case['host_gap']:.1%}" if "host_gap" in case else ""
        lines.append("| " + " | ".join([name, f"{case['wall_ms']:.2f}", *cells, idle]) + " |")
    return "\n".join(lines)


def _device(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    device: str = hardware.get("gpu", hardware["cpu"])
    return device


def _operations(records: list[dict[str, Any]], key: str, title: str) -> list[str]:
    """A line for each operation, a column for each record: ours (torch)."""
    names = dict.fromkeys(name for record in records for name in record["operations"])
    heads = [f"{title} {record[key]}" for record in records]
    lines = [f"| us (torch) | {' | '.join(heads)} |", "|---|" + "---|" * len(records)]
    for name in names:
        found = [record["operations"].get(name, {}) for record in records]
        cells = [
            f"{one['us']:.1f} ({one['torch_us']:.0f})" if "us" in one else "" for one in found
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu_speed": ("cpu_speed.json", cpu_speed),
    "end_to_end": ("end_to_end.json", end_to_end),
    "step_anatomy": ("step_anatomy.json", step_anatomy),
    "calibrate": ("calibrate.json", calibrate),
    "kernels": ("kernel_attention.json", kernels),
    "kernel_steps": ("kernel_steps.json", kernel_steps),
    "kernel_elementwise": ("kernel_elementwise.json", kernel_elementwise),
}


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text()
    for marker, (file, describe) in TABLES.items():
        path = ROOT / "experiments/results" / file
        if not path.exists():
            continue
        table = describe(json.loads(path.read_text()))
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()

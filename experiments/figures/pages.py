"""Write the measured tables of the pages from the JSON files they come from.

python -m specdec.experiments.figures.pages
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec.experiments.figures.end_to_end_plot import bootstrap
from specdec.experiments.figures.trees_and_rules_plot import tree_lengths, tree_speed
from specdec.experiments.studies import drafters as drafter_study
from specdec.models.standin import SHAPES

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/acceptance.md")


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


def rule_steps(result: dict[str, Any]) -> str:
    """The table of `rule_steps.py`."""
    settings = result["settings"]
    lines = [
        f"Acceptance of trees of {settings['nodes']} nodes with {settings['candidates']} draft "
        f"candidates each, a vocabulary of {settings['vocabulary']:,}, {settings['dtype']} "
        f"logits, temperature {settings['temperature']:g}, on one {_device(result)}: microseconds "
        f"in a CUDA graph, and of the torch definition by the clock (`{result['command']}`, "
        f"[JSON](../experiments/results/rule_steps.json)):",
    ]
    return "\n".join([*lines, "", *_operations(result["batches"], "batch", "batch")])


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
        f"gap of logits within the rounding bound of `experiments/studies/agreement.py`. Grids, prompts "
        f"and commands are in the [JSON](experiments/results/end_to_end.json) "
        f"(`python -m specdec.experiments.studies.end_to_end`):",
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


def drafter_lengths(result: dict[str, Any]) -> str:
    """The tables of `drafters.py --grid budgets`: accepted lengths by budget, and by prompts."""
    settings, parts = result["settings"], result["parts"]
    budgets = sorted({entry["budget"] for part in parts.values() for entry in part.values()} - {0})
    drafters = list(
        dict.fromkeys(entry["drafter"] for part in parts.values() for entry in part.values())
    )
    drafters.remove("none")
    groups = drafter_study.groups_of(result)
    count, stored = sum(map(len, groups.values())), result["datastore"]
    lines = [
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}: {count} "
        f"prompts, {settings['tokens']} new tokens each; at every budget of nodes the better "
        f"of the trees of the grid, tokens over steps of all prompts (`{result['command']}`, "
        f"[JSON](experiments/results/drafter_lengths.json)). `translated` is the draft model with "
        f"another tokenizer (`experiments/tools/retokenize.py --keep 6000`); the datastore of `rest`: "
        f"{stored['tokens'] / 1e6:.1f} M tokens of {', '.join(stored['sources'])}. "
        f"State is kept for a prompt, a category or the run (never reset):",
        "",
        "| drafter | state | "
        + " | ".join(f"{name}, {budget}" for name in parts for budget in budgets)
        + " |",
        "|---|---|" + "---|" * len(parts) * len(budgets),
    ]
    middle = 32 if 32 in budgets else budgets[-1]
    by_group = [
        "",
        f"The same by prompts, with {middle} nodes:",
        "",
        f"| drafter | T | {' | '.join(groups)} |",
        "|---|---|" + "---|" * len(groups),
    ]
    for drafter in drafters:
        cells, state = [], None
        for name, part in parts.items():
            plain = next(entry for entry in part.values() if entry["drafter"] == "none")
            for budget in budgets:
                found = drafter_study.best(part, "accepted_length", drafter=drafter, budget=budget)
                if found is None:
                    cells.append("")
                    continue
                entry, state = found[1], found[1]["state"]
                every = drafter_study.summary(entry, plain, list(plain["prompts"]))
                cells.append(f"{every['accepted_length']:.2f}")
                if budget == middle:
                    own = (drafter_study.summary(entry, plain, of) for of in groups.values())
                    lengths = (f"{one['accepted_length']:.2f}" for one in own)
                    by_group.append(
                        f"| `{drafter}` | {name.removeprefix('T=')} | {' | '.join(lengths)} |"
                    )
        lines.append(f"| `{drafter}` | {state or 'none'} | {' | '.join(cells)} |")
    return "\n".join(lines + by_group)


def drafter_speed(result: dict[str, Any]) -> str:
    """The table of `drafters.py --grid speed`: the fastest tree of each drafter."""
    settings, groups = result["settings"], drafter_study.groups_of(result)
    lines = [
        f"`{settings['target']}` in {settings['dtype']} on one {_device(result)}, batch "
        f"{settings['batch']}, {settings['tokens']} new tokens for each of "
        f"{sum(map(len, groups.values()))} prompts; models of `{settings['draft']}`, but that "
        f"`translated` drafts with a built-in model of 2.4 M parameters and another tokenizer. "
        f"Of each drafter the fastest tree of its grid; by device time of all steps, over `none` "
        f"in the same turns, with 95 % paired bootstrap intervals over prompts, and by prompts "
        f"(`{result['command']}`, [JSON](experiments/results/drafter_speed.json)). Identical: "
        f"outputs equal to those of `none`; every other one parts at a gap of logits within the "
        f'rounding bound of `experiments/studies/agreement.py` where "explained" says so:',
        "",
        f"| T | drafter | tokens/s | accepted length | over `none` | {' | '.join(groups)} "
        f"| identical | explained |",
        "|---|---|---|---|---|" + "---|" * len(groups) + "---|---|",
    ]
    for name, part in result["parts"].items():
        plain = next(entry for entry in part.values() if entry["drafter"] == "none")
        every = list(plain["prompts"])
        for drafter in dict.fromkeys(entry["drafter"] for entry in part.values()):
            found = drafter_study.best(part, "speedup", drafter=drafter)
            assert found is not None
            title, entry = found
            total = drafter_study.summary(entry, plain, every)
            seconds = [
                [side["prompts"][one]["seconds"] for one in every] for side in (plain, entry)
            ]
            low, high = bootstrap(*seconds)
            own = [drafter_study.summary(entry, plain, of)["speedup"] for of in groups.values()]
            checked = entry["agreement"]
            explained = sum(one["explained"] for one in checked["divergences"])
            cells = [
                name.removeprefix("T="),
                f"`{title.replace(':', '`:')}" if drafter != "none" else "`none`",
                f"{total['tokens_per_second']:.0f}",
                f"{total['accepted_length']:.2f}",
                f"{total['speedup']:.2f} ({low:.2f} to {high:.2f})" if drafter != "none" else "",
                *(f"{speedup:.2f}" if drafter != "none" else "" for speedup in own),
                f"{checked['identical']} of {checked['checked']}" if checked["checked"] else "",
                f"{explained} of {len(checked['divergences'])}" if checked["divergences"] else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_resumed(result)])


def _resumed(result: dict[str, Any]) -> list[str]:
    """What verification saves by going on where a draft has stopped, beside the weights it
    leaves out."""
    settings, found = result["settings"], []
    shape = SHAPES.get(settings["target"].removeprefix("standin:"))
    part = result["parts"].get("T=0", {})
    for name, entry in part.items():
        other = part.get(name.replace("early_exit:", "early_exit anew:"))
        if entry["drafter"] != "early_exit" or other is None:
            continue
        mine, theirs = (
            1e3 * one["verbs"]["verify"] / sum(p["steps"] for p in one["prompts"].values())
            for one in (entry, other)
        )
        tree = name.removeprefix("early_exit: ")
        found.append(f"{theirs:.2f} to {mine:.2f} ms ({1 - mine / theirs:.1%}; {tree})")
    if shape is None or not found:
        return []
    heads = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    layer = shape.hidden_size * (heads + 3 * shape.intermediate_size)
    whole = layer * shape.num_hidden_layers + shape.hidden_size * shape.vocab_size
    return [
        "",
        f"Verification that goes on after {settings['exit_layer']} of {shape.num_hidden_layers} "
        f"layers takes less by {' and '.join(found)}; these layers hold "
        f"{settings['exit_layer'] * layer / whole:.1%} of the weights that a pass reads.",
    ]


def lookup_speed(result: dict[str, Any]) -> str:
    """The table of `lookup_speed.py`."""
    stored = result["datastore"]
    lines = [
        f"A look-up of `drafter=retriever`, one thread of an {result['hardware']['cpu']}, files "
        f"in the page cache; the datastore has {stored['tokens'] / 1e6:.0f} M tokens of "
        f"{stored['documents']:,} documents and opens in {stored['open_seconds']:.3f} s "
        f"(`{result['command']}`, [JSON](experiments/results/lookup_speed.json)):",
        "",
        "| where | microseconds: median | p90 | p99 | median without a match |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["lookup_us"].items():
        match, missed = entry["match"], entry["no_match"]
        cells = [name, *(f"{match[key]:.0f}" for key in ("median", "p90", "p99"))]
        cells.append(f"{missed['median']:.0f}" if missed["steps"] else "")
        lines.append(f"| {' | '.join(cells)} |")
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
    "drafter_lengths": ("drafter_lengths.json", drafter_lengths),
    "drafter_speed": ("drafter_speed.json", drafter_speed),
    "lookup_speed": ("lookup_speed.json", lookup_speed),
    "tree_lengths": ("tree_lengths.json", tree_lengths),
    "tree_speed": ("tree_speed.json", tree_speed),
    "tree_speed_batch8": ("tree_speed_batch8.json", tree_speed),
    "rule_steps": ("rule_steps.json", rule_steps),
    "kernels": ("kernel_attention.json", kernels),
    "kernel_steps": ("kernel_steps.json", kernel_steps),
    "kernel_elementwise": ("kernel_elementwise.json", kernel_elementwise),
}


def main() -> None:
    for page in (ROOT / name for name in PAGES):
        text = page.read_text()
        for marker, (file, describe) in TABLES.items():
            path = ROOT / "experiments/results" / file
            if not path.exists() or f"<!-- {marker} -->" not in text:
                continue
            table = describe(json.loads(path.read_text()))
            pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
            text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        page.write_text(text)


if __name__ == "__main__":
    main()

"""What several GPUs gain that share a target."""

from typing import Any

from specdec.experiments.figures.markdown import Result, device, number, piece, source


def ranks(result: Result, file: str = "ranks") -> str:
    """The table of `bench.ranks`: the same on one GPU and on all of them, and a large target."""
    settings, gpus = result["settings"], result["hardware"]["gpus"]
    small, alone = result["small"], result["alone"]
    nodes = f"pass over {settings['nodes']} nodes, over one of a node"
    rows = [_row("plain step, ms", alone, small, "plain", "step_ms")]
    for tree in settings["trees"]:
        rows.append(_row(f"`small_llama {tree}`, ms a token", alone, small, tree, "token_ms"))
    rows.append([*_row(nodes, alone, small, "passes", "many_over_one")[:3], ""])
    if large := result.get("large"):
        name, limit = settings["large"], "plain step, large, over its limit"
        figures = {
            "plain step, ms": large["plain"]["step_ms"],
            "that over its limit": result["ratios"][limit],
            nodes: large["passes"]["many_over_one"],
        }
        name = f"`{name}`" + ("" if (how := settings["quantize"]) == "none" else f" in {how}")
        rows += [[f"{name}: {what}", "", number(one), ""] for what, one in figures.items()]
    return piece(_about(result, file), ["", "one GPU", f"{gpus} GPUs", f"{gpus} over one"], rows)


def _about(result: Result, file: str) -> str:
    settings, gpus, sums = result["settings"], result["hardware"]["gpus"], result["sums"]
    bits, speed = result["small"]["bits"], result["read_bytes_per_second"] / 1e12
    equal = "have" if bits["equal"] else "do NOT have"
    return (
        f"`{settings['small']}` in {settings['dtype']} on one {device(result)} and on {gpus} that "
        f"share it (`target.tp={gpus}`): {settings['prompts']} prompts, {settings['tokens']} new "
        f"tokens each; `small_llama` with `{settings['draft']}`, whole on each GPU. The limit is "
        f"what reading the weights of one GPU takes at {speed:.2f} TB/s, measured in the same "
        f"run. Of {sums['sums']} sums over shared memory {len(sums['wrong'])} differ from sums of "
        f"gathered parts; {bits['of']} of {bits['steps']} steps {equal} the same bits on all GPUs "
        f"({source(result, file)}):"
    )


def _row(
    name: str, alone: dict[str, Any], together: dict[str, Any], part: str, figure: str
) -> list[str]:
    one, all_of_them = (side.get(part, {}).get(figure) for side in (alone, together))
    ratio = all_of_them / one if one and all_of_them else None
    return [name, number(one), number(all_of_them), number(ratio)]

"""Tables of what replay says beside runs."""

from specdec.experiments.figures.markdown import Result, device, interval, number, piece, source

PARTS = ("steps", "draft", "verify", "loop", "uneven")


def runs_table(result: Result, file: str = "replay") -> str:
    """Tokens a step, and of runs that are timed tokens a second."""
    replay, settings = result["replay"], result["settings"]
    timed = any("speed" in one for one in result["run"])
    about = (
        f"{replay['configurations']} configurations replayed over {replay['tokens']} tokens in "
        f"{replay['seconds']:.1f} s, and {len(result['run'])} of them run: tokens a step of "
        f"`{settings['draft']}` for `{settings['target']}`, {settings['prompts']} prompts, "
        f"{settings['samples']} texts of {settings['tokens']} tokens each at temperature "
        f"{settings['temperature']:g}, {settings['dtype']}, on an {device(result)}, with 95 % "
        f"jackknife intervals over prompts; texts of the runs are others than those of the "
        f"record; p of the two being equal, by Holm of all of them"
    )
    heads = ["tree", "nodes", "children", "rule", "run", "replay", "p", "Holm"]
    if timed:
        about += (
            "; tokens a second, by how much replay is above, and by how much of the run's time "
            "each part was foretold too long"
        )
        heads += ["tokens/s", "replay", "gap", *PARTS]
    rows = []
    for one in result["run"]:
        cells = [one["tree"], str(one["budget"]), one["children"], one["acceptance"]]
        cells += [interval(*one["run"]), interval(*one["replay"])]
        cells += [number(one["p"], 3), number(one["holm"], 3)]
        if timed:
            cells += _speed(one)
        rows.append(cells)
    return piece(f"{about} ({source(result, file)}):", heads, rows)


def _speed(one: Result) -> list[str]:
    if "speed" not in one:
        return [""] * (3 + len(PARTS))
    speed = one["speed"]
    shares = [speed["gap"], *(speed["parts"][part] for part in PARTS)]
    cells = [number(speed["measured"], 1), number(speed["predicted"], 1)]
    return [*cells, *(f"{share:+.1%}" for share in shares)]

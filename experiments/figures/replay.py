"""Tables of what replay says beside runs."""

from html import escape

from specdec.experiments.figures.markdown import Result, device, interval, number, piece, source

END = '<article class="end">'  # of a page of `specdec compare`
PARTS = ("steps", "draft", "verify", "loop", "uneven")


def runs_table(result: Result, file: str = "replay") -> str:
    """Tokens a step, and of runs that are timed tokens a second."""
    return piece(f"{_about(result)} ({source(result, file)}):", *_runs(result))


def beside_runs(page: str, result: Result) -> str:
    """An HTML page of what was replayed, with the same table before its end."""
    heads, rows = _runs(result)
    head = "".join(f'<th><span class="head">{escape(cell)}</span></th>' for cell in heads)
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    made = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    before, end, after = page.rpartition(END)
    return (
        f'{before}<article id="runs">\n<section>\n<h2>Beside runs</h2>\n'
        f'<p class="about">{escape(_about(result).replace("`", ""))}</p>\n'
        f'<div class="scroll wide">\n<table>\n{made}\n</table>\n</div>\n</section>\n</article>\n'
        f"{end}{after}"
    )


def _about(result: Result) -> str:
    replay, settings = result["replay"], result["settings"]
    about = (
        f"{replay['configurations']} configurations replayed over {replay['tokens']} tokens in "
        f"{replay['seconds']:.1f} s, and {len(result['run'])} of them run: tokens a step of "
        f"`{settings['draft']}` for `{settings['target']}`, {settings['prompts']} prompts, "
        f"{settings['samples']} texts of {settings['tokens']} tokens each at temperature "
        f"{settings['temperature']:g}, {settings['dtype']}, on an {device(result)}, with 95 % "
        f"jackknife intervals over prompts; texts of the runs are others than those of the "
        f"record; p of the two being equal, by Holm of all of them"
    )
    if _timed(result):
        about += (
            f"; tokens a second, which are these over the mean seconds of a step of "
            f"{settings['timed']} texts of each prompt, decoded one at a time, by how much replay "
            f"is above, and by how much of the run's time each part was foretold too long"
        )
    return about


def _timed(result: Result) -> bool:
    return any("speed" in one for one in result["run"])


def _runs(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and rows."""
    heads = ["tree", "nodes", "children", "rule", "run", "replay", "p", "Holm"]
    timed = _timed(result)
    if timed:
        heads += ["tokens/s", "replay", "gap", *PARTS]
    rows = []
    for one in result["run"]:
        cells = [one["tree"], str(one["budget"]), one["children"], one["acceptance"]]
        cells += [interval(*one["run"]), interval(*one["replay"])]
        cells += [number(one["p"], 3), number(one["holm"], 3)]
        if timed:
            cells += _speed(one)
        rows.append(cells)
    return heads, rows


def _speed(one: Result) -> list[str]:
    if "speed" not in one:
        return [""] * (3 + len(PARTS))
    speed = one["speed"]
    shares = [speed["gap"], *(speed["parts"][part] for part in PARTS)]
    cells = [number(speed["measured"], 1), number(speed["predicted"], 1)]
    return [*cells, *(f"{share:+.1%}" for share in shares)]

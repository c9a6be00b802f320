"""The table of what bets find."""

from specdec.experiments.figures.markdown import Result, piece


def faults(result: Result) -> str:
    """Tokens until each fault is certain, by bet; and alarms without one."""
    found, settings, clean = result["faults"], result["settings"], result["clean"]
    ways = list(found["none"]["certain"][0])
    rows = [
        [one["about"], *(_range([world[way] for world in one["certain"]]) for way in ways)]
        for one in found.values()
    ]
    about = (
        f"Tokens until a fault is certain at {settings['alpha']}, in {settings['worlds']} made-up "
        f"languages of {settings['vocabulary']} tokens, from the fastest to the slowest; `-`: in "
        f"none within {settings['tokens']:,}, `+`: not in all. Beside the bets, alone and "
        f"together, is the test of Kolmogorov and Smirnov in the order of p, which may be looked "
        f"at once. Of {settings['audits']:,} audits of {settings['audited']:,} tokens without a "
        f"fault {clean['alarms']} ended with an alarm, at {settings['alarm']}; p was 0.01 or less "
        f"in {clean['below']['0.01']} (`{result['command']}`, "
        f"[JSON](../../experiments/results/faults.json)):"
    )
    return piece(about, ["fault", *ways], rows)


def _range(values: list[int | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    ends = f"{known[0]:,} to {known[-1]:,}" if known[0] < known[-1] else f"{known[0]:,}"
    return ends + "+" * (len(known) < len(values))

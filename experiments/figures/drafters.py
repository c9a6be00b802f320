"""Tables of what drafters are worth, and of what a look-up takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specdec.experiments.figures.markdown import (
    Result,
    device,
    interval,
    number,
    piece,
    source,
    table,
    weights_of,
)
from specdec.lab.metrics import groups_of, summary
from specdec.lab.statistics import ratio
from specdec.models.standin import SHAPES

Wide = tuple[int, str, str]  # batch, temperature and drafter of a row of wide trees


def plain_of(part: dict[str, Any]) -> Any:
    """The entry of plain decoding."""
    return next(entry for entry in part.values() if entry["drafter"] == "none")


def best(part: dict[str, Any], key: str, **wanted: Any) -> tuple[str, dict[str, Any]] | None:
    """The entry with the largest figure over all prompts among those with these properties that
    are finished."""
    plain = plain_of(part)
    every = list(plain["prompts"])
    able = [
        (name, entry)
        for name, entry in part.items()
        if entry["prompts"].keys() == plain["prompts"].keys() and wanted.items() <= entry.items()
    ]
    return max(able, key=lambda one: summary(one[1], plain, every)[key], default=None)


def drafter_lengths(result: Result) -> str:
    """The tables of `drafters.py --grid budgets`: accepted lengths by budget, and by prompts."""
    settings, parts = result["settings"], result["parts"]
    budgets = sorted({entry["budget"] for part in parts.values() for entry in part.values()} - {0})
    drafters = list(
        dict.fromkeys(entry["drafter"] for part in parts.values() for entry in part.values())
    )
    drafters.remove("none")
    groups = groups_of(result)
    count, stored = sum(map(len, groups.values())), ""
    if "datastore" in result:
        tokens, sources = (result["datastore"][name] for name in ("tokens", "sources"))
        stored = f"; the datastore of `rest`: {tokens / 1e6:.1f} M tokens of {', '.join(sources)}"
    lines = [
        f"`{settings['target']}` with `{settings['draft']}`, {settings['dtype']}: {count} "
        f"prompts, {settings['tokens']} new tokens each; at every budget of nodes the better "
        f"of the trees of the grid, tokens over steps of all prompts "
        f"({source(result, 'drafter_lengths')}). `translated` is the draft model with another "
        f"tokenizer (`experiments/tools/retokenize.py`, 6000 tokens kept){stored}. State is kept "
        f"for a prompt, a category or the run (never reset):",
        "",
    ]
    middle = 32 if 32 in budgets else budgets[-1]
    rows, by_group = [], []
    for drafter in drafters:
        cells, state = [], None
        for name, part in parts.items():
            plain = plain_of(part)
            for budget in budgets:
                found = best(part, "accepted_length", drafter=drafter, budget=budget)
                if found is None:
                    cells.append("")
                    continue
                entry, state = found[1], found[1]["state"]
                every = summary(entry, plain, list(plain["prompts"]))
                cells.append(f"{every['accepted_length']:.2f}")
                if budget == middle:
                    own = (summary(entry, plain, of) for of in groups.values())
                    lengths = (f"{one['accepted_length']:.2f}" for one in own)
                    by_group.append([f"`{drafter}`", name.removeprefix("T="), *lengths])
        rows.append([f"`{drafter}`", state or "none", *cells])
    heads = ["drafter", "state", *(f"{name}, {budget}" for name in parts for budget in budgets)]
    lines += table(heads, rows)
    lines += ["", f"The same by prompts, with {middle} nodes:", ""]
    return "\n".join([*lines, *table(["drafter", "T", *groups], by_group)])


def drafter_speed(*results: Result, files: Sequence[str] = ("drafter_speed",)) -> str:
    """The table of `drafters.py --grid speed`: the fastest tree of each drafter. Several results
    are of other batches or weights; `files` hold them."""
    first = results[0]
    settings, groups = first["settings"], groups_of(first)
    if min(map(len, groups.values())) < 2:
        groups = {}  # a column of one prompt says little
    batches = " and ".join(dict.fromkeys(str(one["settings"]["batch"]) for one in results))
    used = {entry["drafter"] for part in first["parts"].values() for entry in part.values()}
    other = ""
    if "translated" in used:
        other = (
            ", but that `translated` drafts with a built-in model of 2.4 M parameters and another "
            "tokenizer"
        )
    lines = [
        f"`{settings['target']}` in {settings['dtype']} on one {device(first)}, batch {batches}, "
        f"{settings['tokens']} new tokens for each of {sum(map(len, groups_of(first).values()))} "
        f"prompts; models of `{settings['draft']}`{other}. Of each drafter the fastest tree of "
        f"its grid; by device time of all steps, over `none` in the same turns, with 95 % "
        f"jackknife intervals over prompts{', and by prompts' if groups else ''} "
        f"({'; '.join(map(source, results, files))}). Identical: outputs equal to those of "
        f"`none`; every other one parts at a gap of logits within the rounding bound of "
        f'`specdec/lab/lossless.py` where "explained" says so:',
        "",
    ]
    several = len(results) > 1
    rows = [
        [f"{one['settings']['batch']}{weights_of(one)}", *row] if several else row
        for one in results
        for row in _speeds(one, groups)
    ]
    heads = ["batch"] if several else []
    heads += ["T", "drafter", "tokens/s", "accepted length", "over `none`", *groups]
    lines += table([*heads, "identical", "explained"], rows)
    return "\n".join([*lines, *_resumed(first)])


def drafter_wide(*results: Result, files: Sequence[str] = ("drafter_wide",)) -> str:
    """The table of `drafters.py grid=wide`: the fastest tree of each budget, its gain over plain
    decoding, and that of the best over the drafter's own chain."""
    first = results[0]
    settings = first["settings"]
    budgets = sorted(
        {
            entry["budget"]
            for one in results
            for part in one["parts"].values()
            for entry in part.values()
        }
        - {0}
    )
    counts = sorted({sum(map(len, groups_of(one).values())) for one in results})
    prompts = ", ".join(map(str, counts[:-1])) + " or " * (len(counts) > 1) + str(counts[-1])
    about = (
        f"`{settings['target']}` in {settings['dtype']} on one {device(first)}, "
        f"{settings['tokens']} new tokens for each of {prompts} prompts; models of "
        f"`{settings['draft']}`. Tokens per second and accepted length of the fastest tree of "
        f"each budget, the first a chain; then the fastest of all over `none`, "
        f"and over the drafter's own chain, in the same turns, with 95 % jackknife intervals over "
        f"prompts ({'; '.join(map(source, results, files))}):"
    )
    rows, reached = [], dict[Wide, dict[int, tuple[float, float]]]()
    for one in results:
        for name, part in one["parts"].items():
            plain = plain_of(part)
            every = list(plain["prompts"])
            for drafter in dict.fromkeys(entry["drafter"] for entry in part.values()):
                fastest = best(part, "speedup", drafter=drafter)
                chain = best(part, "speedup", drafter=drafter, budget=budgets[0])
                if drafter == "none" or fastest is None or chain is None:
                    continue
                own = dict(_by_budget(part, drafter, budgets))
                reached[one["settings"]["batch"], name, drafter] = own
                cells = (f"{own[n][0]:.0f} ({own[n][1]:.2f})" if n in own else "" for n in budgets)
                gains = [_gain(side, fastest[1], every) for side in (plain, chain[1])]
                batch = str(one["settings"]["batch"])
                rows.append([batch, name.removeprefix("T="), f"`{drafter}`", *cells, *gains])
    heads = ["batch", "T", "drafter", *(f"{budget} nodes" for budget in budgets)]
    page = piece(about, [*heads, "best over `none`", "over its chain"], rows)
    if bounds := list(_bounds(reached)):
        page += (
            "\n\nTrees that were left out of the larger batch could not be the fastest: if they "
            "took no more time than its largest ones and had the accepted lengths of the smaller "
            f"batch, they would reach {min(bounds):.2f} to {max(bounds):.2f} of the fastest."
        )
    return page


def _by_budget(
    part: dict[str, Any], drafter: str, budgets: Sequence[int]
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Tokens per second and accepted length of the fastest tree of each budget there is."""
    plain = plain_of(part)
    for budget in budgets:
        if found := best(part, "speedup", drafter=drafter, budget=budget):
            own = summary(found[1], plain, list(plain["prompts"]))
            yield budget, (own["tokens_per_second"], own["accepted_length"])


def _bounds(reached: Mapping[Wide, Mapping[int, tuple[float, float]]]) -> Iterator[float]:
    """What trees that a batch left out would reach at most, over its fastest; `reached` is as of
    `_by_budget`."""
    for (batch, *which), own in reached.items():
        largest = max(own)
        for (other, *same), theirs in reached.items():
            if same == which and other < batch and largest in theirs:
                for budget in theirs.keys() - own.keys():
                    longer = theirs[budget][1] / theirs[largest][1]
                    yield own[largest][0] * longer / max(speed for speed, _ in own.values())


def _gain(side: dict[str, Any], entry: dict[str, Any], every: Sequence[str]) -> str:
    """How much faster an entry is than another, over the same prompts."""
    seconds = [[one["prompts"][name]["seconds"] for name in every] for one in (side, entry)]
    return interval(*ratio(*seconds).around)


def levels(result: Result, file: str = "levels") -> str:
    """How long chains of drafts take, from `bench.run anatomy`: milliseconds, and over what the
    first drafter takes for as many levels."""
    first = next(iter(result["cases"])).partition(",")[0].rpartition(" ")[0]
    drafts = {
        name.partition(",")[0]: case["verbs_ms"]["draft"] for name, case in result["cases"].items()
    }
    rows = []
    for name, ms in drafts.items():
        drafter, _, chain = name.rpartition(" ")
        over = ms / drafts[f"{first} {chain}"]
        rows.append([f"`{drafter}`", chain.removeprefix("chain:"), number(ms), number(over)])
    about = (
        f"Milliseconds of drafting a chain for `{result['settings']['target']}` on one "
        f"{device(result)} ({source(result, file)}):"
    )
    return piece(about, ["drafter", "levels", "ms", f"over `{first}`"], rows)


def drafter_texts(*results: Result, files: Sequence[str] = ("exact_texts",)) -> str:
    """The table of `drafters.py grid=texts`: how many texts are those of plain decoding, and how
    many are the same whatever the batch. Several results are of other batches or temperatures."""
    settings = results[0]["settings"]
    stored = settings.get("cache_dtype", "auto")
    pages = "" if stored == "auto" else f" with keys and values in {stored}"
    notes = {one["settings"]["batch"]: one["note"] for one in results if "note" in one}
    said = "".join(f". Batch {batch}: {note}" for batch, note in notes.items())
    about = (
        f"Texts of exact mode, `{settings['target']}` in {settings['dtype']}{pages} on one "
        f"{device(results[0])}, {settings['tokens']} new tokens each, and how many are those of "
        f"`none`; last, of those decoded in several batches, how many are the same in all "
        f"({'; '.join(map(source, results, files))}){said}:"
    )
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for result in results:
        for name, part in result["parts"].items():
            for method, entry in part.items():
                key = name.removeprefix("T="), f"`{method.replace(':', '`:')}"
                rows.setdefault(key, {})[result["settings"]["batch"]] = entry
    batches = sorted({result["settings"]["batch"] for result in results})
    lines = []
    for key, entries in rows.items():
        texts: dict[str, list[str]] = {}
        for entry in entries.values():
            for prompt, taken in entry["prompts"].items():
                texts.setdefault(prompt, []).append(taken["text"])
        equal = [len(set(found)) == 1 for found in texts.values() if len(found) > 1]
        compared = [entries[batch]["agreement"] if batch in entries else {} for batch in batches]
        shares = [(one.get("identical"), one.get("checked")) for one in compared]
        shares.append((sum(equal), len(equal)))
        lines.append([*key, *(f"{some} of {all_}" if all_ else "" for some, all_ in shares)])
    heads = ["T", "drafter", *(f"as `none`, batch {batch}" for batch in batches)]
    return piece(about, [*heads, "whatever the batch"], lines)


def _speeds(result: Result, groups: Mapping[str, list[str]]) -> Iterator[list[str]]:
    """The fastest tree of each drafter at each temperature, also by groups of prompts."""
    for name, part in result["parts"].items():
        plain = plain_of(part)
        every = list(plain["prompts"])
        for drafter in dict.fromkeys(entry["drafter"] for entry in part.values()):
            found = best(part, "speedup", drafter=drafter)
            assert found is not None
            title, entry = found
            total = summary(entry, plain, every)
            gain = _gain(plain, entry, every)
            own = [summary(entry, plain, of)["speedup"] for of in groups.values()]
            checked = entry["agreement"]
            explained = sum(one["explained"] for one in checked["divergences"])
            yield [
                name.removeprefix("T="),
                f"`{title.replace(':', '`:')}" if drafter != "none" else "`none`",
                f"{total['tokens_per_second']:.0f}",
                f"{total['accepted_length']:.2f}",
                gain if drafter != "none" else "",
                *(f"{speedup:.2f}" if drafter != "none" else "" for speedup in own),
                f"{checked['identical']} of {checked['checked']}" if checked["checked"] else "",
                f"{explained} of {len(checked['divergences'])}" if checked["divergences"] else "",
            ]


def _resumed(result: Result) -> list[str]:
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


def lookup_speed(result: Result) -> str:
    """The table of `lookup_speed.py`."""
    stored = result["datastore"]
    about = (
        f"A look-up of `drafter=retriever`, one thread of an {result['hardware']['cpu']}, files "
        f"in the page cache; the datastore has {stored['tokens'] / 1e6:.0f} M tokens of "
        f"{stored['documents']:,} documents and opens in {stored['open_seconds']:.3f} s "
        f"({source(result, 'lookup_speed')}):"
    )
    rows = []
    for name, entry in result["lookup_us"].items():
        match, missed = entry["match"], entry["no_match"]
        cells = [name, *(f"{match[key]:.0f}" for key in ("median", "p90", "p99"))]
        cells.append(f"{missed['median']:.0f}" if missed["steps"] else "")
        rows.append(cells)
    heads = ["where", "microseconds: median", "p90", "p99", "median without a match"]
    return piece(about, heads, rows)

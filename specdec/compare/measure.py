"""From sums over conversations to the figures of methods, and how they differ."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.compare.figures import Difference, Entry, Estimate, Share
from specdec.compare.grouping import MARKS, Contender, labels_of
from specdec.compare.read import Run
from specdec.compare.sums import Conversation, Sums, total
from specdec.lab.metrics import VERBS, by_depth
from specdec.lab.statistics import Ratio, holm, product, ratio

Keys = Sequence[Conversation]
LENGTH, SPEED = "accepted_length", "tokens_per_second"
EXPECTED = re.compile(r"([\d.]+) times plain decoding expected")


def entry(method: Contender, keys: Keys, *, times: bool) -> Entry:
    """The figures of a method on these conversations.

    Args:
        times: whether those of its group can be used.
    """
    parts = [method.texts[key] for key in keys]
    whole, runs = total(parts), method.runs
    timed, told = times and method.timed, runs[0].replayed
    energy = _energy(runs) if times else None
    return Entry(
        name=method.name,
        mark=method.mark,
        labels=labels_of(runs[0]),
        folders=[run.name for run in runs],
        seeds=sorted({run.seed for run in runs}),
        conversations=len(keys),
        tokens=whole.tokens,
        batch_size=int(runs[0].settings.get("batch_size", 1)),
        accepted_length=estimate(_length(parts)),
        per_request=None if told else estimate(_per_request(parts)),
        unrepetitive=None if told else _unrepetitive(parts),
        repetitive=whole.loops / whole.texts,
        tokens_per_second=whole.tokens / whole.seconds if timed and whole.seconds else None,
        speedup=speedup(method, keys) if times else None,
        tokens_per_pass=_over(whole.tokens, whole.passes),
        nodes_per_step=_over(whole.drafted, whole.steps),
        acceptance_by_depth=(
            runs[0].summary["acceptance_by_depth"] if told else by_depth(whole.depths)
        ),
        anatomy=_anatomy(whole) if timed else None,
        energy=energy and energy[0],
        idle_watts=energy and energy[1],
        predicted_speedup=_predicted(runs[0]),
        by_category={
            name: _share(method, own, times=times) for name, own in by_category(keys).items()
        },
        lossless=[{"run": run.name, **_lossless(run)} for run in runs if not told],
        repeats=_repeats(method, keys) if timed else None,
        expected_speed=_expected_speed(method, whole),
    )


def _expected_speed(method: Contender, whole: Sums) -> float | None:
    if not whole.expected_seconds:
        return None
    batch = int(method.runs[0].settings.get("batch_size", 1))
    return batch * whole.tokens / whole.expected_seconds


def estimate(found: Ratio) -> Estimate:
    """As figures have it."""
    if found.ends is not None:
        return Estimate(value=found.value, low=found.ends[0], high=found.ends[1])
    _, least, most = found.around
    return Estimate(value=found.value, least=least, most=most)


def by_category(keys: Keys) -> dict[str, list[Conversation]]:
    """Conversations by category; none if there is but one."""
    found: dict[str, list[Conversation]] = {}
    for key in keys:
        found.setdefault(key.category, []).append(key)
    return found if len(found) > 1 else {}


def speedup(method: Contender, keys: Keys) -> Estimate | None:
    """Over plain decoding, whose texts need not be equally long; None without its times."""
    plain = method.plain
    if plain is None or not all(key in plain for key in keys):
        return None
    mine, theirs = ([side[key] for key in keys] for side in (method.texts, plain))
    columns = [[float(part.tokens) for part in side] for side in (mine, theirs)]
    spent = [[part.seconds for part in side] for side in (mine, theirs)]
    if not all(min(column) > 0.0 for column in (*columns, *spent)):
        return None
    return estimate(product([columns[0], spent[1]], [spent[0], columns[1]]))


def _length(parts: Sequence[Sums]) -> Ratio:
    return ratio([part.tokens for part in parts], [part.steps for part in parts])


def _per_request(parts: Sequence[Sums]) -> Ratio:
    return ratio([part.lengths for part in parts], [part.decoded for part in parts])


def _unrepetitive(parts: Sequence[Sums]) -> Estimate | None:
    """Accepted length without texts that repeat themselves; None if no text is left."""
    kept = [(part.tokens - part.loop_tokens, part.steps - part.loop_steps) for part in parts]
    kept = [one for one in kept if one[1]]
    return estimate(ratio(*zip(*kept, strict=True))) if kept else None


def _share(method: Contender, keys: Keys, *, times: bool) -> Share:
    return Share(
        conversations=len(keys),
        accepted_length=estimate(_length([method.texts[key] for key in keys])),
        speedup=speedup(method, keys) if times else None,
    )


def _anatomy(whole: Sums) -> dict[str, float]:
    """Milliseconds of a step of the batch, by verb."""
    return {verb: 1e3 * _over(whole.verbs[verb], whole.passes) for verb in VERBS}


def _energy(runs: Sequence[Run]) -> tuple[float, float | None] | None:
    """Joules for a token, and watts of the idle machine; None if a run did not measure it."""
    found = [run.summary.get("energy") or {} for run in runs]
    if not all(one.get("joules_per_token") for one in found):
        return None
    joules = sum(one["joules"] for one in found)
    return joules / sum(one["joules"] / one["joules_per_token"] for one in found), found[0].get(
        "idle_watts"
    )


def _predicted(run: Run) -> float | None:
    """What the choice of a tree by costs has promised."""
    chosen = run.summary.get("chosen_by") or {}
    shape = chosen.get("tree.shape", chosen.get("shape"))  # the latter of earlier runs
    said = EXPECTED.search(str(shape))
    return float(said[1]) if said else None


def _lossless(run: Run) -> Mapping[str, Any]:
    verdict = run.summary.get("lossless") or {}
    return verdict or {"verdict": "not checked", "reason": "the run was killed"}


def _repeats(method: Contender, keys: Keys) -> float | None:
    """By how much the speeds of runs of equal seed differ, at most."""
    by_seed: dict[int, list[float]] = {}
    for run in method.runs:
        whole = total(run.texts[key] for key in keys)
        by_seed.setdefault(run.seed, []).append(_over(whole.tokens, whole.seconds))
    spreads = [max(one) / min(one) - 1.0 for one in by_seed.values() if len(one) > 1 and min(one)]
    return max(spreads, default=None)


def differences(methods: Sequence[Contender], keys: Keys, *, pace: bool) -> list[Difference]:
    """Of each quantity, the method with the most of it against each other one, lossless ones and
    those of each other mark among themselves."""
    found: list[Difference] = []
    for mark in MARKS:
        alike = [method for method in methods if method.mark == mark]
        for quantity in (SPEED, LENGTH):
            able = alike
            if quantity == SPEED:
                able = [method for method in alike if pace and method.timed]
            if len(able) > 1:
                found += _against_best(able, keys, quantity)
    return found


def _against_best(methods: Sequence[Contender], keys: Keys, quantity: str) -> list[Difference]:
    order = sorted(methods, key=lambda method: worth(method, keys, quantity), reverse=True)
    ratios = [compared(order[0], other, keys, quantity) for other in order[1:]]
    corrected = holm([one.p for one in ratios])
    return [
        Difference(
            first=order[0].name,
            second=other.name,
            quantity=quantity,
            ratio=estimate(one),
            p=one.p,
            p_holm=p_holm,
            equivalent=one.equivalent,
            by_conversation=dict(zip(names_of(keys), one.singles, strict=True)),
        )
        for other, one, p_holm in zip(order[1:], ratios, corrected, strict=True)
    ]


def worth(method: Contender, keys: Keys, quantity: str) -> float:
    """Its accepted length or tokens per second."""
    whole = total(method.texts[key] for key in keys)
    return _over(whole.tokens, whole.seconds if quantity == SPEED else whole.steps)


def compared(one: Contender, other: Contender, keys: Keys, quantity: str) -> Ratio:
    """The ratio of two methods, paired by conversation."""
    tokens, spent = [], []
    for method in (one, other):
        parts = [method.texts[key] for key in keys]
        tokens.append([float(part.tokens) for part in parts])
        spent.append([part.seconds if quantity == SPEED else part.steps for part in parts])
    return product([tokens[0], spent[1]], [spent[0], tokens[1]])


def names_of(keys: Keys) -> list[str]:
    """Of conversations, with a hash of the prompt where a name is there twice."""
    names = [key.name for key in keys]
    twice = {name for name in names if names.count(name) > 1}
    return [f"{key.name} #{key.mark[:6]}" if key.name in twice else key.name for key in keys]


def chosen(methods: Sequence[Contender], keys: Keys, *, times: bool, pace: bool) -> list[Entry]:
    """The best setting of each drafter that has several, chosen on one half of the conversations
    (by a hash of the prompt) and measured on the other: the best of many on the same prompts
    promises too much."""
    halves: tuple[list[Conversation], list[Conversation]] = ([], [])
    for key in keys:
        halves[hashlib.sha256(f"{key.name} {key.mark}".encode()).digest()[0] % 2].append(key)
    if not all(halves):
        return []
    by_drafter: dict[tuple[str, str], list[Contender]] = {}
    for method in methods:
        if method.mark in ("", "REPLAYED"):
            drafter = labels_of(method.runs[0])["drafter"]
            by_drafter.setdefault((method.mark, drafter), []).append(method)
    if max(map(len, by_drafter.values()), default=0) < 2:
        return []
    best = []
    for (mark, _), own in by_drafter.items():
        timed = pace and not mark
        able = [method for method in own if not timed or method.timed]
        quantity = SPEED if timed else LENGTH
        best += [max(able, key=lambda m: worth(m, halves[0], quantity))] if able else []
    found = [entry(method, halves[1], times=times) for method in best]
    return best_first(found, pace=pace)


def best_first(entries: Sequence[Entry], *, pace: bool) -> list[Entry]:
    """By mark, then the fastest, or if speeds cannot be compared the longest."""

    def key(one: Entry) -> tuple[int, float, float]:
        speed = one.tokens_per_second if pace else one.expected_speed
        return MARKS.index(one.mark), -(speed or 0.0), -one.accepted_length.value

    return sorted(entries, key=key)


def _over(amount: float, per: float) -> float:
    return amount / per if per else 0.0

"""What a comparison says, in three sentences: who is ahead, where, and what may be doubted."""

from collections.abc import Mapping, Sequence

from specdec.compare.figures import Difference, Entry, Estimate
from specdec.compare.grouping import Contender, several
from specdec.compare.measure import LENGTH, SPEED, Keys, by_category, compared, worth
from specdec.lab.statistics import FEWEST, holm

SURE = 0.05  # chance of a difference that is none


def verdict(
    methods: Sequence[Contender],
    keys: Keys,
    entries: Sequence[Entry],
    differences: Sequence[Difference],
    *,
    pace: bool,
) -> list[str]:
    """Three sentences.

    Args:
        entries: of the methods.
        differences: between them.
        pace: whether speeds can be compared.
    """
    mark = entries[0].mark
    alike = {one.name: one for one in entries if one.mark == mark}
    mine = [method for method in methods if method.name in alike]
    own = [one for one in differences if one.first in alike]
    return [
        _ahead(alike, own),
        _where(mine, keys),
        _doubts(entries, len(keys), pace=pace),
    ]


# Who is ahead


def _ahead(entries: Mapping[str, Entry], differences: Sequence[Difference]) -> str:
    """The fastest and the longest, each over the next."""
    if len(entries) == 1:
        (one,) = entries.values()
        return f"{one.name} alone was measured: {_has(one)}."
    said = []
    for quantity, title in (
        (SPEED, "is the fastest"),
        (LENGTH, "has the longest accepted length"),
    ):
        own = [one for one in differences if one.quantity == quantity]
        if own:
            said.append(f"{own[0].first} {title}: {_over_next(entries[own[0].first], own)}")
    return f"Of {len(entries)} methods {'; '.join(said)}."


def _over_next(best: Entry, own: Sequence[Difference]) -> str:
    """By how much the best is ahead, and from whom it cannot be told apart."""
    value = spoken(best.accepted_length)
    if own[0].quantity == SPEED:
        value = f"{spoken(best.speedup)} times plain decoding" if best.speedup else "by tokens/s"
    open_ = [one for one in own if one.p_holm is None or one.p_holm >= SURE]
    sure = [one for one in own if one.p_holm is not None and one.p_holm < SURE]
    said = [value]
    if own[0] in open_:
        said.append(_open(own[0]))
    if sure:
        one = sure[0]
        said.append(f"{spoken(one.ratio)} times {one.second} ({chance(one.p_holm or 0.0)})")
    others = [one.second for one in open_ if one is not own[0]]
    if others:
        said.append(f"not told apart from {several(others)} either")
    return ", ".join(said)


def _open(one: Difference) -> str:
    """Of a pair that nothing is sure of."""
    if one.equivalent:
        return f"equal within 2 % to {one.second}"
    if one.p_holm is None:
        return f"{spoken(one.ratio)} times {one.second}, of too few conversations to be sure"
    return f"not told apart from {one.second} ({spoken(one.ratio)} times, {chance(one.p_holm)})"


def _has(one: Entry) -> str:
    speed = "" if one.speedup is None else f", {spoken(one.speedup)} times plain decoding"
    return f"accepted length {spoken(one.accepted_length)}{speed}"


def spoken(estimate: Estimate) -> str:
    """A value with its interval, or with the range of single conversations."""
    if estimate.low is not None and estimate.high is not None:
        return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
    if estimate.least is None or estimate.most is None or estimate.least == estimate.most:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} (single ones {estimate.least:.2f} to {estimate.most:.2f})"


def chance(p: float) -> str:
    """A p-value after Holm's correction."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


# Where


def _where(methods: Sequence[Contender], keys: Keys) -> str:
    """Whether categories have winners of their own, by accepted length: times need more texts."""
    categories = by_category(keys)
    if not categories or len(methods) < 2:
        count = "one category" if not categories else "one method"
        return f"There is {count}, so nothing to say of where methods differ."
    overall = max(methods, key=lambda method: worth(method, keys, LENGTH))
    others, chances = [], []
    for name, own in categories.items():
        best = max(methods, key=lambda method: worth(method, own, LENGTH))
        if best is not overall:
            found = compared(best, overall, own, LENGTH)
            others.append((name, best.name, found))
            chances.append(found.p)
    told = len(categories)
    if not others:
        return f"By accepted length {overall.name} is ahead in each of {told} categories."
    sure = [
        f"{name} to {best} ({found.value:.2f} times, {chance(p)})"
        for (name, best, found), p in zip(others, holm(chances), strict=True)
        if p is not None and p < SURE
    ]
    ahead = (
        f"By accepted length {overall.name} is ahead in {told - len(others)} of {told} categories"
    )
    if sure:
        rest = "" if len(sure) == len(others) else "; the others may be chance"
        return f"{ahead}, and loses {', '.join(sure)}{rest}."
    which = several([f"{name} ({best})" for name, best, _ in others])
    return f"{ahead}; that another is ahead in {which} may be chance."


# What may be doubted


def _doubts(entries: Sequence[Entry], conversations: int, *, pace: bool) -> str:
    """What the checks of losslessness said, and what does not follow."""
    by_verdict: dict[str, list[str]] = {}
    for one in entries:
        for run in one.lossless:
            by_verdict.setdefault(str(run.get("verdict", "not checked")), []).append(one.name)
    count = sum(map(len, by_verdict.values()))
    passed = len(by_verdict.pop("passed", []))
    said = [f"{passed} of {count} runs passed the check of losslessness"]
    for verdict, names in by_verdict.items():
        said.append(f"{verdict}: {several(list(dict.fromkeys(names)))}")
    told = [one.name for one in entries if one.mark == "REPLAYED"]
    if not count:
        said = ["Nothing was decoded: all is expected, of recorded texts"]
    marked = [one.name for one in entries if one.mark and one.name not in told]
    unable = []
    if conversations < FEWEST:
        many = "conversation is" if conversations == 1 else "conversations are"
        unable.append(f"{conversations} {many} too few for intervals")
    if not pace and len(entries) > len(told) + 1:
        unable.append("who is faster is not known")
    if marked and len(marked) < len(entries):
        unable.append(f"{several(marked)} stand apart, for their texts are not the target's")
    if told and count:
        unable.append(f"{len(told)} replayed methods stand apart, for they were not decoded")
    return "; ".join([*said, *unable]) + "."

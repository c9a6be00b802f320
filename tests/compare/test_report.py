"""The report: what it holds, whatever the runs are called and whatever they lack."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.compare.figures import Comparison, Group
from specdec.compare.report import html, write
from tests.compare import made
from tests.compare.page import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
SECTIONS = ["verdict", "methods", "categories", "depth", "pareto", "anatomy", "differences"]
SECTIONS += ["predicted", "lossless", "trees"]


def bare(group: Group) -> Group:
    """What is left of a group that kept and measured as little as can be."""
    nothing = {"tokens_per_second": None, "speedup": None, "anatomy": None, "energy": None}
    nothing |= {"unrepetitive": None, "idle_watts": None, "predicted_speedup": None}
    nothing |= {"by_category": {}, "acceptance_by_depth": [], "repetitive": 0.0}
    entries = [replace(entry, **nothing) for entry in group.entries[:1]]
    times = "runs on different GPUs"
    return replace(group, entries=entries, times=times, trees=[], differences=[])


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return made.comparison([made.small()])


@pytest.fixture(scope="module")
def text(whole: Comparison) -> str:
    return html(whole)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_sections_stand_in_their_order(page: Page) -> None:
    ends = ["left-out", "settings", "environment", "commands"]
    sections = [id for id in page.ids if id in ends or re.fullmatch(r"g0-[a-z]+", id)]
    assert sections == [*(f"g0-{name}" for name in SECTIONS), *ends]


def test_page_is_well_formed(page: Page) -> None:
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids))


def test_nothing_comes_from_outside(text: str, page: Page) -> None:
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"@import|url\((?!#)|https?:|<link|<img|<iframe", text)


def test_equal_comparisons_give_equal_bytes(whole: Comparison, text: str, tmp_path: Path) -> None:
    again = made.comparison([made.small()])
    write(again, tmp_path / "new" / "report.html")
    assert again == whole
    assert (tmp_path / "new" / "report.html").read_bytes() == text.encode()


def test_a_report_does_not_know_when_or_where_it_was_made(text: str) -> None:
    assert not re.search(r"20\d\d-\d\d-\d\d|/home/|/work/|/tmp/", text)


HOSTILE = "<script>alert('x')</script>\"onload=\"&amp; $\\frac{1}{2}$ {{ 7 * 7 }}"


def test_names_are_shown_as_they_are(whole: Comparison) -> None:
    """Of methods, categories, conversations, folders, prompts and tokens."""
    (group,) = whole.groups
    share = group.entries[0].by_category["math"]
    entries = [
        replace(entry, name=HOSTILE + str(i), by_category={HOSTILE: share, "math": share})
        for i, entry in enumerate(group.entries)
    ]
    difference = replace(
        *group.differences[:1],
        first=entries[0].name,
        second=entries[1].name,
        by_conversation={HOSTILE: 1.2, "\ud800\x00\x1b": 0.9},
    )
    tree = made.tree(entries[0].name, prompt=HOSTILE, next_token="</svg><script>")
    tree = replace(tree, tokens=[HOSTILE, *tree.tokens[1:-1], "\ud800\x00\n"])
    hostile = made.comparison(
        [replace(group, entries=entries, differences=[difference], trees=[tree])],
        left_out={HOSTILE: HOSTILE},
        commands=[HOSTILE],
    )
    text = html(hostile)
    page = Page(text)
    assert page.wrong == []
    assert page.handlers == []
    assert page.counts["script"] == 1
    assert page.texts["code"][-1] == HOSTILE
    assert any(title.startswith(f"{HOSTILE}: 1.20") for title in page.texts["title"])
    assert r"\ud800\x00\x1b: 0.90" in page.texts["title"]
    assert not set("\x00\x1b\ud800") & set(text)
    text.encode()


def test_what_is_missing_is_left_out_or_named() -> None:
    page = Page(html(made.comparison([bare(made.small())], left_out={}, commands=[])))
    expected = ["verdict", "methods", "anatomy", "lossless", "trees"]
    assert [id for id in page.ids if id.startswith("g0-")] == [f"g0-{name}" for name in expected]
    said = page.texts["p"]
    assert "Not shown: runs on different GPUs." in said
    assert any("record.trees" in one for one in said)
    assert "left-out" not in page.ids
    assert "speedup" not in page.texts["span"]  # the column


def test_no_runs_at_all() -> None:
    page = Page(
        html(
            Comparison(
                groups=[], differing={}, left_out={"a": "no summary"}, environment={}, commands=[]
            )
        )
    )
    assert page.wrong == []
    assert "no summary" in page.texts["dd"]


def test_batches_are_shown_once_for_groups_that_differ_in_nothing_else() -> None:
    groups = [made.small(batch=b, temperature=t) for t, b in [(0, 1), (0, 8), (1, 4)]]
    lean = [bare(group) for group in groups]
    for group, found in zip(lean, groups, strict=True):
        speed = found.entries[0].tokens_per_second
        group.entries[:] = [replace(group.entries[0], name="same", tokens_per_second=speed)]
        group.chosen.extend(group.entries)
    text = html(made.comparison(lean))
    page = Page(text)
    assert [id for id in page.ids if id.endswith("-batch")] == ["g0-batch"]
    assert len(page.ids) == len(set(page.ids))
    assert [f"same, batch {b}" in text for b in (1, 4, 8)] == [True, False, True]
    chosen = [title for title in page.texts["h4"] if "chosen on one half" in title]
    assert len(chosen) == 3


def test_few_trees_of_many_are_shown_those_of_each_method_first() -> None:
    lean = bare(made.small())
    methods = [f"method {i}" for i in range(4)]
    trees = [made.tree(name, step, 14 if step else 1) for name in methods for step in range(5)]
    page = Page(html(made.comparison([replace(lean, trees=trees)])))
    assert [page.texts["b"].count(name) for name in methods] == [3, 3, 3, 3]
    assert not any("nothing drafted" in one for one in page.texts["figcaption"])
    assert any("12 of 20 trees" in one for one in page.texts["p"])


def test_what_to_know_is_said_and_pairs_of_each_mark_have_a_chart() -> None:
    group = made.small(notes=["unstable clock: <b>"])
    best, *others = [one for one in group.differences if one.quantity == "accepted_length"]
    found = [best, replace(others[0], first="a lossy one")]
    page = Page(
        html(made.comparison([replace(bare(group), differences=found, entries=group.entries)]))
    )
    assert page.texts["li"] == ["unstable clock: <b>"]
    titles = [title for title in page.texts["figcaption"] if title.endswith("over the others")]
    assert [title.split(": ")[1].split(" over")[0] for title in titles] == [
        best.first,
        "a lossy one",
    ]


@pytest.mark.slow
def test_many_methods_and_conversations_stay_small() -> None:
    names = [f"{drafter} {shape}" for drafter in made.DRAFTERS for shape in made.TREES]
    text = html(made.comparison([made.group(names)]))
    assert len(names) == 24
    assert len(text) < 1_000_000
    assert "The best 8 of 24 methods are drawn." in text
    assert all(text.count(name) >= 2 for name in names)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_process(text: str) -> None:
    code = "from tests.compare import made; from specdec.compare.report import html; import sys;"
    code += "sys.stdout.buffer.write(html(made.comparison([made.small()])).encode())"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, check=True
        )
        assert done.stdout == text.encode()


PROBE = """<script>
const found = {};
const table = document.querySelector("#g0-methods table");
const first = () => table.tBodies[0].rows[0].cells[0].textContent.trim();
const titles = [...table.tHead.rows[0].cells].map((head) => head.textContent);
const column = titles.findIndex((title) => title.startsWith("accepted"));
const head = table.tHead.rows[0].cells[column];
found.order = [first()];
for (let i = 0; i < 2; i++) {
  head.querySelector("button").click();
  found.order.push(first(), head.getAttribute("aria-sort"));
}
const box = document.querySelector("#g0-depth input");
const artists = [...document.querySelectorAll(`.method-${box.dataset.method}`)];
const seen = () => artists.filter((one) => one.getClientRects().length > 0).length;
found.seen = [artists.length > 0, seen() > 0];
box.click();
found.seen.push(seen());
found.boxes = [...document.querySelectorAll(`input[data-method="${box.dataset.method}"]`)]
  .map((one) => one.checked);
box.click();
found.seen.push(seen() > 0);
found.flat = [...document.querySelectorAll("svg.chart")]
  .filter((one) => one.getBoundingClientRect().height < 50).length;
document.body.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_report_works_in_a_browser(whole: Comparison, text: str, tmp_path: Path) -> None:
    """Offline and without errors: it shows its charts, sorts its tables and hides methods."""
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", PROBE + "</body>"))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=2000", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr
    assert len(re.findall('<svg [^>]*class="chart"', done.stdout)) == 7
    assert done.stdout.count("<h3>") == len(SECTIONS)
    attribute = re.search(r"data-found='?\"?(\{.*?\})\"?'?>", done.stdout)
    assert attribute is not None
    found = json.loads(attribute[1].replace("&quot;", '"'))
    entries = whole.groups[0].entries
    order = sorted(entries, key=lambda entry: entry.accepted_length.value)
    down, up = order[-1].name, order[0].name
    assert found["order"] == [entries[0].name, down, "descending", up, "ascending"]
    assert found["seen"] == [True, True, 0, True]
    assert found["boxes"]
    assert not any(found["boxes"])
    assert found["flat"] == 0

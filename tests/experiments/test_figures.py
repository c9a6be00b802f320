"""The generated pages are what the committed JSON files give."""

import json
import re
from pathlib import Path

import pytest

from specdec.experiments.figures import draw, pages
from specdec.experiments.figures.replay import END, beside_runs

DOCUMENTS = pages.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_page_is_what_its_files_give(path: Path) -> None:
    assert path.read_text() == DOCUMENTS[path], "python -m specdec.experiments.figures.pages"


def test_every_link_of_a_page_leads_to_a_file() -> None:
    for path, text in DOCUMENTS.items():
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links or path.stem == "README"
        for link in links:
            assert (path.parent / link).exists(), (path, link)


def test_every_result_is_on_a_page() -> None:
    shown = "".join(DOCUMENTS.values())
    for page in ("acceptance", "outputs"):
        shown += (pages.ROOT / f"docs/{page}.md").read_text()
    for path in pages.RESULTS.glob("*.*"):
        if path.stem != "acceptance_bounds" or path.suffix == ".png":
            assert f"experiments/results/{path.name}" in shown, path.name


def test_the_readme_shows_six_rows() -> None:
    rows = pages.summary().splitlines()[2:]
    assert len(rows) == 6
    assert [row.split(" | ")[1].partition("`, ")[0] for row in rows] == [
        "`none`",
        *["`small_llama", "`ngram"],
        *["`small_llama"] * 3,
    ]


def test_every_plot_of_a_page_can_be_drawn_from_its_file() -> None:
    for _, _, tables in pages.PAGES.values():
        for file, _, plots in tables:
            path = pages.RESULTS / f"{file}.json"
            if plots and "acceptance_rates" not in plots.values():
                found = draw.plots(json.loads(path.read_text()), path)
                assert {picture.stem for picture in found} == set(plots.values())


def test_a_file_without_a_plot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("cpu_speed", "has no plot"), ("nothing", "no such file")):
        assert draw.main([str(pages.RESULTS / f"{name}.json")]) == 2
        assert said in capsys.readouterr().err


def test_the_page_of_a_replay_has_the_runs_beside_it() -> None:
    page = (pages.ROOT / "docs" / "results" / "replay.html").read_text(encoding="utf-8")
    result = json.loads((pages.RESULTS / "replay.json").read_text())
    begin, end = page.index('<article id="runs">'), page.rindex(END)
    assert beside_runs(page[:begin] + page[end:], result) == page
    assert page[begin:end].count("<tr>") == 1 + len(result["run"])

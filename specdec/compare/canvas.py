"""What all plots share: those of experiments, which are PNG files, and those of a report, which
are SVG inside its page."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#999999", "#117733")

# What a page's stylesheet colours, light or dark. Plots are drawn in these colours, which nothing
# else has, and the SVG then names the variable instead.
INK, MUTED, LINE, PAPER = "#000101", "#000102", "#000103", "#000104"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
METHODS = tuple(f"#0002{i:02x}" for i in range(8))
VERBS = tuple(f"#0003{i:02x}" for i in range(6))
VARIABLES |= {colour: f"var(--m{i})" for i, colour in enumerate(METHODS)}
VARIABLES |= {colour: f"var(--v{i})" for i, colour in enumerate(VERBS)}

PAGE: dict[Any, Any] = {  # one unit is a CSS pixel
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same widths everywhere
    "font.size": 11.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a $
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}
COORDINATES = ("d", "x", "y", "width", "height", "transform", "viewBox")
HREF = "{http://www.w3.org/1999/xlink}href"


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure, inches wide and high, and its panels [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def by_powers_of_two(axes: Any, ticks: list[int], labels: list[str] | None = None) -> None:
    """An axis of sizes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels or list(map(str, ticks)))
    axes.minorticks_off()


@contextmanager
def page_style() -> Iterator[None]:
    """Inside, plots look as those of a page: draw and call `svg` in it."""
    from matplotlib import rc_context

    with rc_context(PAGE):
        yield


def svg(figure: Any, name: str, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The picture as an `<svg>` element to stand in HTML, equal for equal figures.

    An artist whose gid is words gets those that begin with "method-" as its classes.

    Args:
        name: begins its ids; no other picture of the page has it.
        label: what it shows, for those who do not see it.
        titles: by gid, what hovering over each of its markers says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format")))
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
    # Its style sheet would be that of the whole page.
    root[:] = [one for one in root if one.tag != "metadata" and one.find("style") is None]
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    root.set("style", f"max-width: {figure.get_figwidth() * 72:.0f}px")
    for group in root.iter("g"):
        _entitle(group, titles.get(group.get("id", ""), ()))
        _join_styles(group)
        words = group.attrib.pop("id", "").split()
        if classes := [word for word in words if word.startswith("method-")]:
            group.set("class", " ".join(classes))
    _rename(root, name)
    for element in root.iter():
        element.text = (element.text or "").strip() or None
        element.tail = None
        for key in element.attrib.keys() & set(COORDINATES):
            element.set(key, _rounded(element.attrib[key]))
        if re.match(r"rotate\(-?0 ", element.get("transform", "")):
            del element.attrib["transform"]
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    text = re.sub(r" ?font-family: [^;]*;", "", text)
    return re.sub("#000[123][0-9a-f]{2}", lambda found: VARIABLES[found[0]], text)


def _entitle(group: ElementTree.Element, titles: Sequence[str]) -> None:
    """Give the markers of a group their titles."""
    if not titles:
        return
    for marker, title in zip(group.iter("use"), titles, strict=True):
        ElementTree.SubElement(marker, "title").text = title


def _join_styles(group: ElementTree.Element) -> None:
    """Say a style that all markers of a group have once."""
    styles = Counter(child.get("style") for child in group)
    if len(styles) == 1 and all(child.tag == "use" for child in group):
        (style,) = styles
        if style and "style" not in group.attrib:
            group.set("style", style)
            for child in group:
                del child.attrib["style"]


def _rename(root: ElementTree.Element, name: str) -> None:
    """Short ids for what is referred to, and no others."""
    new: dict[str, str] = {}
    for element in root.iter():
        if "id" in element.attrib:
            new[element.attrib["id"]] = f"{name}-{len(new)}"
            element.set("id", new[element.attrib["id"]])
    for element in root.iter():
        if HREF in element.attrib:
            element.set("href", "#" + new[element.attrib.pop(HREF)[1:]])
        if clip := element.get("clip-path"):
            element.set("clip-path", f"url(#{new[clip[5:-1]]})")


def _rounded(text: str) -> str:
    """Coordinates to a tenth of a pixel."""
    short = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}", text)
    return " ".join(re.sub(r"\.0\b", "", short).split())

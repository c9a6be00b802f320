"""Sizes: a file is read in one sitting, a function on one screen, and a name is given once."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("specdec", "hydra_plugins", "drafters", "verifier", "kernels", "experiments")
LONGEST_FILE, LONGEST_FUNCTION, SCREEN = 450, 90, 50
REASON = "(Long "  # in the docstring of what is longer than a screen


def files(*folders: str) -> list[Path]:
    """Python files of these folders, not through their links."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any(p.is_symlink() for p in path.parents)]


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """All but kernels, whose length is that of what they compute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "jit" not in str(
            [ast.dump(decorator) for decorator in node.decorator_list]
        ):
            yield node


def too_long(path: Path) -> Iterator[str]:
    """The file, or functions of it."""
    lines = len(path.read_text().splitlines())
    if lines > LONGEST_FILE:
        yield f"{path.relative_to(ROOT)}: {lines} lines"
    if path.is_relative_to(ROOT / "tests"):
        return
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        reason = REASON in " ".join((ast.get_docstring(function) or "").split())
        if lines > LONGEST_FUNCTION or (lines > SCREEN and not reason):
            yield f"{path.relative_to(ROOT)}, {function.name}: {lines} lines, and no reason"


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_and_functions_are_of_a_size_to_be_read(folder: str) -> None:
    found = [one for path in files(folder) for one in too_long(path)]
    assert not found, "\n".join(found)


def test_what_a_run_is_made_of_is_named_once() -> None:
    names = Counter(
        node.name
        for path in files(*FOLDERS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    )
    for name in ("Method", "Session", "OurSession", "method_of", "ratio", "Decoder"):
        assert names[name] == 1, name

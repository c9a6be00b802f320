"""Trees of a comparison's report: a few of those that runs have recorded."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from specdec.compare.figures import Tree
from specdec.compare.grouping import Contender
from specdec.compare.read import Run
from specdec.compare.sums import lines_of

MOST, READ = 3, 1000  # trees of a method; lines of a file that are looked at
FIELDS = ("request", "step", "tokens", "parents", "draft", "target", "path", "next_token")


def trees_of(method: Contender) -> list[Tree]:
    """Of the first prompts of a method's first run, the tree of which most was kept."""
    run = method.runs[0]
    path = run.folder / "trees.jsonl"
    if not path.exists():
        return []
    best: dict[int, Mapping[str, Any]] = {}
    for number, one in enumerate(lines_of(path, FIELDS)):
        known = best.get(one["request"])
        if number >= READ or (known is None and len(best) == MOST):
            break
        if known is None or _worth(one) > _worth(known):
            best[one["request"]] = one
    prompts, spell = dict(_prompts(run)), _speller(str(run.value("target.path")))
    return [
        Tree(
            method=method.name,
            prompt=prompts.get(request, str(request)),
            step=one["step"],
            tokens=[spell(token) for token in one["tokens"]],
            parents=one["parents"],
            draft=one["draft"],
            target=one["target"],
            path=one["path"],
            next_token=spell(one["next_token"]),
        )
        for request, one in best.items()
    ]


def _worth(tree: Mapping[str, Any]) -> tuple[int, int]:
    """How much there is to see: nodes kept, nodes."""
    return len(tree["path"]), len(tree["tokens"])


def _prompts(run: Run) -> Iterator[tuple[int, str]]:
    """Names of prompts by request."""
    for one in lines_of(run.folder / "generations.jsonl", ("request", "id", "category")):
        yield one["request"], f"{one['category']}/{one['id']}" if one["category"] else one["id"]


@cache
def _speller(target: str) -> Callable[[int], str]:
    """From a token to its text; to its number where the tokenizer is not at hand. Read by
    `tokenizers` alone: transformers would take as long to import as all the rest."""
    file = _tokenizer_file(target)
    if file is None or not file.is_file():
        return str
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


def _tokenizer_file(target: str) -> Path | None:
    """Of a model folder, of the zoo's models or of the hub's cache."""
    kind, colon, name = target.partition(":")
    if colon and kind in ("zoo", "standin"):  # stand-ins speak the language of the zoo's target
        model = name if kind == "zoo" else "target"
        return Path(__file__).parents[1] / "zoo" / model / "tokenizer.json"
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(target, "tokenizer.json")
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None

"""Give a model a smaller tokenizer, to study drafts whose tokens are not the target's.

    python -m specdec.experiments.tools.retokenize source=zoo:draft keep=6000 out=drafts/6000
    python -m specdec.run drafter=translated drafter.path=drafts/6000

Of a byte-level BPE model this keeps single bytes, added tokens and the first merges, up to
`keep` tokens, and gives them other ids, by `seed`. The rows of the embedding and of the head
go with their tokens. So it is the same network: a text whose tokens are all kept is encoded as
before and gets the same logits, less those of the tokens that are gone. It was not trained on the
shorter tokens that the others fall apart into, which a model made for its tokenizer would be.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.lab.command import option, run_main
from specdec.models.load import zoo_path


def kept_tokens(description: dict[str, Any], keep: int) -> tuple[list[str], list[list[str]]]:
    """The tokens of a tokenizer.json that stay, and the merges that make them.

    Raises:
        ValueError: not a byte-level BPE, or fewer to keep than bytes and added tokens are, or more
            than there are tokens.
    """
    model, decoder = description["model"], description["decoder"] or {}
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(decoder):
        raise ValueError("its tokenizer is not a byte-level BPE; choose another source")
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    made = {"".join(pair) for pair in merges}
    added = {token["content"] for token in description["added_tokens"]}
    tokens = dict.fromkeys(t for t in model["vocab"] if t not in made or t in added)
    tokens |= dict.fromkeys(token["content"] for token in description["added_tokens"])
    most = len(model["vocab"].keys() | added)
    if not len(tokens) <= keep <= most:
        raise ValueError(
            f"keep={keep}: must be from {len(tokens)}, its bytes and added tokens, to {most}"
        )
    used = []
    for pair in merges:
        whole = "".join(pair)
        if len(tokens) == keep and whole not in tokens:
            break
        if all(part in tokens for part in pair) and whole in model["vocab"]:
            tokens[whole] = None
            used.append(pair)
    return list(tokens), used


def renumber(
    description: dict[str, Any], keep: int, seed: int
) -> tuple[dict[str, Any], dict[int, int]]:
    """A tokenizer.json with the tokens that are kept, and their new ids by the old ones.

    Raises:
        ValueError: as `kept_tokens`.
    """
    tokens, merges = kept_tokens(description, keep)
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    old = [(description["model"]["vocab"] | added)[token] for token in tokens]
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)).tolist()
    new = dict(zip(old, order, strict=True))
    names = dict(zip(tokens, order, strict=True))
    vocab = {t: i for t, i in names.items() if t in description["model"]["vocab"]}
    fresh: dict[str, Any] = json.loads(json.dumps(description))
    fresh["model"] |= {"vocab": dict(sorted(vocab.items(), key=lambda e: e[1])), "merges": merges}
    for token in fresh["added_tokens"]:
        token["id"] = new[token["id"]]
    fresh["added_tokens"].sort(key=lambda token: token["id"])
    for part in _parts(fresh["post_processor"]):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[i] for i in token["ids"]]
    return fresh, new


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    return processor.get("processors", [processor]) if processor else []


def renumber_model(model: Any, new: dict[int, int]) -> None:
    """Move the rows of embedding and head, and the ids that the configuration names."""
    old = sorted(new, key=lambda i: new[i])
    kept = {name: rows[old].clone() for name, rows in _rows(model).items()}
    model.resize_token_embeddings(len(old))
    with torch.no_grad():
        for name, rows in _rows(model).items():
            rows.copy_(kept[name])
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, name, None)
            if ids is not None:
                setattr(config, name, [new[i] for i in ids] if isinstance(ids, list) else new[ids])


def _rows(model: Any) -> dict[str, Tensor]:
    """What has a row for each token; the same one twice if they are tied."""
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {
        f"{end}.{name}": rows.detach()
        for end, layer in ends.items()
        for name, rows in layer.named_parameters()
    }


def retokenize(source: str, folder: Path, *, keep: int, seed: int) -> None:
    """Write the model of `source` with `keep` of its tokens to a folder.

    Args:
        source: model folder, hub id or zoo:NAME.
        folder: made if it is not there; must hold no model.

    Raises:
        ValueError: a source that cannot be read or is not a byte-level BPE, a `keep` out of range,
            a folder in use.
    """
    if (folder / "config.json").exists():
        raise ValueError(f"out={folder}: holds a model; remove it or choose another folder")
    where = zoo_path(source[4:], "source") if source.startswith("zoo:") else source
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype="auto")
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"source={source}: cannot be loaded: {first}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"source={source}: it has no tokenizer.json; choose another source")
    try:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        description, new = renumber(description, keep, seed)
    except ValueError as error:
        raise ValueError(f"source={source}: {error}") from None
    renumber_model(model, new)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Tokenizer.from_str(json.dumps(description)).save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)  # by old ids; tokenizer.json has them too
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = option("zoo:draft", "model folder, hub id or zoo:NAME")
    keep: int = option(about="tokens that stay")
    seed: int = option(0, "of the new ids")
    out: Path = option(about="folder of the new model")


def work(options: Options) -> None:
    retokenize(options.source, options.out, keep=options.keep, seed=options.seed)
    print(f"model in {options.out}: drafter=translated drafter.path={options.out}")


main = partial(run_main, Options, work, doc=__doc__)

if __name__ == "__main__":
    sys.exit(main())

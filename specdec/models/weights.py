"""Files of models: whether they are whole, and hold every number that a model computes with.

What a file lacks transformers makes up at random, and says so in a log. Here its report is read,
and files are looked at before anything is loaded.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specdec.models.shards import local
from specdec.reasons import first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    INDEX,
)
NO_MODEL = {  # how files begin that came instead of a model's
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"<!doctype": "is an HTML page; download the file itself",
    b"<html": "is an HTML page; download the file itself",
}
AGAIN = "download it again"
MTP_TENSORS = r"(model\.)?mtp(_layers)?\."  # how names of MTP layers begin, which are for drafting


class BrokenFilesError(ValueError):
    """What is wrong with files of a model, in one line that names setting and file."""


def folder_of(where: str) -> Path | None:
    """Where the files of a model lie, given its folder or hub id; None if nothing of it is here.

    Raises:
        ValueError: not even the name of a model.
    """
    if Path(where).is_dir():
        return Path(where)
    found = try_to_load_from_cache(where, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def check_files(folder: Path, name: str, *, complete: bool) -> None:
    """Look at the files of a model, without reading weights.

    Args:
        name: setting and value, for messages.
        complete: False for a folder that files may still be downloaded to.

    Raises:
        ValueError: a file that is missing, cut, or something else than its name says.
    """
    for file in [*(folder / text for text in TEXTS), *sorted(folder.glob("*.model"))]:
        if file.exists():
            check_kind(file, name)
            if file.suffix == ".json":
                found = read_object(file, name)
                if file.name == INDEX and not {"metadata", "weight_map"} <= found.keys():
                    raise BrokenFilesError(
                        f"{name}: {INDEX} has no metadata or weight_map; {AGAIN}"
                    )
    files = weight_files(folder)
    if complete and not files and any(folder.glob("*.bin")):
        raise BrokenFilesError(
            f"{name}: its weights are pickles (*.bin), which are not read; save them as "
            f"{WEIGHTS}, by save_pretrained of transformers"
        )
    for file in files:
        if file.exists():
            check_kind(file, name)
            tensors_in(file, name)
        elif complete:
            raise BrokenFilesError(
                f"{name}: {file.name} is missing, which {INDEX} names; download it as well"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them; none if there are none."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
    places = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return [folder / file for file in sorted(set(map(str, dict(places).values())))]


def check_report(report: Mapping[str, Any], folder: Path | None, name: str) -> None:
    """Refuse what transformers says it had to make up, or to leave out, while it loaded a model.
    Tied weights and names that the class of the model ignores are not in its report.

    Args:
        report: missing_keys, unexpected_keys, mismatched_keys (with both shapes), error_msgs.
        folder: where the files lie, if that is known.
        name: setting and value, for messages.

    Raises:
        ValueError: one line that names a file and a tensor.
    """
    missing, unknown, shapes, errors = (
        sorted(report.get(part, ()))
        for part in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    unknown = [key for key in unknown if not re.match(MTP_TENSORS, key)]
    mend = "config.json and weights must be of one model: download both again"
    if shapes:
        key, there, wanted = shapes[0]
        raise BrokenFilesError(
            f"{name}: {_file_of(key, folder)} holds {key} with shape {list(there)}, and "
            f"config.json asks for {list(wanted)}{more(shapes)}; {mend}"
        )
    if missing:
        instead = f", but {unknown[0]}{more(unknown)} instead" if unknown else ""
        raise BrokenFilesError(
            f"{name}: {_file_of(missing[0], folder)} has no {missing[0]}{more(missing)}, which "
            f"config.json asks for{instead}; {mend}"
        )
    if unknown:
        raise BrokenFilesError(
            f"{name}: {_file_of(unknown[0], folder)} holds {unknown[0]}{more(unknown)}, for "
            f"which config.json has no place; {mend}"
        )
    if errors:
        raise BrokenFilesError(f"{name}: {' '.join(str(errors[0]).split())}; {mend}")


@torch.no_grad()
def check_finite(model: Any, folder: Path | None, name: str) -> None:
    """Refuse weights that are NaN or infinite: one pass over them, and one wait for the device.

    Raises:
        ValueError: one line that names a file and a tensor.
    """
    tensors = {key: local(tensor) for key, tensor in model.state_dict().items()}
    bad = not_finite(tensors)
    if bad:
        raise BrokenFilesError(
            f"{name}: {_file_of(bad[0], folder)} gives {bad[0]}{more(bad)} values that are NaN "
            f"or infinite in {str(tensors[bad[0]].dtype).removeprefix('torch.')}; take other "
            f"weights, or another dtype if they are finite there"
        )


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Names of those that hold NaN or infinity; one wait for the device."""
    # Quantised weights may be tensors of classes of their own.
    plain = {
        key: _range(tensor)
        for key, tensor in tensors.items()
        if isinstance(tensor, Tensor)
        and type(tensor.data) is Tensor
        and tensor.is_floating_point()
        and (tensor.itemsize > 1 or tensor.dtype == torch.float8_e4m3fn)
        and tensor.numel()
    }
    if not plain:
        return []
    fine = torch.stack(list(plain.values())).isfinite().all(1).tolist()
    return [key for key, good in zip(plain, fine, strict=True) if not good]


def _range(tensor: Tensor) -> Tensor:
    """[2] float64, smallest and largest number; NaN if there is one."""
    if tensor.dtype == torch.float8_e4m3fn:  # no infinities, and NaN is all ones but the sign
        most = tensor.view(torch.uint8).bitwise_and(127).amax()
        return torch.where(most == 127, torch.nan, 0.0).double().expand(2)
    return torch.stack(tensor.detach().aminmax()).double()


def check_kind(file: Path, name: str) -> None:
    """Raise ValueError for what often lies where a model's file should."""
    try:
        with file.open("rb") as opened:
            head = opened.read(64).lower()
    except OSError as error:
        raise BrokenFilesError(f"{name}: {file.name} cannot be read: {error.strerror}") from None
    if not head:
        raise BrokenFilesError(f"{name}: {file.name} is empty; {AGAIN}")
    for beginning, reason in NO_MODEL.items():
        if head.lstrip().startswith(beginning):
            raise BrokenFilesError(f"{name}: {file.name} {reason}")


def read_object(file: Path, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is something else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise BrokenFilesError(f"{name}: {file.name} is not JSON ({reason}); {AGAIN}") from None
    if not isinstance(found, dict):
        raise BrokenFilesError(f"{name}: {file.name} is JSON, but no object; {AGAIN}")
    return found


def tensors_in(file: Path, name: str) -> list[str]:
    """Names of the tensors of a safetensors file; opening it compares its header with its size."""
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise BrokenFilesError(
            f"{name}: {file.name} is cut or no safetensors file ({reason}); {AGAIN}"
        ) from None


def _file_of(key: str, folder: Path | None) -> str:
    """The file that holds a tensor; of one that none holds the only file, or the index of all."""
    files = [] if folder is None else [file for file in weight_files(folder) if file.exists()]
    for file in files:
        if key in tensors_in(file, file.name):
            return file.name
    return files[0].name if len(files) == 1 else INDEX if files else "the file"


def more(found: list[Any]) -> str:
    """How many there are besides the first."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""

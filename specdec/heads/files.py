"""Files of heads: where they lie, which tensors they hold and what config.json says.

Nothing of a file is run: safetensors, or pickles of which only tensors are read.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import safe_open
from torch import Tensor

from specdec.models.load import find_model
from specdec.models.weights import (
    AGAIN,
    INDEX,
    WEIGHTS,
    BrokenFilesError,
    check_kind,
    read_object,
    tensors_in,
)
from specdec.reasons import first_line

CONFIG = "config.json"
WHERE = (  # what heads are published in, the first that is there
    WEIGHTS,
    INDEX,
    "medusa_lm_head.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "medusa_lm_head.pt",
    "hydra_lm_head.pt",
)

DTYPES = {  # by their names in safetensors; others are of quantised weights
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}


def find_head(path: str, setting: str = "drafter.path") -> str:
    """The folder or hub id that a path names, before anything is loaded.

    Raises:
        ValueError: no such built-in head or folder, or a stand-in, which is none.
    """
    if path.startswith("standin:"):
        raise ValueError(
            f"{setting}={path}: a stand-in is a whole model; give the folder or hub id of a head, "
            f"or zoo:NAME"
        )
    return find_model(path, setting=setting)


class HeadFiles:
    """What a head's files hold, by the names of its tensors. Weights stay on disk until read.

    Args:
        path: folder, hub id or zoo:NAME.
        setting: the option that gave it, for messages.

    Attributes:
        name: setting and value, for messages.
        config: config.json.
        shapes, types: of every tensor.

    Raises:
        ValueError: no files there, or broken ones, in one line that names setting and file.
    """

    def __init__(self, path: str, setting: str = "drafter.path") -> None:
        self.name = f"{setting}={path}"
        where = find_head(path, setting)
        self._folder = Path(where) if Path(where).is_dir() else None
        self._hub = where
        self._unreached = ""  # why a file is not here that may be on the hub
        config = self._get(CONFIG)
        if config is None:
            raise self._lacks(f"has no {CONFIG}; put the head's own beside the weights")
        self.config = read_object(config, self.name)
        self._places = self._tensors()
        files = dict.fromkeys(self._places.values())
        looked = {key: found for file in files for key, found in self._look(file)}
        self.shapes = {key: shape for key, (shape, _) in looked.items()}
        self.types = {key: kind for key, (_, kind) in looked.items()}

    def file_of(self, key: str) -> str:
        """The name of the file that holds a tensor; of one that none holds, of the first."""
        return self._places.get(key, next(iter(self._places.values()))).name

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """A tensor as it is in the file."""
        file = self._places[key]
        if file in self._pickled:
            return self._pickled[file][key].to(device)
        with safe_open(file, "pt", device=str(device)) as opened:
            found: Tensor = opened.get_tensor(key)
        return found

    def beside(self, file: str) -> Any:
        """What torch.save wrote into a further file, tensors and numbers alone; None if there is
        no such file."""
        found = self._get(file)
        return None if found is None else self._loaded(found)

    def _get(self, file: str) -> Path | None:
        """A file of the folder, or of the hub; None if there is none."""
        if self._folder is not None:
            there = self._folder / file
        else:
            try:
                there = Path(hf_hub_download(self._hub, file))
            except LocalEntryNotFoundError as error:  # no connection, or none is allowed
                self._unreached = first_line(error)
                return None
            except EntryNotFoundError:
                return None
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                self._unreached = first_line(error)
                raise self._lacks("") from None
        if not there.exists():
            return None
        check_kind(there, self.name)
        return there

    def _tensors(self) -> dict[str, Path]:
        """The file of every tensor."""
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        for candidate in WHERE:
            found = self._get(candidate)
            if found is not None:
                files = self._shards(found) if found.suffix == ".json" else [found]
                return {key: file for file in files for key in self._keys(file)}
        places = ", ".join(name for name in WHERE if not name.endswith(".json"))
        raise self._lacks(f"has no weights; those of a head are in one of {places}")

    def _lacks(self, what: str) -> BrokenFilesError:
        if not self._unreached:
            return BrokenFilesError(f"{self.name}: {what}")
        return BrokenFilesError(
            f"{self.name}: cannot be downloaded ({self._unreached}); give a folder, an id of the "
            f"Hugging Face hub or zoo:NAME"
        )

    def _shards(self, index: Path) -> list[Path]:
        places = read_object(index, self.name).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise BrokenFilesError(f"{self.name}: {index.name} has no weight_map; {AGAIN}")
        files = []
        for file in sorted(set(map(str, places.values()))):
            found = self._get(file)
            if found is None:
                raise BrokenFilesError(
                    f"{self.name}: {file} is missing, which {index.name} names; download it as "
                    f"well"
                )
            files.append(found)
        return files

    def _keys(self, file: Path) -> list[str]:
        if file.suffix == ".safetensors":
            return tensors_in(file, self.name)
        self._pickled[file] = found = self._unpickled(file)
        return list(found)

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        """A file of torch.save, of which only tensors are read."""
        found = self._loaded(file)
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise BrokenFilesError(
                f"{self.name}: {file.name} holds a {kind}, no tensors with names; save its "
                f"state_dict() as {WEIGHTS}"
            )
        wrong = [key for key, value in found.items() if not isinstance(value, Tensor)]
        if wrong:
            raise BrokenFilesError(
                f"{self.name}: {file.name} holds {wrong[0]}, which is no tensor; save its tensors "
                f"alone, as {WEIGHTS}"
            )
        return {str(key): value for key, value in found.items()}

    def _loaded(self, file: Path) -> Any:
        try:
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch before 1.6 are no archives
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of any class: it can hold anything
            raise BrokenFilesError(
                f"{self.name}: {file.name} is cut, or holds more than tensors "
                f"({first_line(error)}); {AGAIN}, or save its tensors as {WEIGHTS}"
            ) from None

    def _look(self, file: Path) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        """Shapes and types in a file, which is opened once: experts of a model are thousands."""
        if file in self._pickled:
            for key, tensor in self._pickled[file].items():
                yield key, (tuple(tensor.shape), tensor.dtype)
            return
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                found = opened.get_slice(key)
                kind = DTYPES.get(found.get_dtype(), torch.uint8)
                yield key, (tuple(found.get_shape()), kind)


def object_in(config: Mapping[str, Any], field: str, name: str) -> dict[str, Any]:
    """A field of config.json that is an object itself; empty if it is not there.

    Raises:
        ValueError: it is something else.
    """
    found = config.get(field)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BrokenFilesError(
            f"{name}: {CONFIG} has {field}={json.dumps(found)}, which must be an object; {AGAIN}"
        )
    return found

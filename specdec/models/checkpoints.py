"""Checkpoints read tensor by tensor, so that weights are quantised as they are read and a large
model never exists in another type: plain ones, and those in float8 e4m3 of compressed-tensors and
of transformers (finegrained), whose packages are not needed.

Weights alone are read from those: activations, which such checkpoints may ask to be quantised as
well, stay in the type of the model.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from specdec.kernels.layout import SCALED_BLOCK, Fp8Weight
from specdec.kernels.reference import quantise_weight
from specdec.models.placement import Placement, free_memory
from specdec.models.quantised import Quantize, projections, put
from specdec.models.shards import cut, local, part_of, replace
from specdec.models.weights import INDEX, WEIGHTS, BrokenFilesError, check_report, weight_files
from specdec.ranks import ALONE, Ranks

E4M3 = "F8_E4M3"  # as safetensors calls it
SCALES = ("weight_scale", "weight_scale_inv")  # both are what values are multiplied by
UNUSED = ("input_scale", "output_scale", "k_scale", "v_scale", "inv_freq", "activation_scale")
HEAD = "lm_head"
GENERAL = ("torchao",)  # what transformers runs and our products do not


def scheme_of(config: Any, name: str) -> str | None:
    """What a checkpoint is quantised by, if it is: fp8, whose weights are read here, or torchao.

    Args:
        name: setting and value, for messages.

    Raises:
        ValueError: something else; one line that names it.
    """
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    found = dict(stated if isinstance(stated, Mapping) else stated.to_dict())
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
    why: str | None = ""
    if method in GENERAL:
        return method
    if method == "fp8":
        why = _finegrained(found)
    elif method == "compressed-tensors":
        why = _compressed(found)
    if why is None:
        return "fp8"
    raise BrokenFilesError(
        f"{name}: its weights are quantised by {method}{why and f' ({why})'}, which is not read; "
        f"take its bfloat16 weights, with quantize=fp8 if they are to be small"
    )


def _finegrained(stated: Mapping[str, Any]) -> str | None:
    """What is not read of it; None if all is."""
    blocks = stated.get("weight_block_size", (SCALED_BLOCK, SCALED_BLOCK))
    if blocks is not None and list(blocks) != [SCALED_BLOCK, SCALED_BLOCK]:
        return f"blocks of {' x '.join(map(str, blocks))}"
    if stated.get("scale_fmt", "float") not in ("float", None):
        return f"scales in {stated['scale_fmt']}"
    return None


def _compressed(stated: Mapping[str, Any]) -> str | None:
    """As `_finegrained`."""
    if stated.get("format") not in (None, "float-quantized", "naive-quantized"):
        return f"format {stated['format']}"
    for group in dict(stated.get("config_groups") or {}).values():
        weights = dict(group.get("weights") or {})
        kind, bits = weights.get("type"), weights.get("num_bits")
        strategy, blocks = weights.get("strategy"), weights.get("block_structure")
        if (kind, bits) != ("float", 8):
            return f"{kind}{bits} weights"
        if strategy not in ("channel", "tensor", "block"):
            return f"a scale per {strategy}"
        if strategy == "block" and list(blocks or ()) != [SCALED_BLOCK, SCALED_BLOCK]:
            return f"blocks of {' x '.join(map(str, blocks or ()))}"
        if weights.get("symmetric") is False:
            return "weights with zero points"
        if weights.get("actorder"):
            return "columns in another order"
    return None


def fetch(where: str) -> Path:
    """The folder of the weights of a hub id, which are downloaded if they are not there."""
    try:
        hf_hub_download(where, INDEX)
    except EntryNotFoundError:
        return Path(hf_hub_download(where, WEIGHTS)).parent
    folder = Path(hf_hub_download(where, INDEX)).parent
    for file in weight_files(folder):
        hf_hub_download(where, file.name)
    return folder


class Entry(NamedTuple):
    """A tensor in a file, by its header."""

    file: Path
    shape: list[int]
    dtype: str


@torch.no_grad()
def read_model(
    folder: Path,
    config: Any,
    placement: Placement,
    name: str,
    quantize: Quantize,
    ranks: Ranks = ALONE,
) -> tuple[Any, list[str]]:
    """A causal LM whose layers are of the Llama kind, tensor by tensor; and what is to be known of
    it, a line each.

    Args:
        name: setting and value, for messages.
        quantize: what becomes of the weights of layers that are not quantised already.
        ranks: who shares it; each reads all, a tensor at a time, and keeps its part.

    Raises:
        ValueError: tensors that are missing, too many, of other shapes or not finite; or there is
            no room for them.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, dtype=placement.dtype)
    model = cut(model, ranks.size)
    with Checkpoint(folder, name, placement, ranks) as files:
        files.check(model)
        files.check_room(model, quantize)
        for layer in model.base_model.layers:
            for part, child in projections(layer):
                files.fill_linear(part, child, quantize)
        tied = config.tie_word_embeddings
        if not tied and ranks.size == 1:
            files.fill_linear(model, HEAD, "none")
        files.fill(model)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    rotary = model.base_model.rotary_emb  # computed, so that it is in no file
    model.base_model.rotary_emb = type(rotary)(config=plain).to(placement.device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval(), files.notes


class Checkpoint:
    """The files of a model, open.

    Args:
        folder: where they lie.
        name: setting and value, for messages.
        placement: of the model.
        ranks: who shares the model.

    Attributes:
        notes: what was read otherwise than it is in the files.
    """

    def __init__(
        self, folder: Path, name: str, placement: Placement, ranks: Ranks = ALONE
    ) -> None:
        self.folder, self.name, self.placement, self.ranks = folder, name, placement, ranks
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._names: dict[int, str] = {}  # of modules
        self.notes: list[str] = []

    def __enter__(self) -> "Checkpoint":
        for file in weight_files(self.folder):
            opened = self._open[file] = self._stack.enter_context(safe_open(file, "pt"))
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                part = opened.get_slice(key)
                self.entries[key] = Entry(file, part.get_shape(), part.get_dtype())
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def check(self, model: Any) -> None:
        """Raise ValueError unless there is exactly what the model has places for."""
        self._names = {id(module): path for path, module in model.named_modules()}
        wanted = {key: list(tensor.shape) for key, tensor in model.named_parameters()}
        if model.config.tie_word_embeddings:
            wanted.pop(f"{HEAD}.weight", None)
        scales = {key: self._scale(key) for key in wanted if key in self.entries}
        taken = {*wanted, *(key for key in scales.values() if key is not None)}
        if model.config.tie_word_embeddings:
            taken.add(f"{HEAD}.weight")
            if self._scale(f"{HEAD}.weight") is not None:
                raise BrokenFilesError(
                    f"{self.name}: {HEAD}.weight is in float8, and config.json ties it to the "
                    f"embedding; set tie_word_embeddings to false there, or take it out"
                )
        shapes = [
            (key, self.entries[key].shape, shape)
            for key, shape in wanted.items()
            if key in self.entries and self.entries[key].shape != shape
        ]
        report = {
            "missing_keys": wanted.keys() - self.entries.keys(),
            "unexpected_keys": [
                key for key in self.entries.keys() - taken if key.rpartition(".")[2] not in UNUSED
            ],
            "mismatched_keys": shapes,
        }
        check_report(report, self.folder, self.name)

    def check_room(self, model: Any, quantize: Quantize) -> None:
        """Raise ValueError if the weights do not fit the device."""
        layers = {
            f"{self._names[id(part)]}.{child}.weight"
            for layer in model.base_model.layers
            for part, child in projections(layer)
        }
        needed, kept = 0, [f"{HEAD}.weight"] if self.ranks.size == 1 else []
        for key, tensor in model.named_parameters():
            small = quantize == "fp8" and key in layers
            small |= key in {*layers, *kept} and self._scale(key) is not None
            needed += local(tensor).numel() * (1 if small else self.placement.dtype.itemsize)
        free = free_memory(self.placement.device)
        if needed > free:
            raise BrokenFilesError(
                f"{self.name}: weights of {needed / 2**30:.1f} GiB do not fit the "
                f"{free / 2**30:.1f} GiB that are free on device={self.placement.device}; "
                f"choose a smaller model"
            )

    def fill_linear(self, part: nn.Module, child: str, quantize: Quantize) -> None:
        """Read a linear layer, quantised if it is to be or if it is in the file."""
        linear: Any = getattr(part, child)
        path = f"{self._names[id(part)]}.{child}".removeprefix(".")  # of the model itself
        key = f"{path}.weight"
        stored = self._scale(key) is not None
        if not stored and quantize != "fp8":
            return
        bias = None if linear.bias is None else self._plain(f"{path}.bias")
        weight = self._fp8(key) if stored else None
        try:
            if weight is None:
                weight = quantise_weight(self._read(key).to(self.placement.device))
            put(part, child, weight, bias, self.ranks)
        except ValueError as error:
            mend = "; lower target.tp" if stored else ""
            raise BrokenFilesError(
                f"{self.name}: {self.entries[key].file.name}: {key}: {error}{mend}"
            ) from None

    def fill(self, model: Any) -> None:
        """Read what is left."""
        for key, parameter in [*model.named_parameters()]:
            if parameter.is_meta and key in self.entries:
                path, _, last = key.rpartition(".")
                every = self._plain(key)
                mine = part_of(parameter, every, self.ranks)
                replace(model.get_submodule(path), last, mine if mine is every else mine.clone())

    def _read(self, key: str) -> Tensor:
        found: Tensor = self._open[self.entries[key].file].get_tensor(key)
        return found

    def _plain(self, key: str) -> Tensor:
        """In the type of the model, and of what is in float8 a note."""
        if self._scale(key) is not None:
            why = "ranks share it" if key == f"{HEAD}.weight" else "rows of it are looked up"
            self.notes.append(f"{self.name}: {key} is dequantised from float8, for {why}")
            return self._fp8(key).dequantised(self.placement.dtype)
        return self._read(key).to(device=self.placement.device, dtype=self.placement.dtype)

    def _scale(self, key: str) -> str | None:
        """Name of the scale of a weight in float8; None of any other.

        Raises:
            ValueError: a weight of another quantised type, or in float8 without a scale.
        """
        kind = self.entries[key].dtype if key in self.entries else "F32"
        if kind in ("F64", "F32", "BF16", "F16"):
            return None
        base = key.removesuffix(".weight")
        names = [f"{base}.{scale}" for scale in SCALES if f"{base}.{scale}" in self.entries]
        if kind == E4M3 and names:
            return names[0]
        what = "has no scale" if kind == E4M3 else f"is of type {kind}"
        raise BrokenFilesError(
            f"{self.name}: {self.entries[key].file.name}: {key} {what}, and config.json says "
            f"nothing that would explain it; take weights in bfloat16, or e4m3 with weight_scale"
        )

    def _fp8(self, key: str) -> Fp8Weight:
        """Values and scales of a weight [N, K]; one scale of a whole weight counts for each row.

        Raises:
            ValueError: scales of another shape, or that are not finite.
        """
        values, name = self._read(key), self._scale(key)
        assert name is not None
        rows, columns = values.shape
        scale = self._read(name).float()
        blocks = [-(-rows // SCALED_BLOCK), -(-columns // SCALED_BLOCK)]
        if scale.numel() == 1 or (scale.numel() == rows and list(scale.shape) != blocks):
            scale = scale.flatten().expand(rows).contiguous()
        elif list(scale.shape) != blocks:
            raise BrokenFilesError(
                f"{self.name}: {self.entries[key].file.name}: {name} has shape "
                f"{list(scale.shape)}; it must be [1], [{rows}, 1] or {blocks}, for {key} "
                f"with shape {[rows, columns]}"
            )
        device = self.placement.device
        return Fp8Weight(values.to(device).contiguous(), scale.to(device))

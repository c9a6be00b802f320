"""Where models come from: the built-in ones, stand-ins, folders and the Hugging Face hub."""

from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PretrainedConfig,
)

from specdec.models.checkpoints import fetch, read_model, scheme_of
from specdec.models.direct import FAMILIES, known
from specdec.models.hook import UnsupportedError
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.models.probe import check_config
from specdec.models.quantised import Quantize, quantisation_of, slow
from specdec.models.shards import check_split, plan_of
from specdec.models.standin import Widening, named_shape, standin, standin_config
from specdec.models.weights import (
    BrokenFilesError,
    check_files,
    check_finite,
    check_report,
    folder_of,
)
from specdec.ranks import ALONE, Ranks
from specdec.reasons import first_line

CPU = Placement()
ALIASES = {"mimo": "qwen2"}  # a family of code of its own that computes what another does


class Models:
    """Models of one placement, each loaded once, by its path."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._loaded: dict[tuple[str, Quantize], PagedLM] = {}

    def load(
        self,
        path: str,
        *,
        setting: str = "path",
        quantize: Quantize = "none",
        ranks: Ranks = ALONE,
    ) -> PagedLM:
        """As `load_model`."""
        key = path, quantize
        if key not in self._loaded:
            self._loaded[key] = load_model(
                path, self.placement, setting=setting, quantize=quantize, ranks=ranks
            )
        return self._loaded[key]


def load_model(
    path: str,
    placement: Placement = CPU,
    *,
    setting: str = "path",
    quantize: Quantize = "none",
    ranks: Ranks = ALONE,
) -> PagedLM:
    """Load a model and its tokenizer from a local folder or the Hugging Face hub; `zoo:NAME` is
    built in, `standin:NAME` is made from it (`standin.py`).

    Args:
        setting: the option that gave `path`, for error messages.
        quantize: fp8 quantises the weights of its layers as they are read or made.
        ranks: who shares it, each of whom loads its own part at the same time.

    Raises:
        ValueError: nothing there, or nothing that can be run; one line that names the setting.
    """
    device, dtype, kernels = placement.device, placement.dtype, placement.kernels
    name = f"{setting}={path}"
    transformers.utils.logging.disable_progress_bar()
    if path.startswith("standin:"):
        shape, zoo = named_shape(path.removeprefix("standin:"), setting)
        source = zoo_path(zoo)
        check_files(source, name, complete=True)
        try:
            large = standin(
                source, shape, device=device, dtype=dtype, quantize=quantize, ranks=ranks
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tokenizer = AutoTokenizer.from_pretrained(source)
        widening = Widening(small=AutoConfig.from_pretrained(source), shape=shape)
        return PagedLM(large, tokenizer, name=name, kernels=kernels, standin=widening, ranks=ranks)
    where = find_model(path, setting=setting)
    model, tokenizer, scheme, notes = _load_files(where, placement, name, quantize, ranks)
    lm = PagedLM(model, tokenizer, name=name, kernels=kernels, path=path, ranks=ranks)
    lm.notes += notes
    if scheme is not None and lm.quantised is None:  # dequantised as it was loaded
        lm.quantised = scheme
        lm.notes.append(f"{name}: {slow(model, scheme)}")
    if quantize == scheme == "fp8":
        lm.notes.append(f"{name}: its weights are fp8 already, and stay as its files have them")
    return lm


def _load_files(
    where: str, placement: Placement, name: str, quantize: Quantize, ranks: Ranks
) -> tuple[Any, Any, str | None, list[str]]:
    """The model and the tokenizer of a folder or hub id, exactly as the files have them unless
    they are to be quantised; what the files are quantised by, and what is to be known of them.

    Raises:
        ValueError: files that are broken, or are no causal LM that can be run.
    """
    local = Path(where).is_dir()
    try:
        if local:
            check_files(Path(where), name, complete=True)
        config = _config(where)
        check_config(config)
        check_split(config, ranks.size, name)
        folder = folder_of(where)
        if folder is not None and not local:
            check_files(folder, name, complete=False)
        tokenizer = _tokenizer(where, name)
        scheme, notes = scheme_of(config, name), list[str]()
        if quantize == "fp8":
            _check_quantisable(config, scheme, name)
        if known(config) and "fp8" in (quantize, scheme):
            files = Path(where) if local else fetch(where)
            kept: Quantize = "none" if scheme else quantize
            model, notes = read_model(files, config, placement, name, kept, ranks)
            if quantisation_of(model) is None:
                raise BrokenFilesError(
                    f"{name}: config.json says that its weights are in float8, and none is; take "
                    f"quantization_config out of it"
                )
        else:
            model = _by_transformers(where, config, placement, name, ranks)
        check_finite(model, folder_of(where), name)
    except UnsupportedError as reason:
        kind = (config.architectures or [config.model_type])[0]
        raise ValueError(f"{name}: {kind} cannot run over the paged cache: {reason}") from None
    except BrokenFilesError:
        raise
    except Exception as error:  # of any class: a configuration can hold anything
        first = _reason(error)
        raise ValueError(f"{name}: cannot be loaded as a causal LM: {first}") from error
    return model, tokenizer, scheme, notes


def _config(where: str) -> Any:
    """config.json, of a family that transformers has no code of by the name of one that it has."""
    told, _ = PretrainedConfig.get_config_dict(where)
    alias = ALIASES.get(told.get("model_type", ""))
    if alias is None:
        return AutoConfig.from_pretrained(where)
    others = ("model_type", "auto_map", "architectures")
    return AutoConfig.for_model(alias, **{k: v for k, v in told.items() if k not in others})


def _by_transformers(
    where: str, config: Any, placement: Placement, name: str, ranks: Ranks
) -> Any:
    """A model as transformers loads it, with nothing made up.

    Raises:
        ValueError: files that lack what the configuration asks for, or hold more.
    """
    stated = getattr(config, "quantization_config", None)
    plain = {}
    if isinstance(stated, dict) and stated.get("quant_method") == "compressed-tensors":
        plain["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=placement.dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # the report has them, with both shapes
        output_loading_info=True,
        **plain,
        **plan_of(ranks.size),
    )
    # Zero points of symmetric quantisation are zero, and in no file.
    missing = [key for key in report["missing_keys"] if not key.endswith("_zero_point")]
    check_report({**report, "missing_keys": missing}, folder_of(where), name)
    return model if ranks.size > 1 else model.to(placement.device)


def config_of(path: str, *, setting: str = "path") -> Any:
    """The configuration of what `load_model` would load; None if it cannot be read, which loading
    will tell.

    Raises:
        ValueError: as `find_model`.
    """
    where = find_model(path, setting=setting)
    try:
        config = _config(where)
        if path.startswith("standin:"):
            config = standin_config(config, named_shape(path.removeprefix("standin:"))[0])
        return config
    except Exception:  # of any class, as above
        return None


def _check_quantisable(config: Any, scheme: str | None, name: str) -> None:
    """Raise ValueError unless layers of such a model can be quantised, or are so already."""
    setting = name.partition("=")[0].removesuffix("path") + "quantize"
    kind = (config.architectures or [config.model_type])[0]
    if not known(config):
        raise BrokenFilesError(
            f"{name}: {kind} cannot be quantised here; choose one of {', '.join(FAMILIES)}, or "
            f"{setting}=none"
        )
    if scheme not in (None, "fp8"):
        raise BrokenFilesError(
            f"{name}: its weights are quantised by {scheme} already; use {setting}=none"
        )


def load_tokenizer(path: str, *, setting: str = "path") -> Any:
    """That of a model alone, as `load_model` has it."""
    return _tokenizer(find_model(path, setting=setting), f"{setting}={path}")


def _tokenizer(where: str, name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # of any class, as above
        reason = _reason(error)
    else:
        if set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
            return tokenizer
        reason = "they hold no tokens"
    raise BrokenFilesError(
        f"{name}: cannot be loaded as a causal LM: its files make no tokenizer; put its "
        f"tokenizer.json beside the weights ({reason})"
    )


def _reason(error: Exception) -> str:
    first = first_line(error)
    said = isinstance(error, OSError | ValueError)  # others say little without their class
    return first if said else f"{type(error).__name__}: {first}"


def find_model(path: str, *, setting: str = "path") -> str:
    """The folder or hub id that a path names, before anything is loaded; as in `load_model`.

    Raises:
        ValueError: there is no such built-in model, stand-in or folder.
    """
    if path.startswith("standin:"):
        return str(zoo_path(named_shape(path.removeprefix("standin:"), setting)[1]))
    if path.startswith("zoo:"):
        return str(zoo_path(path.removeprefix("zoo:"), setting))
    if not path.startswith(("/", ".", "~")):
        return path
    where = Path(path).expanduser()
    if not where.is_dir():
        raise ValueError(
            f"{setting}={path}: no such folder; give a model folder, a hub id or zoo:NAME"
        )
    return str(where)


def zoo_path(name: str, setting: str = "path") -> Path:
    """Folder of a built-in model.

    Raises:
        ValueError: no built-in model of that name.
    """
    zoo = Path(__file__).parents[1] / "zoo"
    if not (zoo / name / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in zoo.iterdir() if p.is_dir()))
        raise ValueError(f"{setting}=zoo:{name}: no such built-in model; there are {names}")
    return zoo / name

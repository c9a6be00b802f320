"""Where models come from: the built-in ones, stand-ins, folders and the Hugging Face hub."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec.models.hook import UnsupportedError
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.models.probe import check_config
from specdec.models.standin import named_shape, standin

CPU = Placement()


class Models:
    """Models of one placement, each loaded once, by its path."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._loaded: dict[str, PagedLM] = {}

    def load(self, path: str, *, setting: str = "path") -> PagedLM:
        """As `load_model`."""
        if path not in self._loaded:
            self._loaded[path] = load_model(path, self.placement, setting=setting)
        return self._loaded[path]


def load_model(path: str, placement: Placement = CPU, *, setting: str = "path") -> PagedLM:
    """Load a model and its tokenizer from a local folder or the Hugging Face hub; `zoo:NAME` is
    built in, `standin:NAME` is made from it (`standin.py`).

    Args:
        setting: the option that gave `path`, for error messages.

    Raises:
        ValueError: nothing there, or nothing that can be run; one line that names the setting.
    """
    device, dtype, kernels = placement.device, placement.dtype, placement.kernels
    name = f"{setting}={path}"
    if path.startswith("standin:"):
        shape, zoo = named_shape(path.removeprefix("standin:"), setting)
        source = zoo_path(zoo)
        large = standin(source, shape, device=device, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
        return PagedLM(large, tokenizer, name=name, kernels=kernels)
    where = path
    if path.startswith("zoo:"):
        where = str(zoo_path(path.removeprefix("zoo:"), setting))
    elif path.startswith(("/", ".", "~")):
        where = str(Path(path).expanduser())
        if not Path(where).is_dir():
            raise ValueError(f"{name}: no such folder; give a model folder, a hub id or zoo:NAME")
    try:
        config = AutoConfig.from_pretrained(where)
        check_config(config)
        transformers.utils.logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except UnsupportedError as reason:
        kind = (config.architectures or [config.model_type])[0]
        raise ValueError(f"{name}: {kind} cannot run over the paged cache: {reason}") from None
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: cannot be loaded as a causal LM: {first}") from None
    return PagedLM(model.to(device), tokenizer, name=name, kernels=kernels)


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

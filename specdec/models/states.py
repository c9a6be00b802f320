"""States: the target's hidden states that somebody asked for, of one pass."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from specdec.observation import Tap


class States:
    """Hidden states kept on the way through a model: no copies, and none that nobody wants.

    Args:
        wanted: which.

    Attributes:
        found: [B, N, H] each.
    """

    __slots__ = ("found", "wanted")

    def __init__(self, wanted: Collection[Tap] = ()) -> None:
        self.wanted = frozenset(wanted)
        self.found: dict[Tap, Tensor] = {}

    def keep(self, tap: Tap, state: Tensor, like: Tensor) -> None:
        """If it is wanted, `state` in the shape of `like`."""
        if tap in self.wanted:
            self.found[tap] = state.view_as(like)

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Keep what passes through a transformers model meanwhile, by hooks on its layers."""
        if not self.wanted:
            yield
            return
        layers = layers_of(model)
        last = len(layers)

        def entering(tap: Tap) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.found[tap] = args[0] if args else kwargs["hidden_states"]

            return hook

        def leaving(_: Any, __: Any, out: Any) -> None:
            self.found[last] = out[0] if isinstance(out, tuple) else out

        def ended(_: Any, __: Any, out: Any) -> None:
            self.found["normal"] = out[0]

        hooks = []
        for tap in self.wanted:
            if tap == "normal":
                hooks.append(model.base_model.register_forward_hook(ended))
            elif tap == last:
                hooks.append(layers[-1].register_forward_hook(leaving))
            else:
                hook = entering(tap)
                hooks.append(layers[tap].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def layers_of(model: Any) -> Any:
    """The decoder layers of a transformers model.

    Raises:
        ValueError: there is no list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = min((name.count(".") for name in found), default=0)  # experts may be as many
    lists = [module for name, module in found.items() if name.count(".") == outer]
    if len(lists) != 1:
        raise ValueError(f"{type(model).__name__} has no one list of its {count} layers")
    return lists[0]

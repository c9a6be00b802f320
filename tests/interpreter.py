"""Triton's interpreter, in less time."""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any


def hasten() -> None:
    """At each call of a kernel, and of each function in it, the interpreter goes through all of
    `triton.language` for what it must replace, and at each operation it writes down the table of
    types, and the shape of what comes of it, number by number: half of the time of a kernel of a
    few programs. What it finds is the same each time. An interpreter that is built otherwise is
    left alone."""
    import triton
    from triton.language import core
    from triton.runtime import interpreter

    replaced = {"_patch_builtin", "_patch_attr", "_patch_lang", "_get_np_dtype"}
    if not replaced <= vars(interpreter).keys():
        return
    keep_shapes(core)

    @cache  # at the first call nothing is replaced yet
    def builtins(place: Any) -> list[str]:
        return [name for name, it in inspect.getmembers(place) if core.is_builtin(it)]

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        for name in builtins(place):
            member = getattr(place, name)
            if not core.is_builtin(member):  # so all of them are replaced
                return
            interpreter._patch_attr(place, name, member, builder, scope)

    def np_dtype(kind: Any) -> Any:  # whose name says all that it is
        if kind.name not in known:
            known[kind.name] = original(kind)
        return known[kind.name]

    def patch_lang(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in languages:
            found = {name: it for name, it in names.items() if it is core or it is triton.language}
            languages[id(names)] = SimpleNamespace(__globals__=found, kept=names)
        return patch(languages[id(names)])

    patch, languages = interpreter._patch_lang, dict[int, SimpleNamespace]()
    original, known = interpreter._get_np_dtype, dict[str, Any]()
    interpreter._patch_lang = patch_lang
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = np_dtype


def keep_shapes(core: Any) -> None:
    """Types of blocks, and shapes of tensors, are made once each: nobody changes them."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, shapes = dict[Any, dict[str, Any]](), dict[Any, tuple[Any, Any]]()

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = type(element_ty), str(element_ty), getattr(element_ty, "address_space", ""), sizes
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[sizes]

    core.block_type.__init__, core.tensor.__init__ = block, tensor

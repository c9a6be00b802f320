"""Triton's interpreter, in less time."""

import inspect
from functools import cache
from typing import Any


def hasten() -> None:
    """At each call of a kernel, and of each function in it, the interpreter goes through all of
    `triton.language` for what it must replace, and at each operation it writes down the table of
    types: a third of the time of a kernel of a few programs. What it finds is the same each time.
    An interpreter that is built otherwise is left alone."""
    from triton.language import core
    from triton.runtime import interpreter

    if not {"_patch_builtin", "_patch_attr", "_get_np_dtype"} <= vars(interpreter).keys():
        return

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

    original, known = interpreter._get_np_dtype, dict[str, Any]()
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = np_dtype

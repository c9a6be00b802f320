"""Values as they are typed, and whether they are of the type that is wanted."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of that type; a list serves as a tuple, and a text as a path.

    Raises:
        ValueError: it is not.
    """
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a folder called 7
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise ValueError(f"{name}={shown(value)}: {expected}") from None


def shown(value: Any) -> str:
    """A value as one types it: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def flat(
    values: Mapping[str, Any], *, joint: str = ".", empty: bool = False, prefix: str = ""
) -> dict[str, Any]:
    """Nested values by full name, as `tree.budget`.

    Args:
        joint: between the parts of a name.
        empty: whether mappings without anything in them are values.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and (value or not empty):
            found |= flat(value, joint=joint, empty=empty, prefix=f"{prefix}{name}{joint}")
        else:
            found[f"{prefix}{name}"] = value
    return found

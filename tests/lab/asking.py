"""Prompts read in tests."""

from collections.abc import Callable
from typing import Any

import pytest

from specdec.lab.prompts import Prompt, load_prompts

Write = Callable[..., str]


def load(
    path: str | None = None, *, field: str | None = None, limit: int | None = None, **kwargs: Any
) -> list[Prompt]:
    return load_prompts(path=path, field=field, limit=limit, **kwargs)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers compare the message
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message

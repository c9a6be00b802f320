"""Sessions of our own decoder with the zoo pair."""

import pytest

from specdec.lab.prompts import Asked
from specdec.lab.workshop import PLAIN, Workshop, tree

NEW = 6
TEXTS = ("def fibonacci(n):\n    ", "It was a dark night, and the old captain stood at the")


def test_sessions_share_models_and_say_what_plain_decoding_says() -> None:
    shop = Workshop("target=zoo device=cpu")
    batch = [
        Asked(number, f"text/{number}", shop.target.tokenizer(text).input_ids)
        for number, text in enumerate(TEXTS)
    ]
    plain = shop.session(PLAIN, rows=2, longest=64).decode(batch, NEW)
    assert plain.passes == [NEW, NEW]
    assert sum(plain.verbs.values()) == pytest.approx(plain.seconds, rel=0.2)
    sessions = [
        shop.session(f"drafter=small_llama {tree('chain', budget)}", rows=rows, longest=64)
        for budget, rows in ((2, 2), (3, 1))  # a row for both prompts, one after the other
    ]
    assert sessions[0].method.drafter.lm is sessions[1].method.drafter.lm  # type: ignore[attr-defined]
    for session in sessions:
        session.warm_up(batch[0].tokens)
        found = session.decode(batch, NEW)
        assert found.outputs == plain.outputs
        assert sum(found.passes) < sum(plain.passes)
        assert session.notes()["graphs"]["obstacle"] is None

"""What is captured, when, and under which key; without a GPU a graph that only records what would
be done."""

from typing import Any

import pytest
import torch

from specdec.graphs import Graphs


class Recorded:
    """A graph whose replay writes what its function would compute from the tensors of the time of
    the capture."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    class Capturing:
        def __init__(self, graph: Any, pool: Any, capture_error_mode: str) -> None:
            assert (pool, capture_error_mode) == ("pool", "global")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Graphs(enabled=True)


def test_called_then_captured_then_replayed(graphs: Graphs) -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return len(calls)

    assert [graphs.run("verify", 1, work) for _ in range(5)] == [1, 2, 2, 2, 2]
    assert len(calls) == 2
    assert graphs.counts == {"verify": {"called": 1, "captured": 1, "replayed": 4}}


def test_keys_keep_functions_apart(graphs: Graphs) -> None:
    for _ in range(3):
        for name in ("draft", "verify"):
            for key in ((1, 4), (2, 4)):
                assert graphs.run(name, key, lambda n=name, k=key: (n, k)) == (name, key)  # type: ignore[misc]
    assert graphs.counts["draft"] == {"called": 2, "captured": 2, "replayed": 4}


def test_after_a_failure_nothing_is_captured(
    graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    capturing = [False, True, False]

    def work() -> int:
        if capturing.pop(0):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return 7

    assert [graphs.run("draft", 1, lambda: 5) for _ in range(3)] == [5] * 3
    assert [graphs.run("verify", 1, work) for _ in range(2)] == [7, 7]
    assert graphs.run("draft", 1, lambda: 6) == 6  # no longer what was captured
    assert graphs.obstacle == "operation not permitted when stream is capturing"
    assert "without CUDA graphs" in caplog.text
    assert [graphs.run("accept", 1, lambda: 3) for _ in range(4)] == [3] * 4
    assert graphs.counts["accept"] == {"called": 4, "captured": 0, "replayed": 0}


def test_where_it_is_off_functions_are_called() -> None:
    off = Graphs(enabled=False)
    calls: list[int] = []
    for _ in range(4):
        off.run("verify", 1, lambda: calls.append(1))
    assert len(calls) == 4
    assert off.counts == {"verify": {"called": 4, "captured": 0, "replayed": 0}}

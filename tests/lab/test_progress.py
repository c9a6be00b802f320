"""Progress: figures that move within a text, a line a minute where there is no terminal."""

import io
import re
import time
from contextlib import suppress

import pytest
from rich.console import Console

from specdec.flight import Step
from specdec.lab.progress import Bar, Live, Pace


class Clock:
    """Seconds, as told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(tokens: list[int], seconds: float = 0.5) -> Step:
    ones = [1] * len(tokens)
    times = {"draft": 0.2 * seconds, "verify": 0.8 * seconds}
    return Step(
        requests=ones, nodes=ones, depths=ones, accepted=ones, tokens=tokens, seconds=times
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


def logged(clock: Clock) -> tuple[Live, io.StringIO]:
    written = io.StringIO()
    return Live(Console(file=written, width=40), clock), written


def test_a_log_gets_a_line_a_minute_and_one_at_the_end(clock: Clock) -> None:
    """Four texts of 120 tokens, 3 in a step, a step in a second; the device takes half of it. The
    third text is done right after the second line."""
    live, written = logged(clock)
    with live.side("speculative", 4, longest=240):
        for number in range(1, 161):
            clock.now += 1.0
            live.step(step([3]))
            if number % 40 == 0:
                live.finished(120)
    assert written.getvalue().splitlines() == [
        "speculative: 1 of 4 texts, 6.0 tok/s  accepted 3.00, 0:01:00 gone, 0:01:40 left",
        "speculative: 2 of 4 texts, 6.0 tok/s  accepted 3.00, 0:02:00 gone, 0:00:40 left",
        "speculative: 4 of 4 texts, 6.0 tok/s  accepted 3.00, in 0:02:40",
    ]


def test_before_the_first_text_is_done_texts_are_as_long_as_they_may_be(clock: Clock) -> None:
    live, written = logged(clock)
    with live.side("baseline", 2, longest=300):
        clock.now += 60.0
        live.step(step([100, 100]))
    assert "0 of 2 texts" in written.getvalue()
    assert "0:01:00 gone, 0:02:00 left" in written.getvalue()
    live, written = logged(clock)
    with live.side("baseline", 2):
        clock.now += 60.0
        live.step(step([100, 100]))
    assert "left" not in written.getvalue()


def test_an_interruption_leaves_the_last_line(clock: Clock) -> None:
    live, written = logged(clock)
    with suppress(KeyboardInterrupt), live.side("baseline", 2):
        live.step(step([1]))
        raise KeyboardInterrupt
    assert written.getvalue() == "baseline: 0 of 2 texts, 2.0 tok/s  accepted 1.00, in 0:00:00\n"


def test_the_bar_moves_within_a_text(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    pace = Pace(title="speculative", texts=1, longest=100, begun=clock.now)
    shown = []
    with Bar(pace, clock, console) as bar:
        for tokens, steps in ((0, 0), (25, 10), (75, 25)):
            pace.tokens, pace.steps, pace.seconds = tokens, steps, tokens / 50
            clock.now = 1000.0 + tokens / 5
            with console.capture() as captured:
                console.print(*bar.get_renderables())
            shown.append(captured.get())
    assert [line.count("━") for line in shown] == [0, 7, 22]
    assert "50.0 tok/s  accepted 2.50  0:00:05  0:00:15 left" in shown[1]
    assert "50.0 tok/s  accepted 3.00  0:00:15  0:00:05 left" in shown[2]
    assert bar.tasks[0].completed == 0.75


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=True, force_interactive=True)
    live = Live(console)
    with live.side("baseline", 1):
        live.step(step([2, 1]))
        live.finished(3)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert "1/1     6.0 tok/s  accepted 1.50" in plain
    assert "texts" not in plain


def test_a_step_costs_next_to_nothing() -> None:
    """Less than 20 µs, where the shortest steps there are take hundreds."""
    live = Live(Console(file=io.StringIO()))
    one = step([1] * 8)
    with live.side("baseline", 1):
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            for _ in range(100):
                live.step(one)
            times.append((time.perf_counter() - begun) / 100)
    assert min(times) < 20e-6

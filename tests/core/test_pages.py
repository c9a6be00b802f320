"""Pages against a plain model: what each place of each page holds, and what is on offer under
which whole prompt."""

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec.pages import CacheFullError, Pages

ROWS, COUNT, SIZE, MAX_TOKENS = 4, 9, 3, 16


def test_pages_need_no_torch() -> None:
    code = "import sys, specdec.pages; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


class Life:
    """Pages and the model beside them. A token stands with all that precedes it, as keys and
    values do, and of prompts with its successors, so that a page that is shared or written to
    wrongly shows in what it holds."""

    def __init__(self, *, count: int = COUNT, successors: int = 0) -> None:
        self.pages = Pages(count=count, size=SIZE, max_tokens=MAX_TOKENS, successors=successors)
        self.successors = successors
        self.prompts: dict[int, list[int]] = {}  # announced at `open`, of each open row
        self.histories: dict[int, list[int]] = {}  # tokens committed, of each open row
        self.held: dict[int, list[int]] = {}  # pages of each open row
        self.written: dict[tuple[int, int], list[int]] = {}  # history at each place of each page
        # Under the pages of the beginning and all tokens up to the end of the page, and those
        # that come after it.
        self.offered: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        self.announced: list[list[int]] = []

    def open(
        self,
        row: int,
        prompt: list[int],
        *,
        tokens: int = MAX_TOKENS,
        found: int | None = None,
    ) -> int:
        match, held = self.match(prompt), {page for own in self.held.values() for page in own}
        if found is not None:
            match = match[: found // SIZE]
        done = self.pages.open(row, tokens=tokens, prefix=prompt, found=found)
        own = self.pages.of(row)
        assert own[: len(match)] == match
        assert held.isdisjoint(own[len(match) :])
        assert done == SIZE * len(match)
        assert tokens <= self.pages.allocated(row) == SIZE * len(own) < tokens + SIZE
        self.prompts[row], self.histories[row], self.held[row] = prompt, prompt[:done], own
        if prompt not in self.announced:
            self.announced.append(prompt)
        return done

    def commit(self, row: int, tokens: list[int]) -> None:
        before = len(self.histories[row])
        own, prompt = self.held[row], self.prompts[row]
        for token in tokens:
            history = [*self.histories[row], token]
            page, place = divmod(len(history) - 1, SIZE)
            self.written[own[page], place] = self.histories[row] = history
            whole = prompt[: len(history) + self.successors]
            if len(history) + self.successors <= len(prompt):
                self.written[own[page], place] = whole
                if place == SIZE - 1:
                    self.offered.setdefault((tuple(own[:page]), tuple(whole)), own[page])
        self.pages.offer(row, before + len(tokens))

    def close(self, row: int) -> None:
        self.pages.close(row)
        del self.prompts[row], self.histories[row], self.held[row]
        held = {page for own in self.held.values() for page in own}
        self.offered = {key: page for key, page in self.offered.items() if page in held}

    def match(self, prompt: Sequence[int]) -> list[int]:
        pages: list[int] = []
        for end in range(SIZE, len(prompt) + 1 - self.successors, SIZE):
            page = self.offered.get((tuple(pages), tuple(prompt[: end + self.successors])))
            if page is None:
                break
            pages.append(page)
        return pages

    def verify(self) -> None:
        self.pages.check({row: len(history) for row, history in self.histories.items()})
        assert sorted(self.pages.rows) == sorted(self.histories)
        holders = Counter(page for own in self.held.values() for page in own)
        assert self.pages.free == self.pages.count - len(holders)
        assert sorted(self.pages._shared_key) == sorted(self.offered.values())
        for row, history in self.histories.items():
            own = self.pages.of(row)
            assert own == self.held[row]
            for i in range(len(history)):
                depends = (history[: i + 1], self.prompts[row][: i + 1 + self.successors])
                assert self.written[own[i // SIZE], i % SIZE] in depends
            assert all(holders[page] == 1 for page in own[len(history) // SIZE :])
        for prompt in self.announced:
            match = self.pages.match(prompt)
            assert match == self.match(prompt)
            assert holders.keys() >= set(match)
            for i in range(len(match) * SIZE):
                held_there = self.written[match[i // SIZE], i % SIZE]
                assert held_there == prompt[: i + 1 + self.successors]

    def assert_unchanged_by(
        self, call: Callable[[], object], kind: type[Exception], message: str
    ) -> None:
        before = copy.deepcopy(vars(self.pages))
        with pytest.raises(kind, match=message):
            call()
        assert vars(self.pages) == before


PROMPTS = st.sampled_from([[0] * 9, [0] * 4 + [1] * 4, [0] * 3 + [1] * 6, [1, 0, 1]]) | st.lists(
    st.integers(0, 1), max_size=12
).map(lambda tail: ([0] * 7 + tail)[-12:])


class PagesMachine(RuleBasedStateMachine):
    """Random lives of rows."""

    successors = 0

    def __init__(self) -> None:
        super().__init__()
        self.life = Life(successors=self.successors)

    def closed_rows(self) -> list[int]:
        return [row for row in range(ROWS) if row not in self.life.histories]

    @precondition(lambda self: self.closed_rows())
    @rule(data=st.data(), prompt=PROMPTS, room=st.integers(1, 7), fewer=st.integers(0, 2))
    def open(self, data: st.DataObject, prompt: list[int], room: int, fewer: int) -> None:
        """With all pages that it finds, or fewer."""
        row, life = data.draw(st.sampled_from(self.closed_rows())), self.life
        tokens = min(len(prompt) + room, MAX_TOKENS)
        match = len(life.match(prompt))
        taken = max(0, match - fewer)
        found = taken * SIZE if fewer else None
        needed = -(-tokens // SIZE) - taken
        if needed <= life.pages.free:
            life.open(row, prompt, tokens=tokens, found=found)
        else:
            message = f"^{needed} pages needed, {life.pages.free} free$"
            life.assert_unchanged_by(
                lambda: life.pages.open(row, tokens=tokens, prefix=prompt, found=found),
                CacheFullError,
                message,
            )

    @precondition(lambda self: self.life.histories)
    @rule(data=st.data(), drafted=st.lists(st.integers(0, 2), max_size=9))
    def commit(self, data: st.DataObject, drafted: list[int]) -> None:
        """A row still in its prompt goes on with it, another takes any tokens."""
        row, life = data.draw(st.sampled_from(sorted(self.life.histories))), self.life
        done = len(life.histories[row])
        rest = life.prompts[row][done:]
        tokens = rest[: len(drafted)] if rest else drafted
        life.commit(row, tokens[: life.pages.allocated(row) - done])

    @precondition(lambda self: self.life.histories)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.life.close(data.draw(st.sampled_from(sorted(self.life.histories))))

    @invariant()
    def pages_are_those_of_the_model(self) -> None:
        self.life.verify()

    def teardown(self) -> None:
        for row in list(self.life.histories):
            self.life.close(row)
        self.life.verify()
        assert self.life.pages.free == COUNT
        assert self.life.pages.match([0] * 9) == []


PagesMachine.TestCase.settings = settings(
    max_examples=75, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLives = PagesMachine.TestCase


class SuccessorsMachine(PagesMachine):
    successors = 2


SuccessorsMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)
TestRandomLivesOfPagesThatDependOnWhatFollows = SuccessorsMachine.TestCase


# Prompts


def test_rows_share_the_full_pages_of_a_common_prompt() -> None:
    life = Life()
    prompt = [1, 2, 0, 1, 2, 2, 1]
    assert life.open(0, prompt) == 0
    first, second = life.pages.of(0)[:2]
    assert life.pages.match(prompt) == []
    life.commit(0, prompt[:4])
    assert life.pages.match(prompt) == [first]
    life.commit(0, prompt[4:])
    assert life.pages.match(prompt) == [first, second]
    assert life.pages.match([1, 2, 0, 1, 2, 1, 1]) == [first]
    assert life.pages.match([2, 1, 2, 0, 1, 2, 2]) == []
    assert life.pages.match(prompt[:5]) == [first]

    free = life.pages.free
    assert life.open(1, prompt, tokens=9) == 6
    assert life.pages.of(1)[2] != life.pages.of(0)[2]
    assert life.pages.free == free - 1
    life.commit(1, [1, 0, 0])
    life.verify()

    life.close(0)
    life.verify()
    assert life.open(2, prompt, tokens=7) == 6
    life.close(1)
    life.commit(2, [2])
    life.verify()
    life.close(2)
    assert life.pages.free == COUNT
    assert life.pages.match(prompt) == []


def test_output_tokens_are_not_offered_to_later_prompts() -> None:
    life = Life()
    life.open(0, [1, 2, 0, 1])
    life.commit(0, [1, 2, 0, 1])
    life.commit(0, [2, 2, 0, 0, 0])
    assert life.pages.match([1, 2, 0, 1, 2, 2, 0, 0, 0]) == life.pages.of(0)[:1]


def test_equal_pages_under_different_beginnings_are_not_confused() -> None:
    life = Life()
    for row, first in enumerate((0, 2)):
        life.open(row, [first] * 3 + [1] * 3, tokens=6)
        life.commit(row, [first] * 3 + [1] * 3)
    assert life.open(2, [2, 2, 2, 1, 1, 1], tokens=6) == 6
    assert life.pages.of(2) == life.pages.of(1)
    life.verify()


@pytest.mark.parametrize("first", [0, 1])
def test_two_rows_that_fill_the_same_prompt_at_once_both_survive(first: int) -> None:
    """Neither found the other's pages at `open`; closing one must not harm the other."""
    life = Life()
    prompt = [1, 1, 2, 0, 2, 1, 0]
    for row in range(2):
        life.open(row, prompt, tokens=8)
    for row in range(2):
        life.commit(row, prompt)
    life.close(first)
    life.open(2, prompt, tokens=8)
    life.commit(2, prompt[len(life.histories[2]) :])
    life.verify()


# Errors


def test_errors_of_open_change_nothing() -> None:
    Life(count=5).open(0, [], tokens=15)  # as many pages as there are
    life = Life(count=5)
    life.open(0, [], tokens=7)
    life.commit(0, [1, 1, 1, 1])
    life.assert_unchanged_by(
        lambda: life.pages.open(2, tokens=9, prefix=[1] * 9, found=3),
        RuntimeError,
        "^cache row 2: 3 tokens to be shared, 0 are on offer$",
    )
    for row, tokens, kind, message in (
        (0, 1, RuntimeError, "cache row 0 is already open"),
        (1, 17, ValueError, "a sequence of 17 tokens exceeds the 16 of a cache row"),
        (1, 16, ValueError, "a sequence of 16 tokens exceeds the 5 pages of the cache"),
        (1, 9, CacheFullError, "3 pages needed, 2 free"),
    ):
        life.assert_unchanged_by(
            lambda row=row, tokens=tokens: life.pages.open(row, tokens=tokens),
            kind,
            f"^{message}$",
        )
    life.open(1, [], tokens=6)
    life.verify()
    with pytest.raises(CacheFullError, match="1 pages needed, 0 free"):
        life.open(2, [], tokens=1)


# check()


def swap_owner_page(pages: Pages) -> None:
    """Row 1 gets row 0's last page instead of its own."""
    own, other = pages._rows[1].pages, pages._rows[0].pages[2]
    pages._free.append(own[1])
    pages._references[own[1]] -= 1
    pages._references[other] += 1
    own[1] = other


CORRUPTIONS: dict[str, tuple[str, Callable[[Pages], object]]] = {
    "two_writers": ("rows 0 and 1 may both write to it", swap_owner_page),
    "offered_page_is_not_full": (
        "on offer, and row 0 may write to it",
        lambda pages: pages.offer(0, 6),
    ),
    "freed_in_use": (
        "is free and in use",
        lambda pages: pages._free.append(pages._rows[0].pages[0]),
    ),
    "count_too_high": (
        "3 references, 2 held",
        lambda pages: pages._references.__setitem__(pages._rows[0].pages[0], 3),
    ),
    "count_too_low": (
        "1 references, 2 held",
        lambda pages: pages._references.__setitem__(pages._rows[0].pages[0], 1),
    ),
    "leaked": ("pages leaked", lambda pages: pages._free.pop()),
    "freed_twice": ("pages leaked", lambda pages: pages._free.append(pages._free[0])),
    "offered_page_is_free": (
        "is free and in use",
        lambda pages: pages._shared_key.__setitem__(pages._free[0], (-1, (9, 9, 9))),
    ),
    "offer_without_page": ("index of shared prefixes", lambda pages: pages._shared.clear()),
    "offer_of_another_page": (
        "index of shared prefixes",
        lambda pages: pages._shared.update({(7, (9, 9, 9)): pages._rows[0].pages[0]}),
    ),
}


def broken_life() -> Life:
    """Two rows: a prompt, and one that shares its first page."""
    life = Life()
    prompt = [1, 2, 0, 1, 2, 2]
    life.open(0, prompt, tokens=7)
    life.commit(0, prompt[:5])
    life.open(1, prompt, tokens=6)
    life.commit(1, [1])
    life.verify()
    return life


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_detects(name: str) -> None:
    message, corrupt = CORRUPTIONS[name]
    life = broken_life()
    corrupt(life.pages)
    with pytest.raises(RuntimeError, match=message):
        life.pages.check({0: 5, 1: 4})


@pytest.mark.parametrize("committed", [-1, 10])
def test_check_detects_tokens_outside_the_pages(committed: int) -> None:
    with pytest.raises(RuntimeError, match=f"^row 0: {committed} committed of 9 allocated$"):
        broken_life().pages.check({0: committed, 1: 4})

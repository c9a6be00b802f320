"""The loop: rows that are refilled and wait, texts that end where they should, what is sampled,
what a drafter is told."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec import decode as decode_module
from specdec import timing
from specdec.arrivals import Intake
from specdec.drafters.host import HostDrafter
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.flight import Step
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.observation import Observation
from specdec.protocols import AcceptanceRule, StepContext, TreePolicy
from specdec.ranks import Ranks
from specdec.reasons import DraftError
from specdec.request import Capacity, Decoding, Request
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from tests.core.generated import (
    DEPTH,
    DEVICE,
    PAGE_SIZE,
    PLANS,
    TREES,
    ZOO_NEW,
    Pair,
    decode,
    drafter_of,
    family_prompts,
    generate,
)
from tests.decoding import decoder_of, outputs_of, requests_of
from tests.drafters.learning import Scripted, following
from tests.models.tiny import save, tiny

pytestmark = pytest.mark.usefixtures("load_once")


# --- rows


def test_refill_changes_nothing(zoo: Pair) -> None:
    prompts = [*zoo.prompts, *zoo.prompts[:2]]
    lengths = [9, 21, 4, 17, 22, 12, 8]
    expected = [
        output[:length]
        for output, length in zip([*zoo.outputs, *zoo.outputs[:2]], lengths, strict=True)
    ]
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["dynamic"]("top_k")
    run = decode(zoo.target, drafter, shape, prompts, lengths, batch_size=3)
    assert run.outputs == expected
    # A row did take another request over while its neighbours went on.
    first, *_, last = [step.requests for step in run.steps if len(step.requests) == 3]
    assert first == [0, 1, 2]
    assert set(last) != set(first)
    assert any(
        len(set(a.requests) & set(b.requests)) == 2 for a, b in itertools.pairwise(run.steps)
    )


@pytest.mark.parametrize("drafter", ["small_llama", "ngram"])
def test_rows_wait_for_pages_and_give_the_same(zoo: Pair, drafter: str) -> None:
    longest = -(-(max(map(len, zoo.prompts)) + ZOO_NEW) // PAGE_SIZE)
    drafting, shape = drafter_of(drafter, zoo.draft), TREES["dynamic"]("top_k")
    run = decode(
        zoo.target, drafting, shape, zoo.prompts, ZOO_NEW, batch_size=4, pages=longest * 5 // 2
    )
    assert run.outputs == zoo.outputs
    assert 1 < max(len(step.requests) for step in run.steps) < 4  # several ran, and some waited


def test_a_common_beginning_is_computed_once(zoo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = zoo.prompts[0], zoo.prompts[2]
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    prefilled: list[int] = []
    prefill = PagedLM.prefill

    def counting(lm: PagedLM, cache: Any, rows: Any, tokens: Any, **options: Any) -> None:
        prefilled.extend(map(len, tokens))
        prefill(lm, cache, rows, tokens, **options)

    monkeypatch.setattr(PagedLM, "prefill", counting)
    run = decode(zoo.target, NoDrafter(), None, [first, second], 4, batch_size=2)
    assert run.outputs == [zoo.outputs[0][:4], zoo.outputs[2][:4]]
    reused = shared // PAGE_SIZE * PAGE_SIZE
    assert sum(prefilled) == len(first) - 1 + len(second) - 1 - reused


def test_a_drafter_with_less_room_than_the_target(zoo: Any) -> None:
    class Narrow(SmallLlama):
        def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
            super().prepare(replace(capacity, pages=capacity.pages_of_a_row + 1), tree)

    drafter, shape = Narrow(path=str(zoo.draft)), Chain(budget=3)
    found = decode(zoo.target, drafter, shape, zoo.prompts[:3], 24, batch_size=3)
    plain = decode(zoo.target, NoDrafter(), None, zoo.prompts[:3], 24, batch_size=3)
    assert found.outputs == plain.outputs


class Crowded(Scripted):
    """A verifier whose caches hold two sequences at a time."""

    held = 0

    def start(self, sequences: Any, *given: Any) -> Intake:
        admitted = list(sequences)[: 2 - self.held]
        self.held += len(admitted)
        return super().start(admitted, *given)

    def finish(self, sequence: Decoding) -> None:
        self.held -= 1


def test_whoever_waits_takes_the_room_of_the_first_that_ends() -> None:
    decoder = decoder_of(Crowded(), NoDrafter(), rows=3)
    steps: list[Step] = []
    requests = [
        Request(id=i, prompt_ids=[3, 4], max_new_tokens=new)
        for i, new in enumerate([2, 12, 3, 1, 12])
    ]
    done = list(decoder.run(requests, on_step=steps.append))
    assert [sequence.request.id for sequence in done] == [0, 2, 3, 1, 4]
    running = [sorted(step.requests) for step in steps]
    assert running == [[0, 1]] * 2 + [[1, 2]] * 3 + [[1, 3]] + [[1, 4]] * 6 + [[4]] * 6


# --- what is counted


class Forked(HostDrafter):
    """Proposes the same three nodes on two levels, whatever the text."""

    def propose(self, sequence: Decoding, levels: int) -> Iterable[tuple[Sequence[int], float]]:
        return [([1, 2], 0.6), ([3], 0.3)]


def test_nodes_are_counted_without_the_root_and_depth_is_that_of_the_longest_path() -> None:
    decoder = decoder_of(Scripted(), Forked(), Static(widths=[2, 1]))
    steps: list[Step] = []
    (done,) = decoder.run(requests_of([[5, 6]], 8), on_step=steps.append)
    assert done.steps == len(steps)
    for step in steps:
        assert (step.nodes, step.depths) == ([3], [2])
    assert done.drafted == 3 * len(steps)
    assert [step.tokens[0] for step in steps] == done.accepted_lengths
    assert sum(done.accepted_lengths) == len(done.output_ids) == 8


class Slow(Scripted):
    """Reads prompts in 5 s, verifies in 2 s and commits in 3 s of a clock of its own."""

    clock = 0.0

    def start(self, *given: Any) -> Intake:
        self.clock += 5
        return super().start(*given)

    def verify(self, context: StepContext, tree: TokenTree) -> Any:
        self.clock += 2
        return super().verify(context, tree)

    def commit(self, context: StepContext, acceptance: Acceptance) -> None:
        self.clock += 3


def test_the_time_of_a_step_is_divided_among_its_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowDrafter(Forked):
        def draft(self, context: StepContext) -> TokenTree:
            slow.clock += 1
            return super().draft(context)

    class SlowRule(Greedy):
        def accept(self, *given: Any) -> Acceptance:
            slow.clock += 4
            return super().accept(*given)

    slow = Slow()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: slow.clock))
    figures_of = decode_module.figures_of

    def slowly(*given: Any) -> Any:
        slow.clock += 8
        return figures_of(*given)

    monkeypatch.setattr(decode_module, "figures_of", slowly)
    decoder = decoder_of(slow, SlowDrafter(), Static(widths=[2, 1]), SlowRule(), trees=99)
    steps: list[Step] = []
    for _ in decoder.run(requests_of([[5, 6]], 8), on_step=steps.append):
        slow.clock += 100  # is the caller's
    verbs = {"other": 8.0, "draft": 1.0, "verify": 2.0, "accept": 4.0, "commit": 3.0}
    assert [step.seconds for step in steps] == [{"prefill": 5.0, **verbs}] + [verbs] * (
        len(steps) - 1
    )
    assert len(steps) > 1
    counts = {"called": len(steps), "captured": 0, "replayed": 0}
    assert decoder.graphs.counts == dict.fromkeys(("verify", "accept", "commit"), counts)


# --- temperature 1

SAMPLED: list[tuple[AcceptanceRule, Children]] = [
    (RecursiveRejection(), "sample"),
    (RecursiveRejection(), "sample_with_replacement"),
    (TargetOnly(), "top_k"),
]


@pytest.mark.some(1)
@pytest.mark.parametrize("tree", ["chain", "dynamic"])
@pytest.mark.parametrize(
    ("rule", "children"), SAMPLED, ids=[f"{rule.name}-{children}" for rule, children in SAMPLED]
)
def test_a_seed_and_a_prompt_decide_what_is_sampled(
    zoo: Pair, rule: AcceptanceRule, children: Children, tree: str
) -> None:
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES[tree](children)

    def sample(*, seed: int, batch_size: int) -> list[list[int]]:
        return decode(
            zoo.target,
            drafter,
            shape,
            zoo.prompts[:3],
            8,
            rule=rule,
            temperature=1.0,
            seed=seed,
            batch_size=batch_size,
        ).outputs

    alone = sample(seed=1, batch_size=1)
    together = sample(seed=1, batch_size=3)
    assert sample(seed=1, batch_size=3) == together
    assert together == alone
    other = sample(seed=2, batch_size=3)
    assert all(a != b for a, b in zip(other, alone, strict=True))


def test_equal_prompts_are_sampled_apart(zoo: Pair) -> None:
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["chain"]("sample")
    run = decode(
        zoo.target,
        drafter,
        shape,
        [zoo.prompts[1]] * 3,
        12,
        rule=RecursiveRejection(),
        temperature=1.0,
        batch_size=3,
    )
    assert len({tuple(output) for output in run.outputs}) == 3


def test_sampled_children_at_temperature_zero(zoo: Any) -> None:
    """The drafter's own choice is certain then, and one child is left of each node."""
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["static"]("sample")
    found = decode(zoo.target, drafter, shape, zoo.prompts[:2], 24)
    plain = decode(zoo.target, NoDrafter(), None, zoo.prompts[:2], 24)
    assert found.outputs == plain.outputs
    assert len(found.steps) < len(plain.steps)


# --- ends


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> tuple[PagedLM, Path, Any]:
    model = tiny(
        "llama", num_hidden_layers=2, tie_word_embeddings=False, max_position_embeddings=32
    )
    folder = save(model, tmp_path_factory.mktemp("short"))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    return load_model(str(folder), Placement(device=DEVICE)), folder, reference


@pytest.mark.some(3)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_a_sequence_ends_with_the_context(
    short_context: tuple[PagedLM, Path, Any], drafter: str, tree: str, batch_size: int
) -> None:
    target, folder, reference = short_context
    prompts = [*family_prompts(), family_prompts()[0] + [9] * 12]  # the last leaves room for one
    drafting, shape = drafter_of(drafter, folder), TREES[tree]("top_k")
    run = decode(target, drafting, shape, prompts, 100, batch_size=batch_size)
    assert {sequence.finish_reason for sequence in run.sequences} == {"context"}
    assert {len(sequence.tokens) for sequence in run.sequences} == {32}
    assert run.outputs == [generate(reference, prompt, 32 - len(prompt)) for prompt in prompts]


def test_a_prompt_must_leave_room_for_a_token() -> None:
    decoder = decoder_of(Scripted(max_context=8), NoDrafter())
    with pytest.raises(ValueError, match="request 0: a prompt of 8 tokens leaves no room"):
        decoder.submit(requests_of([[1] * 8], 1)[0])
    (done,) = decoder.run(requests_of([[1] * 7], 5))
    assert (len(done.output_ids), done.finish_reason) == (1, "context")


def test_a_request_may_come_before_those_that_wait() -> None:
    decoder = decoder_of(Scripted(), NoDrafter())
    for request in requests_of([[1], [2], [3]], 2):
        decoder.submit(request, first=request.id == 2)
    assert [done.request.id for done in decoder.run([])] == [2, 0, 1]


def test_the_next_step_is_queued_as_long_as_somebody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the one under way has landed, as on a GPU: five steps for the longer of two."""
    loop, queued = decoder_of(Scripted(), NoDrafter(), rows=2), []
    land = loop._land

    def landing(flight: Any) -> Any:
        queued.append(len(loop._flights))
        return land(flight)

    monkeypatch.setattr(loop, "_ahead", 1)
    monkeypatch.setattr(loop, "_land", landing)
    short, long = requests_of([[1], [2]], 5)
    done = loop.run([replace(short, max_new_tokens=2), long])
    outputs = {one.request.id: one.output_ids for one in done}
    assert outputs == {0: following(1, 2), 1: following(2, 5)}
    assert queued == [1, 1, 1, 1, 0]


def test_a_step_is_told_once_the_next_is_queued_and_before_what_ends_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also to whoever compares what ranks do."""
    target, queued, told, compared = Scripted(), 0, list[int](), []
    logits = target.logits

    def counted(context: StepContext, tree: TokenTree) -> Any:
        nonlocal queued
        queued += 1
        return logits(context, tree)

    monkeypatch.setattr(target, "logits", counted)
    monkeypatch.setattr(Ranks, "landed", lambda ranks, sequences: compared.append(len(sequences)))
    run = decoder_of(target, NoDrafter()).run(
        requests_of([[1], [2]], 3), on_step=lambda step: told.append(queued)
    )
    assert [(len(told), len(compared)) for _ in run] == [(3, 3), (6, 6)]
    assert told == [2, 3, 3, 5, 6, 6]


def test_a_stop_token_cuts_an_accepted_path_short(
    short_context: tuple[PagedLM, Path, Any],
) -> None:
    target, folder, reference = short_context
    prompt = family_prompts()[3]
    output = generate(reference, prompt, DEPTH + 1)
    place = next(i for i in range(1, DEPTH) if output[i] not in output[:i])
    drafter, shape = drafter_of("small_llama", folder), TREES["chain"]("top_k")
    run = decode(target, drafter, shape, [prompt], 20, stop=[output[place]])
    step = run.steps[0]  # on a GPU the next one is under way when this one lands
    assert step.accepted == [DEPTH]  # all of it was right
    assert step.tokens == [place + 1]
    assert run.outputs == [output[: place + 1]]
    assert run.sequences[0].finish_reason == "stop"


def test_the_length_limit_cuts_an_accepted_path_short(
    short_context: tuple[PagedLM, Path, Any],
) -> None:
    target, folder, reference = short_context
    prompt = family_prompts()[3]
    drafter, shape = drafter_of("small_llama", folder), TREES["chain"]("top_k")
    run = decode(target, drafter, shape, [prompt], DEPTH - 1)
    assert [step.accepted for step in run.steps] == [[DEPTH]]
    assert run.outputs == [generate(reference, prompt, DEPTH - 1)]
    assert run.sequences[0].finish_reason == "length"


# --- what a drafter is told


class Told(NGram):
    """Notes what its guesses came to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kept: dict[int, list[int]] = {}

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        for i, sequence in enumerate(context.sequences):
            assert acceptance.path.device.type == "cpu"
            tokens = self.kept.setdefault(sequence.request.id, list(sequence.tokens))
            assert tokens == sequence.tokens  # those of the draft
            tree, length = self.drafted, int(acceptance.length[i])
            path = acceptance.path[i, 1:length]
            tokens += [*tree.tokens[i, path].tolist(), int(acceptance.next_token[i])]

    def draft(self, context: StepContext) -> TokenTree:
        self.drafted = super().draft(context)
        return self.drafted


def test_a_drafter_on_the_host_is_told_what_was_kept(zoo: Any) -> None:
    drafter, shape = Told(), Static(widths=[2, 1, 1])
    outputs = decode(zoo.target, drafter, shape, zoo.prompts[:3], 24, batch_size=2).outputs
    for i, output in enumerate(outputs):
        told = drafter.kept[i][len(zoo.prompts[i]) :]
        assert told[: len(output)] == output


def test_a_drafter_on_the_host_is_given_the_last_tokens_of_another_device() -> None:
    """The tensors of the batch, which are not read, are on one without memory."""
    decoder = decoder_of(Scripted(), Told(), Static(widths=[2, 1]), rows=2)
    decoder.device = torch.device("meta")
    prompts = [[5, 6], [3, 9, 4]]
    assert outputs_of(decoder, prompts, 12) == [following(ids[-1], 12) for ids in prompts]


def test_a_drafter_that_fails_on_one_sequence_is_named_with_that_one() -> None:
    class Failing(HostDrafter):
        def propose(
            self, sequence: Decoding, levels: int
        ) -> Iterable[tuple[Sequence[int], float]]:
            if sequence.request.id == 1:
                raise IndexError("nothing there")
            return []

    decoder = decoder_of(Scripted(), Failing(), Chain(budget=2), rows=3)
    with pytest.raises(DraftError, match="Failing failed on request 1: IndexError: nothing"):
        list(decoder.run(requests_of([[5], [6], [7]], 3)))

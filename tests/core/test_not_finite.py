"""Numbers that are none: a run stops where they would become text, and nowhere else."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from specdec.drafters.growth import Expand, Frontier, GrowingDrafter
from specdec.drafters.host import HostDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.lab.files import to_json
from specdec.lab.records import RecordFile
from specdec.lab.runs import RunFolder
from specdec.observation import Observation
from specdec.protocols import AcceptanceRule, StepContext
from specdec.reasons import DraftError, LogitsError
from specdec.request import Decoding
from specdec.tree import TokenTree
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.traversal import Traversal
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import FakeVerifier, decoder_of, outputs_of, requests_of
from tests.running import QUICK, lines, summary_of
from tests.verifier.laws import RULES

VOCAB = 12


class Counting(FakeVerifier):
    """A target that counts up, and whose logits after one token are none."""

    def __init__(self, bad: int, value: float, *, whole: bool = False) -> None:
        super().__init__(max_context=64)
        self.table = torch.full((VOCAB, VOCAB), -9.0)
        self.table[torch.arange(VOCAB), (torch.arange(VOCAB) + 1) % VOCAB] = 9.0
        self.table[bad, slice(None) if whole else 3] = value

    def logits(self, context: StepContext, tree: TokenTree) -> Tensor:
        return self.table[tree.tokens]


class Branches(HostDrafter):
    """The next tokens, and a branch to a token that does not follow."""

    def propose(self, sequence: Decoding, levels: int) -> Iterator[tuple[list[int], float]]:
        last = sequence.tokens[-1]
        yield [(last + i + 1) % VOCAB for i in range(levels)], 2.0
        yield [7], 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("value", "whole"), [(math.nan, False), (math.inf, False), (math.nan, True), (-math.inf, True)]
)
def test_a_run_stops_at_the_step_whose_path_has_them(
    value: float, whole: bool, temperature: float
) -> None:
    decoder = decoder_of(
        Counting(7, value, whole=whole),
        Branches(),
        Static(widths=[2, 1]),
        temperature=temperature,
        max_tokens=40,
    )
    run = decoder.run(requests_of([[8], [1], [8]], 8))
    assert next(run).output_ids == [9, 10, 11, 0, 1, 2, 3, 4]
    with pytest.raises(LogitsError) as stop:  # at three tokens a step, 7 is the root of the third
        next(run)
    assert stop.value.requests == [1]
    assert stop.value.reason == "step 3"


def test_any_row_of_a_batch_may_be_the_one() -> None:
    for prompts in ([[7], [1]], [[1], [7]]):
        decoder = decoder_of(Counting(7, math.nan), NoDrafter(), rows=2)
        with pytest.raises(LogitsError) as stop:
            outputs_of(decoder, prompts, 4)
        assert stop.value.requests == [prompts.index([7])]
        assert stop.value.reason == "step 1"


def test_a_branch_that_is_not_taken_may_have_them() -> None:
    decoder = decoder_of(Counting(7, math.nan), Branches(), Static(widths=[2, 1]), max_tokens=40)
    assert outputs_of(decoder, [[8]], 6) == [[9, 10, 11, 0, 1, 2]]


def test_tokens_may_be_masked_by_minus_infinity() -> None:
    decoder = decoder_of(Counting(9, -math.inf), Branches(), Chain(budget=2), max_tokens=40)
    assert outputs_of(decoder, [[8]], 4) == [[9, 10, 11, 0]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_every_rule_ends(rule: AcceptanceRule, value: float) -> None:
    target = Counting(7, value)
    target.table[:] = value
    decoder = decoder_of(target, Drawing(), Chain(budget=2, children="sample"), rule)
    decoder.sampling = decoder_of(target, Drawing(), temperature=1.0).sampling
    with pytest.raises(LogitsError):
        outputs_of(decoder, [[3]], 4)


class Drawing(GrowingDrafter):
    """Any token is as likely as any other; after one of them nothing is known."""

    bad = -1

    def begin(self, context: StepContext) -> Expand:
        def expand(frontier: Frontier) -> tuple[Tensor, Tensor]:
            batch, nodes = frontier.tokens.shape
            ids = torch.arange(VOCAB).expand(batch, nodes, VOCAB)
            probs = torch.full(ids.shape, 1 / VOCAB)
            return ids, probs.masked_fill((frontier.tokens == self.bad)[..., None], math.nan)

        return expand


@pytest.mark.parametrize("rule", [RecursiveRejection(), Traversal()], ids=lambda rule: rule.name)
def test_probabilities_of_a_draft_that_are_none_are_its_failure(rule: AcceptanceRule) -> None:
    drafter = Drawing(depth=1)
    drafter.bad = 2
    tree = Chain(budget=1, children="sample")
    target = Counting(7, 0.0)
    decoder = decoder_of(target, drafter, tree, rule, temperature=0.5, max_tokens=40)
    with pytest.raises(DraftError, match="its probabilities are NaN") as failure:
        outputs_of(decoder, [[8]], 10)
    assert failure.value.requests == [0]


# --- the command


def test_the_command_names_prompt_and_step_and_keeps_what_is_finished(
    specdec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = TreeVerifier.verify

    def broken(
        self: TreeVerifier, context: StepContext, tree: TokenTree
    ) -> tuple[Tensor, Observation]:
        logits, seen = verify(self, context, tree)
        for row, sequence in enumerate(context.sequences):
            if len(sequence.tokens) - len(sequence.request.prompt_ids) >= 9:
                logits[row] = math.nan
        return logits, seen

    monkeypatch.setattr(TreeVerifier, "verify", broken)
    records = [{"id": f"a/{i}", "text": "Once upon a time"} for i in range(2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    words = ("drafter=ngram", "tree=chain", "tree.budget=1", f"prompts.path={tmp_path}/p.jsonl")
    words += ("kernels.graphs=false",)  # a graph would not call what is planted
    code, printed, error = specdec(
        *words, f"out={tmp_path}/o", "baseline=false", *QUICK, "max_new_tokens=30"
    )
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: target.path=zoo:target: prompt a/0, step ")
    assert "NaN or infinite logits in float32; choose another dtype" in error
    assert "Traceback" not in printed
    assert summary_of(tmp_path / "o")["interrupted"]
    assert "NaN" not in (tmp_path / "o/summary.json").read_text()


# --- JSON


def test_json_has_no_nan(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, (math.inf, "NaN")], "b": {"c": -math.inf}, "d": None}
    expected = {"a": [1.5, None, [None, "NaN"]], "b": {"c": None}, "d": None}
    assert json.loads(to_json(value)) == expected
    file = RecordFile(tmp_path / "r.jsonl", TypeAdapter(dict))
    file.append(value)
    file.close()
    file.read()
    file.rewrite([value, *file.records])
    assert lines(tmp_path / "r.jsonl") == [expected, expected]
    RunFolder(tmp_path, config={}, resume=False).write_summary(value)
    assert summary_of(tmp_path) == expected

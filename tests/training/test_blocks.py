"""Blocks at several anchors at once are what each is alone, restated from the tokens before it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.heads.block import BlockConfig, BlockHead
from specdec.heads.formats import load_head
from specdec.training import blocks
from specdec.training.blocks import anchors_of, drafted
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.dspark import DSpark
from specdec.training.methods.peagle import PEagle
from tests.heads import oracle
from tests.training.small import VOCAB, WIDTH, filled, surroundings, target
from tests.training.test_methods import seen_of

SLOTS, BLOCK = 9, 4
FORMS: dict[str, dict[str, Any]] = {
    "both ways": {},
    "causal": {"causal": (True, True)},
    "windows": {"causal": (True, False), "windows": (5, None), "scale": 1.5},
    "shifted": {"shifted": True, "windows": (4, 6)},
}


def head_of(**form: Any) -> BlockHead:
    made: Any = DFlash(block=BLOCK, layers=2).make(surroundings(target())).head
    head = BlockHead(replace(made.config, **form))
    head.load_state_dict(made.state_dict())
    return filled(head)


def facts_of(head: Any) -> oracle.Facts:
    config = head.config
    tensors = {name: value.double() for name, value in head.state_dict().items()}
    layer = config.layer
    return oracle.Facts(
        tensors=tensors,
        layers=("layers.0", "layers.1"),
        embedding=tensors["embed_tokens.weight"],
        output=tensors["lm_head.weight"],
        heads=(layer.num_attention_heads, layer.num_key_value_heads),
        eps=layer.rms_norm_eps,
        taps=config.taps,
        ids=torch.arange(VOCAB),
        block={
            "slots": config.block,
            "mask": tensors["mask_embedding"],
            "causal": config.causal,
            "windows": config.windows,
            "scale": config.scale,
        }
        if isinstance(config, BlockConfig)
        else {},
    )


def inputs(head: BlockHead) -> tuple[Tensor, Tensor]:
    """States of tokens 0 .. SLOTS - 1 of two sequences, and all tokens."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, SLOTS, len(head.config.taps) * WIDTH, generator=generator)
    return states, torch.randint(VOCAB, (2, SLOTS + 1), generator=generator)


def worst(head: BlockHead) -> float:
    """How far blocks at many places are from blocks alone, as a share of the largest number."""
    states, tokens = inputs(head)
    anchors = torch.tensor([[0, 3, 4, 8], [1, 2, 7, 5]])
    found, facts, off = drafted(head, states, tokens[:, 1:], anchors), facts_of(head), 0.0
    first = 0 if head.config.shifted else 1
    for row in range(2):
        each = states[row].split(WIDTH, dim=-1)
        for place, anchor in enumerate(anchors[row].tolist()):
            alone = oracle.block(facts, each, tokens[row, : anchor + 2].tolist())
            wanted = alone[first : first + head.config.levels]
            gap = (found[row, place] - wanted).abs().max() / wanted.abs().max()
            off = max(off, float(gap))
    return off


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_block_is_that_of_drafting_it_alone(form: str) -> None:
    assert worst(head_of(**FORMS[form])) < 1e-5


@torch.no_grad()
def test_a_block_that_sees_others_or_later_states_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, head = blocks.visible, head_of()

    def late(anchors: Tensor, *rest: Tensor, **how: Any) -> Tensor:
        return right(anchors + 1, *rest, **how)

    def others(anchors: Tensor, known: Tensor, *rest: Tensor, **how: Any) -> Tensor:
        seen = right(anchors, known, *rest, **how)
        seen[..., len(known) :] = True
        return seen

    for wrong in (late, others):
        monkeypatch.setattr(blocks, "visible", wrong)
        assert worst(head) > 1e-3


def test_anchors_are_spread_over_what_counts() -> None:
    mask = torch.zeros(3, 64, dtype=torch.bool)
    mask[0], mask[1, 20:36] = True, True
    tokens = torch.arange(3 * 66).view(3, 66)
    found = anchors_of(mask, tokens, 8)
    assert found[0].div(8, rounding_mode="floor").tolist() == list(range(8))
    assert (found[1] - 20).div(2, rounding_mode="floor").tolist() == list(range(8))
    assert (found[2] < 64).all()  # of none that counts
    assert found.equal(anchors_of(mask, tokens, 8))
    assert not found.equal(anchors_of(mask, tokens + 1, 8))
    assert not found.equal(anchors_of(mask, tokens, 8, salt=0.3))
    every = torch.cat([anchors_of(mask[:1], tokens[:1] + k, 8)[0] for k in range(400)])
    assert every.bincount(minlength=64).min() > 20  # of 50 in the mean


def test_all_slots_may_be_anchors() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    found = anchors_of(mask, torch.arange(20).view(2, 10), 8)
    assert found.tolist() == [list(range(8))] * 2


@torch.no_grad()
def test_a_level_is_judged_by_the_token_it_is_about() -> None:
    lm = target()
    trainee = DFlash(block=BLOCK, layers=1, anchors=3).make(surroundings(lm))
    filled(trainee.head)
    seen = seen_of(lm, trainee, rows=2)
    _, overlap = trainee.chains(seen, 5)
    facts = replace(facts_of(trainee.head), layers=("layers.0",))
    for row in range(2):
        states = seen.states[row].split(WIDTH, dim=-1)
        for slot in range(seen.mask.shape[1]):
            read = oracle.block(facts, states, seen.tokens[row, : slot + 2].tolist())[1:]
            for level in range(5):
                at = slot + level
                if level >= BLOCK - 1 or at >= seen.mask.shape[1]:
                    assert not overlap[level, row, slot]
                    continue
                drafts = (read[level] @ facts.output.T).softmax(-1)
                kept = torch.minimum(drafts, seen.logits[row, at].double().softmax(-1)).sum()
                assert float(overlap[level, row, slot]) == pytest.approx(float(kept), rel=1e-4)


@pytest.mark.parametrize("window", [None, BLOCK])
@torch.no_grad()
def test_what_is_written_drafts_the_same(window: int | None, tmp_path: Path) -> None:
    lm = target()
    method = DFlash(block=BLOCK, taps=[0, 1, "normal"], window=window)
    trainee = method.make(surroundings(lm))
    for parameter in trainee.head.parameters():
        if parameter.requires_grad:
            parameter.copy_((0.3 * torch.randn(parameter.shape)).bfloat16().float())
    trainee.save(tmp_path, "tiny")
    read: Any = load_head(str(tmp_path), lm, kinds=("dflash",))
    own = replace(trainee.head.config, layer=read.config.layer, output_bias=False)
    assert read.config == own
    assert read.config.windows == (window, window)
    states, tokens = inputs(trainee.head)
    anchors = torch.tensor([[0, 3], [5, 2]])
    ours, theirs = (drafted(head, states, tokens[:, 1:], anchors) for head in (trainee.head, read))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_what_corrects_a_level_is_the_token_of_the_text(markov: Any) -> None:
    """Drafts, and how sure the head is of them, whose loss has the overlap for its aim."""
    lm = target()
    method = DSpark(block=BLOCK, layers=1, anchors=20, rank=4, markov=markov)
    trainee = method.make(surroundings(lm))
    filled(trainee.head)
    seen = seen_of(lm, trainee, rows=2)
    slots = seen.mask.shape[1]
    _, overlap = trainee.chains(seen, BLOCK)
    facts = replace(facts_of(trainee.head), layers=("layers.0",), flags=frozenset({"shifted"}))
    w, losses = facts.tensors, [[[] for _ in range(BLOCK)] for _ in range(2)]
    for row in range(2):
        states, text = seen.states[row].split(WIDTH, dim=-1), seen.tokens[row].tolist()
        for slot in range(slots):
            read = oracle.block(facts, states, text[: slot + 2])
            for level in range(min(BLOCK, slots - slot)):
                path = text[slot + 2 : slot + 2 + level]
                drafts = oracle.dspark(facts, states, text[: slot + 2], path).softmax(-1)
                wanted = seen.logits[row, slot + level].double().softmax(-1)
                kept = float(torch.minimum(drafts, wanted).sum())
                assert float(overlap[level, row, slot]) == pytest.approx(kept, rel=1e-4)
                inputs = [read[level], w["markov_head.markov_w1.weight"][text[slot + 1 + level]]]
                logit = w["confidence_head.proj.weight"][0] @ torch.cat(inputs)
                sure = float((logit + w["confidence_head.proj.bias"][0]).sigmoid())
                off = -kept * math.log(sure) - (1 - kept) * math.log(1 - sure)
                losses[row][level].append(off)
    figures = trainee.lesson(seen).figures  # of anchors at all slots
    for level in range(BLOCK):
        mean = sum(sum(row[level]) / len(row[level]) for row in losses) / 2
        assert float(figures[f"confidence/depth_{level + 1}"]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("markov", ["vanilla", "rnn"])
@torch.no_grad()
def test_dspark_is_read_again_as_specforge_has_it(markov: Any, tmp_path: Path) -> None:
    lm = target()
    trainee = DSpark(block=BLOCK, rank=4, markov=markov).make(surroundings(lm))
    for parameter in trainee.head.parameters():
        if parameter.requires_grad:
            parameter.copy_((0.3 * torch.randn(parameter.shape)).bfloat16().float())
    trainee.save(tmp_path, "tiny")
    read: Any = load_head(str(tmp_path), lm, kinds=("dspark",))
    assert read.description.startswith("DSpark of SpecForge: 2 layers")
    assert read.config == replace(trainee.head.config, layer=read.config.layer, output_bias=False)
    states, tokens = inputs(trainee.head)
    given = states, tokens[:, 1:], torch.tensor([[0, 3], [5, 2]])
    ours, theirs = (blocks.corrected(head, *given) for head in (trainee.head, read))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("wrong", "window"), [(False, None), (False, BLOCK), (True, None)])
@torch.no_grad()
def test_levels_of_one_pass_are_those_of_a_draft(
    wrong: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = target()
    method = PEagle(steps=BLOCK, anchors=20, taps=[0, 1, "normal"], window=window)
    trainee = method.make(surroundings(lm))
    head = filled(trainee.head)
    if wrong:  # masked pairs see a pair more than there is
        right = blocks.visible
        monkeypatch.setattr(
            blocks, "visible", lambda at, *rest, **how: right(at + 1, *rest, **how)
        )
    seen = seen_of(lm, trainee, rows=2)
    slots = seen.mask.shape[1]
    _, overlap = trainee.chains(seen, BLOCK)
    facts = replace(facts_of(head), flags=frozenset({"fc_norm"}), window=window)
    facts = replace(facts, block={"mask": head.config.mask})
    off = 0.0
    for row in range(2):
        states, text = seen.states[row].split(WIDTH, dim=-1), seen.tokens[row].tolist()
        for slot in range(slots):
            for level in range(min(BLOCK, slots - slot)):
                path = text[slot + 2 : slot + 2 + level]
                drafts = oracle.peagle(facts, states, text[: slot + 2], path).softmax(-1)
                wanted = seen.logits[row, slot + level].double().softmax(-1)
                kept = float(torch.minimum(drafts, wanted).sum())
                off = max(off, abs(float(overlap[level, row, slot]) - kept))
    assert (off > 1e-3) if wrong else (off < 1e-5)
    figures = trainee.lesson(seen).figures  # of anchors at all slots
    for level in range(BLOCK):
        mean = float(overlap[level, :, : slots - level].mean())
        assert float(figures[f"overlap/depth_{level + 1}"]) == pytest.approx(mean, rel=1e-4)

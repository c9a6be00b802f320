"""Every method learns, is measured by what it would draft, and is written as drafters read it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdec.drafters import dflash, dspark, eagle, medusa, mtp
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.heads.formats import load_head
from specdec.models.paged import PagedLM
from specdec.protocols import Drafter
from specdec.training.batches import Batch
from specdec.training.measure import look
from specdec.training.methods import small_llama
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.dspark import DSpark
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.methods.early_exit import EarlyExit
from specdec.training.methods.medusa import Medusa
from specdec.training.methods.mtp import MTP
from specdec.training.methods.peagle import PEagle
from specdec.training.methods.small_llama import SmallLlama
from specdec.training.optimise import Optimisers
from specdec.training.teacher import Teacher, plain
from tests.decoding import decoder_of, requests_of
from tests.tiny import tiny_llama
from tests.training.methods import HEADS, METHODS, SLOTS, made, seen_of
from tests.training.small import VOCAB, WIDTH, course, filled, surroundings, target

STEPS = 100
ALL: dict[str, Any] = METHODS | {"eagle3": lambda **rates: Eagle3(steps=3, **rates)}
DRAFTERS: dict[str, Any] = {
    "dflash": dflash.DFlash,
    "dspark": dspark.DSpark,
    "eagle": eagle.Eagle1,
    "eagle3": eagle.Eagle3,
    "medusa": medusa.Medusa,
    "mtp": mtp.MTP,
    "peagle": eagle.PEagle,
}
LEARNT = 8  # tokens


@pytest.fixture(autouse=True)
def tiny_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft of one layer instead of that of the zoo."""

    class Models:
        def __init__(self, placement: Any) -> None:
            pass

        def load(self, path: str, **options: Any) -> PagedLM:
            return PagedLM(tiny_llama(9, 1, VOCAB))

    monkeypatch.setattr(small_llama, "Models", Models)


def text_by(lm: PagedLM, drafter: Drafter, new: int = LEARNT) -> tuple[int, list[int]]:
    """Steps, and tokens, of a text decoded with chains of three nodes."""
    decoder = decoder_of(lm, drafter, Chain(budget=3 * (not isinstance(drafter, NoDrafter))))
    (sequence,) = decoder.run(requests_of([[1, 5, 9]], new))
    return len(sequence.accepted_lengths), sequence.tokens


@pytest.mark.parametrize("name", METHODS)
def test_one_sequence_is_learnt_by_heart(name: str) -> None:
    lm = target()
    method, trainee = made(
        name, lm, warm_up=5, rate=1e-2, matrix_rate=2e-2, weight_decay=0.0, steady=0.3
    )
    seen = seen_of(lm, trainee)
    optimisers = Optimisers(trainee, method)
    first = trainee.lesson(seen)
    for step in range(STEPS):
        lesson = trainee.lesson(seen)
        lesson.loss.backward()
        optimisers.step(step / STEPS, step)
    last = trainee.lesson(seen)
    assert last.loss.item() < 0.1 * first.loss.item() + 0.02
    depth = 1 if name == "eagle1" else 3
    agrees, overlap = trainee.chains(seen, depth)
    assert agrees[:, 0, : SLOTS - 2].float().mean() > 0.9
    assert overlap[:, 0, : SLOTS - 2].mean() > 0.8


@pytest.mark.some(2)
@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_learnt_by_heart_is_accepted_whole(name: str, tmp_path: Path) -> None:
    """One text of the target's own, from its training over files to decoding."""
    lm = target()
    _, text = text_by(lm, NoDrafter(), LEARNT + 4)  # drafts of the last step go beyond
    method = ALL[name](warm_up=5, rate=1e-2, matrix_rate=2e-2, weight_decay=0.0, steady=0.3)
    if hasattr(method, "anchors"):  # every slot, every time
        method = replace(method, anchors=len(text) - 2)
    trainee = method.make(surroundings(lm))
    tokens = torch.tensor([text])
    batch = Batch(tokens=tokens, mask=torch.ones(1, tokens.shape[1] - 2, dtype=torch.bool))
    with plain(lm.model) as model:
        seen = look(Teacher(model, trainee.taps), batch)
    trainee.save(tmp_path / "fresh", "tiny")
    optimisers = Optimisers(trainee, method)
    for step in range(3 * STEPS):
        loss = trainee.lesson(seen).loss
        if loss.item() < 0.003:
            break
        loss.backward()
        optimisers.step(step / (3 * STEPS), step)
    trainee.save(tmp_path / "learnt", "tiny")
    steps = {}
    for folder in ("fresh", "learnt"):
        steps[folder], found = text_by(lm, DRAFTERS[name](path=str(tmp_path / folder)))
        assert found == text[: len(found)]
    assert steps["learnt"] == LEARNT // 4 < steps["fresh"]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    lm = target()
    with plain(lm.model) as model:
        method = METHODS[name]()
        method.check(lm)
        one = course(method, lm, model, tmp_path, tokens=48)
        one.run()
        before = [p.detach().clone() for p in one.trainee.module.parameters()]
        with torch.no_grad():
            for parameter in one.trainee.module.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        one.resume()
    for now, then in zip(one.trainee.module.parameters(), before, strict=True):
        assert torch.equal(now, then)


def overlap_of(drafted: Tensor, wanted: Tensor) -> Tensor:
    return torch.minimum(drafted.softmax(-1), wanted.softmax(-1)).sum(-1)


@torch.no_grad()
def test_a_medusa_head_is_about_the_token_at_its_distance() -> None:
    lm = target()
    _, trainee = made("medusa", lm)
    filled(trainee.heads)
    seen = seen_of(lm, trainee, rows=2)
    agrees, overlap = trainee.chains(seen, 5)
    with plain(lm.model) as model:
        out = model(input_ids=seen.tokens, output_hidden_states=True)
    for slot in range(SLOTS):
        drafted = trainee.heads.logits(out.hidden_states[-1][:, slot])  # [B, heads, V]
        for head in range(3):
            place = slot + 1 + head  # the token before the one that is drafted
            if slot > SLOTS - 3:
                assert not overlap[head, :, slot].any()
                continue
            wanted = out.logits[:, place]
            expected = overlap_of(drafted[:, head], wanted)
            torch.testing.assert_close(overlap[head, :, slot], expected, rtol=1e-4, atol=1e-5)
            same = drafted[:, head].argmax(-1) == wanted.argmax(-1)
            assert agrees[head, :, slot].bool().equal(same)
    assert not overlap[3:].any()  # beyond its heads
    # Every head reads the same state; its loss is about its own token.
    figures = trainee.lesson(seen).figures
    for head in range(3):
        kept = overlap[head, :, : SLOTS - 2].mean()
        assert figures[f"overlap/depth_{head + 1}"].item() == pytest.approx(kept.item(), rel=1e-4)


@torch.no_grad()
def test_fresh_medusa_heads_say_what_the_target_says() -> None:
    lm = target()
    for tied in (True, False):
        trainee = Medusa(heads=2, tied=tied).make(surroundings(lm))
        state = torch.randn(3, WIDTH)
        for head in range(2):
            torch.testing.assert_close(
                trainee.heads.logits(state)[:, head], lm.model.lm_head(state)
            )


@torch.no_grad()
def test_a_small_model_is_judged_after_the_same_tokens() -> None:
    lm = target()
    _, trainee = made("small_llama", lm)
    seen = seen_of(lm, trainee, rows=2)
    _, overlap = trainee.chains(seen, 3)
    with plain(lm.model) as model:
        wanted = model(input_ids=seen.tokens).logits
    expected = overlap_of(trainee.module(input_ids=seen.tokens).logits, wanted)[:, 1:-1]
    for depth in range(3):
        torch.testing.assert_close(
            overlap[depth, :, : SLOTS - depth], expected[:, depth:], rtol=1e-4, atol=1e-5
        )
        assert not overlap[depth, :, SLOTS - depth :].any()


@torch.no_grad()
def test_an_exit_is_judged_by_the_target_that_it_is_part_of() -> None:
    lm = target()
    _, trainee = made("early_exit", lm)
    seen = seen_of(lm, trainee, rows=2)
    model = trainee.module
    out = model(input_ids=seen.tokens, output_hidden_states=True)
    early = model.lm_head(model.model.norm(out.hidden_states[1]))
    _, overlap = trainee.chains(seen, 1)
    expected = overlap_of(early, out.logits)[:, 1:-1]
    torch.testing.assert_close(overlap[0], expected, rtol=1e-4, atol=1e-5)
    nats = torch.nn.functional.cross_entropy(
        out.logits[:, 1:-1].flatten(0, 1), seen.labels.flatten(), reduction="sum"
    )
    assert trainee.nats(seen).item() == pytest.approx(nats.item(), rel=1e-5)
    figures = trainee.lesson(seen).figures
    assert figures["nats"].item() == pytest.approx(nats.item() / (2 * SLOTS), rel=1e-5)


@torch.no_grad()
def test_eagle1_learns_the_next_state() -> None:
    lm = target()
    _, trainee = made("eagle1", lm)
    seen = seen_of(lm, trainee)
    found = trainee.lesson(seen)
    with plain(lm.model) as model:
        states = model(input_ids=seen.tokens, output_hidden_states=True).hidden_states[-1]
    from specdec.training.test_time import unroll

    (output,) = unroll(trainee.head, states[:, :SLOTS], seen.tokens[:, 1 : SLOTS + 1], 1)
    wanted = torch.nn.functional.smooth_l1_loss(output, states[:, 1 : SLOTS + 1])
    assert found.figures["states/depth_1"].item() == pytest.approx(wanted.item(), rel=1e-4)
    tokens = found.figures["loss/depth_1"]
    assert found.loss.item() == pytest.approx((wanted + 0.1 * tokens).item(), rel=1e-4)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_are_read_back(name: str, tmp_path: Path) -> None:
    lm = target()
    _, trainee = made(name, lm)
    for parameter in trainee.module.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape).bfloat16().float())
    trainee.save(tmp_path, "tiny")
    read: Any = load_head(str(tmp_path), lm, kinds=(name,))
    ours, theirs = dict(trainee.module.named_parameters()), dict(read.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value.float(), theirs[key].float()), key


@pytest.mark.parametrize("name", ["small_llama", "early_exit"])
@torch.no_grad()
def test_models_are_read_back(name: str, tmp_path: Path) -> None:
    lm = target()
    _, trainee = made(name, lm)
    trainee.save(tmp_path, "tiny")
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    for key, value in trainee.module.state_dict().items():
        assert torch.equal(value.bfloat16(), read.state_dict()[key]), key


@torch.no_grad()
def test_a_model_from_scratch_follows_from_the_seed() -> None:
    lm = target()
    fresh = [SmallLlama(from_scratch=True).make(surroundings(lm)).module for _ in range(2)]
    begun = SmallLlama().make(surroundings(lm)).module
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (*fresh, begun)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[2], tiny_llama(9, 1, VOCAB).model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Eagle(loss="l2"), r"^method\.loss=l2: must be one of .*eagle1$"),
        (lambda: Eagle(steps=0), r"^method\.steps=0: must be at least 1$"),
        (lambda: DFlash(block=1), r"^method\.block=1: must be at least 2"),
        (lambda: PEagle(anchors=0), r"^method\.anchors=0: must be at least 1$"),
        (lambda: DSpark(block=0), r"^method\.block=0: must be at least 1, or nothing"),
        (lambda: DSpark(rank=0), r"^method\.rank=0: must be at least 1$"),
        (lambda: DSpark(markov="lstm"), r"^method\.markov=lstm: must be one of vanilla, gated"),  # type: ignore[arg-type]
        (lambda: DFlash(window=7), r"^method\.window=7: must hold method\.block=8, or be null$"),
        (lambda: DFlash(loss="dspark"), r"^method\.loss=dspark: must be one of kl.* ce$"),
        (lambda: DFlash(anchors=0), r"^method\.anchors=0: must be at least 1$"),
        (
            lambda: DFlash(taps=[2]).check(target()),
            r"^method\.taps=\[2\]: files of DFlash .* use normal instead of 2$",
        ),
        (lambda: MTP(decay=1.5), r"^method\.decay=1\.5: must be above 0 and at most 1$"),
        (lambda: MTP(tap=3).check(target()), r"^method\.tap=\[3\]: 3 must be 0 to"),
        (lambda: Medusa(heads=0), r"^method\.heads=0: must be at least 1$"),
        (lambda: Medusa(decay=0.0), r"^method\.decay=0\.0: must be above 0"),
        (lambda: SmallLlama(path="zoo:none"), r"^method\.path=zoo:none: no such built-in model"),
        (lambda: EarlyExit(loss="tv"), r"^method\.loss=tv: must be one of kl, ce$"),
        (lambda: EarlyExit(weight=0.0), r"^method\.weight=0\.0: must be above 0$"),
        (lambda: EarlyExit(clip=0.0), r"^method\.clip=0\.0: must be above 0$"),
        (
            lambda: EarlyExit(exit_layer=2).check(target()),
            r"^method\.exit_layer=2: must be from 1 to 1, the target has 2 layers$",
        ),
        (lambda: Eagle(tap=3).check(target()), r"^method\.tap=\[3\]: 3 must be 0 to"),
    ],
)
def test_mistakes_are_told_in_one_line(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()

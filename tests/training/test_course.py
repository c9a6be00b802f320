"""The loop: it learns, goes on where it was, and keeps the best."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.training.batches import Batch
from specdec.training.course import Course
from specdec.training.measure import Length, look
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.optimise import Optimisers, scale_of
from specdec.training.teacher import Teacher, plain
from specdec.training.trainee import Rates
from tests.training.small import VOCAB, course, surroundings, target


def weights(one: Course) -> list[torch.Tensor]:
    return [p.detach().clone() for p in one.trainee.module.parameters() if p.requires_grad]


def timeless(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in point.items() if k != "seconds"} for point in curve]


@pytest.mark.parametrize(
    "method",
    [Eagle3(steps=2, warm_up=3), DFlash(block=4, layers=1, anchors=3, warm_up=3)],
    ids=["eagle3", "dflash"],
)
def test_a_resumed_training_is_the_same_bit_for_bit(method: Any, tmp_path: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    lm = target()
    with plain(lm.model) as model:
        whole = course(method, lm, model, folders[0], tokens=320)
        whole.run()

        def interrupt(point: dict[str, Any]) -> None:
            if point["steps"] == 10:
                raise KeyboardInterrupt

        first = course(method, lm, model, folders[1], tokens=320, told=interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.run()
        second = course(method, lm, model, folders[1], tokens=320)
        second.resume()
        second.run()
    assert first.progress.steps == 10
    assert whole.progress.steps == second.progress.steps == 20
    for one, other in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(one, other)
    assert timeless(whole.progress.curve) == timeless(second.progress.curve)
    heads = [(folder / "head" / "model.safetensors").read_bytes() for folder in folders]
    assert heads[0] == heads[1]


def test_other_settings_are_not_continued(tmp_path: Path) -> None:
    lm = target()
    with plain(lm.model) as model:
        one = course(Eagle3(steps=1), lm, model, tmp_path, tokens=32)
        one.run()
        one.settings["seed"] = 4
        with pytest.raises(ValueError, match=r"^seed=4: the training in .* has 3; leave it so"):
            one.resume()


def test_ids_of_tokens_are_kept_and_other_weights_refused(tmp_path: Path) -> None:
    lm = target()
    with plain(lm.model) as model:
        one = course(Eagle3(steps=1, draft_vocab=10), lm, model, tmp_path, tokens=32)
        one.run()
        names = one.trainee.module.names.clone()
        one.trainee.module.names.sub_(1)
        one.resume()
        assert one.trainee.module.names.equal(names)
        other = course(Eagle3(steps=1, draft_vocab=9), lm, model, tmp_path, tokens=32)
        with pytest.raises(ValueError, match=r"^resume: the training in .* has other weights"):
            other.resume()


@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "taps": [0]}])
def test_one_sequence_is_learnt_by_heart(settings: dict[str, Any]) -> None:
    lm = target()
    method = Eagle3(steps=3, warm_up=5, rate=1e-2, matrix_rate=2e-2, weight_decay=0.0, **settings)
    torch.manual_seed(1)
    tokens = torch.randperm(VOCAB)[:10][None]
    batch = Batch(tokens=tokens, mask=torch.ones(1, 8, dtype=torch.bool))
    trainee = method.make(surroundings(lm))
    optimisers = Optimisers(trainee, method)
    with plain(lm.model) as model:
        seen = look(Teacher(model, trainee.taps), batch)
    for step in range(100):
        lesson = trainee.lesson(seen)
        lesson.loss.backward()
        optimisers.step(step / 100, step)
    assert trainee.lesson(seen).loss.item() < 0.03
    agrees, overlap = trainee.chains(seen, 3)
    assert agrees[:, 0, :6].all()
    assert overlap[:, 0, :6].min() > 0.9
    assert not agrees[2, 0, 6:].any()  # chains beyond the end


def test_slots_without_a_chain_teach_nothing() -> None:
    lm = target()
    trainee = Eagle3(steps=3).make(surroundings(lm))
    tokens = torch.randint(VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 4] = False
    with plain(lm.model) as model:
        seen = look(Teacher(model, trainee.taps), Batch(tokens=tokens, mask=mask))
    figures = trainee.lesson(seen).figures
    _, overlap = trainee.chains(seen, 3)
    for step in range(3):
        slots = mask[:, step:]  # a chain of that depth ends at these
        kept = overlap[step, :, : 8 - step][slots].mean()
        assert figures[f"overlap/depth_{step + 1}"].item() == pytest.approx(kept.item(), rel=1e-4)


def test_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = target()
    scores = [1.0, 2.0, 1.5, 3.0, 2.5]
    with plain(lm.model) as model:
        one = course(Eagle3(steps=1), lm, model, tmp_path, tokens=256)

        def measured() -> dict[str, Length]:
            found = {"sampled": 2.0, "greedy_by_depth": [], "sampled_by_depth": []}
            return {"corpus": Length(greedy=scores.pop(0), **found)}

        monkeypatch.setattr(one, "_lengths", measured)
        kept: list[int] = []
        monkeypatch.setattr(
            one.trainee, "save", lambda folder, name: kept.append(one.progress.tokens)
        )
        one.run()
    assert kept == [0, 64, 192]
    assert one.progress.best["corpus/greedy"] == 3.0


def test_parameters_move_by_the_rate() -> None:
    lm = target()
    rates = {"rate": 1e-3, "warm_up": 0, "steady": 0.5, "clip": 1e9}
    moved = []
    for share in (0.0, 0.75, 1.0):
        method = Eagle3(steps=1, **rates)
        trainee = method.make(surroundings(lm))
        norm = trainee.head.norm.weight
        before = norm.detach().clone()
        for parameter in trainee.module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        Optimisers(trainee, method).step(share, 0)
        moved.append((before - norm).mean().item())
    assert moved == pytest.approx([1e-3, 0.5e-3, 0.02e-3], rel=5e-3)  # AdamW's first step


def test_gradients_are_clipped_together() -> None:
    method = Eagle3(steps=1, clip=0.5)
    trainee = method.make(surroundings(target()))
    optimisers = Optimisers(trainee, method)
    for parameter in optimisers.parameters:
        parameter.grad = torch.randn_like(parameter)
    optimisers.step(0.0, 0)
    first = {"momentum": 0.05, "exp_avg": 0.1}  # weight of a first gradient
    squares = sum(
        (state[name] / weight).square().sum()
        for optimiser, _ in optimisers.each
        for state in optimiser.state.values()
        for name, weight in first.items()
        if name in state
    )
    assert float(squares) ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_rates_rise_stay_and_fall() -> None:
    rates = Rates(rate=1.0, matrix_rate=1.0, warm_up=10, steady=0.6)
    assert scale_of(0.0, 0, rates) == pytest.approx(0.1)
    assert scale_of(0.3, 50, rates) == scale_of(0.59, 500, rates) == 1.0
    assert scale_of(0.8, 500, rates) == pytest.approx(0.5)
    assert scale_of(1.0, 500, rates) == pytest.approx(0.02)


def test_muon_is_that_of_torch() -> None:
    from specdec.training.muon import Muon

    torch.manual_seed(0)
    start = [torch.randn(12, 30), torch.randn(30, 12), torch.randn(16, 16)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    mine = Muon(ours, rate=0.1, weight_decay=0.05)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        mine.step()
        torchs.step()
    for x, one, other in zip(start, ours, theirs, strict=True):
        # It iterates in bfloat16, whose rounding is 2 ** -8.
        assert (one - other).norm() < 0.02 * (one - x).norm()


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    from specdec.training.checkpoint import load_state

    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"state.pt: cannot be continued, "):
        load_state(tmp_path)
    torch.save({"weights": {}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="is no checkpoint of a training"):
        load_state(tmp_path)

"""Every method learns, is measured by what it would draft, and is written as drafters read it."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.drafters import dflash, dspark, eagle, medusa, mtp
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.heads.formats import load_head
from specdec.models.load import zoo_path
from specdec.models.paged import PagedLM
from specdec.models.standin import Widening
from specdec.protocols import Drafter
from specdec.training.batches import Batch, Seen
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
from tests.models.standins import BASE, build
from tests.tiny import tiny_llama
from tests.training.small import VOCAB, WIDTH, course, filled, surroundings, target

SLOTS, STEPS = 8, 100
METHODS: dict[str, Any] = {
    "eagle": lambda **rates: Eagle(steps=3, **rates),
    "eagle1": lambda **rates: Eagle(loss="eagle1", steps=1, **rates),
    "medusa": lambda **rates: Medusa(heads=3, blocks=2, tied=False, **rates),
    "dflash": lambda **rates: DFlash(block=4, layers=1, anchors=3, **rates),
    "dspark": lambda **rates: DSpark(
        block=3, layers=1, anchors=3, rank=4, confidence=False, **rates
    ),
    "mtp": lambda **rates: MTP(**rates),
    "peagle": lambda **rates: PEagle(steps=3, layers=1, anchors=3, **rates),
    "small_llama": lambda **rates: SmallLlama(**rates),
    "early_exit": lambda **rates: EarlyExit(exit_layer=1, weight=1.0, **rates),
}


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
HEADS = ("dflash", "dspark", "eagle", "medusa", "mtp", "peagle")


@pytest.fixture(autouse=True)
def tiny_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft of one layer instead of that of the zoo."""

    class Models:
        def __init__(self, placement: Any) -> None:
            pass

        def load(self, path: str, **options: Any) -> PagedLM:
            return PagedLM(tiny_llama(9, 1, VOCAB))

    monkeypatch.setattr(small_llama, "Models", Models)


def made(name: str, lm: PagedLM, **rates: Any) -> Any:
    method = METHODS[name](**rates)
    method.check(lm)
    return method, method.make(surroundings(lm))


def text_by(lm: PagedLM, drafter: Drafter, new: int = LEARNT) -> tuple[int, list[int]]:
    """Steps, and tokens, of a text decoded with chains of three nodes."""
    decoder = decoder_of(lm, drafter, Chain(budget=3 * (not isinstance(drafter, NoDrafter))))
    (sequence,) = decoder.run(requests_of([[1, 5, 9]], new))
    return len(sequence.accepted_lengths), sequence.tokens


def seen_of(lm: PagedLM, trainee: Any, rows: int = 1) -> Seen:
    torch.manual_seed(1)
    tokens = torch.stack([torch.randperm(VOCAB)[: SLOTS + 2] for _ in range(rows)])
    batch = Batch(tokens=tokens, mask=torch.ones(rows, SLOTS, dtype=torch.bool))
    with plain(lm.model) as model:
        return look(None if trainee.is_target else Teacher(model, trainee.taps), batch)


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


@pytest.mark.parametrize("name", [*HEADS, "eagle1"])
def test_a_training_begins_with_a_head(name: str, tmp_path: Path) -> None:
    """What was written drafts again as it did, every weight learns, and the target stays."""
    lm = target()
    before = [parameter.clone() for parameter in lm.model.parameters()]
    method, first = made(name, lm)
    with torch.no_grad():
        for parameter in first.module.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.3 * torch.randn(parameter.shape)).bfloat16().float())
    first.save(tmp_path, "tiny")
    method = replace(method, path=str(tmp_path), rate=1e-2, matrix_rate=1e-2, warm_up=0)
    method.check(lm)
    second = method.make(surroundings(lm))
    seen = seen_of(lm, first)
    for one, other in zip(first.chains(seen, 2), second.chains(seen, 2), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)
    learns = {n: p.requires_grad for n, p in first.module.named_parameters()}
    assert learns == {n: p.requires_grad for n, p in second.module.named_parameters()}
    second.lesson(seen).loss.backward()
    Optimisers(second, method).step(0.0, 0)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True)
    )
    for one, other in zip(before, lm.model.parameters(), strict=True):
        assert torch.equal(one, other)
    second.save(tmp_path / "again", "tiny")
    written, again = (
        vars(load_head(str(folder), lm, kinds=(method.drafter,)).config)
        for folder in (tmp_path, tmp_path / "again")
    )
    for key, value in written.items():
        assert key == "layer" or again[key] == value, key


def test_what_a_head_was_lent_learns_as_its_own(tmp_path: Path) -> None:
    """The target's output head is left as it is where a head goes on with one of its own."""
    lm = target()
    before = lm.model.get_output_embeddings().weight.clone()
    Eagle3(tied=True).make(surroundings(lm)).save(tmp_path, "tiny")
    method = Eagle3(path=str(tmp_path), warm_up=0)
    method.check(lm)
    trainee = method.make(surroundings(lm))
    trainee.lesson(seen_of(lm, trainee)).loss.backward()
    Optimisers(trainee, method).step(0.0, 0)
    assert torch.equal(lm.model.get_output_embeddings().weight, before)
    assert not torch.equal(trainee.head.lm_head.weight, before)


def test_output_rows_of_named_tokens_stay_tied(tmp_path: Path) -> None:
    lm = target()
    method = Eagle3(tied=True, draft_vocab=10)
    around = surroundings(lm)
    around = replace(around, counts=around.counts.flip(0))  # the last ten, not the first
    first = method.make(around)
    first.save(tmp_path, "tiny")
    method = replace(method, path=str(tmp_path))
    method.check(lm)
    head = method.make(surroundings(lm)).head
    assert torch.equal(head.names, first.head.names)
    assert not head.lm_head.weight.requires_grad


def test_a_block_may_be_filled_with_the_targets_own_row(tmp_path: Path) -> None:
    """Published heads of DFlash hold no embedding of their mask token."""
    lm = target()
    method, trainee = made("dflash", lm)
    trainee.save(tmp_path, "tiny")
    (tmp_path / "mask_embedding.pt").unlink()
    method = replace(method, path=str(tmp_path))
    method.check(lm)
    trainee = method.make(surroundings(lm))
    row = lm.model.get_input_embeddings().weight[trainee.head.config.mask]
    assert torch.equal(trainee.head.blocks(torch.tensor([1]), 2)[0, 1], row)
    trainee.save(tmp_path / "again", "tiny")
    assert not load_head(str(tmp_path / "again"), lm, kinds=["dflash"]).config.own_mask


@pytest.mark.parametrize(("share", "refused"), [(0.002, False), (0.1, True)])
def test_an_embedding_of_ones_own_is_refused(share: float, refused: bool, tmp_path: Path) -> None:
    """A training takes the target's; files of other types hold it rounded."""
    lm = target()
    method = Eagle3(path=str(tmp_path))
    replace(method, path=None).make(surroundings(lm)).save(tmp_path, "tiny")
    weights = load_file(file := tmp_path / "model.safetensors")
    own = lm.model.get_input_embeddings().weight.detach().clone()
    own[5] *= 1 + share
    save_file({**weights, "embed_tokens.weight": own}, file)
    with pytest.raises(ValueError, match="an embedding of its own") if refused else nullcontext():
        method.check(lm)


def test_a_widened_head_is_refused(tmp_path: Path) -> None:
    """What the norms of one make up for has no place in its files."""
    small = AutoConfig.from_pretrained(zoo_path("target"))
    lm = PagedLM(build(BASE), standin=Widening(small=small, shape=BASE))
    with pytest.raises(ValueError, match=r"was widened for .*; train it for the model that"):
        Eagle3(path="zoo:eagle3").check(lm)


@pytest.mark.parametrize(
    ("written", "begun", "said"),
    [
        ("eagle", "mtp", r"is a head of kind eagle .* use method=eagle"),
        (
            "dflash",
            lambda **how: DFlash(block=5, layers=1, **how),
            r"its block is 4, .* make 5; ",
        ),
        ("dspark", lambda **how: DSpark(block=3, layers=1, rank=8, **how), r"its rank is 4, .* 8"),
        ("peagle", lambda **how: PEagle(layers=2, **how), r"1, .* 2; set method\.layers$"),
        (
            lambda **how: Eagle3(draft_vocab=10, **how),
            lambda **how: Eagle3(**how),
            r"its vocab_size is 10, .* make 24; set method\.draft_vocab$",
        ),
        (
            lambda **how: Eagle3(rope_theta=5.0, **how),
            lambda **how: Eagle3(**how),
            r"its rope_theta is 5\.0, .*; set method\.rope_theta$",
        ),
        (
            lambda **how: Eagle3(**how),
            lambda **how: Eagle3(tied=True, **how),
            r"has an output head of its own, .*; set method\.tied=false$",
        ),
        (
            lambda **how: Eagle3(taps=[0, 1], **how),
            lambda **how: Eagle3(taps=[1, 2], **how),
            r"its taps is \(0, 1\), .* \(1, 2\); set method\.taps$",
        ),
        (
            lambda **how: Eagle(tap=1, **how),
            lambda **how: Eagle(**how),
            r"its taps is \(1,\), .*; set method\.tap$",
        ),
        ("medusa", lambda **how: Medusa(heads=2, blocks=2, tied=False, **how), "its heads is 3"),
    ],
)
def test_a_head_of_another_shape_is_refused(
    written: Any, begun: Any, said: str, tmp_path: Path
) -> None:
    lm = target()
    write, read = (METHODS[one] if isinstance(one, str) else one for one in (written, begun))
    trainee = write().make(surroundings(lm))
    with torch.no_grad():
        for parameter in trainee.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    trainee.save(tmp_path, "tiny")
    with pytest.raises(ValueError, match=rf"^method\.path={tmp_path}:? .*{said}"):
        read(path=str(tmp_path)).check(lm)


def test_names_and_mask_are_those_of_the_head(tmp_path: Path) -> None:
    lm = target()
    around = surroundings(lm)
    other = replace(around, counts=around.counts.flip(0))
    for make in (
        lambda **how: Eagle3(draft_vocab=10, **how),
        METHODS["peagle"],
        METHODS["dflash"],
    ):
        first = make().make(around)
        first.save(tmp_path / "head", "tiny")
        second = make(path=str(tmp_path / "head")).make(other)
        fresh = make().make(other)
        for name in ("names", "mask"):
            found = [
                getattr(one.head, name, getattr(one.head.config, name, None))
                for one in (first, second, fresh)
            ]
            if found[0] is None:
                continue
            same = [torch.equal(torch.as_tensor(found[0]), torch.as_tensor(one)) for one in found]
            assert same == [True, True, False]


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

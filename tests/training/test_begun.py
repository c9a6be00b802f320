"""A training that begins with a head which is there."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from specdec.drafters.small_llama import SmallLlama as Draft
from specdec.heads.formats import load_head
from specdec.models.load import zoo_path
from specdec.models.paged import PagedLM
from specdec.models.standin import Widening
from specdec.training.methods.dflash import DFlash
from specdec.training.methods.dspark import DSpark
from specdec.training.methods.eagle import Eagle
from specdec.training.methods.eagle3 import Eagle3
from specdec.training.methods.medusa import Medusa
from specdec.training.methods.peagle import PEagle
from specdec.training.methods.small_llama import SmallLlama
from specdec.training.optimise import Optimisers
from tests.heads import made as heads
from tests.heads.mtp import mtp
from tests.models.standins import BASE, build
from tests.models.tiny import tiny
from tests.training.methods import HEADS, METHODS, made, seen_of
from tests.training.small import surroundings, target


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


def test_a_head_is_no_draft_model(tmp_path: Path) -> None:
    """It is named before anything is loaded; a model may hold a head beside its layers."""
    model = tiny("llama")
    write = {"eagle3": heads.eagle3, "eagle": heads.eagle, "medusa": heads.medusa, "mtp": mtp}
    for kind, written in write.items():
        written(tmp_path / kind, model)
        said = rf"^method\.path=.*{kind}: is a head of kind {kind} .* use method={kind}$"
        with pytest.raises(ValueError, match=said):
            SmallLlama(path=str(tmp_path / kind))
    with pytest.raises(ValueError, match=r"^drafter\.path=zoo:eagle3: .* use drafter=eagle3$"):
        Draft(path="zoo:eagle3").find()
    mtp(tmp_path / "whole", model, whole=True)
    for path in ("zoo:draft", "standin:llama_160m", "on/the-hub", str(tmp_path / "whole")):
        SmallLlama(path=path)


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
        ("peagle", lambda **how: PEagle(layers=2, **how), r"1, .* 2; set method\.layers=1$"),
        (
            lambda **how: Eagle3(draft_vocab=10, **how),
            lambda **how: Eagle3(**how),
            r"its vocab_size is 10, .* make 24; set method\.draft_vocab=10$",
        ),
        (
            lambda **how: Eagle3(rope_theta=5.0, **how),
            lambda **how: Eagle3(**how),
            r"its rope_theta is 5\.0, .*; set method\.rope_theta=5\.0$",
        ),
        (
            lambda **how: Eagle3(**how),
            lambda **how: Eagle3(tied=True, **how),
            r"has an output head of its own, .*; set method\.tied=false$",
        ),
        (
            lambda **how: Eagle3(taps=[0, 1], **how),
            lambda **how: Eagle3(taps=[1, 2], **how),
            r"its taps is \(0, 1\), .* \(1, 2\); set method\.taps=\[0,1\]$",
        ),
        (
            lambda **how: Eagle(tap=1, **how),
            lambda **how: Eagle(**how),
            r"its taps is \(1,\), .*; set method\.tap=1$",
        ),
        (
            lambda **how: Eagle3(window=9, **how),
            lambda **how: Eagle3(**how),
            r"its windows is \(9,\), .* make \(\); set method\.window=9$",
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

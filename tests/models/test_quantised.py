"""Weights in float8: the model that is decoded is transformers' own of the dequantised weights,
however it comes to them; what cannot be read is refused by name."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.static import Static
from specdec.kernels.choose import Kernels
from specdec.kernels.layout import Fp8Weight
from specdec.models import checkpoints
from specdec.models.fingerprint import fingerprint
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.models.quantised import Fp8Linear, Quantize, output_of
from specdec.protocols import Drafter, TreePolicy
from specdec.training.methods.causal import trained_copy
from tests.decoding import decoder_of, outputs_of
from tests.kernels.memory import DEVICE
from tests.models.fp8_files import (
    BLOCKED,
    FINEGRAINED,
    STORED,
    WEIGHTS,
    configure,
    group,
    peak_of,
    quantised,
    rounded,
    write,
)
from tests.models.tiny import (
    FLOAT32_ROUNDING,
    error,
    own_attention,
    paged_and_own,
    save,
    texts,
    tiny,
)

NEW = 12


def load(folder: Path, quantize: Quantize = "none", **placement: Any) -> PagedLM:
    path = str(folder)
    return load_model(path, Placement(**placement), setting="target.path", quantize=quantize)


def refusal_of(folder: Path, quantize: Quantize = "none") -> str:
    with pytest.raises(ValueError, match=r"target\.path=") as refusal:
        load(folder, quantize)
    message = str(refusal.value)
    assert message.startswith(f"target.path={folder}: ")
    assert "\n" not in message
    return message.removeprefix(f"target.path={folder}: ")


def meant_by(model: Any) -> Any:
    """Transformers' own model of the weights that `quantize=fp8` makes of these."""
    own = own_attention(model)
    for name, parameter in own.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = rounded(parameter.data)
    return own


def assert_computes(lm: PagedLM, own: Any) -> None:
    for ours, expected in paged_and_own(lm, own):
        assert error(ours, expected) < FLOAT32_ROUNDING


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 8}),
        ("mistral", {"sliding_window": 12}),
    ],
)
def test_logits_are_those_of_dequantised_weights(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(kind, **settings)
    lm = load(save(model, tmp_path), "fp8")
    assert lm.quantised == "fp8"
    assert not lm.notes
    assert lm._direct is not None
    own = meant_by(model)
    assert_computes(lm, own)
    assert all(isinstance(layer.qkv, Fp8Weight) for layer in lm._direct.layers)
    tokens = torch.tensor([texts()[0]])
    lm.model.set_attn_implementation("eager")  # the pass that checks a run
    assert error(lm.model(tokens).logits, own(tokens).logits.double()) < FLOAT32_ROUNDING
    plain = model(tokens).logits.double()
    assert error(own(tokens).logits, plain) > 100 * FLOAT32_ROUNDING  # it is another model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "exact"),
    [("rows", False), *product(("channel", "finegrained"), (False, True))],
)
def test_triton_kernels_read_them(stored: str, exact: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False, **BLOCKED)
    if stored == "rows":
        save(model, tmp_path)
        own = meant_by(model)
    else:
        own = own_attention(write(model, tmp_path, stored, head=True))
    kernels, device = Kernels(impl="triton", exact=exact), torch.device(DEVICE)
    lm = load(tmp_path, "fp8", kernels=kernels, device=device)
    assert lm._direct is not None
    assert_computes(lm, own.to(device))


DRAFTS: dict[str, tuple[Any, TreePolicy]] = {
    "none": (NoDrafter, Chain(budget=0)),
    "early_exit": (lambda: EarlyExit(exit_layer=1), Static(widths=[2, 1])),
    "small_llama": (None, Static(widths=[2, 2])),
}


@pytest.mark.parametrize("draft", DRAFTS)
def test_texts_are_those_of_generate(draft: str, tmp_path: Path) -> None:
    model = tiny("llama")
    own = meant_by(model)
    target = load(save(model, tmp_path / "target"), "fp8")
    make, tree = DRAFTS[draft]
    if make is None:
        small = save(tiny("llama", num_hidden_layers=1), tmp_path / "draft")
        drafter: Drafter = SmallLlama(path=str(small), quantize="fp8")
    else:
        drafter = make()
    prompts = [text[:7] for text in texts()]
    found = outputs_of(decoder_of(target, drafter, tree, rows=2, max_tokens=40), prompts, NEW)
    if make is None:
        assert drafter.own_model is not None
        assert drafter.own_model.quantised == "fp8"
    for prompt, output in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        expected = own.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert output == expected[0, len(prompt) :].tolist()


def test_scales_fit_bfloat16_and_weights_are_of_the_file_whatever_the_type(
    tmp_path: Path,
) -> None:
    folder = save(tiny("llama"), tmp_path)
    wide, narrow = load(folder, "fp8"), load(folder, "fp8", dtype=torch.bfloat16)
    for mine, theirs in zip(wide.model.modules(), narrow.model.modules(), strict=True):
        if isinstance(mine, Fp8Linear):
            assert isinstance(theirs, Fp8Linear)
            assert torch.equal(mine.values.view(torch.uint8), theirs.values.view(torch.uint8))
            exact = theirs.weight.dequantised(torch.bfloat16).double()
            assert torch.equal(exact, mine.weight.dequantised(torch.float64))
    assert narrow.dtype == torch.bfloat16
    assert fingerprint(wide) == fingerprint(narrow)
    assert fingerprint(wide) != fingerprint(load(folder))


# --- checkpoints of others


@pytest.mark.parametrize(
    ("stored", "again"), [*((stored, "none") for stored in STORED), ("channel", "fp8")]
)
def test_fp8_checkpoints_are_read(stored: str, again: Quantize, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False, **BLOCKED)
    head = stored in ("channel", "finegrained")
    meant = write(model, tmp_path, stored, head=head)
    lm = load(tmp_path, again)
    assert lm.quantised == "fp8"
    assert lm._direct is not None
    assert isinstance(lm._direct.head, Fp8Weight) == head
    assert torch.equal(output_of(lm.model), meant.lm_head.weight)
    assert lm._direct.layers[0].down.blocked == (STORED[stored][1] == "block")
    assert_computes(lm, own_attention(meant))
    said = "its weights are fp8 already, and stay as its files have them"
    assert lm.notes == [f"target.path={tmp_path}: {said}"] * (again == "fp8")


def test_an_output_head_in_float8_is_as_near_as_one_in_bfloat16(tmp_path: Path) -> None:
    """To float64: of a product with the weights that it stands for, in the type of the model; by
    the pass that decodes, and by the one that checks a run."""
    meant = write(
        tiny("llama", tie_word_embeddings=False, **BLOCKED), tmp_path, "block", head=True
    )
    head = meant.lm_head.weight.double()
    lm = load(tmp_path, dtype=torch.bfloat16)
    assert lm._direct is not None
    normal = torch.randn(1, 5, head.shape[1], generator=torch.Generator().manual_seed(0))
    normal = normal.bfloat16()
    expected = normal.double() @ head.T
    rounded_head = normal @ head.bfloat16().T
    for ours in (lm._direct.logits(normal, "all"), lm.model.lm_head(normal)):
        assert ours is not None
        assert error(ours, expected) <= error(rounded_head, expected)


def test_an_embedding_in_float8_is_dequantised_and_that_is_said(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True, **BLOCKED)
    meant = write(model, tmp_path, "channel")
    key = "model.embed_tokens.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    values, scales, of = quantised(tensors[key], "row")
    tensors[key], tensors[f"{key}_scale"] = values, scales
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    meant.model.embed_tokens.weight.data = of.float()
    lm = load(tmp_path)
    (note,) = lm.notes
    assert note.startswith(f"target.path={tmp_path}: {key} is dequantised from float8")
    assert_computes(lm, own_attention(meant))
    tensors |= {"lm_head.weight": values.clone(), "lm_head.weight_scale": scales.clone()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    message = refusal_of(tmp_path)
    assert message.startswith("lm_head.weight is in float8, and config.json ties it to the embed")


def test_transformers_reads_the_finegrained_file_alike(tmp_path: Path) -> None:
    """What is written by hand here is what others read; blocks that are cut they do not know."""
    model = tiny("llama", tie_word_embeddings=False, **BLOCKED | {"hidden_size": 256})
    meant = write(model, tmp_path, "finegrained")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, mine), other in zip(meant.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_what_cannot_be_joined_goes_the_general_way_and_says_so(tmp_path: Path) -> None:
    model = tiny("llama", **BLOCKED | {"intermediate_size": 200})
    meant = write(model, tmp_path, "finegrained")
    lm = load(tmp_path)
    assert lm._direct is None
    (note,) = lm.notes
    assert "which is slow" in note
    assert "\n" not in note
    assert_computes(lm, own_attention(meant))


def test_layers_that_a_checkpoint_leaves_alone_stay_plain(tmp_path: Path) -> None:
    model = tiny("qwen3", head_dim=8, tie_word_embeddings=False)
    meant = write(model, tmp_path, "channel")
    tensors, own = load_file(tmp_path / WEIGHTS), own_attention(meant)
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key] = dict(model.named_parameters())[key].data
    del tensors[key + "_scale"]
    own.model.layers[1].mlp.down_proj.weight.data = tensors[key]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert_computes(load(tmp_path, "fp8"), own)


FOREIGN: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "int8 weights": group("channel", type="int"),
    "int4 weights": group("group", type="int", num_bits=4),
    "a scale per group": group("group", group_size=128),
    "columns in another order": group("channel", actorder="weight"),
    "format pack-quantized": group("channel") | {"format": "pack-quantized"},
    "blocks of 64 x 64": {"quant_method": "fp8", "weight_block_size": [64, 64]},
    "scales in ue8m0": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_quantisations_are_refused_by_name(what: str, tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path)
    configure(tmp_path, quantization_config=FOREIGN[what])
    message = refusal_of(tmp_path)
    assert what in message
    assert "which is not read" in message


def test_float8_that_is_in_no_file_is_missed(tmp_path: Path) -> None:
    """Else the model would pass for one whose products read half as much."""
    save(tiny("llama"), tmp_path)
    configure(tmp_path, quantization_config=FINEGRAINED)
    message = refusal_of(tmp_path)
    assert message.startswith("config.json says that its weights are in float8, and none is; take")
    assert refusal_of(tmp_path, "fp8") == message


def test_other_families_are_not_quantised(tmp_path: Path) -> None:
    message = refusal_of(save(tiny("gpt_neox"), tmp_path), "fp8")
    assert message == (
        "GPTNeoXForCausalLM cannot be quantised here; choose one of llama, mistral, qwen2, "
        "qwen3, or target.quantize=none"
    )


def test_torchao_is_not_quantised_twice(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path)
    configure(tmp_path, quantization_config={"quant_method": "torchao"})
    assert "by torchao already" in refusal_of(tmp_path, "fp8")


def test_quantised_weights_are_not_trained(tmp_path: Path) -> None:
    lm = load(save(tiny("llama", num_hidden_layers=1), tmp_path), "fp8")
    with pytest.raises(ValueError, match="quantised by fp8, and this method trains them; take"):
        trained_copy(lm)
    fresh = trained_copy(lm, fresh=1)  # of its shape alone
    assert all(type(one) is not Fp8Linear for one in fresh.modules())


KEY = "model.layers.1.mlp.up_proj.weight"


def _broken(tensors: dict[str, Tensor], how: str) -> None:
    if how == "nan":
        tensors[KEY].view(torch.uint8)[3, 5] = 0xFF
    elif how == "infinite scale":
        tensors[KEY + "_scale"][2] = torch.inf
    elif how == "shape of scales":
        tensors[KEY + "_scale"] = torch.ones(7, 1)
    elif how == "no scale":
        del tensors[KEY + "_scale"]
    elif how == "int8":
        tensors[KEY] = tensors[KEY].to(torch.int8)
    elif how == "missing":
        del tensors[KEY]
    elif how == "unknown":
        tensors["model.layers.1.mlp.zero.weight"] = torch.ones(2)
    else:
        tensors[KEY] = quantised(torch.ones(3, 3), "row")[0]


BROKEN = {
    "nan": "are NaN or infinite",
    "infinite scale": "are NaN or infinite",
    "shape of scales": "has shape [7, 1]; it must be [1], [48, 1] or [1, 1]",
    "no scale": f"{KEY} has no scale",
    "int8": f"{KEY} is of type I8",
    "missing": f"has no {KEY}",
    "unknown": "model.layers.1.mlp.zero.weight, for which config.json has no place",
    "shape": "with shape [3, 3], and config.json asks for [48, 32]",
}


@pytest.mark.parametrize("how", BROKEN)
def test_files_that_are_broken(how: str, tmp_path: Path) -> None:
    write(tiny("llama", num_hidden_layers=2), tmp_path, "channel")
    tensors = load_file(tmp_path / WEIGHTS)
    _broken(tensors, how)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    message = refusal_of(tmp_path)
    assert BROKEN[how] in message
    assert WEIGHTS in message


def test_weights_that_cannot_be_quantised(tmp_path: Path) -> None:
    save(tiny("llama", num_hidden_layers=2), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[KEY][1, 2] = torch.inf
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    message = refusal_of(tmp_path, "fp8")
    assert f"{WEIGHTS}: {KEY}: " in message


def test_no_room_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tiny("llama"), tmp_path)
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 1000)
    assert "GiB do not fit the" in refusal_of(tmp_path, "fp8")


# --- memory


@pytest.mark.parametrize("kind", ["read", "joined"])
def test_no_more_than_a_layer_is_ever_in_another_type(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    model = tiny("llama", tie_word_embeddings=False, head_dim=32, **sizes)
    save(model, tmp_path)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    ends = 2 * model.lm_head.weight.nbytes
    whole = sum(parameter.nbytes for parameter in model.parameters())

    mapped = (tmp_path / WEIGHTS).stat().st_size  # the file, which is no memory of ours
    if kind == "read":
        placement, config = Placement(), model.config
        most, (made, _) = peak_of(
            lambda: checkpoints.read_model(tmp_path, config, placement, "target", "fp8")
        )
    else:
        most, lm = peak_of(lambda: load(tmp_path, "fp8"))
        made = lm.model
    small = sum(tensor.nbytes for tensor in made.state_dict().values())
    assert small < 0.35 * whole
    slack = 100_000 if kind == "read" else 600_000  # of the probe, its tables of angles above all
    assert small < most - mapped < small + layer + ends + slack
    assert most - mapped < 0.5 * whole

"""What is no head of a target is refused in one line that says where, what and why."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.heads import files as heads
from specdec.heads.formats import find_head, load_head
from specdec.models.paged import PagedLM
from tests.heads import made
from tests.models.tiny import VOCABULARY, tiny

ALL = ("eagle3", "eagle", "medusa", "dflash")
FILE = "model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8), name="target.path=tiny")


def refused(folder: Path | str, target: PagedLM, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_head(str(folder), target, **{"kinds": ALL} | options)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("drafter.path=")


def edited(folder: Path, tensors: Callable[[Tensors], Any] | None = None, **config: Any) -> None:
    """Change a head on disk; None takes a field away."""
    if tensors is not None:
        found = load_file(folder / FILE)
        tensors(found)
        save_file(found, folder / FILE)
    said = json.loads((folder / "config.json").read_text()) | config
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))


# Files


class Code:
    """What a pickle must not be able to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def only_config(folder: Path, file: str, content: Any) -> None:
    (folder / FILE).unlink()
    if isinstance(content, bytes):
        (folder / file).write_bytes(content)
    else:
        torch.save(content, folder / file)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no object"),
    "no weights": (lambda f: (f / FILE).unlink(), r"has no weights; .*medusa_lm_head\.pt"),
    "empty": (lambda f: (f / FILE).write_bytes(b""), "safetensors is empty"),
    "pointer": (
        lambda f: (f / FILE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "cut": (lambda f: cut(f / FILE), "is cut or no safetensors file"),
    "cut pickle": (
        lambda f: only_config(f, "pytorch_model.bin", b"PK\x03\x04 nothing more"),
        "is cut, or holds more than tensors",
    ),
    "code": (
        lambda f: only_config(f, "pytorch_model.bin", {"fc.weight": Code()}),
        "holds more than tensors",
    ),
    "list": (
        lambda f: only_config(f, "pytorch_model.bin", [torch.zeros(1)]),
        "holds a list, no tensors with names",
    ),
    "number": (
        lambda f: only_config(f, "pytorch_model.bin", {"fc.weight": 3}),
        r"holds fc\.weight, which is no tensor",
    ),
    "shard": (
        lambda f: only_config(
            f, "model.safetensors.index.json", b'{"weight_map": {"fc.weight": "a.safetensors"}}'
        ),
        r"a\.safetensors is missing, which model\.safetensors\.index\.json names",
    ),
    "index": (
        lambda f: only_config(f, "model.safetensors.index.json", b"{}"),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(
    damage: Callable[[Path], Any], message: str, target: PagedLM, tmp_path: Path
) -> None:
    made.eagle3(tmp_path, target.model, layout="specforge")
    damage(tmp_path)
    refused(tmp_path, target, message)


@pytest.mark.parametrize("archive", [False, True], ids=["before torch 1.6", "since"])
def test_what_a_pickle_wants_to_run_is_not_run(
    archive: bool, target: PagedLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.eagle3(tmp_path, target.model)
    file = tmp_path / "pytorch_model.bin"
    found = torch.load(file, weights_only=True)
    torch.save(found, file, _use_new_zipfile_serialization=archive)
    head = load_head(str(tmp_path), target, kinds=ALL)
    assert head.get_parameter("fc.weight").equal(found["fc.weight"])
    torch.save(found | {"code": Code()}, file, _use_new_zipfile_serialization=archive)
    refused(tmp_path, target, "holds more than tensors")
    assert not capsys.readouterr().out


def test_a_folder_that_is_not_there(target: PagedLM, tmp_path: Path) -> None:
    refused(tmp_path / "none", target, "no such folder")
    refused("standin:llama3_8b", target, "a stand-in is a whole model")
    refused("zoo:none", target, "no such built-in model")
    refused("nobody/nothing", target, r"cannot be downloaded \(An error happened")
    refused("no//name", target, r"cannot be downloaded \(Repo id must be")
    assert find_head(str(tmp_path)) == str(tmp_path)


def test_a_head_of_the_hub_is_read_from_its_cache(
    target: PagedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not in the cache is not taken for what is not on the hub."""
    place = tmp_path / "models--some--head"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr(heads, "hf_hub_download", partial(hf_hub_download, cache_dir=tmp_path))
    made.eagle3(place / "snapshots" / "abc", target.model)
    head = load_head("some/head", target, kinds=ALL)
    found = torch.load(place / "snapshots" / "abc" / "pytorch_model.bin", weights_only=True)
    assert head.get_parameter("fc.weight").equal(found["fc.weight"])
    (place / "snapshots" / "abc" / "pytorch_model.bin").unlink()
    refused("some/head", target, "cannot be downloaded")


def test_weights_may_lie_in_several_files(target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model, layout="specforge")
    found = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    keys = sorted(found)
    parts = {"a.safetensors": keys[:7], "b.safetensors": keys[7:]}
    for file, names in parts.items():
        save_file({name: found[name] for name in names}, tmp_path / file)
    places = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    head = load_head(str(tmp_path), target, kinds=ALL)
    assert head.get_parameter("fc.weight").equal(found["fc.weight"])


# Other kinds of heads

FOREIGN = {
    "a Domino head": ["hidden_norm.weight", "prefix_gru.weight_ih_l0"],
    "a Hydra head": ["hydra_mlp.0.0.linear.weight", "hydra_lm_head.0.weight"],
    "an MLP speculator": ["emb.0.weight", "proj.0.weight"],
    "an MLP speculator with a prefix": ["speculator.emb.0.weight"],
    "a ReDrafter head": ["rnn_w.weight", "lm_head.0.linear.weight"],
    "a GRIFFIN head": ["fc.fc.weight", "fc.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_heads_that_are_not_read_are_named(kind: str, target: PagedLM, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, 2) for name in FOREIGN[kind]}
    made.write(tmp_path, made.layer_config(target.model), tensors, FILE)
    what = kind.partition(" of ")[0].partition(" with ")[0]
    refused(tmp_path, target, f"holds {what}, which is not read; heads of EAGLE")


@pytest.mark.parametrize("kind", ["domino", "hydra"])
def test_heads_that_are_not_read_are_known_by_their_wrapper(
    kind: str, target: PagedLM, tmp_path: Path
) -> None:
    made.eagle3(tmp_path, target.model, layout="speculators")
    edited(tmp_path, speculators_model_type=kind)
    refused(tmp_path, target, "holds .*, which is not read")


def test_what_is_no_head(target: PagedLM, tmp_path: Path) -> None:
    whole = {key: value.clone() for key, value in target.model.state_dict().items()}
    made.write(tmp_path / "whole", {}, whole, FILE)
    refused(tmp_path / "whole", target, "a whole model and no head, as .*drafter=small_llama")
    made.write(tmp_path / "other", {}, {"a.b": torch.zeros(1)}, FILE)
    refused(tmp_path / "other", target, r"no head that is known, as a\.b")
    made.eagle3(tmp_path / "eagle3", target.model)
    refused(tmp_path / "eagle3", target, r"is a head of kind eagle3 .*, and eagle or medusa is "
            "asked for; use drafter=eagle3", kinds=("eagle", "medusa"))  # fmt: skip


# Tensors, maps of tokens and config.json


def poisoned(tensors: Tensors) -> None:
    tensors["midlayer.mlp.up_proj.weight"][3, 3] = torch.inf


def renamed(tensors: Tensors) -> None:
    tensors["head.weight"] = tensors.pop("lm_head.weight")


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: make(tensors[name]).contiguous()})


def without(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def swapped(ids: Tensor) -> Tensor:
    ids = ids + torch.arange(len(ids))
    return ids.flip(0) - torch.arange(len(ids))


def beyond(tensors: Tensors) -> None:
    tensors["d2t"][-1] = VOCABULARY
    del tensors["t2d"]


def at(tensors: Tensors, place: int, name: int) -> None:
    """One of the ids."""
    tensors["d2t"][place] = name - (place % len(tensors["d2t"]))
    del tensors["t2d"]


def other(ids: Tensor) -> Tensor:
    names = torch.arange(VOCABULARY)[-len(ids) :]
    return names - torch.arange(len(ids))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no output head": (
        {"tensors": without("lm_head.weight")},
        r"model\.safetensors has no lm_head\.weight, which a head",
    ),
    "another name": (
        {"tensors": renamed},
        r"has no lm_head\.weight, .* but head\.weight instead; .* download both again",
    ),
    "no norm": ({"tensors": without("norm.weight", "midlayer.hidden_norm.weight")}, "and 1 more"),
    "surplus": (
        {"tensors": lambda found: found.update(extra=torch.zeros(2))},
        r"holds extra, for which a head with this config\.json has no use",
    ),
    "both names": (
        {"tensors": lambda found: found.update({"model.norm.weight": torch.ones(32)})},
        r"holds (model\.)?norm\.weight and (model\.)?norm\.weight, which are one tensor",
    ),
    "shape": (
        {"tensors": replaced("midlayer.mlp.up_proj.weight", lambda x: x[:30])},
        r"holds midlayer\.mlp\.up_proj\.weight of shape \[30, 32\], and it must be \[40, 32\]",
    ),
    "infinite": (
        {"tensors": poisoned},
        r"model\.safetensors gives midlayer\.mlp\.up_proj\.weight values that are NaN or infinite",
    ),
    "quantised": (
        {"tensors": replaced("midlayer.mlp.up_proj.weight", lambda x: x.to(torch.int8))},
        "quantised heads are not read",
    ),
    "float8": (
        {"tensors": replaced("midlayer.mlp.up_proj.weight", lambda x: x.to(torch.float8_e4m3fn))},
        "as float8_e4m3fn; quantised heads are not read",
    ),
    "states": (
        {"tensors": replaced("fc.weight", lambda x: torch.zeros(32, 3 * 40))},
        "reads states of 40 numbers, and those of target.path=tiny have 32: this head belongs",
    ),
    "number of states": (
        {"tensors": replaced("fc.weight", lambda x: torch.zeros(32, 4 * 32))},
        r"fc\.weight joins 4 states of 32 numbers, and 3 are named; say which by drafter",
    ),
    "stated states": ({"target_hidden_size": 40}, "reads states of 40 numbers"),
    "vocabulary": ({"vocab_size": 100}, "a vocabulary of 100, and target.path=tiny has 96 tokens"),
    "length of d2t": (
        {"tensors": replaced("d2t", lambda x: x[:40])},
        r"holds d2t of shape \[40\], and its output head names 48",
    ),
    "absolute d2t": (
        {"tensors": replaced("d2t", lambda x: x + torch.arange(48))},
        r"d2t .* and t2d name different tokens",
    ),
    "d2t of arange": (
        {"tensors": replaced("d2t", lambda x: torch.arange(48))},
        r"d2t .* and t2d name different tokens",
    ),
    "another d2t": (
        {"tensors": replaced("d2t", other)},
        r"d2t .* and t2d name different tokens",
    ),
    "order of d2t": (
        {"tensors": lambda found: [replaced("d2t", swapped)(found), found.pop("t2d")]},
        "d2t does not make ids that ascend",
    ),
    "repeated": (
        {
            "tensors": lambda found: [
                found["d2t"].__setitem__(7, found["d2t"][6] - 1),
                found.pop("t2d"),
            ]
        },
        "d2t does not make ids that ascend",
    ),
    "one beyond": ({"tensors": lambda found: at(found, -1, VOCABULARY)}, "makes ids .* has 96"),
    "one below": ({"tensors": lambda found: at(found, 0, -1)}, "makes ids -1 to .* has 96"),
    "range of d2t": ({"tensors": beyond}, "d2t makes ids .* has 96: this head belongs to another"),
    "zeros": (
        {"tensors": lambda found: [found["d2t"].zero_(), found.pop("t2d")]},
        "d2t is all zero and there is no t2d",
    ),
    "length of t2d": (
        {"tensors": lambda found: [found["t2d"].fill_(True), found.pop("d2t")]},
        "t2d names 96 tokens, and its output head 48",
    ),
    "no map": ({"tensors": without("d2t", "t2d")}, "names 48 tokens and has no d2t"),
    "size": ({"hidden_size": None}, "has hidden_size=None, which must be a number"),
    "rows": ({"num_attention_heads": 5}, "q_proj has 32 rows, which 5 heads"),
    "keys": ({"num_key_value_heads": 4}, r"k_proj\.weight of shape \[16, 64\], and .* \[32, 64\]"),
    "layers": ({"num_hidden_layers": 2}, r"has no layers\.1\.input_layernorm\.weight"),
    "epsilon": ({"rms_norm_eps": "small"}, "describes no decoder layer"),
    "flag": ({"fc_norm": True}, r"has no fc_norm\.0\.weight \(and 2 more\)"),
    "rope": ({"rope_scaling": {"type": "su"}}, "rope_scaling of type 'su', which is not known"),
    "ropes": ({"rope_scaling": [1]}, "a rope_scaling that is no object"),
    "factor": ({"rope_scaling": {"rope_type": "yarn"}}, "describes no decoder layer"),
    "activation": ({"hidden_act": "gelu"}, "asks for hidden_act=gelu"),
    "window": (made.sliding(0, 1), "has sliding_window=0, and a window must hold a token"),
    "no number": (made.sliding("9", 1), "layer_types, .* do not say of 1 layers"),
    "kind of attention": (
        {"use_sliding_window": True, "layer_types": ["chunked_attention"]},
        "layer_types, .* of config.json do not say of 1 layers whether attention is full",
    ),
    "layer 9": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 9]}}, "state 9"),
    "no list": ({"eagle_aux_hidden_state_layer_ids": "2,5"}, "must be a list of layers"),
    "a word": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, "5"]}},
        "a list of layers",
    ),
    "no object": ({"eagle_config": [2]}, "eagle_config=.*, which must be an object"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_heads(
    change: dict[str, Any], message: str, target: PagedLM, tmp_path: Path
) -> None:
    made.eagle3(tmp_path, target.model, layout="specforge")
    edited(tmp_path, **change)
    refused(tmp_path, target, message)


def test_a_head_of_another_architecture(target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model, layout="speculators")
    wrapper = json.loads((tmp_path / "config.json").read_text())["speculators_config"]
    wrapper["verifier"] = {"name_or_path": "Qwen/Qwen3-8B", "architectures": ["Qwen3ForCausalLM"]}
    edited(tmp_path, speculators_config=wrapper)
    refused(tmp_path, target, "is made for Qwen3ForCausalLM, and target.path=tiny is a Llama")
    wrapper["verifier"]["architectures"] = ["LlamaForConditionalGeneration"]
    edited(tmp_path, speculators_config=wrapper)
    head: Any = load_head(str(tmp_path), target, kinds=ALL)
    assert "made for Qwen/Qwen3-8B" in head.description


def test_decoder_layers_of_another_type(target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model, layout="speculators")
    edited(tmp_path, transformer_layer_config={"model_type": "gemma3_text"})
    refused(tmp_path, target, "decoder layers of type 'gemma3_text'; those of llama, qwen3")


@pytest.mark.parametrize("taps", [[2, 5, 9], [2, 2, 5], [True, 2, 5], ["last", 2, 5], [2, 5]])
def test_states_by_the_setting(taps: list[Any], target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model)
    refused(tmp_path, target, r"drafter\.taps", taps=taps)


def test_states_of_a_target_with_few_layers(tmp_path: Path) -> None:
    small = PagedLM(tiny("llama", num_hidden_layers=6), name="target.path=small")
    made.eagle3(tmp_path, small.model)
    refused(tmp_path, small, r"read states \[2, 3, 3\], one of them twice, as .* has 6 layers")
    load_head(str(tmp_path), small, kinds=ALL, taps=[1, 3, 5])


def test_the_bias_of_eagle_1_is_not_forgotten(target: PagedLM, tmp_path: Path) -> None:
    made.eagle(tmp_path, target.model, file=FILE)
    edited(tmp_path, without("fc.bias"))
    refused(tmp_path, target, r"has no fc\.bias")
    edited(tmp_path, bias=False)
    load_head(str(tmp_path), target, kinds=ALL)
    made.eagle(tmp_path, target.model, layout="speculators")
    edited(tmp_path, fusion_bias=None)
    refused(tmp_path, target, r"holds fusion_fc\.bias, for which")


def test_heads_that_read_one_state_read_one(target: PagedLM, tmp_path: Path) -> None:
    made.eagle(tmp_path / "eagle", target.model)
    refused(tmp_path / "eagle", target, r"EAGLE-1 reads one state; .* drafter\.taps", taps=[2, 5])
    medusa = tmp_path / "medusa"
    made.write(medusa, {}, {"0.0.linear.weight": torch.ones(32, 32)}, "medusa_lm_head.safetensors")
    refused(medusa, target, r"Medusa heads read one state; .* drafter\.taps", taps=[2, 5])


def test_a_head_of_eagle_1_of_another_target(target: PagedLM, tmp_path: Path) -> None:
    wide = PagedLM(tiny("llama", num_hidden_layers=8, hidden_size=48), name="target.path=wide")
    made.eagle(tmp_path, target.model)
    refused(tmp_path, wide, "reads states of 32 numbers, and those of target.path=wide have 48")


def test_an_output_head_with_a_bias_cannot_be_lent(tmp_path: Path) -> None:
    phi = PagedLM(tiny("phi", num_hidden_layers=8), name="target.path=phi")
    made.eagle(tmp_path, phi.model, file=FILE)
    refused(tmp_path, phi, "output head of target.path=phi, which adds a bias")
    edited(tmp_path, lambda found: found.update({"lm_head.weight": torch.ones(VOCABULARY, 32)}))
    load_head(str(tmp_path), phi, kinds=ALL)


def test_medusa_heads_of_another_target(target: PagedLM, tmp_path: Path) -> None:
    made.write(tmp_path, {}, {"0.0.linear.weight": torch.ones(8, 8)}, "medusa_lm_head.safetensors")
    refused(tmp_path, target, "reads states of 8 numbers, .* these heads belong to another target")
    tensors = {"0.0.linear.weight": torch.ones(32, 32), "0.1.weight": torch.ones(90, 32)}
    made.write(tmp_path, {}, tensors, "medusa_lm_head.safetensors")
    refused(tmp_path, target, r"0\.1\.weight of shape \[90, 32\], and it must be \[96, 32\]")

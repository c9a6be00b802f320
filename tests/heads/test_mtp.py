"""MTP layers: read from every layout, each node of every tree as restated, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5TextRotaryEmbedding,
)

from specdec.drafters.eagle import Eagle1
from specdec.drafters.mtp import MTP
from specdec.drafters.trees.static import Static
from specdec.heads.formats import load_head
from specdec.heads.mtp_files import HowMTP
from specdec.models.load import Models, load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from tests.heads import made, oracle
from tests.heads.mtp import mtp
from tests.heads.test_drafts import TOLERANCE, TREES, watched
from tests.heads.test_formats import TOKENS, N, check, states_of
from tests.heads.test_refusals import edited, without
from tests.models.tiny import own_attention, tiny

LAYOUTS = ("mimo", "qwen", "speculators", "speculators, qwen2", "speculators, qwen3_5")
MODELS = Models(Placement())


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N), name="target.path=tiny")


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with its target"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_is_read_computes_what_its_files_say(
    layout: str, whole: bool, target: PagedLM, tmp_path: Path
) -> None:
    facts = mtp(tmp_path, target.model, layout=layout, whole=whole)
    head: Any = load_head(str(tmp_path), target, kinds=("mtp",))
    check(head, facts, target, oracle.mtp)
    assert head.embed_tokens.weight is not None
    assert head.lm_head.weight.data_ptr() == target.model.lm_head.weight.data_ptr()
    name = {"mimo": "MiMo", "qwen": "Qwen3-Next"}.get(layout, "speculators")
    assert head.description.startswith(f"MTP layer of {name}: 1 layer of 32, states normal of 8")
    assert "hands on normed states" in head.description


def test_the_state_that_is_read_and_the_one_that_is_handed_on_can_be_chosen(
    target: PagedLM, tmp_path: Path
) -> None:
    facts = mtp(tmp_path, target.model)
    head: Any = load_head(
        str(tmp_path), target, kinds=("mtp",), taps=[N], how=HowMTP(feedback="hidden")
    )
    check(head, replace(facts, taps=(N,), flags=facts.flags | {"hidden"}), target, oracle.mtp)
    assert "hands on unnormed states" in head.description
    with pytest.raises(ValueError, match=r"^drafter\.feedback=twice: must be normal, hidden or n"):
        MTP(path=str(tmp_path), feedback="twice")


def test_the_layer_of_qwen_is_that_of_transformers(target: PagedLM, tmp_path: Path) -> None:
    """Gates, norms of 1 + weight and rotary positions of a part are those of Qwen3.5's own code,
    with the weights as they are in the file."""
    mtp(tmp_path, target.model, layout="qwen")
    head: Any = load_head(str(tmp_path), target, kinds=("mtp",))
    config = Qwen3_5TextConfig(
        **made.layer_config(target.model, head_dim=16, layer_types=["full_attention"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 50.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 0],
        },
    )
    config._attn_implementation = "eager"
    theirs = Qwen3_5DecoderLayer(config, 0)
    found = load_file(tmp_path / "model.safetensors")
    start = "mtp.layers.0."
    theirs.load_state_dict({k.removeprefix(start): v for k, v in found.items() if start in k})
    x = torch.randn(1, 9, made.D, generator=torch.Generator().manual_seed(3))
    places = torch.arange(9)[None]
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    rotary: Any = Qwen3_5TextRotaryEmbedding(config)
    with torch.no_grad():
        expected = theirs(
            hidden_states=x, position_embeddings=rotary(x, places), attention_mask=mask
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        head.enter = lambda index, embedded, hidden: (
            hidden,
            head.normed(head.layers[0].input_layernorm, hidden),
        )
        head.leave = lambda hidden: (hidden, hidden)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

        ours, _ = head(x, x, head.rotary(x, places), attend)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.some(4)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_node_of_every_tree_is_as_restated(
    layout: str, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    facts = mtp(tmp_path, target.model, layout=layout)
    watcher = watched(target, MTP(path=str(tmp_path)), facts, partial(oracle.mtp, facts), tree)
    assert watcher.worst < TOLERANCE


# Traps: none of them crashes


class Late(MTP):
    """Pairs each token with the state of the token before the one it should."""

    note = Eagle1.note

    def catch_up(self, rows: Tensor) -> Any:
        self._states[rows, 1:] = self._states[rows, :-1]
        return super().catch_up(rows)


class Unread(MTP):
    """Keeps what it drafted instead of the target's states."""

    def note(self, context: Any, tree: Any, acceptance: Any, seen: Any) -> None:
        super().note(context, tree, acceptance, seen)
        self._states[context.rows, 1:] = 0


class Unmasked(MTP):
    """Nodes of a tree see all that were drafted before, and each other."""

    def _use(self, head: Any, target: PagedLM) -> None:
        super()._use(head, target)
        forward = self.model.forward

        def seeing(*given: Any, ancestors: Any = None, first: int = 0, **more: Any) -> Any:
            if ancestors is not None:
                ancestors = torch.full_like(ancestors, (1 << (first + ancestors.shape[1])) - 1)
            return forward(*given, ancestors=ancestors, first=first, **more)

        self.model.forward = seeing  # type: ignore[method-assign]


def reversed_input(head: Any) -> None:
    head.fc.weight.data = head.fc.weight.roll(head.width, dims=1)


def hidden(head: Any) -> None:
    head.config = replace(head.config, norm_output=False)


def centred(head: Any) -> None:
    head.layers[0].input_layernorm.weight.sub_(1)


def ungated(head: Any) -> None:
    head.layers[0].self_attn.gate_proj.weight.zero_()


def whole_turned(head: Any) -> None:
    head.config = replace(head.config, turned=None)
    head.rotary = head.turning()


TRAPS: dict[str, Any] = {
    "late": Late,
    "unread": Unread,
    "unmasked": Unmasked,
    "order": reversed_input,
    "feedback": hidden,
    "state": [N],
    "norms": centred,
    "gates": ungated,
    "turned": whole_turned,
}


@pytest.mark.some(4)
@pytest.mark.parametrize("trap", TRAPS)
def test_the_traps_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    """Each moves a probability by a thousand times what is allowed."""
    facts, change = mtp(tmp_path, target.model, layout="qwen"), TRAPS[trap]
    kind = change if isinstance(change, type) else MTP
    drafter = kind(path=str(tmp_path), taps=change if isinstance(change, list) else None)
    load = drafter.load

    def spoilt(*given: Any) -> None:
        load(*given)
        if callable(change) and not isinstance(change, type):
            with torch.no_grad():
                change(drafter.head)
            drafter._use(drafter.head, given[0])

    drafter.load = spoilt
    watcher = watched(target, drafter, facts, partial(oracle.mtp, facts), "static")
    assert watcher.worst > 1000 * TOLERANCE


# The target's own files


def test_the_layer_in_the_target_s_own_files_is_read(tmp_path: Path) -> None:
    """transformers leaves its tensors aside; the model is loaded all the same."""
    shutil.copytree(zoo_path("draft"), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    own = load_model("zoo:draft")
    layer = {"hidden_size": own.config.hidden_size, "vocab_size": own.vocab_size}
    with pytest.raises(ValueError, match=r"^target\.path=zoo:draft: holds no MTP layers, as .*;"):
        MTP().load(own, MODELS)
    save_file(load_file(file) | alike(own, layer["hidden_size"]), file)
    target = load_model(str(tmp_path / "model"), setting="target.path")
    drafter = MTP()
    drafter.check(Static(widths=[2]))
    drafter.find()
    drafter.load(target, MODELS)
    assert drafter.notes["drafter.path"].startswith("MTP layer of MiMo: 1 layer of ")
    states = states_of(own_attention(target.model), TOKENS, ("normal",))
    assert drafter.head.fuse(states[0]).shape == states[0].shape


def test_a_model_of_mimo_is_loaded_as_the_qwen2_that_it_is(tmp_path: Path) -> None:
    model = tiny("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    for file in zoo_path("target").glob("token*.json"):
        shutil.copy(file, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "configuration_mimo.MiMoConfig"}
    said |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(said | {"num_nextn_predict_layers": 1}))
    file = tmp_path / "model.safetensors"
    extra = {"model.mtp_layers.0.final_layernorm.weight": torch.ones(made.D)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    found = load_model(str(tmp_path), setting="target.path")
    tokens = torch.tensor([TOKENS])
    with torch.inference_mode():
        logits = (own_attention(lm)(tokens).logits for lm in (found.model, model))
    assert torch.equal(*logits)


def alike(own: PagedLM, width: int) -> dict[str, Tensor]:
    """An MTP layer that is the model's own first layer, between other parts."""
    start = "model.mtp_layers.0."
    tensors = {
        key.replace("model.layers.0.", start): value.clone()
        for key, value in own.model.state_dict().items()
        if key.startswith("model.layers.0.")
    }
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        tensors[f"{start}{name}.weight"] = torch.ones(width)
    return tensors | {f"{start}input_proj.weight": torch.eye(width).repeat(1, 2)}


def test_a_target_without_files_has_no_layer_of_its_own(target: PagedLM) -> None:
    with pytest.raises(ValueError, match=r"^drafter\.path=null: target\.path=tiny has no files"):
        MTP().load(target, MODELS)


# What is refused, or said


def refused(folder: Path, target: PagedLM, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_head(str(folder), target, **{"kinds": ("mtp",)} | options)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("drafter.path=")


FOREIGN = {
    "model.layers.61.eh_proj.weight": r"holds MTP layers as DeepSeek's or GLM's, which is not rea",
    "model.mtp.layers.0.eh_proj.weight": r"holds MTP layers as DeepSeek's or GLM's, which is not",
    "mtp.layers.0.mlp.experts.3.up_proj.weight": r"holds an MTP layer with experts, which is not",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_layers_that_are_not_read_are_named(name: str, target: PagedLM, tmp_path: Path) -> None:
    mtp(tmp_path, target.model, layout="qwen")
    edited(tmp_path, lambda found: found.update({name: torch.zeros(2, 2)}))
    refused(tmp_path, target, FOREIGN[name])


def more_layers(found: dict[str, Tensor]) -> None:
    found["mtp_layers.0.self_attn.sinks"] = torch.zeros(4)


WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any] | None, dict[str, Any], str]] = {
    "kind": (
        "mimo",
        None,
        {"model_type": "bailing"},
        r"has an MTP layer of type 'bailing'; those of llama",
    ),
    "missing": (
        "mimo",
        without("model.mtp_layers.0.input_proj.weight"),
        {},
        r"model\.safetensors has no fc\.weight",
    ),
    "surplus": ("speculators", more_layers, {}, r"holds mtp_layers\.0\.self_attn\.sinks, for wh"),
    "vocabulary": (
        "mimo",
        None,
        {"vocab_size": 7},
        r"is made for a vocabulary of 7, and .* belongs to another target",
    ),
    "width": (
        "mimo",
        None,
        {"hidden_size": 64},
        r"reads states of 64 numbers, and those of target\.path=tiny have 32",
    ),
    "turned": (
        "mimo",
        None,
        {"partial_rotary_factor": 0.4},
        r"partial_rotary_factor=0\.4, which must turn an even number of the 8 ",
    ),
    "scaling": (
        "mimo",
        None,
        {"rope_scaling": {"type": "spiral"}},
        r"rope|decoder layer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, target: PagedLM, tmp_path: Path) -> None:
    layout, change, config, message = WRONG[case]
    mtp(tmp_path, target.model, layout=layout)
    edited(tmp_path, change, **config)
    refused(tmp_path, target, message)


def test_a_layer_reads_one_state_and_is_known_by_its_kind(target: PagedLM, tmp_path: Path) -> None:
    mtp(tmp_path, target.model, layout="qwen")
    refused(tmp_path, target, "reads one state; give drafter.taps one", taps=[3, "normal"])
    refused(tmp_path, target, "is a head of kind mtp .* use drafter=mtp", kinds=("eagle3",))


# Layers for further depths


@pytest.mark.some(3)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("layout", "layers"), [("mimo", 2), ("qwen", 3), ("speculators", 3)])
def test_each_layer_drafts_its_level(
    layout: str, layers: int, tree: str, target: PagedLM, tmp_path: Path
) -> None:
    """Over the states that the layer above made of all tokens; the last is used again."""
    facts = mtp(tmp_path, target.model, layout=layout, layers=layers)
    drafter, restate = MTP(path=str(tmp_path)), partial(oracle.mtp, facts)
    shortest = 1 if layers == 2 else layers
    watcher = watched(target, drafter, facts, restate, tree, shortest=shortest)
    assert watcher.worst < TOLERANCE
    assert f"{layers} layers of 32" in drafter.notes["drafter.path"]


def test_the_first_layer_can_draft_all_levels(target: PagedLM, tmp_path: Path) -> None:
    facts = mtp(tmp_path, target.model, layers=2)
    alone = replace(facts, layers=facts.layers[:1])
    drafter = MTP(path=str(tmp_path), layers=1)
    watcher = watched(target, drafter, alone, partial(oracle.mtp, alone), "static")
    assert watcher.worst < TOLERANCE
    both = MTP(path=str(tmp_path))
    watcher = watched(target, both, alone, partial(oracle.mtp, alone), "static")
    assert watcher.worst > 1000 * TOLERANCE
    with pytest.raises(ValueError, match=r"^drafter\.layers=0: must be at least 1, or null$"):
        MTP(path=str(tmp_path), layers=0)
    with pytest.raises(ValueError, match=r"^drafter\.layers=3: drafter\.path=.* holds 2 of MTP; "):
        MTP(path=str(tmp_path), layers=3).load(target, MODELS)


@pytest.mark.parametrize("trap", ["swapped", "behind", "forgotten"])
def test_the_traps_of_further_layers_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    facts = mtp(tmp_path, target.model, layers=2)
    drafter = MTP(path=str(tmp_path))
    load = drafter.load

    def spoilt(*given: Any) -> None:
        load(*given)
        model: Any = drafter.model
        if trap == "swapped":
            model.each.reverse()
        if trap == "behind":  # the second layer has an entry for the first pair
            opened = model.open

            def open_(row: int, **more: Any) -> None:
                opened(row, **more)
                model._seen[row] = 1

            model.open = open_
        if trap == "forgotten":  # what the first made of the pair before is gone
            append = model.append

            def append_(*given: Any) -> None:
                append(*given)
                model._last.zero_()

            model.append = append_

    drafter.load = spoilt  # type: ignore[method-assign]
    watcher = watched(target, drafter, facts, partial(oracle.mtp, facts), "static")
    assert watcher.worst > 1000 * TOLERANCE

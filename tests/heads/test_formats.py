"""Heads in the layouts that are published: what is loaded computes what the files say."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.heads import files
from specdec.heads.formats import check_whole, load_head
from specdec.models.paged import PagedLM
from specdec.observation import Tap
from tests.heads import made, oracle
from tests.models.tiny import VOCABULARY, own_attention, tiny

TOLERANCE = 1e-5
TOKENS = torch.randint(3, VOCABULARY, (19,), generator=torch.Generator().manual_seed(1)).tolist()
PATH = [7, 41, 90, 12]
N = 8


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N), name="target.path=tiny")


@pytest.fixture(scope="module")
def wide_target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=N, hidden_size=48), name="target.path=wide")


def states_of(model: Any, tokens: list[int], taps: Sequence[Tap]) -> list[Tensor]:
    """[T, H] each, as transformers has them. The last of its hidden_states is normed; what leaves
    the last layer goes into the norm."""
    into: list[Tensor] = []
    base = model.base_model
    hook = base.norm.register_forward_pre_hook(lambda _, given: into.append(given[0]))
    with torch.inference_mode():
        out = base(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    hook.remove()
    known = dict(enumerate(out.hidden_states)) | {len(base.layers): into[0]}
    known["normal"] = out.last_hidden_state
    return [known[tap][0].clone() for tap in taps]


@torch.no_grad()
def drafted(head: Any, states: Sequence[Tensor], tokens: list[int], path: list[int]) -> Tensor:
    """[VD] logits after the path, by the head's own forward over all pairs, again for each
    token."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    features = head.fuse(torch.cat([state[None, : len(tokens) - 1] for state in states], dim=-1))
    for count in range(len(path) + 1):
        embedded = head.embed(torch.tensor([tokens[1:] + path[:count]]))
        places = torch.arange(embedded.shape[1])[None]
        fed, read = head(embedded, features, head.rotary(embedded, places), attend)
        features = torch.cat([features, fed[:, -1:]], dim=1)
    logits: Tensor = head.lm_head(read[0, -1])
    return logits


def distance(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double().softmax(-1) - expected.softmax(-1)).abs().max())


def check(head: Any, facts: oracle.Facts, target: PagedLM, restated: Any) -> None:
    assert head.config.taps == facts.taps
    states = states_of(own_attention(target.model), TOKENS, facts.taps)
    ids = torch.arange(VOCABULARY) if head.names is None else head.names
    assert ids.equal(facts.ids)
    for length in (0, 1, len(PATH)):
        ours = drafted(head, states, TOKENS, PATH[:length])
        assert distance(ours, restated(facts, states, TOKENS, PATH[:length])) < TOLERANCE
    assert not head.training
    assert not any(parameter.requires_grad for parameter in head.parameters())


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TRAINED = {"original_max_position_embeddings": 16}
SCALED = {  # as config.json says it, and as the oracle has it
    "linear": ({"factor": 2.0}, {"factor": 2.0}),
    "dynamic": ({"factor": 2.0}, {"factor": 2.0, "trained": 64}),
    "yarn": ({"factor": 4.0} | TRAINED, {"factor": 4.0, "trained": 16}),
    "llama3": (LLAMA3 | TRAINED, {"factor": 8.0, "low": 1.0, "high": 4.0, "trained": 16}),
}


def ropes() -> dict[str, Any]:
    """Every scaling in the old spelling and the new, in raw files and in those of speculators."""
    cases: dict[str, Any] = {}
    for kind, (said, known) in SCALED.items():
        for layout, new in itertools.product(("specforge", "speculators"), (False, True)):
            field = {"rope_type": kind, **said}
            config: dict[str, Any] = {"rope_theta": 500.0, "rope_scaling": field}
            if new:
                config = {"rope_parameters": {"rope_theta": 500.0, **field}}
            ignored = layout == "specforge" and not new and kind in ("linear", "dynamic")
            rope = {"kind": kind, "theta": 10_000.0 if ignored else 500.0, **known}
            name = f"{layout}, {kind}, {'new' if new else 'old'}"
            cases[name] = {
                "layout": layout,
                "rope": (config, rope),
            }
    cases["theta"] = {"rope": ({"rope_theta": 500.0}, {"theta": 500.0})}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    cases["type"] = {"rope": (old, {"theta": 10_000.0, "kind": "linear", "factor": 2.0})}
    return cases


EAGLE3: dict[str, dict[str, Any]] = {
    "safeailab, bin": {"layout": "safeailab"},
    "safeailab, safetensors": {"file": "model.safetensors"},
    "safeailab, all tokens": {"named": None},
    "safeailab, size of heads": {"head_dim": 16, "config": {"head_dim": 8}},
    "safeailab, own embedding": {"own_embedding": True},
    "specforge": {"layout": "specforge", "prefix": "model."},
    "specforge, fc_norm": {"layout": "specforge", "flags": ("fc_norm", "norm_output")},
    "specforge, outputs": {
        "layout": "specforge",
        "taps": (2, 5, 7),
        "config": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 6]}},
    },
    "specforge, states": {
        "layout": "specforge",
        "taps": (3, 5, 7),
        "config": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 5, 7]}},
    },
    "sglang": {"layout": "sglang", "layers": 3},
    "sglang, numbers": {"layout": "sglang", "layers": 2, "listed": True},
    "half precision": {"dtype": torch.float16},
    "half precision, safetensors": {"layout": "specforge", "dtype": torch.bfloat16},
    "deepspec": {"layout": "deepspec", "layers": 2, "named": None},
    "speculators": {"layout": "speculators"},
    "speculators, layers": {"layout": "speculators", "layers": 2},
    "speculators, biases": {"layout": "speculators", "layers": 2, "bias": "qkvo"},
    "biases of q, k, v": {"layout": "specforge", "bias": "qkv"},
    "speculators, own embedding": {"layout": "speculators", "own_embedding": True},
    "speculators, norm_before_fc": {"layout": "speculators", "flags": ("norm_before_fc",)},
    "speculators, twice": {"layout": "speculators", "taps": (2, 2, 5)},
    **{
        f"speculators, {' '.join(flags)}": {"layout": "speculators", "flags": flags}
        for count in (1, 2, 3)
        for flags in itertools.combinations(
            ("norm_before_residual", "norm_output", "fc_norm"), count
        )
    },
}


@pytest.mark.parametrize("case", EAGLE3.values(), ids=EAGLE3.keys())
def test_a_head_of_eagle_3_is_what_its_files_say(
    case: dict[str, Any], target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle3(tmp_path, target.model, **case)
    head = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, facts, target, oracle.eagle3)
    labels = {"sglang": "SGLang", "deepspec": "DeepSpec", "specforge": "SpecForge"}
    labels |= {"safeailab": "SafeAILab", "speculators": "speculators"}
    label = labels[case.get("layout", "safeailab")]
    assert str(head.description).startswith(f"EAGLE-3 of {label}: ")
    shared = head.get_parameter("embed_tokens.weight").data_ptr()
    lent = target.model.get_input_embeddings().weight.data_ptr()
    assert (shared == lent) != case.get("own_embedding", False)


@pytest.mark.some(7)
@pytest.mark.parametrize("case", ropes().values(), ids=ropes().keys())
def test_rotary_angles_are_those_of_the_files(
    case: dict[str, Any], target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle3(tmp_path, target.model, **case)
    head = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, facts, target, oracle.eagle3)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_a_head_may_be_of_another_width_than_its_target(
    layout: str, wide_target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle3(
        tmp_path, wide_target.model, layout=layout, config={"target_hidden_size": 48}
    )
    head = load_head(str(tmp_path), wide_target, kinds=("eagle3",))
    check(head, facts, wide_target, oracle.eagle3)


def test_the_setting_overrides_states_and_angles(target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle3(tmp_path, target.model, taps=(1, 4, 8), rope=({}, {"theta": 77.0}))
    options: dict[str, Any] = {"taps": [1, 4, "normal"], "rope_theta": 77.0}
    head: Any = load_head(str(tmp_path), target, kinds=("eagle3",), **options)
    assert head.config.taps == (1, 4, "normal")
    facts = replace(facts, taps=(1, 4, "normal"))
    check(head, facts, target, oracle.eagle3)


EAGLE: dict[str, dict[str, Any]] = {
    "safeailab": {},
    "safeailab, no bias": {"fc_bias": False},
    "safeailab, safetensors": {"file": "model.safetensors"},
    "biases": {"bias": "qkv"},
    "layers": {"layers": 2},
    "theta": {"rope": ({"rope_theta": 500.0}, {"theta": 500.0})},
    "hass": {"norms": ("embedding_layernorm", "hidden_states_layernorm")},
    "vllm": {"layout": "vllm"},
    "vllm, norms": {"layout": "vllm", "norms": ("enorm", "hnorm")},
    "vllm, no bias": {"layout": "vllm", "fc_bias": False, "config": {"eagle_fc_bias": False}},
    "vllm, norms in use": {
        "layout": "vllm",
        "norms": ("layers.0.input_layernorm", "norm"),
        "in_use": True,
    },
    "speculators": {"layout": "speculators", "fc_bias": False},
    "speculators, bias": {"layout": "speculators"},
    "speculators, norms": {
        "layout": "speculators",
        "norms": ("embedding_layernorm", "pre_lm_head_layernorm", "transformer.input_layernorm"),
    },
}


@pytest.mark.parametrize("case", EAGLE.values(), ids=EAGLE.keys())
def test_a_head_of_eagle_1_is_what_its_files_say(
    case: dict[str, Any], target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle(tmp_path, target.model, **case)
    head = load_head(str(tmp_path), target, kinds=("eagle",))
    check(head, facts, target, oracle.eagle)
    labels = {"safeailab": "SafeAILab", "vllm": "vLLM", "speculators": "speculators"}
    label = labels[case.get("layout", "safeailab")]
    assert str(head.description).startswith(f"EAGLE of {label}: ")
    assert "norm_before_residual" not in str(head.description)
    for name in ("embed_tokens", "lm_head"):
        lent = getattr(target.model.base_model, name, target.model.lm_head)
        assert head.get_parameter(f"{name}.weight").data_ptr() == lent.weight.data_ptr()


def test_a_head_may_read_the_last_state_alone(target: PagedLM, tmp_path: Path) -> None:
    """NVIDIA's heads with use_aux_hidden_state: false, with an fc that is of no use or without."""
    said = {"eagle_config": {"use_aux_hidden_state": False}}
    facts = made.eagle3(tmp_path, target.model, layout="specforge", config=said)
    facts = replace(facts, taps=("normal",), flags=facts.flags | {"no_fc"})
    check(load_head(str(tmp_path), target, kinds=("eagle3",)), facts, target, oracle.eagle3)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    check(load_head(str(tmp_path), target, kinds=("eagle3",)), facts, target, oracle.eagle3)
    (tmp_path / "config.json").write_text(json.dumps(made.layer_config(target.model)))
    head = load_head(str(tmp_path), target, kinds=("eagle3",), taps=["normal"])
    check(head, facts, target, oracle.eagle3)
    with pytest.raises(ValueError, match=r"has no fc\.weight"):
        load_head(str(tmp_path), target, kinds=("eagle3",), taps=[5])


def test_a_head_may_do_with_the_target_s_output_matrix(target: PagedLM, tmp_path: Path) -> None:
    """If its config.json says so, as SGLang has it."""
    facts = made.eagle3(tmp_path, target.model, layout="specforge", named=None)
    config = json.loads((tmp_path / "config.json").read_text()) | {"draft_vocab_size": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    head = load_head(str(tmp_path), target, kinds=("eagle3",))
    lent = target.model.lm_head.weight
    assert head.get_parameter("lm_head.weight").data_ptr() == lent.data_ptr()
    facts = replace(facts, output=lent.detach().double())
    check(head, facts, target, oracle.eagle3)


def test_one_of_two_maps_of_tokens_is_enough(target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle3(tmp_path, target.model, layout="specforge")
    whole = load_file(tmp_path / "model.safetensors")
    for name in ("d2t", "t2d"):
        tensors = {key: value for key, value in whole.items() if key != name}
        save_file(tensors, tmp_path / "model.safetensors")
        check(load_head(str(tmp_path), target, kinds=("eagle3",)), facts, target, oracle.eagle3)


def test_no_difference_at_all_is_a_map_if_the_other_map_says_so(
    target: PagedLM, tmp_path: Path
) -> None:
    facts = made.eagle3(tmp_path, target.model, layout="specforge")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= made.mapped(made.NAMED, torch.arange(made.NAMED), VOCABULARY)
    assert not tensors["d2t"].any()
    save_file(tensors, tmp_path / "model.safetensors")
    facts = replace(facts, ids=torch.arange(made.NAMED))
    check(load_head(str(tmp_path), target, kinds=("eagle3",)), facts, target, oracle.eagle3)


def test_norm_before_residual_goes_by_the_wrapper(target: PagedLM, tmp_path: Path) -> None:
    """A file of speculators that lacks the field means true, a raw one false."""
    flags = ("norm_before_residual",)
    facts = made.eagle3(tmp_path, target.model, layout="speculators", flags=flags)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["norm_before_residual"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    head: Any = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, facts, target, oracle.eagle3)
    assert "states no norm_before_residual: taken for true" in head.description


def test_what_transformers_takes_for_granted_is_left_out_of_wrappers(
    target: PagedLM, tmp_path: Path
) -> None:
    """`speculators` writes what differs from the defaults of transformers."""
    facts = made.eagle3(tmp_path, target.model, layout="speculators")
    config = json.loads((tmp_path / "config.json").read_text())
    layer = config["transformer_layer_config"]
    for field in ("rms_norm_eps", "hidden_act", "max_position_embeddings"):
        del layer[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, replace(facts, eps=1e-6), target, oracle.eagle3)


def test_the_start_of_a_run_says_what_was_read(target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model, layout="speculators", flags=("fc_norm",))
    head: Any = load_head(str(tmp_path), target, kinds=("eagle3",))
    weights = {n: p for n, p in head.named_parameters() if n != "embed_tokens.weight"}
    once = ("fc.", "fc_norm.")
    own = sum(p.numel() for p in weights.values())
    level = sum(p.nbytes for n, p in weights.items() if not n.startswith(once))
    assert own == 3072 + 3 * 32 + 64 * 64 + 32 * 32 + 3 * 40 * 32 + 4 * 32 + 48 * 32
    assert head.description == (
        "EAGLE-3 of speculators: 1 layer of 32, states 2 4 5 of 8, 48 of 96 tokens, fc_norm, "
        f"rope 10,000, 64 positions, {own / 1e3:.3g} k parameters, {level / 1e3:.3g} kB read per "
        f"level"
    )
    made.eagle(tmp_path / "eagle", target.model)
    head = load_head(str(tmp_path / "eagle"), target, kinds=("eagle",))
    lent = ("embed_tokens.weight", "lm_head.weight")
    own = sum(p.numel() for n, p in head.named_parameters() if n not in lent)
    assert f", {own / 1e3:.3g} k parameters, " in head.description


def test_epsilon_may_be_left_out(target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle3(tmp_path, target.model, layout="specforge")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = load_head(str(tmp_path), target, kinds=("eagle3",))
    check(head, replace(facts, eps=1e-6), target, oracle.eagle3)


def test_a_head_of_eagle_1_may_have_its_own_output_matrix(target: PagedLM, tmp_path: Path) -> None:
    facts = made.eagle(tmp_path, target.model, file="model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    own = made.Random(1).matrix(VOCABULARY, made.D)
    save_file(tensors | {"lm_head.weight": own}, tmp_path / "model.safetensors")
    facts = replace(facts, output=own.double())
    check(load_head(str(tmp_path), target, kinds=("eagle",)), facts, target, oracle.eagle)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(4))[:30]
    for rows in (own, own[order]):  # vLLM's map of tokens, of whole matrices and cut ones
        save_file(
            tensors | {"lm_head.weight": rows.contiguous(), "token_map": order},
            tmp_path / "model.safetensors",
        )
        ids = order.sort().values
        cut = replace(facts, ids=ids, output=own[ids].double())
        check(load_head(str(tmp_path), target, kinds=("eagle",)), cut, target, oracle.eagle)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_a_target_may_read_more_tokens_than_it_writes(layout: str, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=N)
    wide = torch.nn.Embedding(VOCABULARY + 4, made.D)
    wide.weight.data[:VOCABULARY] = model.get_input_embeddings().weight
    model.set_input_embeddings(wide)
    target = PagedLM(model, name="target.path=tiny")
    facts = made.eagle3(tmp_path, model, layout=layout)
    if layout == "speculators":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:VOCABULARY].contiguous()
        save_file(tensors, tmp_path / "model.safetensors")
    check(load_head(str(tmp_path), target, kinds=("eagle3",)), facts, target, oracle.eagle3)


@pytest.mark.parametrize("trap", ["shifted", "one layer off", "norm omitted", "absolute ids"])
def test_the_restatement_sees_the_traps(trap: str, target: PagedLM, tmp_path: Path) -> None:
    """Each of the mistakes that never crash moves the distribution by much more than rounding."""
    facts = made.eagle3(tmp_path, target.model)
    head: Any = load_head(str(tmp_path), target, kinds=("eagle3",))
    states = states_of(own_attention(target.model), TOKENS, facts.taps)
    wrong = facts
    if trap == "one layer off":
        states = states_of(own_attention(target.model), TOKENS, [tap + 1 for tap in facts.taps])
    elif trap == "norm omitted":
        ones = torch.ones(made.D).double()
        wrong = replace(facts, tensors={**facts.tensors, "midlayer.hidden_norm.weight": ones})
    elif trap == "shifted":
        states = [state.roll(1, 0) for state in states]
    expected = oracle.eagle3(wrong, states, TOKENS, PATH).softmax(-1)
    states = states_of(own_attention(target.model), TOKENS, facts.taps)
    ours = drafted(head, states, TOKENS, PATH).double().softmax(-1)
    ids = facts.ids
    if trap == "absolute ids":
        ids = facts.tensors["d2t"].long()
    spread = torch.zeros(2, VOCABULARY).double()
    spread[0, head.names] = ours
    spread[1].index_add_(0, ids, expected)
    assert (spread[0] - spread[1]).abs().max() > 100 * TOLERANCE


def test_a_file_is_opened_once_for_all_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets are looked into before each run, and a mixture of experts has thousands."""
    opened: list[Path] = []

    def counted(file: Path, *how: Any, **more: Any) -> Any:
        opened.append(file)
        return safe_open(file, *how, **more)

    monkeypatch.setattr(files, "safe_open", counted)
    shards = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    weights = {}
    for number, shard in enumerate(shards):
        names = [f"model.layers.{number}.mlp.experts.{one}.up_proj.weight" for one in range(9)]
        save_file({name: torch.zeros(2, 2) for name in names}, shard)
        weights |= dict.fromkeys(names, shard.name)
    index = {"metadata": {}, "weight_map": weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    check_whole(str(tmp_path), "target.path")
    assert opened == shards

"""Stand-ins: large shapes that compute what a small model computes, judged by transformers' own
run of the small one."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.static import Static
from specdec.lab.experiment import stop_tokens
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.standin import (
    SHAPES,
    Shape,
    placed_layers,
)
from specdec.protocols import Drafter, TreePolicy
from specdec.verifier.recursive_rejection import RecursiveRejection
from tests.decoding import decoder_of, outputs_of
from tests.models.standins import BASE, build
from tests.running import summary_of

ROOT = Path(__file__).parents[2]
SMALL_VOCABULARY = 8192
WIDTH = 384  # of zoo:target
FLOAT32_ROUNDING = 1e-5  # relative; a misplaced head or norm changes logits by more than 1e-2

FITS = {
    "same groups": BASE,
    "larger groups, as in 70B": replace(BASE, num_key_value_heads=1),
    "smaller groups": replace(BASE, num_key_value_heads=4),
    "no group at all": replace(BASE, num_key_value_heads=8),
    "uneven depth and groups": replace(
        BASE, num_hidden_layers=7, num_attention_heads=9, num_key_value_heads=3
    ),
}
# Of zoo:draft, with the same vocabulary.
DRAFT = Shape(
    hidden_size=320,
    intermediate_size=640,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=9001,
)
TEXTS = (
    "def fibonacci(n):\n    ",
    "It was a dark night, and the old captain",
    "The configuration file has the following options:\n\n- ",
)
NEW = 12


def tokens_of(texts: tuple[str, ...] = TEXTS) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("target"))
    ids: list[list[int]] = [tokenizer(text).input_ids for text in texts]
    return ids


def zoo(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(zoo_path(name), dtype=dtype).eval()


@torch.no_grad()
def hidden_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """The hidden state before the first layer and after each; before the last norm."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in (*model.model.layers, model.model.norm)
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def generate(model: Any, prompts: list[list[int]], new_tokens: int = NEW) -> list[list[int]]:
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None = None,
    *,
    temperature: float = 0.0,
    new_tokens: int = NEW,
) -> list[list[int]]:
    decoder = decoder_of(
        target,
        drafter,
        tree,
        RecursiveRejection() if temperature else None,
        temperature=temperature,
        seed=5,
        rows=2,
        max_tokens=128,
        stop_tokens=stop_tokens(target, ignore_eos=False),
    )
    return outputs_of(decoder, tokens_of(), new_tokens)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Prompts, and ids that no text has in this order."""
    random = torch.randint(SMALL_VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    text = tokens_of((" ".join(TEXTS) * 3,))[0][:40]
    return torch.cat([random, torch.tensor([text])])


@pytest.fixture(scope="module")
def small() -> Any:
    return zoo("target")


@pytest.fixture(scope="module")
def large() -> Any:
    return build(BASE)


@pytest.fixture(scope="module")
def expected(small: Any) -> list[list[int]]:
    return generate(small, tokens_of())


# --- the same function


@pytest.mark.some(2)
@pytest.mark.parametrize("fit", FITS)
@torch.no_grad()
def test_logits_are_those_of_the_small_model(fit: str, small: Any, tokens: Tensor) -> None:
    model = build(FITS[fit])
    assert {name: getattr(model.config, name) for name in asdict(FITS[fit])} == asdict(FITS[fit])
    want, found = small(tokens).logits, model(tokens).logits
    assert found.shape[-1] == FITS[fit].vocab_size
    shared = found[..., :SMALL_VOCABULARY]
    assert (shared - want).norm() <= FLOAT32_ROUNDING * want.norm()
    assert torch.equal(found.argmax(-1), want.argmax(-1))


@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_the_small_model(small: Any, tokens: Tensor) -> None:
    want = small(tokens).logits
    models = (build(BASE, dtype=torch.bfloat16), zoo("target", torch.bfloat16))
    mine, theirs = (
        float((model(tokens).logits[..., :SMALL_VOCABULARY].float() - want).norm())
        for model in models
    )
    assert mine <= 2 * theirs


@pytest.mark.some(1)
@pytest.mark.parametrize("layers", [6, 7, 12, 32])
def test_leaving_early_leaves_the_small_model_early(
    layers: int, small: Any, tokens: Tensor
) -> None:
    model = build(replace(BASE, num_hidden_layers=layers, intermediate_size=1152))
    mine, theirs = hidden_states(model, tokens), hidden_states(small, tokens)
    count = len(theirs) - 1
    for k, want in enumerate(theirs):
        after = k * layers // count
        assert after == (placed_layers(count, layers)[k - 1] + 1 if k else 0)
        found = mine[after]
        assert (found[..., :WIDTH] - want).norm() <= FLOAT32_ROUNDING * want.norm()
        constant = found[..., WIDTH].unique()
        assert len(constant) == 1
        assert constant > 0
        assert not found[..., WIDTH + 1 :].any()


@torch.no_grad()
def test_padded_tokens_never_win_after_any_layer(large: Any, tokens: Tensor) -> None:
    for state in hidden_states(large, tokens):
        logits = large.lm_head(large.model.norm(state))
        padded = (logits.double() / 4).softmax(-1)[..., SMALL_VOCABULARY:]  # at temperature 4
        assert float(padded.sum(-1).max()) < 1e-9
        assert logits.isfinite().all()


@torch.no_grad()
def test_padded_tokens_may_come_in(large: Any) -> None:
    ids = torch.arange(SMALL_VOCABULARY - 4, BASE.vocab_size)[None, :64]
    assert large(ids).logits.isfinite().all()


# --- the same tokens


@pytest.mark.slow
def test_generate_gives_the_same_tokens(large: Any, expected: list[list[int]]) -> None:
    assert generate(large, tokens_of()) == expected


@pytest.mark.some(1)
@pytest.mark.parametrize("direct", [True, False])
def test_greedy_tokens_are_those_of_generate(
    direct: bool, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PagedLM(build(BASE))
    assert target._direct is not None
    if not direct:
        monkeypatch.setattr(target, "_direct", None)
    assert decode(target, NoDrafter()) == expected


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama3_8b", FITS["larger groups, as in 70B"])
    monkeypatch.setitem(SHAPES, "llama_160m", DRAFT)


PAIRS = [
    ("standin:llama3_8b", "standin:llama_160m"),
    ("standin:llama3_8b", "zoo:draft"),  # the target has more logits than the draft
    ("zoo:target", "standin:llama_160m"),  # and fewer
]


@pytest.mark.some(1)
@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize(("path", "draft"), PAIRS)
def test_pairs_of_stand_ins_and_zoo_decode_losslessly(
    path: str, draft: str, expected: list[list[int]]
) -> None:
    target = load_model(path)
    drafter = SmallLlama(path=draft)
    assert decode(target, drafter, Static(widths=[2, 2, 1])) == expected
    assert drafter.vocab_size == min(target.vocab_size, drafter.lm.vocab_size)


@pytest.mark.some(1)
@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize(("path", "draft"), PAIRS)
def test_pairs_sample_tokens_that_there_are(path: str, draft: str) -> None:
    target = load_model(path)
    tree = Static(widths=[2, 1], children="sample")
    for output in decode(target, SmallLlama(path=draft), tree, temperature=1.5):
        assert output
        assert max(output) < SMALL_VOCABULARY


@pytest.mark.slow
def test_the_160m_shape_gives_the_tokens_of_zoo_draft() -> None:
    prompts = tokens_of()
    target = load_model("standin:llama_160m")
    assert decode(target, NoDrafter(), new_tokens=12) == generate(zoo("draft"), prompts, 12)


@pytest.mark.slow
@torch.no_grad()
def test_the_160m_shape_runs_in_bfloat16(tokens: Tensor) -> None:
    model = build("llama_160m", "draft", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = model(tokens[-1:, :8]).logits
    assert logits.isfinite().all()
    assert int(logits.argmax(-1).max()) < SMALL_VOCABULARY


# --- the cost


def test_every_layer_has_work_to_do(large: Any) -> None:
    """All rows of what is read before zero columns drop it, and as random as they say."""
    for layer in large.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert (part.weight.norm(dim=1) > 0).all()
        for part in (mlp.gate_proj, mlp.up_proj):
            assert (part.weight.norm(dim=1) > 0).all()
            last = part.weight[-64:]  # no neuron of the small model
            assert last.std().item() == pytest.approx(0.02, rel=0.05)
    places = placed_layers(6, BASE.num_hidden_layers)
    for index, layer in enumerate(large.model.layers):
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert bool(part.weight.any()) == (index in places)


@torch.no_grad()
def test_the_seed_decides_the_dropped_weights_only(large: Any, tokens: Tensor) -> None:
    same, other = build(BASE), build(BASE, seed=1)
    mine = large.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in same.state_dict().items())
    first = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(other.state_dict()[first], mine[first])
    assert torch.equal(other(tokens).logits.argmax(-1), large(tokens).logits.argmax(-1))


# --- by name


@pytest.mark.usefixtures("small_shapes")
def test_loading_by_name_brings_the_tokenizer_and_the_stop_token(small: Any) -> None:
    target = load_model("standin:llama3_8b")
    reference = load_model("zoo:target")
    assert target.name == "path=standin:llama3_8b"
    assert target.vocab_size == BASE.vocab_size
    assert target.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
    assert target.tokenizer.chat_template == reference.tokenizer.chat_template
    assert target.model.generation_config.to_dict() == small.generation_config.to_dict()
    assert stop_tokens(target, ignore_eos=False) == stop_tokens(reference, ignore_eos=False) != []


@torch.no_grad()
def test_a_saved_stand_in_is_an_ordinary_model(large: Any, tokens: Tensor, tmp_path: Path) -> None:
    large.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(tokens).logits, large(tokens).logits)


def test_every_config_names_a_stand_in() -> None:
    files = sorted((ROOT / "configs/target/standin").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(SHAPES)
    for file in files:
        assert yaml.safe_load(file.read_text())["path"] == f"standin:{file.stem}"


QUICK = ("tracker=none", "prompts.limit=2", "max_new_tokens=8", "dtype=float32", "device=cpu")


@pytest.mark.usefixtures("small_shapes")
def test_the_command_line_knows_stand_ins(specdec, tmp_path):
    arguments = ("target=standin/llama3_8b", "drafter.path=standin:llama_160m")
    assert specdec(*arguments, f"out={tmp_path}/o", *QUICK)[0] == 0
    summary = summary_of(tmp_path / "o")
    assert summary["target"] == "standin:llama3_8b"
    assert summary["lossless"]["verdict"] == "passed"
    assert summary["lossless"]["identical"] == 2


@pytest.mark.parametrize("setting", ["target.path", "drafter.path"])
def test_an_unknown_name_is_refused_in_one_line(specdec, tmp_path, setting):
    code, _, error = specdec(f"{setting}=standin:lion", f"out={tmp_path}/o", *QUICK)
    assert code == 2
    assert error.strip() == (
        f"error: {setting}=standin:lion: no such stand-in; "
        "there are llama3_1b, llama3_70b, llama3_8b, llama_160m"
    )


def test_a_wrong_name_in_a_folder_of_options_names_those_there_are(specdec):
    code, _, error = specdec("target=standin/llama3_9b")
    assert code == 2
    assert "standin/llama3_70b, standin/llama3_8b" in error

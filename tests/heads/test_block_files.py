"""What is read of block heads, what the start of a run says of them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.drafters.compose import Compose
from specdec.drafters.dflash import DFlash
from specdec.drafters.dspark import DSpark
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.heads.flash2 import Convolution, Selector
from specdec.heads.formats import levels_of, load_head
from specdec.models.paged import PagedLM
from tests.decoding import decoder_of, loaded, outputs_of
from tests.heads import blocks, made, oracle
from tests.heads.test_formats import states_of
from tests.models.tiny import own_attention, texts, tiny

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return PagedLM(tiny("llama", num_hidden_layers=8), name="target.path=tiny")


def edited(folder: Path, **config: Any) -> None:
    """Change config.json; None takes a field away."""
    said = json.loads((folder / "config.json").read_text()) | config
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))


def test_the_start_of_a_run_says_what_was_read(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model, own_mask="dict")
    head: Any = load_head(str(tmp_path), target, kinds=("dflash",))
    lent = ("embed_tokens.weight", "lm_head.weight")
    own = sum(p.numel() for name, p in head.named_parameters() if name not in lent)
    read = sum(p.nbytes for name, p in head.named_parameters() if name != lent[0])
    assert head.description == (
        "DFlash of z-lab: 2 layers of 32, blocks of 6, states 2 4 6 of 8, 96 of 96 tokens, "
        f"own_mask, rope 10,000, 64 positions, {own / 1e3:.3g} k parameters, "
        f"{read / 1e3:.3g} kB read per step"
    )
    for name in ("embed_tokens", "lm_head"):
        theirs = getattr(target.model.base_model, name, target.model.lm_head)
        assert head.get_parameter(f"{name}.weight").data_ptr() == theirs.weight.data_ptr()


@pytest.mark.parametrize("layout", ["z-lab", "jetspec", "deepspec", "speculators"])
def test_layouts_are_told_apart(layout: str, target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model, layout=layout)
    head: Any = load_head(str(tmp_path), target, kinds=("dflash",))
    names = {"jetspec": "JetSpec", "deepspec": "DeepSpec"}
    assert str(head.description).startswith(f"DFlash of {names.get(layout, layout)}: ")
    levels = levels_of(str(tmp_path), ("dflash",))
    assert levels == head.config.levels == (6 if layout == "deepspec" else 5)


@pytest.mark.parametrize(
    ("layers", "taps"), [(1, (5,)), (2, (2, 6)), (3, (2, 4, 6)), (5, (2, 3, 4, 5, 6))]
)
def test_states_that_nobody_names_are_spread(
    layers: int, taps: tuple[int, ...], target: PagedLM, tmp_path: Path
) -> None:
    blocks.dflash(tmp_path, target.model, layers=layers, taps=taps)
    edited(tmp_path, dflash_config={"mask_token_id": 5})
    head: Any = load_head(str(tmp_path), target, kinds=("dflash",))
    assert head.config.taps == taps


def test_a_mask_that_was_never_trained_is_said(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=8)
    model.get_input_embeddings().weight.data[5] = 1e-6
    target = PagedLM(model, name="target.path=tiny")
    blocks.dflash(tmp_path, model)
    head: Any = load_head(str(tmp_path), target, kinds=("dflash",))
    assert "whose mask token 5 has an embedding of about zero" in head.description
    blocks.dflash(tmp_path, model, own_mask="tensor")
    head = load_head(str(tmp_path), target, kinds=("dflash",))
    assert "about zero" not in head.description


def inner(**fields: Any) -> Callable[[Path], None]:
    """Change dflash_config."""

    def change(folder: Path) -> None:
        own = json.loads((folder / "config.json").read_text())["dflash_config"] | fields
        edited(folder, dflash_config={k: v for k, v in own.items() if v is not None})

    return change


def stated(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder, **fields)


def beside(content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "mask_embedding.pt")


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / FILE)
        save_file({k: v for k, v in found.items() if k not in names}, folder / FILE)

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no mask": (inner(mask_token_id=None), "has mask_token_id=None, and blocks are filled"),
    "mask beyond": (inner(mask_token_id=96), "token 96, and the embedding has 96 rows: this head"),
    "mask below": (inner(mask_token_id=-1), "token -1, and the embedding has 96 rows"),
    "block": (stated(block_size=1), "has block_size=1, which must be a number of at least 2"),
    "block of words": (stated(block_size="16"), "has block_size=16, which must be a number"),
    "softcap": (inner(final_logit_softcapping="x"), "has final_logit_softcapping=x, which must"),
    "scale": (inner(input_embedding_scale=True), "has input_embedding_scale=True, which must"),
    "attention": (inner(attention_mode="mla"), "asks for attention_mode=mla, which layers"),
    "types": (
        stated(layer_types=["linear_attention"] * 2),
        "layer_types, .* do not say of 2 layers",
    ),
    "few types": (
        stated(layer_types=["full_attention"]),
        "layer_types, .* do not say of 2 layers",
    ),
    "window": (
        stated(layer_types=["sliding_attention"] * 2, use_sliding_window=True, sliding_window=5),
        "has sliding_window=5, and a window must hold a block of 6",
    ),
    "no window": (stated(layer_types=["sliding_attention"] * 2), "has sliding_window=None, and"),
    "states": (inner(target_layer_ids=[1, 4]), "fc.weight joins 3 states of 32 .* 2 are named"),
    "state beyond": (inner(target_layer_ids=[1, 3, 8]), "reads state 9, and those of .* 0 to 8"),
    "states of a word": (inner(target_layer_ids="last"), "target_layer_ids=last, which must be"),
    "vocabulary": (stated(vocab_size=100), "a vocabulary of 100, and target.path=tiny has 96"),
    "width": (stated(hidden_size=48), r"has no embed_tokens\.weight \(and 1 more\)"),
    "width of words": (stated(hidden_size="32x"), "has hidden_size=32x, which must be a number"),
    "no norm": (without("norm.weight"), r"has no norm\.weight, which a head"),
    "layers": (
        stated(num_hidden_layers=3, layer_types=None),
        r"has no layers\.2\.input_layernorm\.weight",
    ),
    "size of the mask": (beside(torch.zeros(31)), "holds no finite embedding of 32 numbers"),
    "no embedding": (beside({"mask_token_id": 5}), "holds no finite embedding of 32"),
    "infinite": (beside(torch.full((32,), torch.inf)), "holds no finite embedding"),
    "another mask": (
        beside({"mask_token_id": 6, "embedding": torch.ones(32)}),
        r"mask_embedding\.pt is of token 6, and config\.json has mask_token_id=5",
    ),
    "broken mask": (
        lambda folder: (folder / "mask_embedding.pt").write_bytes(b"PK nothing"),
        r"mask_embedding\.pt is cut, or holds more than tensors",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, target: PagedLM, tmp_path: Path
) -> None:
    blocks.dflash(tmp_path, target.model)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_head(str(tmp_path), target, kinds=("dflash",))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("drafter.path=")


def test_a_correction_of_another_kind_is_refused(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model, layout="deepspec", markov="vanilla")
    edited(tmp_path, markov_head_type="table")
    with pytest.raises(ValueError, match="markov_head_type=table, which is none of vanilla"):
        load_head(str(tmp_path), target, kinds=("dspark",))
    edited(tmp_path, markov_head_type="gated")
    with pytest.raises(ValueError, match=r"has no markov_head\.gate_proj\.bias \(and 1 more\)"):
        load_head(str(tmp_path), target, kinds=("dspark",))
    without("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")(tmp_path)
    edited(tmp_path, markov_head_type="vanilla")
    with pytest.raises(ValueError, match=r"has no markov_head\.markov_w1\.weight \(and 1 more\)"):
        load_head(str(tmp_path), target, kinds=("dspark",))
    with pytest.raises(ValueError, match=r"of kind dspark \(DSpark of DeepSpec\).*drafter=dspark"):
        load_head(str(tmp_path), target, kinds=("dflash",))


def test_confidence_needs_its_head(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model, layout="deepspec", markov="vanilla")
    drafter = DSpark(path=str(tmp_path), confidence=True)
    with pytest.raises(ValueError, match=r"^drafter\.confidence=true: .* has no confidence head"):
        loaded(drafter, target)
    said = r"^drafter\.parts\.a: DSpark needs trees of its own .*; leave out its confidence=true$"
    with pytest.raises(ValueError, match=said):
        Compose(parts={"a": drafter, "b": NGram()}, mode="union")


class Noting(Static):
    """Keeps what it is asked."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.asked: list[torch.Tensor] = []  # chances [B, F, width]

    def select(self, at: Any, scores: torch.Tensor) -> None:
        self.asked.append(scores.exp())


@pytest.mark.parametrize("children", ["top_k", "sample"])
@pytest.mark.parametrize("reads", ["slot", "both"])
def test_confidence_is_a_factor_where_a_policy_decides(
    reads: str, children: str, target: PagedLM, tmp_path: Path
) -> None:
    """What is proposed and drawn is the same without it."""
    facts = blocks.dflash(
        tmp_path, target.model, layout="deepspec", markov="vanilla", confidence=reads
    )
    every, asked = [], []
    for confidence in (False, True):
        policy = Noting(widths=[2, 2], children=children)
        drafter = DSpark(path=str(tmp_path), confidence=confidence)
        decoder = decoder_of(target, drafter, policy, temperature=1.0)
        found: list[Any] = []
        accept = decoder.rule.accept

        def noting(
            context: Any, tree: Any, logits: Any, kept: Any = found, accept: Any = accept
        ) -> Any:
            kept.append(tree)
            return accept(context, tree, logits)

        decoder.rule.accept = noting  # type: ignore[method-assign]
        outputs_of(decoder, [texts()[0]], 1)
        every.append(found[0])
        asked.append(policy.asked)
    plain, sure = every
    assert plain.tokens.equal(sure.tokens)
    assert plain.proposal.probs.equal(sure.proposal.probs)
    states = states_of(own_attention(target.model), texts()[0], facts.taps)
    slots = oracle.block(facts, states, texts()[0])
    w, chances = facts.tensors, []
    for node, level in enumerate((0, 1, 1)):
        token = int(plain.tokens[0, node])
        inputs = [slots[level], w["markov_head.markov_w1.weight"][token]]
        read = torch.cat(inputs if reads == "both" else inputs[:1])
        logit = w["confidence_head.proj.weight"][0] @ read + w["confidence_head.proj.bias"][0]
        chances.append(float(logit.sigmoid()))
    first, second = (b / a for a, b in zip(*asked, strict=True))
    torch.testing.assert_close(first[0].flatten(), torch.full((2,), chances[0]).double())
    wanted = chances[0] * torch.tensor(chances[1:]).double()[:, None].expand(2, 2)
    torch.testing.assert_close(second[0], wanted, rtol=1e-4, atol=1e-6)


def test_p_eagle_needs_a_mask_token(target: PagedLM, tmp_path: Path) -> None:
    made.eagle3(tmp_path, target.model, layout="specforge", mask=7)
    head: Any = load_head(str(tmp_path), target, kinds=("peagle",))
    assert head.config.mask == 7
    assert "P-EAGLE of SpecForge: 1 layer of 32" in head.description
    edited(tmp_path, mask_token_id=None, ptd_token_id=9)  # its first name
    head = load_head(str(tmp_path), target, kinds=("peagle",))
    assert head.config.mask == 9
    for token, message in (
        (None, "has mask_token_id=None, and blocks are filled"),
        (96, "token 96, and the embedding has 96 rows: this head belongs to another target"),
    ):
        edited(tmp_path, mask_token_id=token, ptd_token_id=None)
        with pytest.raises(ValueError, match=message):
            load_head(str(tmp_path), target, kinds=("peagle",))
    edited(tmp_path, mask_token_id=7)
    with pytest.raises(ValueError, match=r"of kind peagle \(P-EAGLE of .*drafter=peagle"):
        load_head(str(tmp_path), target, kinds=("eagle3",))
    found = load_file(tmp_path / FILE)
    found["mask_hidden"] = found["mask_hidden"][..., :-1].contiguous()
    save_file(found, tmp_path / FILE)
    with pytest.raises(
        ValueError, match=r"mask_hidden of shape \[1, 1, 95\], and .* \[1, 1, 96\]"
    ):
        load_head(str(tmp_path), target, kinds=("peagle",))


UNSELECTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "groups": (inner(conv_group_size=7), r"conv_group_size=7, which must divide its hidden_size="),
    "taps": (inner(conv_kernel_size=7), "conv_kernel_size=7, which must fit into a block"),
    "words": (inner(selector_rank="256"), "selector_rank=256, which must be a number of at least"),
    "none": (inner(selector_top_k=0), "selector_top_k=0, which must be a number of at least 1"),
    "many": (inner(selector_top_k=97), "selector_top_k=97, which must be no more than its tokens"),
    "rank": (inner(selector_rank=5), r"predecessor_codebook of shape \[96, 6\], and .* \[96, 5\]"),
    "no kernel": (
        without("layers.1.mlp_conv.base_kernel"),
        r"has no layers\.1\.mlp_conv\.base_kernel, which a head",
    ),
}


@pytest.mark.parametrize(("damage", "message"), UNSELECTED.values(), ids=UNSELECTED.keys())
def test_a_selector_that_does_not_fit_is_refused_in_one_line(
    damage: Callable[[Path], None], message: str, target: PagedLM, tmp_path: Path
) -> None:
    blocks.dflash(tmp_path, target.model, choices=9)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_head(str(tmp_path), target, kinds=("dflash",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said", "message"),
    [
        ({}, {"sample_from_anchor": True}, "sample_from_anchor=True, which must be false"),
        ({"named": 40}, {}, "draft_vocab_size=40, which must be that of the target"),
    ],
)
def test_a_selector_of_speculators_knows_all_tokens_after_the_root(
    options: dict[str, Any], said: dict[str, Any], message: str, target: PagedLM, tmp_path: Path
) -> None:
    blocks.dflash(tmp_path, target.model, layout="speculators", choices=9, **options)
    edited(tmp_path, **said)
    with pytest.raises(ValueError, match=message):
        load_head(str(tmp_path), target, kinds=("dflash",))


@pytest.mark.parametrize("trap", ["before", "after", "taps", "parent", "slot"])
def test_the_traps_of_a_selector_are_seen(trap: str, target: PagedLM, tmp_path: Path) -> None:
    """None of these crashes; each moves a probability of the first levels."""
    facts = blocks.dflash(tmp_path, target.model, choices=9)
    drafter: Any = DFlash(path=str(tmp_path))
    decoder = decoder_of(target, drafter, Static(widths=[2, 2]))
    head = drafter.head
    mixing, scoring = Convolution.coefficients, Selector.forward

    def wrong(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        found = mixing(self, inputs).clone()
        if trap == "taps":
            return found.flip(3)
        found[0 if trap == "before" else 1] = mixing(self, 0 * inputs)[0]
        return found

    def other(self: Any, normal: Any, tokens: torch.Tensor, ids: Any) -> torch.Tensor:
        tokens = (tokens + 1) % 96 if trap == "parent" else tokens
        return scoring(self, normal.roll(1, -1) if trap == "slot" else normal, tokens, ids)

    with pytest.MonkeyPatch.context() as patch:
        if trap in ("parent", "slot"):
            patch.setattr(Selector, "forward", other)
        else:
            patch.setattr(Convolution, "coefficients", wrong)
        found: list[Any] = []
        accept = decoder.rule.accept

        def noting(context: Any, tree: Any, logits: Any) -> Any:
            found.append(tree)
            return accept(context, tree, logits)

        decoder.rule.accept = noting  # type: ignore[method-assign]
        outputs_of(decoder, [texts()[0]], 1)
    assert head.config.choices == 9
    states = states_of(own_attention(target.model), texts()[0], facts.taps)
    law = oracle.dflash2(facts, states, texts()[0], []).softmax(-1)
    ids, probs = found[0].proposal.ids[0, 0], found[0].proposal.probs[0, 0].double()
    assert (probs - law[ids]).abs().max() > 1e-3


def test_nothing_but_what_the_selector_scores_is_drafted(target: PagedLM, tmp_path: Path) -> None:
    """A tree that asks for more children than there are gets those."""
    blocks.dflash(tmp_path, target.model, choices=3)
    decoder = decoder_of(target, DFlash(path=str(tmp_path)), Static(widths=[5, 5]))
    sizes: list[int] = []
    accept = decoder.rule.accept

    def noting(context: Any, tree: Any, logits: Any) -> Any:
        sizes.extend(tree.size.tolist())
        return accept(context, tree, logits)

    decoder.rule.accept = noting  # type: ignore[method-assign]
    plain = outputs_of(decoder_of(target, NoDrafter()), [texts()[0]], 4)
    assert outputs_of(decoder, [texts()[0]], 4) == plain
    assert set(sizes) == {1 + 3 + 9}


def test_fewer_tokens_need_an_output_head(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model, layout="speculators", named=40)
    without("lm_head.weight")(tmp_path)
    with pytest.raises(ValueError, match=r"has no lm_head\.weight"):
        load_head(str(tmp_path), target, kinds=("dflash",))


def test_trees_deeper_than_a_block_are_refused(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model)
    deep = Static(widths=[1] * 6)
    said = r"^drafter\.path=.*: drafts at most 5 levels, those of a block, and the tree has 6"
    with pytest.raises(ValueError, match=said):
        decoder_of(target, DFlash(path=str(tmp_path)), deep)
    drafter = DFlash(path=str(tmp_path))
    drafter.check(deep)  # nothing is known of the head
    with pytest.raises(ValueError, match=said):
        drafter.find()
    with pytest.raises(ValueError, match=r"^drafter\.depth=6: .* drafts at most 5 levels"):
        DFlash(path=str(tmp_path), depth=6).find()
    drafter = DFlash(path=str(tmp_path))
    decoder_of(target, drafter, Chain(budget=9))
    assert drafter.levels == 5


@pytest.mark.parametrize("base", [-1.0, 0.0, float("inf"), float("nan")])
def test_angles_have_a_positive_base(base: float) -> None:
    with pytest.raises(ValueError, match=rf"^drafter\.rope_theta={base}: must be above 0"):
        DSpark(path="heads", rope_theta=base)


@pytest.mark.parametrize("layout", ["z-lab", "jetspec"])
def test_a_causal_block_has_as_many_slots_as_it_needs(
    layout: str, target: PagedLM, tmp_path: Path
) -> None:
    blocks.dflash(tmp_path, target.model, layout=layout)
    drafter: Any = loaded(DFlash(path=str(tmp_path)), target)
    assert drafter.model.head.config.slots(2) == (3 if layout == "jetspec" else 6)


def test_it_drafts_in_company(target: PagedLM, tmp_path: Path) -> None:
    blocks.dflash(tmp_path, target.model)
    prompts = [*texts(), texts()[0][:1]]
    plain = outputs_of(decoder_of(target, NoDrafter()), prompts, 12)
    parts = {"ngram": NGram(), "head": DFlash(path=str(tmp_path))}
    tree = Dynamic(budget=12, depth=7)  # deeper than a block
    drafter = Compose(parts=parts, mode="union")
    decoder = decoder_of(target, drafter, tree, rows=2, share=False)
    assert outputs_of(decoder, prompts, 12) == plain

"""drafter=early_exit: nothing is computed twice, and what verification takes over is right."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.decode import Decoder
from specdec.drafters.compose import Compose
from specdec.drafters.early_exit import EarlyExit
from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.models.direct import Layer
from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.observation import Observation
from specdec.protocols import StepContext, TreePolicy
from specdec.tree import TokenTree
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded, outputs_of, requests_of
from tests.models.tiny import tiny

TEXTS = ("def fibonacci(n):\n    ", "It was a dark night, and the old captain stood at the")
NEW = 16


def load(dtype: torch.dtype) -> PagedLM:
    return load_model("zoo:target", Placement(dtype=dtype))


@pytest.fixture(scope="module")
def target() -> PagedLM:
    return load(torch.float32)


def outputs(decoder: Decoder, target: PagedLM) -> list[list[int]]:
    return outputs_of(decoder, [target.tokenizer(text).input_ids for text in TEXTS], NEW)


@pytest.mark.some(1)
@pytest.mark.parametrize("exit_layer", [1, 2, 5])
@pytest.mark.parametrize(
    "tree",
    [Chain(budget=4), Static(widths=[3, 2, 1]), Dynamic(budget=12)],
    ids=["chain", "static", "dynamic"],
)
def test_a_verified_node_costs_each_layer_once(
    target: PagedLM, tree: TreePolicy, exit_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows through every layer, counted where the layers are called."""
    rows = [0] * target.layers
    nodes = dropped = 0
    call, end = Layer.__call__, EarlyExit.end

    def counted(self: Layer, index: int, hidden: torch.Tensor, *rest: Any) -> Any:
        rows[index] += len(hidden)
        return call(self, index, hidden, *rest)

    def ended(self: EarlyExit, context: StepContext, tree: TokenTree, expanded: Any) -> TokenTree:
        nonlocal nodes, dropped
        nodes += int(tree.size.sum())
        run = self._nodes.count  # places of candidates that were expanded, dead ones included
        dropped += run - int((expanded >= 0).sum())
        return end(self, context, tree, expanded)

    decoder = decoder_of(target, EarlyExit(exit_layer=exit_layer), tree)
    plain = outputs(decoder_of(target, NoDrafter()), target)
    monkeypatch.setattr(Layer, "__call__", counted)
    prompts = sum(len(target.tokenizer(text).input_ids) - 1 for text in TEXTS)
    monkeypatch.setattr(EarlyExit, "end", ended)
    assert outputs(decoder, target) == plain
    assert nodes > NEW
    assert rows[exit_layer:] == [prompts + nodes] * (target.layers - exit_layer)
    assert rows[:exit_layer] == [prompts + nodes + dropped] * exit_layer
    assert (dropped > 0) == isinstance(tree, Dynamic)  # candidates drafted on, but not kept


@pytest.mark.some(1)
@pytest.mark.parametrize("depth", [None, 2])
def test_resumed_logits_are_those_of_a_whole_pass(
    depth: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also below nodes that lie deeper than the drafter goes, in a composition."""
    target = load(torch.float64)
    tree = Dynamic(budget=12, depth=5)
    drafter: Any = EarlyExit(depth=depth)
    if depth:
        searching = NGram(max_match=4)
        parts = {"ngram": searching, "early_exit": drafter}
        drafter = Compose(parts=parts, mode="union")
    verify, worst, resumed = TreeVerifier.verify, 0.0, 0

    def both(
        self: TreeVerifier, context: StepContext, tree: TokenTree
    ) -> tuple[torch.Tensor, Observation]:
        nonlocal worst, resumed
        logits, seen = verify(self, context, tree)
        if tree.begun is not None:
            resumed += 1
            kept = self.cache.tree_keys.clone(), self.cache.tree_values.clone()
            whole, _ = verify(self, context, replace(tree, begun=None))
            size = int(tree.size[0])
            worst = max(worst, float((whole - logits)[:, :size].abs().max()))
            for scratch, before in zip(
                (self.cache.tree_keys, self.cache.tree_values), kept, strict=True
            ):
                worst = max(worst, float((scratch - before)[:, :1, :, :size].abs().max()))
        return logits, seen

    monkeypatch.setattr(TreeVerifier, "verify", both)
    outputs(decoder_of(target, drafter, tree), target)
    assert resumed > 5
    assert worst < 1e-9


def test_the_target_drafting_with_all_but_nothing_left_out_agrees_with_itself() -> None:
    """A layer that adds nothing may be left out: then every draft is accepted."""
    model = AutoModelForCausalLM.from_pretrained(
        load(torch.float32).model.config._name_or_path, dtype=torch.float32
    )
    last = model.model.layers[-1]
    torch.nn.init.zeros_(last.self_attn.o_proj.weight)
    torch.nn.init.zeros_(last.mlp.down_proj.weight)
    target = PagedLM(model, load(torch.float32).tokenizer)
    drafter = EarlyExit(exit_layer=target.layers - 1)
    decoder = decoder_of(target, drafter, Chain(budget=3))
    prompt = target.tokenizer(TEXTS[0]).input_ids
    (done,) = decoder.run(requests_of([prompt], NEW))
    assert done.accepted_lengths == [4] * (NEW // 4)


@pytest.mark.parametrize("exit_layer", [0, 6, -1])
def test_exit_layers_that_do_not_exist_are_refused(target: PagedLM, exit_layer: int) -> None:
    with pytest.raises(
        ValueError, match=rf"drafter\.exit_layer={exit_layer}: must be from 1 to 5"
    ):
        loaded(EarlyExit(exit_layer=exit_layer), target)


def test_models_that_only_run_as_a_whole_are_refused() -> None:
    whole = PagedLM(tiny("granite"))
    with pytest.raises(ValueError, match=r"layers of GraniteForCausalLM cannot be run in part"):
        loaded(EarlyExit(exit_layer=1), whole)

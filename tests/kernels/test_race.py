"""The last draw in kernels, against the definition in float64."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specdec.kernels import gpu
from specdec.kernels.layout import TargetLaw
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, uniforms
from tests.kernels.cases import DEVICE, SEED, guards, keys_at, random_case, some_logits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities


ALL = 2.0  # more than a token can have


class Rest(NamedTuple):
    """What `draw_rest` is asked; the answer of rows with a length is known, if not close."""

    logits: Tensor
    node: Tensor
    length: Tensor
    ids: Tensor
    taken: Tensor
    temperature: float
    everything: bool = False

    def draw(self, kernels: ModuleType, keys: Tensor) -> Tensor:
        size = torch.full_like(self.node, self.logits.shape[1], dtype=torch.int32)
        law = kernels.target_law(self.logits, size, temperature=self.temperature)
        return self.draw_by(kernels, law, keys)

    def draw_by(self, kernels: ModuleType, law: TargetLaw, keys: Tensor) -> Tensor:
        found: Tensor = kernels.draw_rest(
            self.logits,
            law,
            self.node,
            self.length,
            ids=self.ids,
            taken=self.taken,
            keys=keys,
            stream=TOKEN_STREAM,
        )
        return found


def some_rest(
    *, vocab: int, support: int, dtype: torch.dtype = torch.float32, everything: bool = False
) -> Rest:
    """Six rows, the fourth idle. A part, nothing or all is taken off tokens of the support, whose
    last entries are void and name tokens that others name too."""
    batch, nodes, temperature = 6, 3, 0.8
    generator = torch.Generator().manual_seed(vocab + support)
    logits = some_logits(batch, nodes, vocab, dtype)
    node = torch.tensor([0, 1, 2, 0, 1, 2], device=DEVICE)
    length = torch.tensor([1, 2, 3, 0, 1, 1], device=DEVICE)
    ids = torch.rand(batch, vocab, generator=generator).topk(support).indices.to(DEVICE)
    rows = torch.arange(batch, device=DEVICE)
    whole = (logits.double() / temperature).softmax(-1)[rows, node]
    taken = whole.gather(1, ids) * torch.rand(batch, support, generator=generator).to(DEVICE)
    taken[:, ::3] = ALL
    if everything:
        taken.fill_(ALL)
    else:
        void = max(1, support // 4)
        ids[:, -void:] = ids[:, :1]
        taken[:, -void:] = 0.0
    return Rest(logits, node, length, ids, taken.float(), temperature, everything)


def expected_tokens(rest: Rest, step: int) -> tuple[list[int], bool]:
    """In float64, with numpy's random numbers; and whether all races were won by a margin."""
    batch, _, vocab = rest.logits.shape
    rows = torch.arange(batch, device=DEVICE)
    whole = (rest.logits.double() / rest.temperature).softmax(-1)[rows, rest.node]
    weights = whole.scatter_add(1, rest.ids, -rest.taken.double()).clamp(min=0.0)
    if rest.everything:
        weights = whole
    uniform = uniforms(SEED, range(batch), [step] * batch, TOKEN_STREAM, vocab).to(DEVICE)
    times = -torch.log1p(-uniform) / weights
    (first, second), order = times.sort(1).values[:, :2].unbind(1), times.argsort(1)
    clear = ((second - first) > 1e-4 * first) | second.isinf()
    tokens = torch.where(rest.length > 0, order[:, 0], 0)
    return tokens.tolist(), bool((clear | (rest.length == 0)).all())


@pytest.mark.some(2)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("vocab", "support", "dtype", "everything"),
    [
        (101, 7, torch.float32, False),
        (33, 33, torch.bfloat16, False),
        (128, 4, torch.float16, False),
        (7, 1, torch.float32, False),
        (20, 20, torch.float32, True),
    ],
    ids=["101 tokens", "whole vocabulary", "full chunks", "one candidate", "nothing left"],
)
def test_the_last_draw(vocab: int, support: int, dtype: torch.dtype, everything: bool) -> None:
    rest = some_rest(vocab=vocab, support=support, dtype=dtype, everything=everything)
    drawn = set()
    checked = 0
    for step in range(20):
        tokens, clear = expected_tokens(rest, step)
        if not clear:
            continue
        assert rest.draw(gpu, keys_at(step, 6)).tolist() == tokens
        drawn.update(tokens)
        checked += 1
        if checked == 3:
            break
    assert checked == 3
    assert len(drawn) > 1


@pytest.mark.usefixtures("small_chunks")
def test_the_last_draw_is_that_of_the_rules_that_are_kernels() -> None:
    """Nothing is taken off the target at the root: the same numbers, the same token."""
    case = random_case(3, sizes=[1] * 6, vocab=90, support=5, repeats=False, dtype=torch.float32)
    trees, keys = case.trees(), keys_at(0, 6)
    _, length, token = gpu.RULES["target_only"](
        trees, case.logits, temperature=0.8, keys=keys, streams=(ACCEPT_STREAM, TOKEN_STREAM)
    )
    nothing = torch.zeros(6, 5, device=DEVICE)
    ids = nothing.long()
    rest = Rest(case.logits, torch.zeros_like(length), length, ids, nothing, 0.8)
    assert torch.equal(rest.draw(gpu, keys), token)


@pytest.mark.usefixtures("small_chunks")
def test_the_last_draw_reads_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided inputs, logits of other nodes and of idle rows, tensors as they come."""
    rest, keys = some_rest(vocab=70, support=9), keys_at(1, 6)
    clean = rest.draw(gpu, keys)
    at = torch.zeros(6, 3, dtype=torch.bool, device=DEVICE)
    at[torch.arange(6), rest.node] = rest.length > 0
    size = torch.full((6,), 3, dtype=torch.int32, device=DEVICE)
    law = gpu.target_law(rest.logits, size, temperature=0.8)
    poisoned = rest._replace(
        logits=rest.logits.masked_fill(~at[..., None], float("nan")).mT.contiguous().mT,
        ids=rest.ids.masked_fill(rest.length[:, None] == 0, 2**40).T.contiguous().T,
        taken=rest.taken.T.contiguous().T,
        node=rest.node.masked_fill(rest.length == 0, 2**40),
    )
    with guards(monkeypatch):
        found = poisoned.draw_by(gpu, law, keys)
    assert torch.equal(found, clean)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_last_draw_from_nonsense_is_a_token(value: float) -> None:
    rest = some_rest(vocab=40, support=5)
    nonsense = rest._replace(logits=torch.full_like(rest.logits, value))
    assert ((nonsense.draw(gpu, keys_at(0, 6)) >= 0) & (rest.draw(gpu, keys_at(0, 6)) < 40)).all()

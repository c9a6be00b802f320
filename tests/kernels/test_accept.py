"""Acceptance kernels against loops in float64 that follow the papers.

Where a comparison is within rounding of a tie, the kernel may go either way; the loops say so."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from specdec.kernels.gpu import accept
from specdec.kernels.layout import DraftedTrees
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, random_keys, uniforms
from tests.kernels.cases import DEVICE, Case, random_case

STREAMS = ACCEPT_STREAM, TOKEN_STREAM
MARGIN = 1e-4
SEED = 11
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@dataclass(frozen=True)
class Outcome:
    """What a rule keeps of one tree; `margin` is how close any comparison on the way was."""

    path: list[int]
    token: int
    margin: float


def expected_outcome(
    case: Case, row: int, rule: str, temperature: float, coins: Tensor, uniform: Tensor
) -> Outcome:
    """One tree in float64, with dense distributions, as the papers have it.

    target_only: is the next token, drawn from the target, this child? recursive_rejection:
    SpecInfer (Miao et al. 2024, algorithm 2) and Sequoia (Chen et al. 2024, algorithm 2).
    """
    scores = case.logits[row].double().cpu().numpy()
    path, margin = [0], 1.0
    while True:
        node = path[-1]
        children = [i for i in range(case.size[row]) if case.parents[row, i] == node]
        if rule == "greedy":
            choice = int(np.flatnonzero(scores[node] == scores[node].max())[0])
            taken = [i for i in children if case.tokens[row, i] == choice]
            if not taken:
                return Outcome(path, choice, 1.0)
            path.append(taken[0])
            continue
        p = np.exp((scores[node] - scores[node].max()) / temperature)
        whole = p = p / p.sum()
        left = 1.0  # the smaller, the larger its rounding errors
        q = case.drafts[row, node].astype(np.float32).astype(float)
        for child in children:
            x = case.tokens[row, child]
            if rule == "target_only":
                chance, rest = p[x], np.where(np.arange(len(p)) == x, 0.0, p)
            else:
                chance, rest = min(1.0, p[x] / q[x]) if q[x] > 0 else 0.0, np.maximum(p - q, 0.0)
                if not case.repeats and q[x] < q.sum():
                    q = np.where(np.arange(len(q)) == x, 0.0, q)
                    q = q / q.sum()
            coin = float(coins[child])
            if chance > 0.0:
                margin = min(margin, abs(coin - chance) * left)
            if coin < chance:
                path.append(child)
                break
            if rest.sum() > 1e-9:
                left *= rest.sum()
                p = rest / rest.sum()
            elif rule == "target_only":
                p = whole
        else:
            times = -np.log1p(-uniform.numpy()) / np.where(p > 0, p, 1e-300)
            first, second = np.sort(times)[:2]
            return Outcome(path, int(times.argmin()), min(margin, (second - first) / second))


def check(case: Case, rule: str, temperature: float, support: int | None = None) -> list[int]:
    """The kernel keeps what the loops keep, at the first step that is no close call; lengths."""
    batch, nodes, vocab = case.logits.shape
    for step in range(50):
        ids, steps = list(range(batch)), [step] * batch
        coins = uniforms(SEED, ids, steps, ACCEPT_STREAM, nodes)
        uniform = uniforms(SEED, ids, steps, TOKEN_STREAM, vocab)
        busy = [row for row in ids if case.size[row]]
        expected = {
            row: expected_outcome(case, row, rule, temperature, coins[row], uniform[row])
            for row in busy
        }
        if all(outcome.margin > MARGIN for outcome in expected.values()):
            break
    else:
        pytest.fail("every step was a close call")
    path, length, token = accept.RULES[rule](
        case.trees(support=support),
        case.logits,
        temperature=temperature,
        keys=random_keys(SEED, ids, steps, DEVICE),
        streams=STREAMS,
    )
    assert path.shape == (batch, case.depth + 1)
    assert ((path >= 0) & (path < nodes)).all()
    assert ((token >= 0) & (token < vocab)).all()
    for row in ids:
        if not case.size[row]:
            assert length[row] == 0
            continue
        kept = expected[row].path
        assert length[row] == len(kept)
        assert path[row, : len(kept)].tolist() == kept
        assert token[row] == expected[row].token
    return length.tolist()


RULES = ("greedy", "target_only", "recursive_rejection")


@pytest.mark.some(2)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_keeps_what_the_papers_keep(rule: str, repeats: bool) -> None:
    """Bushes, chains, an idle row and a bare root, over a vocabulary that fills no chunk."""
    lengths = []
    for seed, dtype, bushy, temperature in (
        (0, torch.float32, 0.5, 1.0),
        (1, torch.bfloat16, 0.2, 0.7),
        (2, torch.float16, 0.8, 1.4),
    ):
        case = random_case(
            seed,
            sizes=[9, 0, 6, 1, 8],
            vocab=101,
            support=7,
            repeats=repeats,
            dtype=dtype,
            temperature=temperature,
            bushy=bushy,
        )
        lengths += check(case, rule, temperature)
    assert {0, 1, 2} <= set(lengths)


@pytest.mark.some(1)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
@pytest.mark.parametrize("rule", ["target_only", "recursive_rejection"])
def test_many_siblings_are_rejected_one_after_the_other(rule: str, repeats: bool) -> None:
    case = random_case(
        7,
        sizes=[6, 6, 3, 3] * 4,
        vocab=12,
        support=7,
        repeats=repeats,
        dtype=torch.float32,
        star=True,
    )
    lengths = check(case, rule, 1.0, support=9)
    assert 1 < lengths.count(1) < 15


@pytest.mark.some(3)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("sizes", "vocab", "support", "bushy"),
    [
        ([1], 40, 3, 0.0),
        ([34], 7, 7, 0.3),
        ([5, 4], 300, 300, 0.9),
        ([4], 9001, 64, 0.5),
    ],
    ids=["root", "34 nodes", "whole vocabulary", "9001 tokens"],
)
def test_sizes_at_the_edges(
    rule: str, sizes: list[int], vocab: int, support: int, bushy: float
) -> None:
    case = random_case(
        3,
        sizes=sizes,
        vocab=vocab,
        support=support,
        repeats=vocab == 7,
        dtype=torch.float32,
        bushy=bushy,
    )
    check(case, rule, 1.0, support=support)


@pytest.mark.parametrize(
    "nodes", [129, *(pytest.param(n, marks=pytest.mark.slow) for n in (65, 128, 255, 256, 257))]
)
@pytest.mark.parametrize("rule", RULES)
def test_wide_trees(rule: str, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, the nodes do not fit one tile."""
    monkeypatch.setattr(accept, "TILE", 64)
    case = random_case(
        nodes,
        sizes=[nodes],
        vocab=20,
        support=12,
        repeats=nodes % 2 == 0,
        dtype=torch.float32,
        fan=8,
    )
    lengths = check(case, rule, 1.0)
    assert max(lengths) > 1


@pytest.mark.usefixtures("small_chunks")
def test_equal_logits_choose_the_first_token() -> None:
    logits = torch.zeros(1, 2, 101)
    logits[0, 0, [40, 70, 99]] = 3.0
    logits[0, 1, [20, 90]] = 3.0
    tree = DraftedTrees(
        tokens=torch.tensor([[5, 40]], device=DEVICE),
        parents=torch.tensor([[-1, 0]], dtype=torch.int32, device=DEVICE),
        size=torch.tensor([2], dtype=torch.int32, device=DEVICE),
        depth=1,
    )
    for dtype in (torch.float32, torch.bfloat16):
        path, length, token = accept.greedy_accept(
            tree, logits.to(DEVICE, dtype), temperature=0.0, keys=None, streams=STREAMS
        )
        assert path.tolist() == [[0, 1]]
        assert length.tolist() == [2]
        assert token.tolist() == [20]


def run(rule: str, trees: DraftedTrees, logits: Tensor, step: int = 0) -> list[Tensor]:
    batch = len(logits)
    keys = random_keys(SEED, list(range(batch)), [step] * batch, DEVICE)
    return list(accept.RULES[rule](trees, logits, temperature=1.0, keys=keys, streams=STREAMS))


@pytest.mark.some(2)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rule", RULES)
def test_padding_and_idle_rows_are_not_looked_at(rule: str) -> None:
    case = random_case(5, sizes=[6, 0, 3], vocab=70, support=5, repeats=False, dtype=torch.float32)
    trees = case.trees()
    clean = run(rule, trees, case.logits)
    padding = trees.parents == -2
    logits = case.logits.masked_fill(padding[..., None], float("nan"))
    assert trees.draft_ids is not None
    assert trees.draft_probs is not None
    poisoned = trees._replace(
        tokens=trees.tokens.masked_fill(padding, 2**40),
        draft_ids=trees.draft_ids.masked_fill(padding[..., None], 2**40),
        draft_probs=trees.draft_probs.masked_fill(padding[..., None], float("nan")),
    )
    assert padding.any()
    for a, b in zip(clean, run(rule, poisoned, logits), strict=True):
        assert torch.equal(a, b)


@pytest.mark.some(2)
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rule", RULES)
def test_strided_inputs(rule: str) -> None:
    case = random_case(6, sizes=[5, 4], vocab=70, support=5, repeats=False, dtype=torch.float32)
    trees, (batch, nodes, vocab) = case.trees(), case.logits.shape
    wide = torch.full((nodes, batch, vocab + 9), float("nan"), device=DEVICE)
    wide[..., :vocab] = case.logits.transpose(0, 1)
    reversed_strides = case.logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = trees._replace(
        tokens=trees.tokens.T.contiguous().T, parents=trees.parents.T.contiguous().T
    )
    clean = run(rule, trees, case.logits)
    for logits in (wide.transpose(0, 1)[..., :vocab], reversed_strides):
        for a, b in zip(clean, run(rule, strided, logits), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_written_outside_and_nothing_unwritten_is_read(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor the rule asks for is full of NaN or absurd numbers, between two guards."""
    case = random_case(
        7, sizes=[6, 0, 3, 5], vocab=70, support=5, repeats=False, dtype=torch.float32
    )
    trees = case.trees()
    clean = run(rule, trees, case.logits)
    guarded: list[tuple[Tensor, int]] = []
    zeros = torch.zeros

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        whole = zeros(count + 128, dtype=dtype, device=device)
        whole.fill_(float("nan") if dtype.is_floating_point else -123456)
        guarded.append((whole, count))
        return whole[64 : 64 + count].view(shape)

    keys = random_keys(SEED, list(range(4)), [0] * 4, DEVICE)
    monkeypatch.setattr(torch, "empty", empty)
    found = accept.RULES[rule](trees, case.logits, temperature=1.0, keys=keys, streams=STREAMS)
    monkeypatch.undo()
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a, b)
    assert len(guarded) >= 5
    for whole, count in guarded:
        for guard in (whole[:64], whole[64 + count :]):
            intact = guard.isnan() if guard.is_floating_point() else guard == -123456
            assert intact.all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_logits_without_meaning_give_legal_results(rule: str, value: float) -> None:
    case = random_case(8, sizes=[3], vocab=70, support=5, repeats=False, dtype=torch.float32)
    path, length, token = run(rule, case.trees(), torch.full_like(case.logits, value))
    assert ((path >= 0) & (path < 3)).all()
    assert ((length >= 1) & (length <= case.depth + 1)).all()
    assert ((token >= 0) & (token < 70)).all()


def test_children_need_draft_probabilities() -> None:
    case = random_case(8, sizes=[3], vocab=20, support=5, repeats=False, dtype=torch.float32)
    bare = case.trees()._replace(draft_ids=None, draft_probs=None)
    with pytest.raises(ValueError, match="no draft probabilities"):
        run("recursive_rejection", bare, case.logits)


# The law


@pytest.mark.some(1)
@pytest.mark.parametrize("rule", ["target_only", "recursive_rejection"])
def test_first_tokens_follow_the_target(rule: str) -> None:
    """Two children of the root, drawn anew for every row; chi-square of the first token."""
    vocab, rows = 5, 20_000 if DEVICE.type == "cuda" else 40
    generator = np.random.default_rng(1)
    target = np.array([0.05, 0.45, 0.1, 0.1, 0.3])
    draft = np.array([0.45, 0.05, 0.3, 0.2, 0.0])
    children = np.array([generator.choice(vocab, 2, replace=False, p=draft) for _ in range(rows)])
    case = Case(
        tokens=np.concatenate([np.zeros((rows, 1), int), children], axis=1),
        parents=np.tile([-1, 0, 0], (rows, 1)),
        size=np.full(rows, 3),
        logits=torch.tensor(np.log(target), device=DEVICE).float().expand(rows, 3, vocab),
        drafts=np.stack([draft, 0 * draft, 0 * draft])[None].repeat(rows, 0),
        repeats=False,
    )
    path, length, token = (x.cpu() for x in run(rule, case.trees(), case.logits))
    accepted = torch.tensor(case.tokens).gather(1, path)[:, 1]
    first = torch.where(length > 1, accepted, token)
    counts = np.bincount(first.numpy(), minlength=vocab)
    assert stats.chisquare(counts, target * rows).pvalue > 0.01
    assert 0 < int((length > 1).sum()) < rows


# On a GPU


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_captured_graph_follows_new_inputs(rule: str) -> None:
    """New logits, keys and trees in the same tensors; four replays, which reuse their scratch."""
    cases = [
        random_case(seed, sizes=sizes, vocab=5000, support=64, repeats=False, dtype=torch.bfloat16)
        for seed, sizes in enumerate(([40, 0, 17], [12, 40, 1], [40, 40, 40], [3, 40, 0]))
    ]
    trees = [case.trees(support=64)._replace(depth=40) for case in cases]
    keys = [random_keys(SEED, [0, 1, 2], [step] * 3, DEVICE) for step in range(4)]
    held = trees[0]._replace(
        **{
            name: value.clone()
            for name, value in trees[0]._asdict().items()
            if isinstance(value, Tensor)
        }
    )
    logits, key = cases[0].logits.clone(), keys[0].clone()

    def call(tree: DraftedTrees, logits: Tensor, key: Tensor) -> list[Tensor]:
        found = accept.RULES[rule](tree, logits, temperature=0.9, keys=key, streams=STREAMS)
        return list(found)

    call(held, logits, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(held, logits, key)
    outcomes = set()
    for case, tree, new in zip(cases, trees, keys, strict=True):
        for old, value in zip(held, tree, strict=True):
            if isinstance(old, Tensor):
                old.copy_(value)
        logits.copy_(case.logits)
        key.copy_(new)
        graph.replay()
        expected = call(tree, case.logits, new)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)
        outcomes.add(str(expected))
    assert len(outcomes) == 4


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("rule", RULES)
def test_a_large_vocabulary(rule: str, batch: int) -> None:
    case = random_case(
        20,
        sizes=[64] + [20] * (batch - 1),
        vocab=128_256,
        support=64,
        repeats=False,
        dtype=torch.bfloat16,
        bushy=0.8,
    )
    check(case, rule, 0.8, support=64)
    again = [run(rule, case.trees(), case.logits) for _ in range(2)]
    for a, b in zip(*again, strict=True):
        assert torch.equal(a, b)

"""Acceptance kernels against loops in float64 that follow the papers, numpy's own generator, and
the rules in torch.

A coin that falls within 1e-4 of a chance, or a race won by as little, may go either way in
float32: the expected outcome says how close it was, and such numbers are passed over.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

from specdec.decode import Decoder
from specdec.drafters.host import HostDrafter
from specdec.drafters.trees.static import Static
from specdec.kernels import reference
from specdec.kernels.choose import Kernels
from specdec.kernels.gpu import accept, race, scan, softmax
from specdec.kernels.gpu.philox import arrivals, uniform_at
from specdec.kernels.layout import DraftedTrees
from specdec.protocols import AcceptanceRule, StepContext
from specdec.request import Capacity, Decoding, Request
from specdec.sampling import ACCEPT_STREAM, TOKEN_STREAM, SamplingParams, random_keys, uniforms
from specdec.tree import Acceptance, Proposal, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STREAMS = ACCEPT_STREAM, TOKEN_STREAM
MARGIN = 1e-4
SEED = 11
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of even a small vocabulary."""
    monkeypatch.setattr(scan, "SCAN_BYTES", 128)
    monkeypatch.setattr(race, "RACE_CHUNK", 32)
    monkeypatch.setattr(softmax, "SUPPORT_BLOCK", 4)


# Random numbers


@triton.jit
def _numbers_kernel(
    uniforms_ptr, arrivals_ptr, keys_ptr, first, STREAM: tl.constexpr, COUNT: tl.constexpr
):
    seed, sequence, step = tl.load(keys_ptr), tl.load(keys_ptr + 1), tl.load(keys_ptr + 2)
    offs = tl.arange(0, COUNT)
    numbers = uniform_at(seed, sequence, step, STREAM, first + offs)
    times = arrivals(seed, sequence, step, STREAM, first // 4, COUNT // 4)
    tl.store(uniforms_ptr + offs, numbers)
    tl.store(arrivals_ptr + offs, times)


@pytest.mark.parametrize(
    ("seed", "sequence", "step", "stream"),
    [(0, 0, 0, 0), (1, 2, 3, 1), (2**64 - 1, 2**63 + 5, 2**40, 0), (12345, 2**33, 7, 1)],
)
def test_numbers_are_those_of_numpy(seed: int, sequence: int, step: int, stream: int) -> None:
    count, first = 8192, 128
    keys = random_keys(seed, [sequence], [step], DEVICE)
    numbers = torch.empty(count, dtype=torch.float64, device=DEVICE)
    times = torch.empty(count, dtype=torch.float32, device=DEVICE)
    _numbers_kernel[(1,)](numbers, times, keys, first, STREAM=stream, COUNT=count)
    bits = np.random.Philox(
        key=np.array([seed, sequence], np.uint64), counter=[0, 0, stream, step]
    )
    expected = np.random.Generator(bits).random(first + count)[first:]
    assert numbers.cpu().tolist() == expected.tolist()
    np.testing.assert_allclose(times.cpu().double(), -np.log1p(-expected), rtol=1e-6)


# Trees, and what the papers say becomes of them


@dataclass(frozen=True)
class Case:
    """Trees in numpy: tokens, parents [B, N], size [B], logits [B, N, V], drafts [B, N, V]."""

    tokens: np.ndarray
    parents: np.ndarray
    size: np.ndarray
    logits: Tensor
    drafts: np.ndarray
    repeats: bool

    @property
    def depth(self) -> int:
        deepest = 0
        for parents in self.parents:
            depths = [0]
            for parent in parents[1:]:
                depths.append(depths[parent] + 1 if parent >= 0 else 0)
            deepest = max(deepest, *depths)
        return deepest

    def trees(self, *, support: int | None = None) -> DraftedTrees:
        """On the device. Supports are shuffled and filled up with void entries."""
        batch, nodes, vocab = self.drafts.shape
        most = int((self.drafts > 0).sum(-1).max()) if support is None else support
        ids = np.zeros((batch, nodes, most), np.int64)
        probs = np.zeros((batch, nodes, most), np.float32)
        shuffle = np.random.default_rng(0)
        for row in range(batch):
            for node in range(nodes):
                found = shuffle.permutation(np.flatnonzero(self.drafts[row, node]))
                ids[row, node] = found[0] if len(found) else vocab // 2
                ids[row, node, : len(found)] = found
                probs[row, node, : len(found)] = self.drafts[row, node, found]
        return DraftedTrees(
            tokens=torch.tensor(self.tokens, device=DEVICE),
            parents=torch.tensor(self.parents, dtype=torch.int32, device=DEVICE),
            size=torch.tensor(self.size, dtype=torch.int32, device=DEVICE),
            depth=self.depth,
            draft_ids=torch.tensor(ids, device=DEVICE),
            draft_probs=torch.tensor(probs, device=DEVICE),
            repeats=self.repeats,
        )


WORLDS = ("near", "certain", "rival", "unrelated", "equal", "disjoint", "one draft")


def distributions(
    generator: np.random.Generator, world: str, vocab: int, support: int
) -> tuple[np.ndarray, np.ndarray]:
    """[V] target and draft of one node; zeros in both of most worlds."""
    allowed = generator.permutation(vocab)[:support]
    if world == "one draft":
        allowed = allowed[:1]
    draft = np.zeros(vocab)
    draft[allowed] = generator.dirichlet(np.full(len(allowed), 0.6)).clip(1e-6)
    draft = (draft / draft.sum()).astype(np.float32).astype(np.float64)
    target = generator.dirichlet(np.full(vocab, 0.3))
    if world == "near":
        target = 0.8 * draft + 0.2 * target
    elif world == "rival":
        target[allowed] += 6.0 * generator.dirichlet(np.full(len(allowed), 0.4))
    elif world == "equal":
        target = draft
    elif world == "disjoint":
        target[allowed] = 0.0
    elif world == "certain":
        target = (np.arange(vocab) == allowed[0]).astype(float)
    else:
        target[generator.permutation(vocab)[: vocab // 4]] = 0.0
    total = target.sum()
    return (target / total if total else np.full(vocab, 1 / vocab)), draft


def random_case(
    seed: int,
    *,
    sizes: list[int],
    vocab: int,
    support: int,
    repeats: bool,
    dtype: torch.dtype,
    temperature: float = 1.0,
    bushy: float = 0.5,
    star: bool = False,
) -> Case:
    """Trees of these sizes whose children are drawn from the drafts, in one padded batch.

    Args:
        bushy: how often a node grows on any earlier node instead of the last.
        star: all nodes grow on the root.
    """
    generator = np.random.default_rng(seed)
    batch, nodes = len(sizes), max(sizes)
    tokens = generator.integers(vocab, size=(batch, nodes))
    parents = np.full((batch, nodes), -2)
    targets = np.full((batch, nodes, vocab), 1 / vocab)
    drafts = np.zeros((batch, nodes, vocab))
    for row, size in enumerate(sizes):
        left = {}
        for node in range(size):
            world = WORLDS[generator.integers(len(WORLDS)) if node else row % 3]
            if star and node == 0:
                world = ("rival", "unrelated")[row % 2]
            targets[row, node], drafts[row, node] = distributions(generator, world, vocab, support)
            left[node] = drafts[row, node].copy()
            if node == 0:
                parents[row, 0] = -1
                continue
            parent = int(generator.integers(node)) if generator.random() < bushy else node - 1
            parent = 0 if star else parent
            while left[parent].sum() == 0:  # no token is left to draw
                parent = int(generator.integers(node))
            token = generator.choice(vocab, p=left[parent] / left[parent].sum())
            if not repeats:
                left[parent][token] = 0.0
            parents[row, node], tokens[row, node] = parent, token
        childless = np.setdiff1d(np.arange(nodes), parents[row])
        drafts[row, childless] = 0.0
    with np.errstate(divide="ignore"):
        logits = torch.tensor(np.log(targets) * temperature).to(dtype)
    return Case(tokens, parents, np.array(sizes), logits.to(DEVICE), drafts, repeats)


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


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("repeats", [False, True], ids=["sample", "with_replacement"])
@pytest.mark.parametrize("rule", ["target_only", "recursive_rejection"])
def test_many_siblings_are_rejected_one_after_the_other(rule: str, repeats: bool) -> None:
    case = random_case(
        7,
        sizes=[6, 6, 3, 3] * 8,
        vocab=12,
        support=7,
        repeats=repeats,
        dtype=torch.float32,
        star=True,
    )
    lengths = check(case, rule, 1.0, support=9)
    assert 3 < lengths.count(1) < 29


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


@pytest.mark.parametrize("rule", ["target_only", "recursive_rejection"])
def test_first_tokens_follow_the_target(rule: str) -> None:
    """Two children of the root, drawn anew for every row; chi-square of the first token."""
    vocab, rows = 5, 20_000 if DEVICE.type == "cuda" else 80
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


# In the rules


def context_for(params: SamplingParams, batch: int, step: int, kernels: ModuleType) -> StepContext:
    ids, steps = list(range(batch)), [step] * batch

    def draws(stream: int, count: int) -> Tensor:
        return uniforms(params.seed, ids, steps, stream, count).to(DEVICE)

    return StepContext(
        sequences=[],
        roots=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
        sampling=params,
        uniforms=draws,
        kernels=kernels,
        keys=random_keys(params.seed, ids, steps, DEVICE),
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, top_k=3),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, seed=4),
    ],
    ids=["greedy", "tempered", "filtered"],
)
@pytest.mark.parametrize(
    "rule", [Greedy(), TargetOnly(), RecursiveRejection()], ids=lambda rule: rule.name
)
def test_a_rule_keeps_the_same_with_and_without_kernels(
    rule: AcceptanceRule, params: SamplingParams
) -> None:
    case = random_case(
        9, sizes=[7, 0, 4, 1], vocab=70, support=6, repeats=True, dtype=torch.float32
    )
    drafted = case.trees()
    assert drafted.draft_ids is not None
    assert drafted.draft_probs is not None
    tree = TokenTree(
        tokens=drafted.tokens,
        parents=drafted.parents,
        size=drafted.size,
        depth=drafted.depth,
        proposal=Proposal(
            ids=drafted.draft_ids, probs=drafted.draft_probs, children="sample_with_replacement"
        ),
    )
    gpu = Kernels(impl="triton").on(DEVICE)
    for step in range(2):
        plain = rule.accept(context_for(params, 4, step, reference), tree, case.logits)
        found = rule.accept(context_for(params, 4, step, gpu), tree, case.logits)
        busy = tree.size > 0
        assert torch.equal(found.length, plain.length)
        past = torch.arange(plain.path.shape[1], device=DEVICE) >= plain.length[:, None]
        assert ((found.path == plain.path) | past)[busy].all()
        assert torch.equal(found.next_token[busy], plain.next_token[busy])


class Bigrams:
    """A target whose next token depends on the last one alone; it has no cache to keep."""

    cache = None

    def __init__(self, vocab: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.table = 2.0 * torch.randn(vocab, vocab, generator=generator).to(DEVICE)

    def prepare(self, capacity: Capacity) -> None: ...

    def start(self, sequences: Sequence[Decoding]) -> list[Decoding]:
        return list(sequences)

    def verify(self, context: StepContext, tree: TokenTree) -> Tensor:
        return self.table[tree.tokens]

    def commit(self, context: StepContext, acceptance: Acceptance) -> None: ...

    def finish(self, sequence: Decoding) -> None: ...


class Guesses(HostDrafter):
    """Every token of the vocabulary again, in an order that depends on the last one."""

    def propose(self, sequence: Decoding, levels: int) -> Iterator[tuple[list[int], float]]:
        last = sequence.tokens[-1]
        for i in range(6):
            yield [(last + i + k) % 12 for k in range(levels)], 1.0 + i


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [TargetOnly(), RecursiveRejection()], ids=lambda rule: rule.name)
def test_the_loop_gives_the_same_with_and_without_kernels(
    rule: AcceptanceRule, temperature: float
) -> None:
    outputs, accepted = {}, 0
    for impl in ("triton", "reference"):
        decoder = Decoder(
            verifier=Bigrams(12),
            drafter=Guesses(tree=Static(widths=[2, 1], children="sample")),
            rule=rule,
            sampling=SamplingParams(temperature=temperature, seed=5),
            kernels=Kernels(impl=impl),
            max_context=64,
            device=DEVICE,
            batch_size=2,
        )
        requests = [Request(id=i, prompt_ids=[i, 3], max_new_tokens=5) for i in range(3)]
        done = sorted(decoder.run(requests), key=lambda s: s.request.id)
        outputs[impl] = [sequence.output_ids for sequence in done]
        accepted += sum(max(sequence.accepted_lengths) > 1 for sequence in done)
    assert outputs["triton"] == outputs["reference"]
    assert accepted


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

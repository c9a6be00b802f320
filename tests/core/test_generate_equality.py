"""Losslessness, end to end: at temperature 0 in float32 every drafter and tree gives the tokens of
transformers' own `generate`; at temperature 1 a seed and a prompt decide, never the batch.

The reference is another instance of the same weights with transformers' own attention and cache,
one prompt at a time. All of it runs on the GPU where there is one, and so through its kernels.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from specdec.drafters.ngram import NGram
from specdec.drafters.none import NoDrafter
from specdec.drafters.small_llama import SmallLlama
from specdec.drafters.trees.chain import Chain
from specdec.drafters.trees.dynamic import Dynamic
from specdec.drafters.trees.static import Static
from specdec.flight import Step
from specdec.models.load import load_model, zoo_path
from specdec.models.paged import PagedLM
from specdec.models.placement import Placement
from specdec.observation import Observation
from specdec.protocols import AcceptanceRule, Drafter, StepContext, TreePolicy
from specdec.request import Capacity, Decoding, Request
from specdec.tree import Acceptance, Children, TokenTree
from specdec.verifier.greedy import Greedy
from specdec.verifier.recursive_rejection import RecursiveRejection
from specdec.verifier.target_only import TargetOnly
from specdec.verifier.verifier import TreeVerifier
from tests.decoding import decoder_of, loaded

pytestmark = pytest.mark.usefixtures("load_once")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"

# Small pages and chunks, so that every prompt spans several of each and ends inside one.
PAGE_SIZE = 4
PREFILL_CHUNK = 5

DEPTH = 4  # of the chain
TREES: dict[str, Callable[[Children], TreePolicy]] = {
    "chain": lambda children: Chain(budget=DEPTH, children=children),
    "static": lambda children: Static(widths=[3, 2, 1], children=children),
    "dynamic": lambda children: Dynamic(budget=10, width=3, depth=4, children=children),
}
# (drafter, tree); `none` has no tree.
PLANS = [("none", "chain"), *itertools.product(("small_llama", "ngram"), TREES)]


@dataclass
class Outcome:
    """What a run gave: finished sequences in the order of the prompts, and its steps."""

    sequences: list[Decoding]
    steps: list[Step] = field(default_factory=list)

    @property
    def outputs(self) -> list[list[int]]:
        return [sequence.output_ids for sequence in self.sequences]


def drafter_of(name: str, draft: Path) -> Drafter:
    if name == "none":
        return NoDrafter()
    return NGram() if name == "ngram" else SmallLlama(path=str(draft))


def decode(
    target: PagedLM,
    drafter: Drafter,
    tree: TreePolicy | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    *,
    rule: AcceptanceRule | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    stop: Sequence[int] = (),
    pages: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Outcome:
    """Run the loop; every invariant of every cache is checked after each step and at the end."""
    limits = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    requests = [
        Request(id=i, prompt_ids=prompt, max_new_tokens=limit)
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    verifier = TreeVerifier(target, prefill_chunk=PREFILL_CHUNK)
    loaded(drafter, target)
    decoder = decoder_of(
        verifier,
        drafter,
        tree,
        rule or Greedy(),
        temperature=temperature,
        seed=seed,
        rows=batch_size,
        max_tokens=max(request.max_tokens for request in requests),
        stop_tokens=stop,
        page_size=PAGE_SIZE,
        pages=pages,
        kv_dtype=kv_dtype,
    )
    caches = [verifier.target.cache]
    if isinstance(drafter, SmallLlama):
        caches.append(drafter.model.cache)
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        for cache in caches:
            cache.check()

    finished = sorted(decoder.run(requests, on_step=on_step), key=lambda s: s.request.id)
    for cache in caches:
        cache.check()
        assert cache.free_pages == cache.pages
    assert [sequence.request.id for sequence in finished] == list(range(len(prompts)))
    return Outcome(finished, steps)


def generate(
    model: Any, prompt: Sequence[int], new_tokens: int, stop: Sequence[int] = ()
) -> list[int]:
    """transformers' greedy output, after a check that no choice was so close that rounding could
    turn it."""
    # On the model too: what is unset in the argument would be filled in from there.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(stop) or None, pad_token_id=0
    )
    done = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(done.logits).double().topk(2).values[:, 0]  # [T, 2]
    spread = torch.stack(done.logits).std()
    assert ((best[:, 0] - best[:, 1]) / spread).min() > 1e-4, "a near tie: choose another seed"
    output: list[int] = done.sequences[0, len(prompt) :].tolist()
    return output


def middle_token(outputs: Sequence[Sequence[int]]) -> int:
    """A token that some outputs hold in the middle, to stop at."""
    return outputs[0][len(outputs[0]) // 2]


# --- the built-in pair


@dataclass(frozen=True)
class Pair:
    """A target, the folder of its draft, prompts, and what transformers makes of them."""

    target: PagedLM
    draft: Path
    prompts: list[list[int]]
    outputs: list[list[int]]  # stop tokens ignored
    stop: int
    stopped: list[list[int]]  # stopping at `stop`


ZOO_NEW = 22
LONG = 48  # tokens, for effects that add up


@pytest.fixture(scope="module")
def zoo() -> Pair:
    target = load_model("zoo:target", Placement(device=DEVICE))
    fibonacci = 'def fibonacci(n):\n    """Return the n-th Fibonacci number'
    texts = [
        fibonacci + '."""\n',
        "It was a dark night",
        fibonacci + ', counted from zero."""\n    if',
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
        "<|user|>\nName three colours.\n<|assistant|>\n",
    ]
    prompts = [target.tokenizer(text).input_ids for text in texts]
    pairs = enumerate(zip(prompts[0], prompts[2], strict=False))
    shared = next(i for i, (a, b) in pairs if a != b)
    assert shared >= 2 * PAGE_SIZE, "the two prompts must share pages"
    model = AutoModelForCausalLM.from_pretrained(zoo_path("target"), dtype=torch.float32)
    model.to(DEVICE)
    outputs = [generate(model, prompt, ZOO_NEW) for prompt in prompts]
    stop = middle_token(outputs)
    stopped = [generate(model, prompt, ZOO_NEW, [stop]) for prompt in prompts]
    return Pair(target, zoo_path("draft"), prompts, outputs, stop, stopped)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_zoo_equals_generate(zoo: Pair, drafter: str, tree: str, batch_size: int) -> None:
    build_drafter, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    run = decode(zoo.target, build_drafter, shape, zoo.prompts, ZOO_NEW, batch_size=batch_size)
    assert run.outputs == zoo.outputs
    assert {sequence.finish_reason for sequence in run.sequences} == {"length"}
    accepted = sum(sum(step.accepted) for step in run.steps)
    assert (accepted > 0) == (drafter != "none")
    tokens = sum(sum(step.tokens) for step in run.steps)
    assert tokens == len(zoo.prompts) * ZOO_NEW


@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_zoo_stops_where_generate_stops(zoo: Pair, drafter: str, tree: str) -> None:
    assert zoo.stopped != zoo.outputs
    drafting, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    run = decode(zoo.target, drafting, shape, zoo.prompts, ZOO_NEW, batch_size=4, stop=[zoo.stop])
    assert run.outputs == zoo.stopped
    for sequence in run.sequences:
        assert (sequence.output_ids[-1] == zoo.stop) == (sequence.finish_reason == "stop")


def test_refill_changes_nothing(zoo: Pair) -> None:
    prompts = [*zoo.prompts, *zoo.prompts[:2]]
    lengths = [9, 21, 4, 17, 22, 12, 8]
    expected = [
        output[:length]
        for output, length in zip([*zoo.outputs, *zoo.outputs[:2]], lengths, strict=True)
    ]
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["dynamic"]("top_k")
    for batch_size in (1, 3):
        run = decode(zoo.target, drafter, shape, prompts, lengths, batch_size=batch_size)
        assert run.outputs == expected
    # A row did take another request over while its neighbours went on.
    first, *_, last = [step.requests for step in run.steps if len(step.requests) == 3]
    assert first == [0, 1, 2]
    assert set(last) != set(first)
    assert any(
        len(set(a.requests) & set(b.requests)) == 2 for a, b in itertools.pairwise(run.steps)
    )


@pytest.mark.parametrize("drafter", ["small_llama", "ngram"])
def test_rows_wait_for_pages_and_give_the_same(zoo: Pair, drafter: str) -> None:
    longest = -(-(max(map(len, zoo.prompts)) + ZOO_NEW) // PAGE_SIZE)
    drafting, shape = drafter_of(drafter, zoo.draft), TREES["dynamic"]("top_k")
    run = decode(
        zoo.target, drafting, shape, zoo.prompts, ZOO_NEW, batch_size=4, pages=longest * 5 // 2
    )
    assert run.outputs == zoo.outputs
    assert 1 < max(len(step.requests) for step in run.steps) < 4  # several ran, and some waited


def test_a_common_beginning_is_computed_once(zoo: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = zoo.prompts[0], zoo.prompts[2]
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    prefilled: list[int] = []
    prefill = PagedLM.prefill

    def counting(lm: PagedLM, cache: Any, rows: Any, tokens: Any, **options: Any) -> None:
        prefilled.extend(map(len, tokens))
        prefill(lm, cache, rows, tokens, **options)

    monkeypatch.setattr(PagedLM, "prefill", counting)
    run = decode(zoo.target, NoDrafter(), None, [first, second], 4, batch_size=2)
    assert run.outputs == [zoo.outputs[0][:4], zoo.outputs[2][:4]]
    reused = shared // PAGE_SIZE * PAGE_SIZE
    assert prefilled == [len(first) - 1, len(second) - 1 - reused]


# --- quantised caches


@pytest.fixture(scope="module", params=[torch.float8_e4m3fn, torch.int8], ids=str)
def quantised(request: pytest.FixtureRequest, zoo: Pair) -> tuple[torch.dtype, list[list[int]]]:
    """A type of pages, and the outputs of plain decoding over them."""
    run = decode(zoo.target, NoDrafter(), None, zoo.prompts[:4], LONG, kv_dtype=request.param)
    return request.param, run.outputs


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tree", ["chain", "dynamic"])
@pytest.mark.parametrize("drafter", ["small_llama", "ngram"])
def test_a_quantised_cache_gives_the_same_with_and_without_drafts(
    zoo: Pair,
    quantised: tuple[torch.dtype, list[list[int]]],
    drafter: str,
    tree: str,
    batch_size: int,
) -> None:
    kv_dtype, expected = quantised
    drafting, shape = drafter_of(drafter, zoo.draft), TREES[tree]("top_k")
    prompts = zoo.prompts[:4]
    run = decode(
        zoo.target, drafting, shape, prompts, LONG, batch_size=batch_size, kv_dtype=kv_dtype
    )
    assert run.outputs == expected
    assert sum(sum(step.accepted) for step in run.steps) > LONG


# --- temperature 1

SAMPLED: list[tuple[AcceptanceRule, Children]] = [
    (RecursiveRejection(), "sample"),
    (RecursiveRejection(), "sample_with_replacement"),
    (TargetOnly(), "top_k"),
]


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
@pytest.mark.parametrize(
    ("rule", "children"), SAMPLED, ids=[f"{rule.name}-{children}" for rule, children in SAMPLED]
)
def test_a_seed_and_a_prompt_decide_what_is_sampled(
    zoo: Pair, rule: AcceptanceRule, children: Children, tree: str
) -> None:
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES[tree](children)

    def sample(*, seed: int, batch_size: int) -> list[list[int]]:
        return decode(
            zoo.target,
            drafter,
            shape,
            zoo.prompts[:3],
            8,
            rule=rule,
            temperature=1.0,
            seed=seed,
            batch_size=batch_size,
        ).outputs

    alone = sample(seed=1, batch_size=1)
    together = sample(seed=1, batch_size=3)
    assert sample(seed=1, batch_size=3) == together
    assert together == alone
    other = sample(seed=2, batch_size=3)
    assert all(a != b for a, b in zip(other, alone, strict=True))


def test_equal_prompts_are_sampled_apart(zoo: Pair) -> None:
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["chain"]("sample")
    run = decode(
        zoo.target,
        drafter,
        shape,
        [zoo.prompts[1]] * 3,
        12,
        rule=RecursiveRejection(),
        temperature=1.0,
        batch_size=3,
    )
    assert len({tuple(output) for output in run.outputs}) == 3


# --- families

VOCABULARY = 96
NEW = 8
WINDOW = 6

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _HEADS),
    "qwen3_moe": ("Qwen3Moe", _HEADS | _EXPERTS),
    "gemma2": (
        "Gemma2",
        _HEADS
        | _MIXED
        | {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 20.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3_text": ("Gemma3", _HEADS | _MIXED | {"query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    ),
    "gpt_oss": (
        "GptOss",
        _HEADS | _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
_CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def family_model(name: str, **changes: Any) -> Any:
    """A random model whose logits differ enough for greedy choices to be clear, and to depend on
    attention."""
    prefix, settings = FAMILIES[name]
    config_class = getattr(transformers, _CONFIG_NAMES.get(prefix, f"{prefix}Config"))
    model = getattr(transformers, f"{prefix}ForCausalLM")(
        config_class(**_SIZES | settings | changes)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms, biases, sinks
                parameter.add_(0.3 * noise)
            else:
                fan_in = 1 if "embed" in path else parameter.shape[-1]
                parameter.copy_(1.2 * noise / fan_in**0.5)
    return model.eval()


def disturbed(model: Any, amount: float) -> Any:
    """A copy that agrees with the original now and then."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * parameter.abs().mean() * noise.to(parameter))
    return other


def save(model: Any, folder: Path) -> Path:
    """A model folder with a tokenizer of as many words as the model has tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(model.get_input_embeddings().weight.shape[0])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def family_prompts() -> list[list[int]]:
    """Longer than the window, of different lengths, two with a common beginning of several
    pages."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, VOCABULARY, (40,), generator=generator).tolist()
    return [text[:19], [*text[:13], *text[30:33]], text[20:24] * 3, text[25:33]]


@dataclass(frozen=True)
class Family(Pair):
    name: str
    itself: Path  # the target's own folder, the draft that is always right


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = family_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    itself = save(model, folder / "itself")
    draft = save(disturbed(model, 0.3), folder / "draft")
    reference = AutoModelForCausalLM.from_pretrained(
        itself, dtype=torch.float32, attn_implementation="eager"
    ).to(DEVICE)
    prompts = family_prompts()
    outputs = [generate(reference, prompt, NEW) for prompt in prompts]
    stop = middle_token(outputs)
    stopped = [generate(reference, prompt, NEW, [stop]) for prompt in prompts]
    target = load_model(str(itself), Placement(device=DEVICE))
    return Family(target, draft, prompts, outputs, stop, stopped, request.param, itself)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_family_equals_generate(family: Family, drafter: str, tree: str, batch_size: int) -> None:
    drafting, shape = drafter_of(drafter, family.draft), TREES[tree]("top_k")
    run = decode(family.target, drafting, shape, family.prompts, NEW, batch_size=batch_size)
    assert run.outputs == family.outputs
    if batch_size > 1 and tree == "dynamic":  # rows end apart
        run = decode(
            family.target,
            drafting,
            shape,
            family.prompts,
            NEW,
            batch_size=batch_size,
            stop=[family.stop],
        )
        assert run.outputs == family.stopped


def test_disturbed_draft_is_accepted_in_part(family: Family) -> None:
    """Else the cases above would exercise one branch of the loop only."""
    drafter, shape = drafter_of("small_llama", family.draft), TREES["chain"]("top_k")
    run = decode(family.target, drafter, shape, family.prompts, NEW, batch_size=4)
    accepted = {count for step in run.steps for count in step.accepted}
    assert len(accepted) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_drafts_for_itself_is_always_right(family: Family, batch_size: int) -> None:
    drafter, shape = drafter_of("small_llama", family.itself), TREES["chain"]("top_k")
    whole_steps = 3 * (DEPTH + 1)
    run = decode(family.target, drafter, shape, family.prompts, whole_steps, batch_size=batch_size)
    assert [output[:NEW] for output in run.outputs] == family.outputs
    assert [sequence.steps for sequence in run.sequences] == [3] * len(family.prompts)
    assert {count for step in run.steps for count in step.tokens} == {DEPTH + 1}


# --- ends


@pytest.fixture(scope="module")
def short_context(tmp_path_factory: pytest.TempPathFactory) -> tuple[PagedLM, Path, Any]:
    folder = save(
        family_model("llama", max_position_embeddings=32), tmp_path_factory.mktemp("short")
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    return load_model(str(folder), Placement(device=DEVICE)), folder, reference


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_a_sequence_ends_with_the_context(
    short_context: tuple[PagedLM, Path, Any], drafter: str, tree: str, batch_size: int
) -> None:
    target, folder, reference = short_context
    prompts = [*family_prompts(), family_prompts()[0] + [9] * 12]  # the last leaves room for one
    drafting, shape = drafter_of(drafter, folder), TREES[tree]("top_k")
    run = decode(target, drafting, shape, prompts, 100, batch_size=batch_size)
    assert {sequence.finish_reason for sequence in run.sequences} == {"context"}
    assert {len(sequence.tokens) for sequence in run.sequences} == {32}
    assert run.outputs == [generate(reference, prompt, 32 - len(prompt)) for prompt in prompts]


def test_a_stop_token_cuts_an_accepted_path_short(
    short_context: tuple[PagedLM, Path, Any],
) -> None:
    target, folder, reference = short_context
    prompt = family_prompts()[3]
    output = generate(reference, prompt, DEPTH + 1)
    place = next(i for i in range(1, DEPTH) if output[i] not in output[:i])
    drafter, shape = drafter_of("small_llama", folder), TREES["chain"]("top_k")
    run = decode(target, drafter, shape, [prompt], 20, stop=[output[place]])
    (step,) = run.steps
    assert step.accepted == [DEPTH]  # all of it was right
    assert step.tokens == [place + 1]
    assert run.outputs == [output[: place + 1]]
    assert run.sequences[0].finish_reason == "stop"


def test_the_length_limit_cuts_an_accepted_path_short(
    short_context: tuple[PagedLM, Path, Any],
) -> None:
    target, folder, reference = short_context
    prompt = family_prompts()[3]
    drafter, shape = drafter_of("small_llama", folder), TREES["chain"]("top_k")
    run = decode(target, drafter, shape, [prompt], DEPTH - 1)
    assert [step.accepted for step in run.steps] == [[DEPTH]]
    assert run.outputs == [generate(reference, prompt, DEPTH - 1)]
    assert run.sequences[0].finish_reason == "length"


# --- a published model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("drafter", "tree"), PLANS)
def test_published_story(
    stories: tuple[PagedLM, Path, list[int]], drafter: str, tree: str, batch_size: int
) -> None:
    target, draft, expected = stories
    drafting, shape = drafter_of(drafter, draft), TREES[tree]("top_k")
    run = decode(target, drafting, shape, [[1]] * batch_size, len(expected), batch_size=batch_size)
    assert run.outputs == [expected] * batch_size
    text = target.tokenizer.decode([1, *expected], skip_special_tokens=True)
    assert text.strip() == STORY


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[PagedLM, Path, list[int]]:
    if not STORIES.is_dir():
        pytest.skip("stories260k is not there")
    target = load_model(str(STORIES), Placement(device=DEVICE))
    draft = tmp_path_factory.mktemp("tiny")
    disturbed(target.model, 0.3).save_pretrained(draft)
    target.tokenizer.save_pretrained(draft)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).to(DEVICE)
    expected = generate(model, [1], 61)
    return target, draft, expected


# --- what a drafter is told, and what it may lack


class Told(NGram):
    """Notes what its guesses came to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kept: dict[int, list[int]] = {}

    def commit(self, context: StepContext, acceptance: Acceptance, seen: Observation) -> None:
        for i, sequence in enumerate(context.sequences):
            assert acceptance.path.device.type == "cpu"
            tokens = self.kept.setdefault(sequence.request.id, list(sequence.tokens))
            assert tokens == sequence.tokens  # those of the draft
            tree, length = self.drafted, int(acceptance.length[i])
            path = acceptance.path[i, 1:length]
            tokens += [*tree.tokens[i, path].tolist(), int(acceptance.next_token[i])]

    def draft(self, context: StepContext) -> TokenTree:
        self.drafted = super().draft(context)
        return self.drafted


def test_a_drafter_on_the_host_is_told_what_was_kept(zoo: Any) -> None:
    drafter, shape = Told(), Static(widths=[2, 1, 1])
    outputs = decode(zoo.target, drafter, shape, zoo.prompts[:3], 24, batch_size=2).outputs
    for i, output in enumerate(outputs):
        told = drafter.kept[i][len(zoo.prompts[i]) :]
        assert told[: len(output)] == output


def test_sampled_children_at_temperature_zero(zoo: Any) -> None:
    """The drafter's own choice is certain then, and one child is left of each node."""
    drafter, shape = drafter_of("small_llama", zoo.draft), TREES["static"]("sample")
    found = decode(zoo.target, drafter, shape, zoo.prompts[:2], 24)
    plain = decode(zoo.target, NoDrafter(), None, zoo.prompts[:2], 24)
    assert found.outputs == plain.outputs
    assert len(found.steps) < len(plain.steps)


def test_a_drafter_with_less_room_than_the_target(zoo: Any) -> None:
    class Narrow(SmallLlama):
        def prepare(self, capacity: Capacity, tree: TreePolicy) -> None:
            super().prepare(replace(capacity, pages=capacity.pages_of_a_row + 1), tree)

    drafter, shape = Narrow(path=str(zoo.draft)), Chain(budget=3)
    found = decode(zoo.target, drafter, shape, zoo.prompts[:3], 24, batch_size=3)
    plain = decode(zoo.target, NoDrafter(), None, zoo.prompts[:3], 24, batch_size=3)
    assert found.outputs == plain.outputs

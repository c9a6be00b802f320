"""What several files of these tests decode."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.models.load import load_model, zoo_path
from specdec.models.placement import Placement
from tests.core.generated import DEVICE, PAGE_SIZE, ZOO_NEW, Pair, generate, middle_token


@pytest.fixture(scope="session")
def zoo() -> Pair:
    """The built-in pair."""
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

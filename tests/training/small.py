"""The smallest heads, targets and texts there are to train with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config

from specdec.heads.layered import LayeredHead
from specdec.heads.recurrent import (
    Eagle3Config,
    Eagle3Head,
    EagleConfig,
    EagleHead,
    MTPConfig,
    MTPHead,
)
from specdec.models.paged import PagedLM
from specdec.training.batches import EXTRA, Batch, Batches
from specdec.training.corpus import Corpus
from specdec.training.course import Budget, Course
from specdec.training.measure import MeasureSettings
from specdec.training.methods.head import layer_config
from specdec.training.optimise import Optimisers
from specdec.training.teacher import Teacher
from specdec.training.trainee import Surroundings
from tests.tiny import tiny_llama

WIDTH, VOCAB = 16, 24


def eagle3(taps: int = 3, layers: int = 1, **flags: Any) -> Eagle3Head:
    """With weights far from 0, so that mistakes show."""
    config = tiny_llama(0, 2, VOCAB).config
    return filled(
        Eagle3Head(
            Eagle3Config(
                layer=layer_config(config, layers=layers, rope_theta=100.0),
                taps=tuple(range(taps)),
                state_size=WIDTH,
                target_vocab=VOCAB,
                vocab_size=VOCAB,
                **flags,
            )
        )
    )


def eagle(**flags: Any) -> EagleHead:
    config = tiny_llama(0, 2, VOCAB).config
    layer = layer_config(config, layers=1, rope_theta=100.0)
    sizes = {"state_size": WIDTH, "target_vocab": VOCAB, "vocab_size": VOCAB}
    return filled(EagleHead(EagleConfig(layer=layer, taps=("normal",), **sizes, **flags)))


def mtp(**flags: Any) -> MTPHead:
    config = tiny_llama(0, 2, VOCAB).config
    layer = layer_config(config, layers=1, rope_theta=100.0, make=Qwen3Config)
    sizes = {"state_size": WIDTH, "target_vocab": VOCAB, "vocab_size": VOCAB}
    return filled(MTPHead(MTPConfig(layer=layer, taps=("normal",), **sizes, **flags)))


def filled(head: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    return head.eval()


def decoded(head: LayeredHead, states: Tensor, tokens: Tensor, step: int) -> Tensor:
    """What a head reads at its output head at the end of every chain of `step` own states, each
    decoded token by token over a cache: [T, D] of states [T, S] and tokens [T]; the first `step`
    rows have no chain and are 0. It shares nothing with the parallel form but the head."""
    slots, rows = len(tokens), []
    windows = head.config.windows or (None,) * len(head.layers)

    def one(feature: Tensor, slot: int, cache: list[list[tuple[Tensor, Tensor]]]) -> Any:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache[layer].append((key, value))
            seen = cache[layer] if not windows[layer] else cache[layer][-windows[layer] :]
            keys, values = (torch.cat(x, dim=2) for x in zip(*seen, strict=True))
            groups = query.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            scores = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
            return scores.softmax(-1) @ values

        position = torch.tensor([[slot]])
        angles = head.rotary(feature, position)
        return head(head.embed(tokens[slot : slot + 1])[None], feature, angles, attend)

    for end in range(slots):
        root = end - step
        if root < 0:
            rows.append(torch.zeros(head.width))
            continue
        cache: list[list[tuple[Tensor, Tensor]]] = [[] for _ in head.layers]
        for slot in range(root + 1):
            feature, read = one(head.fuse(states[slot : slot + 1])[None], slot, cache)
        for slot in range(root + 1, end + 1):
            feature, read = one(feature, slot, cache)
        rows.append(read[0, 0])
    return torch.stack(rows)


def texts(folder: Path, count: int = 40, words: int = 60) -> Path:
    """A file of texts that differ."""
    generator = torch.Generator().manual_seed(1)
    known = ["def", "return", "x", "the", "of", "a", "sea", "old", "print", "for", "in", "range"]
    lines = []
    for _ in range(count):
        drawn = torch.randint(len(known), (words,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(known[i] for i in drawn)}))
    path = folder / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def target(layers: int = 2) -> PagedLM:
    return PagedLM(tiny_llama(0, layers, VOCAB))


def corpus(folder: Path, tokens: int = 400) -> Corpus:
    """Random tokens."""
    random = np.random.default_rng(0)
    for name, count in (("tokens", tokens), ("held_out", 64)):
        (folder / f"{name}.bin").write_bytes(random.integers(VOCAB, size=count, dtype=np.uint16))
    for name in ("starts", "held_starts"):
        (folder / f"{name}.bin").write_bytes(np.arange(0, 64, 16))
    manifest = {"type": "uint16", "settings": {"held_out": 4}, "sources": [], "seed": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Corpus(folder)


def surroundings(lm: PagedLM, chunk: int = 64) -> Surroundings:
    counts = torch.arange(VOCAB).flip(0)
    return Surroundings(target=lm, counts=counts, chunk=chunk, compiled=False, seed=0)


def course(
    method: Any, lm: PagedLM, model: Any, folder: Path, *, tokens: int, slots: int = 8, **rest: Any
) -> Course:
    """A training on random tokens.

    Args:
        model: of `lm`, with attention of transformers' own.
    """
    texts_ = corpus(folder)
    trainee = method.make(surroundings(lm))
    rows = torch.from_numpy(texts_.held_out_rows(slots + EXTRA).astype(np.int64))
    held_out = Batch(tokens=rows, mask=torch.ones(len(rows), slots, dtype=torch.bool))
    return Course(
        trainee,
        None if trainee.is_target else Teacher(model, trainee.taps),
        Batches(texts_, None, slots=slots, size=2, share=0.5, seed=3),
        {"corpus": [held_out]},
        Optimisers(trainee, method),
        budget=Budget(seconds=None, tokens=tokens),
        measure=MeasureSettings(tokens=64, depth=3),
        folder=folder,
        settings={"seed": 3},
        device=lm.device,
        target_name="tiny",
        **rest,
    )

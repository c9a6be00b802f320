"""What a model's own generation settings ask for, and what becomes of each: done, harmless,
replaced by `sampling`, or refused by name."""

from collections.abc import Collection, Sequence
from textwrap import shorten
from typing import Annotated, Any

from pydantic import Field, StrictInt, TypeAdapter, ValidationError
from transformers import GenerationConfig

from specdec.processors import NO_PROCESSORS, Processors
from specdec.sampling import SamplingParams

Token = Annotated[StrictInt, Field(ge=0)]
Bias = Annotated[float, Field(lt=float("inf"))]
DONE: dict[str, Any] = {
    "repetition_penalty": Annotated[float, Field(gt=0, allow_inf_nan=False)],
    "suppress_tokens": list[int],
    "begin_suppress_tokens": list[int],
    "bad_words_ids": list[list[Token]],
    "sequence_bias": dict[tuple[Token, ...], Bias] | list[tuple[list[Token], Bias]],
    "min_new_tokens": StrictInt,
    "min_length": StrictInt,
    "stop_strings": str | list[str],
}
"""Settings that are obeyed, and their types."""

CHOSEN = ("do_sample", "temperature", "top_k", "top_p", "min_p")
"""Settings that `sampling` has too."""

FILTERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Further ones that `generate` looks at above temperature 0 alone."""

HARMLESS = frozenset(
    [
        *("max_length", "max_new_tokens"),  # there are settings of ours
        *("early_stopping", "length_penalty", "num_return_sequences"),  # of beams, and copies
        *("renormalize_logits",),  # changes no probability
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("prefill_chunk_size", "compile_config", "disable_compile", "low_memory", "use_mtp"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "transformers_version", "continuous_batching_config"),
        # Of assisted generation, where it is lossless.
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "speculation_type"),
        *("max_matching_ngram_size", "assistant_early_exit"),
        *("assistant_lookbehind", "target_lookbehind"),
    ]
)
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "top_h": 1.0,
    "guidance_scale": 1.0,
    "min_new_tokens": 0,
    "penalty_alpha": 0.0,
}
"""Where they are not what transformers fills in."""


def asked_by(config: GenerationConfig) -> dict[str, Any]:
    """Settings that change something: those transformers knows, with values that are not neutral.
    What a later release adds is among them."""
    defaults = getattr(config, "_get_default_generation_params", dict)() | NEUTRAL
    found = {}
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        empty = value is False or value in ([], (), {}, "")
        neutral = value is None or value == defaults.get(name) or empty
        if not (neutral or name in HARMLESS or name.startswith("_")):
            found[name] = value
    return found


def processors_of(
    config: GenerationConfig, sampling: SamplingParams, *, ends: Collection[int], vocab: int
) -> Processors:
    """What is done to the logits of a model.

    Args:
        ends: tokens that end an output.
        vocab: tokens that logits are of.

    Raises:
        ValueError: `generate` would do what is not done here; one line.
    """
    if sampling.processors == "none":
        return NO_PROCESSORS
    asked = asked_by(config)
    ignored = (*CHOSEN, *FILTERS) if sampling.greedy else CHOSEN
    for name, value in asked.items():
        if name not in DONE and name not in ignored:
            raise _refused(name, value, "is not supported")
    given = {name: _typed(name, asked[name]) for name in DONE if name in asked}
    words = [word for word in given.get("bad_words_ids", []) if word not in [[t] for t in ends]]
    biases = given.get("sequence_bias", {})
    pairs = biases.items() if isinstance(biases, dict) else biases
    bias = {tuple(tokens): amount for tokens, amount in pairs}
    for name, sequences in (("sequence_bias", bias), ("bad_words_ids", words)):
        for tokens in sequences:
            if len(tokens) != 1:
                raise _refused(name, asked[name], "has other than single tokens")
            if tokens[0] >= vocab:
                raise _refused(name, asked[name], f"has a token beyond the vocabulary of {vocab}")
    forbidden = [*(word[0] for word in words), *given.get("suppress_tokens", [])]
    added = {tokens[0]: amount for tokens, amount in bias.items()}
    added |= {token: -float("inf") for token in forbidden if 0 <= token < vocab}
    # As in transformers, the one replaces the other.
    least = 0 if config.min_new_tokens is not None else max(0, given.get("min_length", 0))
    begin = given.get("begin_suppress_tokens", [])
    return Processors(
        vocab=vocab,
        bias=added,
        repetition_penalty=given.get("repetition_penalty", 1.0),
        begin_suppress=[token for token in begin if 0 <= token < vocab],
        ends=[token for token in ends if 0 <= token < vocab],
        min_new_tokens=max(0, given.get("min_new_tokens", 0)),
        min_length=least,
    )


def stop_strings_of(config: GenerationConfig, sampling: SamplingParams) -> Sequence[str]:
    """Texts that end an output by the model's own settings.

    Raises:
        ValueError: they are none.
    """
    asked = asked_by(config)
    if sampling.processors == "none" or "stop_strings" not in asked:
        return ()
    found = _typed("stop_strings", asked["stop_strings"])
    return [found] if isinstance(found, str) else found


def own_settings(config: GenerationConfig, sampling: SamplingParams) -> dict[str, list[str]]:
    """What becomes of those that change something: `obeyed`, or `not_used` because `sampling` says
    otherwise; each as name=value."""
    ours = {name: getattr(sampling, name, None) for name in CHOSEN}
    ours["do_sample"] = not sampling.greedy
    found: dict[str, list[str]] = {"obeyed": [], "not_used": []}
    for name, value in asked_by(config).items():
        if value == ours.get(name):
            continue
        obeyed = name in DONE and sampling.processors == "model"
        found["obeyed" if obeyed else "not_used"].append(_said(name, value))
    return found


def _refused(name: str, value: Any, why: str) -> ValueError:
    return ValueError(
        f"sampling.processors=model: {_said(name, value)} of the model's generation_config {why}; "
        f"use sampling.processors=none to decode without it"
    )


def _said(name: str, value: Any) -> str:
    return shorten(f"{name}={value!r}", 100, placeholder=" ...")


def _typed(name: str, value: Any) -> Any:
    try:
        return TypeAdapter(DONE[name]).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should be", "must be")
        raise _refused(name, value, f"cannot be used: {reason}") from None

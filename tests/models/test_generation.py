"""What becomes of a model's own generation settings, each field that transformers knows among
them."""

from typing import Any

import pytest
from transformers import GenerationConfig, WatermarkingConfig

from specdec.models import generation
from specdec.models.generation import (
    CHOSEN,
    DONE,
    FILTERS,
    HARMLESS,
    own_settings,
    processors_of,
    stop_strings_of,
)
from specdec.processors import NO_PROCESSORS, Processors
from specdec.sampling import SamplingParams

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.0)
NONE = SamplingParams(processors="none")
REFUSED: dict[str, Any] = {
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.1,
    "guidance_scale": 1.5,
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "watermarking_config": WatermarkingConfig(),
    "exponential_decay_length_penalty": (5, 1.1),
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "remove_invalid_values": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": ["one"],
    "force_words_ids": [[4]],
    "token_healing": True,
    "max_time": 2.0,
    "assistant_ensemble_weight": 0.5,
}
NEUTRAL = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "guidance_scale": 1.0,
    "suppress_tokens": [],
    "min_length": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "do_sample": False,
    "max_length": 4096,
    "use_cache": False,
    "renormalize_logits": True,
    "num_assistant_tokens": 5,
    "top_h": None,
}


def asked(sampling: SamplingParams = GREEDY, **settings: Any) -> Processors:
    return processors_of(GenerationConfig(**settings), sampling, ends=[2], vocab=10)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*use sampling.processors=none") as refusal:
        asked(**{name: REFUSED[name]})
    assert "\n" not in str(refusal.value)
    assert asked(NONE, **{name: REFUSED[name]}) == NO_PROCESSORS


def test_every_field_of_transformers_is_accounted_for() -> None:
    """One of a later release is not: it is refused as long as nobody has looked at it."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = {*DONE, *CHOSEN, *FILTERS, *HARMLESS, *REFUSED}
    assert fields <= known


def test_a_field_of_a_later_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(GenerationConfig):
        def __init__(self, **settings: Any) -> None:
            self.mirostat = settings.pop("mirostat", None)
            super().__init__(**settings)

    monkeypatch.setattr(generation, "GenerationConfig", Later)
    with pytest.raises(ValueError, match="mirostat=2"):
        processors_of(Later(mirostat=2), GREEDY, ends=[], vocab=10)
    assert not processors_of(Later(), GREEDY, ends=[], vocab=10)


def test_settings_that_change_nothing_are_no_settings() -> None:
    config = GenerationConfig(**NEUTRAL, chat_format="chatml")  # of a model's own code
    assert not processors_of(config, WARM, ends=[2], vocab=10)
    assert own_settings(config, WARM) == {"obeyed": [], "not_used": []}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_count_above_temperature_0_alone(name: str) -> None:
    assert not asked(GREEDY, **{name: 0.3})
    with pytest.raises(ValueError, match=f"{name}=0.3"):
        asked(WARM, **{name: 0.3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 .* greater than 0"),
        ({"repetition_penalty": "much"}, "repetition_penalty='much' .* valid number"),
        ({"bad_words_ids": [[3], [4, 5]]}, "bad_words_ids=.* single tokens"),
        ({"bad_words_ids": [[]]}, "bad_words_ids=.* single tokens"),
        ({"bad_words_ids": [[10]]}, "bad_words_ids=.* beyond the vocabulary of 10"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, "sequence_bias=.* single tokens"),
        ({"sequence_bias": [[[-3], 1.0]]}, "sequence_bias=.* cannot be used"),
        ({"sequence_bias": [[[3], float("inf")]]}, "sequence_bias=.* cannot be used"),
        ({"suppress_tokens": 3}, "suppress_tokens=3 .* valid list"),
        ({"min_new_tokens": 2.5}, "min_new_tokens=2.5 .* valid integer"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_refused(settings: Any, message: str) -> None:
    config = GenerationConfig()
    for name, value in settings.items():  # some of which it refuses itself
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"{message}.*use sampling.processors=none"):
        processors_of(config, GREEDY, ends=[2], vocab=10)


def test_what_is_done() -> None:
    found = asked(
        repetition_penalty=1.2,
        suppress_tokens=[4, 99],
        bad_words_ids=[[5], [2]],  # not the stop token
        sequence_bias={(6,): 1.5, (4,): 3.0},
        begin_suppress_tokens=[7, 99],
        min_length=8,
    )
    low = -float("inf")
    assert found.bias == {6: 1.5, 4: low, 5: low}
    assert (found.repetition_penalty, found.begin_suppress, found.min_length) == (1.2, [7], 8)
    assert asked(min_length=8, min_new_tokens=3).min_length == 0  # as in transformers
    assert not processors_of(GenerationConfig(min_length=8), GREEDY, ends=[], vocab=10)


def test_what_sampling_replaces_is_named() -> None:
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=50, repetition_penalty=1.1
    )
    names = ["do_sample=True", "temperature=0.6", "top_k=50", "top_p=0.9"]
    assert own_settings(config, GREEDY) == {
        "obeyed": ["repetition_penalty=1.1"],
        "not_used": names,
    }
    alike = SamplingParams(temperature=0.6, top_p=0.9, processors="none")
    assert own_settings(config, alike)["not_used"] == ["top_k=50", "repetition_penalty=1.1"]


def test_stop_strings_of_a_model() -> None:
    assert stop_strings_of(GenerationConfig(stop_strings="END"), GREEDY) == ["END"]
    assert stop_strings_of(GenerationConfig(stop_strings=["a", "b"]), GREEDY) == ["a", "b"]
    assert stop_strings_of(GenerationConfig(stop_strings=["a"]), NONE) == ()
    assert stop_strings_of(GenerationConfig(), GREEDY) == ()
    with pytest.raises(ValueError, match="stop_strings=3"):
        stop_strings_of(GenerationConfig(stop_strings=3), GREEDY)

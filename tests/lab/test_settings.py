"""Settings without Hydra's command line: the same as a run's."""

import pytest
import yaml

from specdec.lab.runs import SCHEMA
from specdec.lab.settings import settings_of, word_of
from tests.running import QUICK

pytestmark = pytest.mark.usefixtures("load_once")


@pytest.mark.parametrize(
    "words",
    [
        "drafter=pld tree=static 'tree.widths=[2, 1]' sampling=nucleus target.path=zoo:draft",
        "experiment=sampled target=standin/llama3_8b target.path=zoo:draft tree.budget=44",
    ],
)
def test_words_stand_for_what_a_run_of_them_notes(specdec, tmp_path, words):
    settings = settings_of(f"{words} {' '.join(QUICK)} baseline=false")
    typed = [word.strip("'") for word in words.replace(", ", ",").split()]
    assert specdec(*typed, *QUICK, "baseline=false", f"out={tmp_path}/o")[0] == 0
    config = yaml.safe_load((tmp_path / "o/config.yaml").read_text())
    assert config.pop("schema") == SCHEMA
    assert isinstance(config.pop("resolved"), dict)
    assert config.pop("out") != settings.pop("out")
    assert settings == config


def test_the_options_that_were_taken_are_named():
    choices = settings_of(["drafter=pld", "target=standin/llama3_8b"])["choices"]
    assert choices["drafter"] == "pld"
    assert choices["target"] == "standin/llama3_8b"
    assert choices["tree"] == settings_of("")["choices"]["tree"] == "chain"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense=1", "nonsense: no such setting; python -m specdec.run --help lists them"),
        ("drafter=smal_llama", "drafter=smal_llama: no such option; the nearest is small_llama;"),
        ("treee=chain", "treee: no such setting; the nearest is tree$"),
        ("tree.budgt=3", "tree.budgt: no such setting; the nearest is tree.budget$"),
        ("temperature=1", "temperature: no such setting; there is sampling.temperature$"),
        ("depth=1", "depth: no such setting; there is drafter.depth and tree.depth$"),
        ("batch=1", "batch: no such setting; there is batch_size$"),
        ("sampling.max_new_tokens=5", "sampling.max_new_tokens: no such .*; there is max_new_tok"),
        ("drafter.budget=5", "drafter.budget: no such setting; there is tree.budget$"),
        (
            "drafter.name=pld",
            "drafter.name: no such setting; an option is chosen by drafter=OPTION$",
        ),
        ("model=a/b", "model: no such setting; there is target.path$"),
        ("max_length=5", "max_length: no such setting; there is max_new_tokens$"),
        ("sampling.nonsense=1", "sampling.nonsense: no such setting; python -m specdec.run --he"),
        ("target=a/B-8", "a/B-8: no such option; a path is given as target=hf target.path=a/B-8;"),
        ("tree.width=3", "tree.width: no such setting here, but of tree=dynamic, threshold$"),
        (
            "drafter=compose drafter.parts.first.window=3",
            "first.window: no such setting here, but of drafter=lookahead, own_cache$",
        ),
        ("prompts=_fields", "prompts=_fields: no such option"),
        ("drafter=./ngram", "drafter=./ngram: no such option; the nearest is ngram"),
        ("tree=null", "tree=null: no such option; there are accuracy, chain"),
        ("tree=[chain,static]", r"tree=\[chain,static\]: no such option"),
        ("+tree=static", "tree: there is such an option already; leave the \\+ out"),
        ("tree.budget=1,2", r"tree.budget=1,2: several values; for a list write 'tree.budget=\[1"),
        ("tree.budget=${nope}", "tree.budget: Interpolation key 'nope' not found"),
        ("+choices.x=1", "choices: no such setting"),
        ("drafter=compose drafter.parts={}", r"drafter.parts=\{\}: empties nothing"),
        (
            "drafter=compose drafter@drafter.parts.x=ngram",
            "drafter@drafter.parts.x: nothing there",
        ),
        ("hydra.sweeper.params={a:1}", "hydra.sweeper.params: what is swept over are words"),
        ("--config-dri x", "--config-dri: no such option; the nearest is --config-dir; settings"),
        ("--config-dir /no/such", "--config-dir /no/such: no such folder"),
        ("--cfg jobs", "--cfg=jobs: must be job, hydra, all"),
        ("--config-dir", "--config-dir=: must be given"),
        ("-m=3", "-m=3: takes no value"),
        ("drafter=user", "drafter._target_: must be given; its file in configs/ shows how"),
    ],
)
def test_mistakes_are_told_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        settings_of(words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    ["a/b-1.c", "a b", "a,b", "it's", 'say "no"', "a\\", 'a\\"', "${x}", "$x", "~", "é=[1]"],
)
def test_a_text_is_a_word_that_is_read_back(text: str):
    assert settings_of([word_of("out", text)])["out"] == text

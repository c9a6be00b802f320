"""Own text: what the target writes after which beginnings, and that an interruption loses none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.models.load import load_model
from specdec.models.paged import PagedLM
from specdec.training.corpus import Corpus, CorpusSettings, Encoding, corpus_of
from specdec.training.own_text import TEMPERATURES, OwnText, OwnTextSettings
from specdec.training.teacher import plain
from tests.training.small import texts

SLOTS, NEW, HELD = 16, 6, 3


@pytest.fixture(scope="module")
def lm() -> PagedLM:
    return load_model("zoo:target")


@pytest.fixture(scope="module")
def corpus(lm: PagedLM, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    encoding = Encoding(tokenizer=lm.tokenizer, end=0, vocab=lm.vocab_size)
    settings = CorpusSettings(held_out=HELD)
    return corpus_of(
        [str(texts(folder))], settings, encoding, folder / "made", width=SLOTS + 2, seed=0
    )


def own_text(lm: PagedLM, corpus: Corpus, folder: Path, **settings: Any) -> OwnText:
    folder.mkdir(exist_ok=True)
    chosen = OwnTextSettings(**{"new": NEW, "batch": 2, "tokens": 40, **settings})
    return OwnText(corpus, lm, chosen, folder, slots=SLOTS, held_out=HELD, seed=0)


def test_rows_are_beginnings_and_what_the_target_says(
    lm: PagedLM, corpus: Corpus, tmp_path: Path
) -> None:
    text = own_text(lm, corpus, tmp_path)
    text.write()
    held, own = text.read()
    assert len(held.rows) == HELD
    rows, spans = (np.concatenate([getattr(x, n) for x in (held, own)]) for n in ("rows", "spans"))
    assert len(rows) == 8  # a round: 40 tokens are not in less
    lengths = set()
    for number, (row, (begin, end)) in enumerate(zip(rows, spans, strict=True)):
        whole = corpus.held_out if number < HELD else corpus.tokens
        starts = corpus.held_starts if number < HELD else corpus.starts
        documents = [whole[start : start + begin].tobytes() for start in starts]
        assert row[:begin].tobytes() in documents  # it begins as a document does
        assert 1 <= begin <= SLOTS - NEW
        assert begin < end <= begin + NEW
        assert not row[end:].any()
        lengths.add(int(begin))
        if TEMPERATURES[number % 4] == 0.0:
            ids = torch.from_numpy(row[None, :begin].astype(np.int64))
            with plain(lm.model) as model:
                said = model.generate(ids, max_new_tokens=NEW, do_sample=False)
            assert said[0].tolist() == row[:end].tolist()
    assert len(lengths) > 3
    sampled = [rows[i, spans[i, 0] : spans[i, 1]].tobytes() for i in range(8) if i % 4]
    assert len(set(sampled)) > 3


def test_an_interrupted_round_is_written_again(
    lm: PagedLM, corpus: Corpus, tmp_path: Path
) -> None:
    whole = own_text(lm, corpus, tmp_path / "whole", tokens=60)
    whole.write()

    def interrupt(share: float, tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    first = own_text(lm, corpus, tmp_path / "parts", tokens=60)
    with pytest.raises(KeyboardInterrupt):
        first.write(interrupt)
    with (tmp_path / "parts" / "own_rows.bin").open("ab") as file:
        file.write(b"half a row")
    second = own_text(lm, corpus, tmp_path / "parts", tokens=60)
    second.write()
    for name in ("own_rows.bin", "own_spans.bin"):
        files = [tmp_path / part / name for part in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    before = files[1].stat().st_mtime_ns
    own_text(lm, corpus, tmp_path / "parts", tokens=60).write()
    assert files[1].stat().st_mtime_ns == before  # complete


def test_other_own_text_is_not_taken(lm: PagedLM, corpus: Corpus, tmp_path: Path) -> None:
    own_text(lm, corpus, tmp_path).write()
    with pytest.raises(ValueError, match="holds own text of another new; choose another folder"):
        own_text(lm, corpus, tmp_path, new=5)


def test_a_beginning_needs_room() -> None:
    assert OwnTextSettings().written(512) == 256
    with pytest.raises(ValueError, match=r"^own_text\.new=15: leaves no room for a beginning in"):
        OwnTextSettings(new=15).written(16)

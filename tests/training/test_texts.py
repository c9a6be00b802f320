"""Which texts are trained on, and how they become tokens."""

import gzip
import json
import lzma
import site
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.training.batches import Batches, OwnRows
from specdec.training.corpus import Corpus, CorpusSettings, Encoding, corpus_of
from specdec.training.texts import Selection, evaluation_texts, files_of, texts_in, texts_of

WORDS = [f"w{i}" for i in range(40)]


class Letters:
    """A tokenizer with a token for each letter."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i + 1 for i in range(26)}

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


ENCODING = Encoding(tokenizer=Letters(), end=0, vocab=27)


def test_what_shares_13_words_with_an_evaluation_text_is_left_out() -> None:
    selection = Selection([" ".join(WORDS)])
    assert not selection.takes("before, " + ", ".join(w.upper() for w in WORDS[5:18]) + " after")
    assert selection.takes(" ".join([*WORDS[5:17], "other", *WORDS[17:29]]))  # twelve, twice
    assert selection.takes("short")
    assert not selection.takes("short")
    assert (selection.repeated, selection.shared) == (1, 1)


def test_texts_are_read_from_files_of_every_kind(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("a", "b\nc"))
    (tmp_path / "1.jsonl").write_text(lines)
    with lzma.open(tmp_path / "2.jsonl.xz", "wt") as file:
        file.write(lines)
    with gzip.open(tmp_path / "3.txt.gz", "wt") as file:
        file.write("whole\ntext")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "4.py").write_text("x = 1\n" * 100)
    (tmp_path / "deep" / "5.py").write_text("x = 1\n")  # too short
    (tmp_path / "deep" / "6.py").write_text("# " + "ä" * 400)  # no ASCII
    (tmp_path / "deep" / "7.bin").write_bytes(b"\0")
    found = [list(texts_in(path)) for path in files_of(str(tmp_path))]
    assert found == [["a", "b\nc"], ["a", "b\nc"], ["whole\ntext"], ["x = 1\n" * 100], [], []]


def test_python_is_the_installed_packages_in_random_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        folder = tmp_path / f"package{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.py").write_text(f"x = {number}\n".rjust(400, "#"))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))  # which is read once
    assert len(files_of("python")) == 20
    some = list(texts_of("python", seed=0, enough=1600))
    assert len(some) == 4
    assert some != list(texts_of("python", seed=1, enough=1600))
    assert len(list(texts_of(str(tmp_path), seed=0, enough=1600))) == 20


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda f: (f / "a.jsonl").write_text('{"text": "x"}\n{"a": 1}\n'), r"a\.jsonl: line 2: "),
        (lambda f: (f / "a.jsonl").write_text("nonsense\n"), r"line 1: must be an object with a"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), r"is not UTF-8; convert it$"),
        (lambda f: (f / "a.txt.xz").write_bytes(b"no"), r"a\.txt\.xz: cannot be read, "),
        (lambda f: (f / "a.bin").write_bytes(b"no"), r"holds no file of \.jsonl, "),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(
    tmp_path: Path, write: Callable[[Path], Any], said: str
) -> None:
    write(tmp_path)

    def read() -> None:
        for path in files_of(str(tmp_path)):
            list(texts_in(path))

    with pytest.raises(ValueError, match=said) as error:
        read()
    assert str(error.value).startswith("data=")
    assert "\n" not in str(error.value)


def test_evaluation_texts_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"turns": ["one", {"deep": "two"}]}\n"three"\n')
    (tmp_path / "b.txt").write_text("four")
    assert list(evaluation_texts([str(tmp_path)])) == ["one", "two", "three", "four"]
    assert len(list(evaluation_texts(["builtin"]))) > 100
    with pytest.raises(ValueError, match=r"^corpus\.without=none: no such file"):
        list(evaluation_texts(["none"]))


def made(folder: Path, **settings: Any) -> Corpus:
    random = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in random.integers(26, size=30)) for _ in range(50)]
    source = folder / "texts.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chosen = CorpusSettings(**{"held_out": 4, "without": [], **settings})
    return corpus_of([str(source)], chosen, ENCODING, folder / "made", width=12, seed=0)


def test_held_out_documents_are_whole_and_never_trained_on(tmp_path: Path) -> None:
    corpus = made(tmp_path)
    assert corpus.tokens.dtype == np.uint16
    documents = np.concatenate([corpus.held_out, corpus.tokens]).reshape(50, 31)
    assert (documents[:, 30] == 0).all()  # each ends
    assert len({row.tobytes() for row in documents}) == 50
    assert len(corpus.held_out) == 62  # the least number of documents with 4 * 12 tokens
    assert corpus.starts.tolist() == list(range(0, 48 * 31, 31))
    assert corpus.held_out_rows(12).shape == (4, 12)


def test_a_corpus_is_made_once(tmp_path: Path) -> None:
    first = made(tmp_path)
    before = (tmp_path / "made" / "tokens.bin").stat().st_mtime_ns
    again = made(tmp_path)
    assert (tmp_path / "made" / "tokens.bin").stat().st_mtime_ns == before
    assert again.manifest == first.manifest
    with pytest.raises(ValueError, match="holds a corpus of other settings; choose another"):
        made(tmp_path, held_out=5)


def test_a_corpus_has_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    assert len(made(tmp_path, tokens=100).tokens) == 124  # whole documents


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1550 tokens are too few for 200 held out sequences"):
        made(tmp_path, held_out=200)


def test_batches_are_of_both_kinds_and_mask_what_was_not_written(tmp_path: Path) -> None:
    corpus = made(tmp_path)
    rows = np.arange(100, 136, dtype=np.uint16).reshape(3, 12)
    own = OwnRows(rows=rows, spans=np.array([[4, 9], [2, 12], [5, 7]], np.int32))
    batches = Batches(corpus, own, slots=10, size=6, share=0.5, seed=0)
    batch = batches.next()
    assert batch.tokens.shape == (6, 12)
    assert batch.mask.shape == (6, 10)
    assert batch.mask[:3].all()
    text = corpus.tokens.tobytes()
    for tokens in batch.tokens[:3]:
        assert tokens.numpy().astype(np.uint16).tobytes() in text
    for tokens, mask in zip(batch.tokens[3:], batch.mask[3:], strict=True):
        begin, end = own.spans[(int(tokens[0]) - 100) // 12]
        about = [int(t) for t, counts in zip(tokens[2:], mask, strict=True) if counts]
        assert about == tokens[begin:end].tolist()  # the written ones, and no others
    state = batches.generator.get_state()
    one = batches.next()
    batches.generator.set_state(state)
    assert (batches.next().tokens == one.tokens).all()

"""Tables and plain texts of prompts, written by hand: what is read, and every refusal."""

import csv
import gzip
import random
import re
from pathlib import Path

import pytest

from specdec.lab.prompt_formats import READERS
from tests.lab.asking import load, refusal

HEADER = b"question_id,category,prompt\n"
# Name of a file: (suffix, content, texts.)
READ: dict[str, tuple[str, bytes, list[str]]] = {
    "table": (".csv", HEADER + b"a,c,Hi\nb,c,Bye\n", ["Hi", "Bye"]),
    "mark and CRLF": (".csv", b"\xef\xbb\xbfprompt,x\r\nHi,1\r\nBye,2\r\n", ["Hi", "Bye"]),
    "CR": (".csv", b"prompt,x\rHi,1\rBye,2", ["Hi", "Bye"]),
    "UTF-16": (".csv", "prompt\nH\u00e9\n".encode("utf-16"), ["H\u00e9"]),
    "quotes": (".csv", b'prompt\n"Say ""Hi"", twice"\n', ['Say "Hi", twice']),
    "line breaks in quotes": (".csv", b'prompt,x\r\n"a\r\nb",1\r\nc,2\r\n', ["a\r\nb", "c"]),
    "blank rows": (".csv", b"\nprompt,x\n\n,\nHi,\n\n", ["Hi"]),
    "names with spaces": (".csv", b"id , prompt \n1, Hi\n", [" Hi"]),
    "an index without a name": (".csv", b",prompt\n0,Hi\n", ["Hi"]),
    "turns as JSON": (".csv", b'turns\n"[""Hi"", ""Bye""]"\n', ["Hi"]),
    "the other column": (".csv", b"prompt,question\n,Hi\n", ["Hi"]),
    "long": (".csv", b"prompt\n" + b"x" * 200_000, ["x" * 200_000]),
    "tabs": (".tsv", b'prompt\tx\nHi, you\t1\n"a\tb"\t2\n', ["Hi, you", "a\tb"]),
    "packed": (".csv.gz", gzip.compress(b"prompt\nHi\n"), ["Hi"]),
    "lines": (".txt", b"\xef\xbb\xbfHi\r\n\r\n  def f():\r\nlast", ["Hi", "  def f():", "last"]),
    "lines with quotes": (".txt.gz", gzip.compress(b'"Hi", he said\n'), ['"Hi", he said']),
}


def written(folder: Path, suffix: str, content: bytes) -> str:
    path = folder / f"set{suffix}"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("case", READ)
def test_tables_and_texts(tmp_path: Path, case: str) -> None:
    suffix, content, texts = READ[case]
    prompts = load(written(tmp_path, suffix, content))
    assert [prompt.turns[0] for prompt in prompts] == texts
    assert {prompt.conversation for prompt in prompts} == {".txt" not in suffix}


def test_columns_are_fields(tmp_path: Path) -> None:
    rows = (
        b"id,category,instruction,input,max_new_tokens,answer\nx,c,Sum up,Text,7,no\n,,Go on,,,\n"
    )
    first, second = load(written(tmp_path, ".csv", rows))
    assert (first.id, first.category, first.max_new_tokens) == ("x", "c", 7)
    assert first.turns == ("Sum up\n\nText",)
    assert first.unused == ("answer",)
    assert (second.id, second.category, second.max_new_tokens) == ("1", None, None)
    assert second.turns == ("Go on",)
    (pandas,) = load(written(tmp_path, ".csv", b",prompt\n0,Hi\n"))
    assert pandas.unused == ("column 1",)
    named = written(tmp_path, ".tsv", b"body\tprompt\nraw\tno\n")
    assert load(named, field="body")[0].turns == ("raw",)


def test_whatever_a_table_holds_is_read_back(tmp_path: Path) -> None:
    """Against the writer of the standard library, which quotes what has to be quoted."""
    draw, path = random.Random(2), tmp_path / "set.csv"
    texts = ["".join(draw.choices("ab ,;\t\"'\n\r\u00e9\u2028|\0", k=9)) + "." for _ in range(200)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "id"], *([text, i] for i, text in enumerate(texts))]
        )
    assert [prompt.turns[0] for prompt in load(str(path))] == texts


HALF = gzip.compress(
    "".join(f'{{"text": "{random.Random(i).random()}"}}\n' for i in range(9999)).encode()
)
# Name of a file: (suffix, content, what is said of it.)
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "no header": (".csv", b"What is 1+1?\n", "line 1, the header, names no column"),
    "no column of prompts": (".csv", b"id,body\n1,Hi\n", "(columns: id, body); name the one"),
    "semicolons": (".csv", b"id;prompt\n1;Hi\n", "separated by semicolons, so write commas"),
    "tabs": (".csv", b"id\tprompt\n1\tHi\n", "so write commas or call the file .tsv"),
    "commas": (".tsv", b"id,prompt\n1,Hi\n", "separated by commas, so write tabs"),
    "twice": (".csv", b"prompt,prompt\n1,Hi\n", "names 'prompt' twice"),
    "a comma too many": (".csv", HEADER + b"a,c,Hi, you\n", "line 2 has 4 cells and the header 3"),
    "a row cut off": (".csv", HEADER + b"a,c,Hi\nb,c", "line 3 has 2 cells and the header 3"),
    "a quote left open": (".csv", b'prompt\n"Hi\nand so on\n', "line 2 begins a row that"),
    "a quote too many": (".csv", b'prompt\nx\n"Hi" you\n', "line 3 begins a row that"),
    "latin-1": (
        ".csv",
        b"prompt\nok\ncaf\xe9\n",
        "line 3 is not UTF-8 (byte 0xe9 at character 4)",
    ),
    "latin-1 in a header": (".csv", b"caf\xe9,prompt\n", "line 1 is not UTF-8"),
    "latin-1 in a text": (
        ".txt",
        b"ok\n\n\xff\n",
        "line 3 is not UTF-8 (byte 0xff at character 1)",
    ),
    "blank": (".csv", HEADER + b"a,c,\n", "line 2 (id 'a'): prompt is blank"),
    "no number": (".csv", b"prompt,max_new_tokens\nHi,many\n", "max_new_tokens is 'many'"),
    "only a header": (".csv", HEADER, "holds no records"),
    "nothing": (".csv", b"", "holds no records"),
    "nothing packed": (".txt.gz", gzip.compress(b""), "holds no records"),
    "blank lines": (".txt", b"\n \r\n", "holds no records"),
    "half of UTF-16": (".tsv", "prompt".encode("utf-16")[:-1], "is not in the encoding"),
    "cut off": (".jsonl.gz", HALF[: len(HALF) // 2], "is cut off or damaged behind line "),
    "damaged": (".jsonl.gz", HALF[:5000] + bytes(99) + HALF[5099:], "damaged behind line "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read(tmp_path: Path, case: str) -> None:
    suffix, content, said = REFUSED[case]
    path = written(tmp_path, suffix, content)
    message = refusal(lambda: load(path))
    assert message.startswith(f"prompts.path={path!r}")
    assert said in message


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv", b"prompt,body\nHi,raw\n")
    message = refusal(lambda: load(path, field="bod"))
    assert message.startswith("prompts.field='bod' is not in prompts.path=")
    assert message.endswith("use one of: prompt, body")
    lines = written(tmp_path, ".txt", b"\nHi\n")
    message = refusal(lambda: load(lines, field="body"))
    assert message.endswith("line 2 (id '0'); use one of: text")


def test_what_lies_behind_the_limit_is_not_read(tmp_path: Path) -> None:
    assert len(load(written(tmp_path, ".jsonl.gz", HALF[: len(HALF) // 2]), limit=9)) == 9


GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
ROW = r"^\| (`\.[a-z, `.]*`) \| .* \| (`.*`) \|$"  # of the guide's table of files: suffixes, lines
EXAMPLES = [
    (suffix, "\n".join(re.findall(r"`([^`]*)`", lines)))
    for suffixes, lines in re.findall(ROW, GUIDE.read_text(), flags=re.MULTILINE)
    for suffix in re.findall(r"`([^`]*)`", suffixes)
]


@pytest.mark.parametrize(("suffix", "content"), EXAMPLES)
def test_examples_of_the_guide(tmp_path: Path, suffix: str, content: str) -> None:
    content = content.replace(",", "\t") if suffix == ".tsv" else content
    (prompt,) = load(written(tmp_path, suffix, content.encode()))
    assert prompt.turns[0] in (
        "Who was Bach?",
        "Hi",
        'Say "Hi", twice',
        'Say "Hi"\t twice',
        "Once upon a time",
    )


def test_the_guide_has_an_example_of_every_format() -> None:
    assert {suffix for suffix, _ in EXAMPLES} == set(READERS)

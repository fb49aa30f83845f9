"""A user's own files: formats, splits, what is said about them. The shapes of a row: `test_rows`."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_datasets import build

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.datasets import SPLITS, Dataset
from emreason.questions.files import load_file
from emreason.questions.prompts import Prompts
from emreason.types import UserError

GOOD = {"question": "Which?", "choices": ["x", "y"], "answer": "B"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_three_formats_say_the_same(tmp_path):
    rows = [{**GOOD, "id": "one"}, {"question": 'Wo, "wer"?\nÄ', "choices": ["ß", "é", "€"], "answer": "C", "id": "two"}]
    jsonl = write(tmp_path / "a.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pyarrow_csv = tmp_path / "a.csv"
    with pyarrow_csv.open("w", newline="", encoding="utf-8") as file:
        import csv

        writer = csv.DictWriter(file, ["id", "question", "choices", "answer"])
        writer.writeheader()
        writer.writerows({**row, "choices": json.dumps(row["choices"])} for row in rows)
    one, two, three = (load_file("test", test=str(path)) for path in (jsonl, tmp_path / "a.parquet", pyarrow_csv))
    assert one == two == three
    assert [(question.id, question.answer, question.choices) for question in one] == [
        ("one", "B", ("x", "y")),
        ("two", "C", ("ß", "é", "€")),
    ]


def test_a_file_as_a_dataset(tmp_path):
    paths = {split: write(tmp_path / f"{split}.jsonl", *({"question": f"{split} {i}?", "answer": i} for i in range(9))) for split in SPLITS}
    overrides = [f"dataset.load.{split}={path}" for split, path in paths.items()]
    dataset = build("file", *overrides, "dataset.load.kind=number", "prompt@dataset.prompt=number", "dataset.limit.train=4")
    assert [len(dataset.questions(split)) for split in SPLITS] == [4, 9, 9]
    assert dataset.questions("test")[0].kind == "number"


FIVE = [
    {"question": "Which is red?", "choices": ["sky", "blood"], "answer": "B"},
    {"question": "Which is hot?", "choices": ["fire", "ice", "snow"], "answer": "A"},
    {"question": "Which flies?", "choices": ["a stone", "a fish", "a bird"], "answer": "C"},
    {"question": "Which is wet?", "choices": ["water", "sand"], "answer": "A"},
    {"question": "Which is sour?", "choices": ["honey", "a lemon"], "answer": "B"},
]


def parts(dataset: Dataset) -> dict[str, set[str]]:
    return {split: {question.text for question in dataset.questions(split)} for split in SPLITS}


def test_one_file_is_split_the_same_way_whatever_its_order(tmp_path):
    """Five lines are enough; a sixth line does not depend on where it stands."""
    forth = parts(build("file", f"dataset.path={write(tmp_path / 'a.jsonl', *FIVE)}"))
    assert {split: len(texts) for split, texts in forth.items()} == {"train": 3, "validation": 1, "test": 1}
    assert set.union(*forth.values()) == {row["question"] for row in FIVE}
    assert parts(build("file", f"dataset.path={write(tmp_path / 'b.jsonl', *reversed(FIVE))}")) == forth
    rows = [{"question": f"What is {i}?", "answer": i} for i in range(200)]
    sizes = {split: len(texts) for split, texts in parts(build("file", f"dataset.path={write(tmp_path / 'c.jsonl', *rows)}")).items()}
    assert sizes == {"train": 120, "validation": 40, "test": 40}


def test_a_question_that_is_there_twice_is_not_both_trained_and_tested_on(tmp_path):
    rows = [{"question": text, "answer": i} for i in range(40) for text in (f"What is {i}?", f"what is  {i}")]
    dataset = build("file", f"dataset.path={write(tmp_path / 'a.jsonl', *rows)}")
    assert dataset.overlap() == {"train_test": 0, "train_validation": 0, "examples_test": 0}
    assert sum(len(dataset.questions(split)) for split in SPLITS) == 80


@pytest.mark.parametrize(
    ("rows", "kind", "instruction"),
    [
        (FIVE, "choice", "the letter"),
        ([{"question": f"{i}?", "answer": a} for i, a in enumerate(["1,000", 2, "-3.5"])], "number", "the number"),
        ([{"question": f"{i}?", "answer": a} for i, a in enumerate([1789, "Paris", "Rome", 3])], "text", "the answer"),
    ],
)
def test_a_file_says_itself_what_its_answers_are(tmp_path, rows, kind, instruction):
    path = write(tmp_path / "a.jsonl", *rows)
    for overrides in ([f"dataset.path={path}"], [f"dataset.load.{split}={path}" for split in SPLITS]):
        dataset = build("file", *overrides)
        question = dataset.questions("train")[0]
        assert question.kind == kind
        assert instruction in Prompts(tiny_tokenizer(), dataset.prompt).text(question)
    given = build("file", f"dataset.path={path}", "dataset.prompt.instruction=Think").prompt
    assert given.instruct(question.kind) == "Think"


def test_a_file_that_cannot_be_split(tmp_path):
    two = write(tmp_path / "a.jsonl", *FIVE[:2], {**FIVE[0], "id": "again"})
    with pytest.raises(UserError, match="2 different questions; at least 3 are needed, one each to train, validate and test"):
        load_file("train", path=two)
    with pytest.raises(UserError, match=r"dataset\.path is one file for all splits, and dataset\.load\.test is given too"):
        load_file("train", path=two, test=two)
    with pytest.raises(UserError, match=r"dataset\.path: there is no file .*absent\.csv"):
        load_file("train", path=str(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {**GOOD, "answer": "C"}], "line 2: the gold answer must be one of the letters AB, not 'C'"),
        ([GOOD, {**GOOD, "answer": "y"}], "line 2: the gold answer must be one of the letters AB, not 'y'"),
        ([GOOD, {**GOOD, "answer": None}], "line 2: `answer` is missing"),
        ([GOOD, {**GOOD, "question": ""}], "line 2: `question` is missing"),
        ([GOOD, {"question": "?", "answer": "A"}], "line 2: `choices` is missing"),
        ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], "line 2: the id 'x' is already that of line 1"),
        ([{**GOOD, "choices": ["Same", "Same "]}], "line 1: two choices are alike ('Same')"),
        ([{**GOOD, "choices": ["x"]}], "line 1: `choices` must be a list of 2 to 26 strings"),
        ([{**GOOD, "choices": "x, y"}], "line 1: `choices` must be a JSON list"),
        ([GOOD, "", "{oops"], "line 3 is not JSON"),
        (["[1, 2]"], "line 1: expected an object"),
    ],
)
def test_a_malformed_file(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError) as error:
        load_file("train", train=path)
    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_file_errors(tmp_path):
    with pytest.raises(UserError, match=r"needs dataset\.path=FILE, or a file per split: dataset\.load\.validation=FILE"):
        load_file("validation", train="x.jsonl")
    with pytest.raises(UserError, match=r"there is no file .*absent\.jsonl"):
        load_file("test", test=str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match=r"must end in \.jsonl, .* or \.parquet"):
        load_file("test", test=write(tmp_path / "a.txt", GOOD))
    with pytest.raises(UserError, match="is not a Parquet file"):
        load_file("test", test=write(tmp_path / "a.parquet", GOOD))
    with pytest.raises(UserError, match=r"dataset\.load\.kind must be one of choice, number, text, or null"):
        load_file("test", kind="letters", test=write(tmp_path / "a.jsonl", GOOD))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="line 1: the gold answer 'many' is not a number"):
        load_file("test", kind="number", test=write(tmp_path / "b.jsonl", {"question": "?", "answer": "many"}))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Ä"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        load_file("test", kind="text", test=str(tmp_path / "latin.jsonl"))


# --- what files hold, and what must come of it -------------------------------------------------------------------------

ROWS = "".join(json.dumps({"question": f"What is {i}?", "answer": i}) + "\n" for i in range(1, 4))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "question;answer\nWhat is 1?;1\nWhat is 2?;2\nWhat is 3?;3\n"),
        ("a.csv", "question\tanswer\nWhat is 1?\t1\nWhat is 2?\t2\nWhat is 3?\t3\n"),
        ("a.tsv", "question\tanswer\nWhat is 1?\t1\nWhat is 2?\t2\nWhat is 3?\t3\n"),
        ("a.csv", "question|answer\nWhat is 1?|1\nWhat is 2?|2\nWhat is 3?|3\n"),
        ("a.csv", "sep=;\nquestion;answer\nWhat is 1?;1\nWhat is 2?;2\nWhat is 3?;3\n"),
        ("a.csv", "Question,Answer\r\nWhat is 1?,1\r\nWhat is 2?,2\r\n\r\nWhat is 3?,3\r\n"),
        ("a.csv", "Question,Answer\rWhat is 1?,1\rWhat is 2?,2\rWhat is 3?,3\r"),
        ("a.csv", 'question, answer\n"What is 1?", "1"\nWhat is 2?, 2\nWhat is 3?, 3\n'),
        ("a.csv", "\ufeff QUESTION , Answer \nWhat is 1?,1\nWhat is 2?,2\nWhat is 3?,3\n"),
        ("a.jsonl", "\ufeff" + ROWS),
        ("a.json", ROWS),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(ROWS.encode(), mtime=0)),  # whatever it is called
        ("a.csv.gz", gzip.compress(b"question,answer\nWhat is 1?,1\nWhat is 2?,2\nWhat is 3?,3\n", mtime=0)),
        ("a.json", json.dumps([json.loads(row) for row in ROWS.splitlines()], indent=1)),
        ("a.json", json.dumps([json.loads(row) for row in ROWS.splitlines()])),
        ("a.jsonl", json.dumps([json.loads(row) for row in ROWS.splitlines()])),
        ("a.json", json.dumps({"version": "1", "data": [json.loads(row) for row in ROWS.splitlines()]})),
        ("a.json", json.dumps({"questions": [json.loads(row) for row in ROWS.splitlines()]}, indent=1)),
    ],
)
def test_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    questions = load_file("test", test=str(path))
    assert [(q.text, q.answer, q.kind) for q in questions] == [(f"What is {i}?", str(i), "number") for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\na,1\nb,2,3\n", "line 3 has 3 cells, the header 2"),
        ("a.csv", "question,id,answer\na,x,1\nb,2\n", "line 3 has 2 cells, the header 3"),
        ("a.csv", 'question,answer\n"a\nb",1\nc,\n', "line 4: `answer` is missing"),
        ("a.csv", 'question,answer\na,1\n"b,2\nc,3\n', "line 3 is not CSV"),
        ("a.csv", "question,answer,answer\na,1,2\n", "two columns are called 'answer'"),
        ("a.csv", "question,answer\na,1\n".encode("utf-16"), "UTF-16"),
        ("a.csv", "question,answer\na,1\n".encode("utf-16-le"), "UTF-16"),
        ("a.csv", "question,answer\nb,1\nä,1\n".encode("latin-1"), "line 3 is not UTF-8 text"),
        ("a.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)[:-9], "not a whole gzip file"),
        ("a.json", '[{"question": "a", "answer": 1},\n{"question"', "not JSON: Expecting ':' delimiter at line 2"),
        ("a.json", '{"question": ["a"],\n "answer": [1]}', 'a JSON file must be a list of objects, or hold one under "data"'),
        ("a.json", "[]", "is empty"),
        ("a.jsonl", '{"question": "a", "answer": 1, "answer": 2}\n', "line 1 cannot be read: an object has 'answer' twice"),
        ("a.jsonl", '{"question": "a \\ud800", "answer": 1}\n', "line 1: `question` holds half a character"),
        ("a.jsonl", '{"question": NaN, "answer": 1}\n', "line 1: `question` is missing"),
        ("a.jsonl", "[" * 100_000, "line 1 cannot be read: maximum recursion depth"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_file("test", test=str(path))
    assert message in str(error.value)
    assert path.name in str(error.value)


def test_parquet_with_nested_types_and_short_floats(tmp_path):
    choices = [{"label": "A", "text": "a dog"}, {"label": "B", "text": "a stone"}]
    nested = pyarrow.table({"question": [{"stem": "Which barks?", "choices": choices}], "answerKey": ["A"]})
    pyarrow.parquet.write_table(nested, tmp_path / "n.parquet")
    (question,) = load_file("test", test=str(tmp_path / "n.parquet"))
    assert (question.text, question.choices, question.answer) == ("Which barks?", ("a dog", "a stone"), "A")
    floats = pyarrow.table({"question": ["a", "b"], "answer": pyarrow.array([0.1, 8.0], pyarrow.float32())})
    pyarrow.parquet.write_table(floats, tmp_path / "f.parquet")
    assert [q.answer for q in load_file("test", test=str(tmp_path / "f.parquet"))] == ["0.1", "8"]
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", b"b"], "answer": ["x", "y"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 1: `question` is bytes, where a text belongs"):
        load_file("test", test=str(tmp_path / "b.parquet"))


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for count in (3, 4):
        write(path, *({"question": f"{i}?", "answer": i} for i in range(count)))
        assert len(load_file("test", test=str(path))) == count


def test_what_was_understood_is_one_line(tmp_path):
    rows = [{"question": f"Ann buys {i} boxes of 4 pens.\nHow many pens has she?", "answer": f"So.\n#### {4 * i}"} for i in range(1000)]
    dataset = build("file", f"dataset.path={write(tmp_path / 'a.jsonl', *rows)}")
    line = dataset.understood()
    assert line.startswith("file: 1,000 questions (600 train, 200 validation, 200 test), kind number, e.g. 'Ann buys ")
    example = dataset.questions("train")[0]
    assert line.endswith(f"How many pens has she?' → {example.answer}")
    choice = build("file", f"dataset.path={write(tmp_path / 'b.jsonl', *FIVE)}").understood()
    assert "kind choice" in choice
    assert choice.endswith(")")  # the letter and the choice's text
    words = build("file", f"dataset.path={tmp_path / 'b.jsonl'}", "dataset.answer_as=text").understood()
    assert words == re.sub(r"→ [A-Z] \((.*)\)$", r"→ \1", choice)


def test_choices_are_answered_by_their_text_where_the_config_says_so(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *FIVE)
    dataset = build("file", f"dataset.path={path}", "dataset.answer_as=text")
    assert {q.answer_as for split in SPLITS for q in dataset.questions(split)} == {"text"}
    assert "the answer." in Prompts(tiny_tokenizer(), dataset.prompt).text(dataset.questions("train")[0])
    lettered = build("file", f"dataset.path={path}")
    assert {q.answer_as for q in lettered.questions("train")} == {"letter"}
    assert "the letter." in Prompts(tiny_tokenizer(), lettered.prompt).text(lettered.questions("train")[0])
    build("file", f"dataset.path={path}", "dataset.answer_as=text", "prompt@dataset.prompt=choice")
    assert "add prompt@dataset.prompt=choice_text" in caplog.text

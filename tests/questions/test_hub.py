"""Datasets of the Hub by overrides alone, and the ready ones on made-up rows of the real shape, from a mirror of the Hub's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from test_datasets import build

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import correct, extract, normalise
from emreason.questions.datasets import SPLITS
from emreason.questions.prompts import Prompts, render_completion
from emreason.types import UserError

FIVE = ["car", "sea", "sky", "hat", "box"]


def gsm8k(i: int) -> dict:
    return {
        "question": f"Ann buys {i} boxes of 4 pens. How many?",
        "answer": f"She has {i}*4=<<{i}*4={4 * i}>>{4 * i} pens.\n#### {4 * i:,}",
    }


def commonsense_qa(i: int) -> dict:
    choices = {"label": list("ABCDE"), "text": FIVE}
    return {"id": f"q{i}", "question": f"Where is {i}?", "question_concept": "thing", "choices": choices, "answerKey": "ABCDE"[i % 5]}


def math500(i: int) -> dict:
    answer = rf"\frac{{{i}}}{{7}}" if i % 2 else str(i)
    return {"problem": f"What is ${i}$?", "solution": rf"It is $\boxed{{{answer}}}$.", "answer": answer, "subject": "Algebra", "level": 1,
            "unique_id": f"test/algebra/{i}.json"}  # fmt: skip


def aqua(i: int) -> dict:
    options = [f"{letter}){i + n}" for n, letter in enumerate("ABCDE")]
    return {"question": f"Which number is {i}?", "options": options, "rationale": "It is.\nAnswer: A", "correct": "ABCDE"[i % 5]}


def strategyqa(i: int) -> dict:
    return {"qid": f"s{i}", "term": "t", "description": "d", "question": f"Is {i} even?", "answer": i % 2 == 0, "facts": "Even is even."}


# name: (repository, configuration's folder, a made-up row, kind, rows per split of the repository, questions of ours)
READY = {
    "gsm8k": ("openai/gsm8k", "main", gsm8k, "number", {"train": 40, "test": 5}, [38, 2, 5]),
    "commonsense_qa": ("tau/commonsense_qa", "data", commonsense_qa, "choice", {"train": 40, "validation": 5}, [36, 4, 5]),
    "math500": ("HuggingFaceH4/MATH-500", None, math500, "text", {"test": 50}, [30, 10, 10]),
    "aqua": ("deepmind/aqua_rat", "raw", aqua, "choice", {"train": 9, "validation": 5, "test": 6}, [9, 5, 6]),
    "strategyqa": ("ChilleD/StrategyQA", "data", strategyqa, "choice", {"train": 40, "test": 6}, [36, 4, 6]),
}


def mirror(root: Path, name: str) -> Path:
    """A mirror as the Hub lays it out: Parquet under the configuration's name, or, where it has none, JSON lines."""
    path, config, row, _, sizes, _ = READY[name]
    start = 0
    for split, size in sizes.items():
        rows = [row(i) for i in range(start, start + size)]
        start += size
        file = root / path / (f"{config}/{split}-00000-of-00001.parquet" if config else f"{split}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        if config:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("name", READY)
def test_a_ready_dataset(tmp_path, name):
    dataset = build(name, data_root=mirror(tmp_path, name))
    _, _, _, kind, _, sizes = READY[name]
    found = {split: dataset.questions(split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == sizes
    everything = [question for split in SPLITS for question in found[split]]
    assert len({question.text for question in everything}) == sum(sizes)
    assert {question.kind for question in everything} == {kind}
    examples = dataset.worked_examples()
    assert 3 <= len(examples) <= 4
    for question in [*everything, *(example.question for example in examples)]:
        assert correct(extract(render_completion(question, "So."), question), question)
    assert {e.question.answer_as for e in examples} == {q.answer_as for q in everything}
    assert Prompts(tiny_tokenizer(), dataset.prompt, examples).ids(found["test"][0], n_examples=len(examples))


def test_the_ready_datasets_golds(tmp_path):
    golds = {name: {q.text: q for q in build(name, data_root=mirror(tmp_path, name)).questions("train")} for name in READY}
    ann = golds["gsm8k"]["Ann buys 3 boxes of 4 pens. How many?"]
    assert ann.answer == "12"
    assert (golds["commonsense_qa"]["Where is 7?"].answer, golds["commonsense_qa"]["Where is 7?"].choices) == ("C", tuple(FIVE))
    assert (golds["aqua"]["Which number is 3?"].answer, golds["aqua"]["Which number is 3?"].choices[3]) == ("D", "6")
    even = next(q for text, q in golds["strategyqa"].items() if text == "Is 4 even?")
    assert (even.answer, even.choices, even.answer_as) == ("A", ("yes", "no"), "text")
    assert all(q.answer in (str(n := int(text[9:-2])), rf"\frac{{{n}}}{{7}}") for text, q in golds["math500"].items())


def test_a_row_that_cannot_be_read_is_left_out_of_aqua_and_counted(tmp_path, caplog):
    root = mirror(tmp_path, "aqua")
    rows = [aqua(i) for i in range(9)]
    rows[4]["correct"] = ""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "deepmind/aqua_rat/raw/train-00000-of-00001.parquet")
    assert len(build("aqua", data_root=root).questions("train")) == 8
    assert "1 of 9 rows skipped" in caplog.text


def test_any_dataset_by_overrides_alone(tmp_path):
    root = mirror(mirror(tmp_path, "gsm8k"), "math500")
    path = ["dataset.load.path=openai/gsm8k", "dataset.load.config=main"]
    mapped = build("hub", *path, "dataset.load.splits.validation=test", "dataset.limit.train=7", data_root=root)
    # test serves two of ours and is cut
    assert [len(mapped.questions(split)) for split in SPLITS] == [7, 4, 1]
    assert not mapped.overlap()["train_test"]
    cut = build("hub", *path, "dataset.load.splits={train: train, validation: train, test: train}", data_root=root)
    assert [len(cut.questions(split)) for split in SPLITS] == [24, 8, 8]
    assert "40 questions (24 train, 8 validation, 8 test), kind number" in cut.understood()
    columns = ["dataset.columns.question=problem", "dataset.columns.answer=level", "dataset.load.splits={train: test, validation: test}"]
    other = build("hub", "dataset.load.path=HuggingFaceH4/MATH-500", *columns, data_root=root)
    assert {question.answer for question in other.questions("train")} == {"1"}
    shown = {normalise(question.text) for split in SPLITS for question in other.questions(split)}
    assert len(shown) == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.load.config=socratic"], r"openai/gsm8k \(socratic, train\)"),
        (["dataset.load.config=main"], r"openai/gsm8k \(main, validation\)"),
        (["dataset.load.config=main", "dataset.load.held_out=2"], r"dataset\.load\.held_out must be a share between 0 and 1, not 2"),
        (["dataset.load.path=nobody/nothing"], r"has no nobody/nothing; `make data` builds"),
        (["dataset.load.config=main", "dataset.load.splits.validation=test", "+dataset.load.nosuch=1"], r"'nosuch'"),
        (["+dataset.nosuch=1"], "unexpected keyword argument 'nosuch'"),
    ],
)
def test_a_hub_dataset_that_is_not_there(tmp_path, overrides, message):
    with pytest.raises(Exception, match=message) as error:
        build("hub", "dataset.load.path=openai/gsm8k", *overrides, data_root=mirror(tmp_path, "gsm8k")).questions("train")
    assert isinstance(error.value, UserError) or isinstance(error.value.__cause__, UserError)


def test_the_hub_itself_is_asked_for_the_same(monkeypatch):
    import datasets

    asked = []

    class Rows(list):
        def to_list(self):
            return list(self)

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return Rows(gsm8k(i) for i in range(40 if split == "train" else 5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(build("gsm8k").questions("train")) == 38
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_commonsense_qa_reads_the_same_through_the_library(tmp_path):
    """The mirror's layout is one that `datasets.load_dataset(PATH)` reads."""
    from emreason.questions.hub import hub_rows

    root = mirror(tmp_path, "commonsense_qa")
    ours = hub_rows("tau/commonsense_qa", None, "validation", str(root))
    (root / "tau/commonsense_qa/data").rename(root / "tau/commonsense_qa/files")  # not where we look
    assert hub_rows("tau/commonsense_qa", None, "validation", str(root)) == ours

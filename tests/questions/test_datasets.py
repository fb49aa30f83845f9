"""Datasets (DESIGN §5.3, §5.4, §5.12): every gold answer is accepted, labels become letters by position, overlaps are known."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub import find_or_build_hub
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import correct, extract, normalise, parse_number
from emreason.questions.datasets import SPLITS, Dataset, cut, explain_sum, identity, make_sums, sum_examples
from emreason.questions.hub import load_hub, load_mmlu
from emreason.questions.prompts import Prompts, PromptTemplate, render_completion
from emreason.types import Question, UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
HUB_NAMES = ("arc_challenge", "arc_easy", "openbookqa", "mmlu")
settings.register_profile("emreason", deadline=None)  # the cores may be busy
settings.load_profile("emreason")

TEMPLATE = PromptTemplate("Explain.", "SENTINEL-77 {answer}")


def build(name: str, *overrides: str, data_root: object = None) -> Dataset:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+dataset={name}", f"+data_root={data_root or 'null'}", *overrides])
    return instantiate(config.dataset)


@pytest.fixture(scope="module")
def hub() -> Path:
    return find_or_build_hub()


@pytest.fixture(scope="module")
def real(hub):
    return {name: build(name, data_root=hub) for name in HUB_NAMES}


# --- every dataset -----------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("name", HUB_NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answer_of_the_hub_is_accepted(real, name, split):
    questions = real[name]._all(split)  # worked examples and overlaps included
    assert len(questions) > 200
    for question in questions:
        completion = render_completion(question, "The answer is (A). No: not A, and not (C) either.")
        assert correct(extract(completion, question), question), question
        for letter in set(question.letters) - {question.answer}:
            assert not correct(extract(f"Because.\nAnswer: {letter}", question), question)
        index = question.letters.index(question.answer)
        stated = extract(f"Answer: {question.answer}. {question.choices[index]}", question)
        assert stated == question.answer or "\n" in question.choices[index], question


@pytest.mark.parametrize("name", ["sums", "reasoning_gym", "gym_family", "gym_equations"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_generated_gold_answer_is_accepted(name, split):
    if name != "sums":
        pytest.importorskip("reasoning_gym")
    for question in build(name).questions(split):
        assert correct(extract(render_completion(question, "Answer: 1"), question), question)
        assert not correct(extract("Answer: 123456789", question), question)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        *((task, "number") for task in ("chain_sum", "basic_arithmetic", "letter_counting")),
        *((task, "text") for task in ("spell_backward", "mini_sudoku", "simple_equations", "number_sorting", "syllogism")),
    ],
)
def test_reasoning_gym_accepts_its_own_answers(task, kind):
    pytest.importorskip("reasoning_gym")
    sizes = "dataset.load.sizes={train:8,validation:4,test:4}"
    dataset = build("reasoning_gym", f"dataset.load.task={task}", f"dataset.load.kind={kind}", sizes)
    assert dataset.name == f"reasoning_gym_{task}"
    questions = [question for split in SPLITS for question in dataset.questions(split)]
    assert all(correct(extract(render_completion(question, "So."), question), question) for question in questions)
    assert not any(correct(extract("Answer: no idea", question), question) for question in questions)


@pytest.mark.real
@pytest.mark.parametrize("name", [*HUB_NAMES, "openbookqa_words", "sums", "gym_family", "gym_equations"])
def test_worked_examples(real, hub, name):
    dataset = real.get(name) or build(name, data_root=hub)
    examples = dataset.worked_examples()
    assert 2 <= len(examples) <= 4
    assert len({example.question.answer for example in examples[:2]}) == 2 or name == "sums"
    for example in examples:
        assert correct(extract(render_completion(example.question, example.rationale), example.question), example.question)
    shown = {normalise(example.question.text) for example in examples}
    for split in SPLITS:
        assert not shown & {normalise(question.text) for question in dataset.questions(split)}
    assert Prompts(tiny_tokenizer(), dataset.prompt, examples).ids(dataset.questions("test")[0], n_examples=len(examples))


@pytest.mark.real
def test_what_the_real_data_is(real):
    sizes = {name: [len(dataset.questions(split)) for split in SPLITS] for name, dataset in real.items()}
    assert sizes == {
        "arc_challenge": [1115, 299, 1172],  # the training splits are less 4 worked examples, one of which OpenBookQA has twice
        "arc_easy": [2247, 570, 2376],
        "openbookqa": [4952, 500, 500],
        "mmlu": [1512, 300, 14042],
    }
    assert {name: dataset.overlap() for name, dataset in real.items()} == {
        "arc_challenge": {"train_test": 0, "train_validation": 0, "examples_test": 0},  # six share a stem, with other choices
        "arc_easy": {"train_test": 3, "train_validation": 0, "examples_test": 0},
        "openbookqa": {"train_test": 14, "train_validation": 7, "examples_test": 0},
        "mmlu": {"train_test": 28, "train_validation": 1, "examples_test": 0},
    }


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"id": "1", "text": "Which?", "answer": "A"}, "list of emreason.Question, not of dict"),
        (Question(1, "Which?", "A", "text"), "question 1: its id must be a string, not 1"),
        (Question("q", None, "A", "text"), "question 'q': its text must be a string"),
        (Question("q", "Which?", 4, "number"), "its answer must be a string, not 4"),
        (Question("q", "Which?", "A", "mc", ("a", "b")), "its kind must be choice, number, text, not 'mc'"),
        (Question("q", "Which?", "A", "choice", ["a", "b"]), "its choices must be a tuple of strings"),
        (Question("q", "Which?", "A", "choice", (1, 2)), "its choices must be a tuple of strings"),
    ],
)
def test_a_loader_of_ones_own_is_held_to_the_types(question, words):
    with pytest.raises(UserError, match=re.escape(words)):
        Dataset("mine", lambda _: iter([question]), TEMPLATE).questions("train")
    with pytest.raises(UserError, match=r"must return a list of emreason\.Question, not None"):
        Dataset("mine", lambda _: None, TEMPLATE).questions("train")


def test_the_fingerprint_is_of_what_is_asked():
    def of(limit, *answers):
        questions = [Question(f"q{n}", f"Question {n}?", answer, "text", verify=str.isalpha) for n, answer in enumerate(answers)]
        return Dataset("mine", lambda _: questions, TEMPLATE, limit={"train": limit}).fingerprint()

    before = of(2, "a", "b", "c")
    assert of(2, "a", "b", "c") == before  # functions among them
    changed = of(2, "x", "y", "z")
    assert all(changed[split] != before[split] for split in SPLITS)
    assert of(1, "a", "b", "c")["test"] == before["test"]


def test_overlap_is_counted_and_dropped():
    texts = {"train": "abcdef", "validation": "fg", "test": "aBhi"}

    def load(split):
        return [Question(f"{split}-{t}", f"{t}?", "1", "number") for t in texts[split]]

    shown = [{"question": "h?", "answer": 1, "rationale": "So."}]
    for drop, left in [(False, "abcdef"), (True, "cde")]:
        dataset = Dataset("d", load, TEMPLATE, shown, drop_overlap=drop)
        assert sorted(question.text[0] for question in dataset.questions("train")) == list(left)
        assert len(dataset.questions("test")) == 4
        assert dataset.overlap() == {"train_test": 2, "train_validation": 1, "examples_test": 1}


def test_one_stem_with_other_choices_is_another_question():
    stem = "Which statement is true?"
    asked = [Question(f"{i}", stem, "A", "choice", (f"a{i}", f"b{i}")) for i in range(10)]
    again = replace(asked[3], id="again", choices=asked[3].choices[::-1], answer="B")
    parts = cut([*asked, again], SPLITS, "mine")
    assert {split: len({identity(q) for q in part}) for split, part in parts.items()} == {"train": 6, "validation": 2, "test": 2}
    assert sum("3" in {q.id for q in part} and "again" in {q.id for q in part} for part in parts.values()) == 1  # kept together
    shown = [{"question": stem, "answer": "A", "choices": ["x", "y"], "rationale": "So."}]
    dataset = Dataset("mine", lambda split: parts[split], TEMPLATE, shown, drop_overlap=True)
    assert len(dataset.questions("train")) == len(parts["train"])
    assert dataset.overlap() == {"train_test": 0, "train_validation": 0, "examples_test": 0}


@pytest.mark.real
def test_drop_overlap(hub):
    dataset = build("openbookqa", "dataset.drop_overlap=true", data_root=hub)
    train = dataset.questions("train")
    assert len(train) < 4952
    for split in ("validation", "test"):
        assert not {identity(question) for question in train} & {identity(question) for question in dataset.questions(split)}
    assert len(dataset.questions("test")) == 500


@pytest.mark.real
def test_labels_become_letters_by_position(hub, tmp_path):
    counts = Counter(len(question.choices) for question in load_hub("test", "allenai/ai2_arc", "ARC-Challenge", data_root=str(hub)))
    assert set(counts) == {3, 4, 5}
    folder = tmp_path / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    rows = [
        {"id": "digits", "question": "?", "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
        {"id": "five", "question": "?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "E"},
        {"id": "three", "question": "?", "choices": {"text": list("xyz"), "label": ["1", "2", "3"]}, "answerKey": "1"},
    ]
    for split in SPLITS:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    questions = load_hub("train", "allenai/ai2_arc", "ARC-Easy", data_root=str(tmp_path))
    assert [(question.answer, question.letters) for question in questions] == [("C", "ABCD"), ("E", "ABCDE"), ("A", "ABC")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[0], "answerKey": "5"}]), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="row 1: the gold answer must be one of 1, 2, 3, 4, not '5'"):
        load_hub("test", "allenai/ai2_arc", "ARC-Easy", data_root=str(tmp_path))


@pytest.mark.real
def test_mmlu_is_cut_without_overlap(hub):
    train, validation = ({question.id for question in load_mmlu(split, 300, str(hub))} for split in ("train", "validation"))
    assert len(train) == 1531 + 285 - 300
    assert len(validation) == 300
    assert not train & validation
    assert {question.id for question in load_mmlu("validation", 100, str(hub))} < validation


# --- limits ------------------------------------------------------------------------------------------------------------


def numbered(split, n=50):
    return [Question(f"{split}-{i}", f"{split} question {i}?", str(i), "number") for i in range(n)]


@given(st.integers(1, 50), st.integers(1, 50))
def test_limited_sets_are_nested_and_deterministic(small, large):
    small, large = sorted((small, large))
    few, many = (Dataset("d", numbered, TEMPLATE, limit={"train": n}).questions("train") for n in (small, large))
    assert len(few) == small
    assert many[:small] == few
    assert few == Dataset("d", lambda split: numbered(split)[::-1], TEMPLATE, limit={"train": small}).questions("train")


def test_a_subset_is_not_the_head_of_the_file():
    chosen = Dataset("d", numbered, TEMPLATE, limit={"train": 10}).questions("train")
    assert {question.id for question in chosen} != {question.id for question in numbered("train")[:10]}
    assert [question.id for question in chosen][:3] == ["train-11", "train-43", "train-39"]  # on every machine, in every process


@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=8), st.integers(1, 9))
def test_questions_with_a_longer_choice_are_left_out_whichever_choice_is_right(lengths, most):
    """By the right choice's length alone, the short ones would be the right ones."""
    every = [
        Question(f"q{i}", f"q {i}?", "AB"[i % 2], "choice", tuple(" ".join([f"{j}"] * n) for j, n in enumerate(ns)))
        for i, ns in enumerate(lengths)
    ]
    kept = {f"q{i}" for i, ns in enumerate(lengths) if max(ns) <= most}
    dataset = Dataset("d", lambda _: every, TEMPLATE, max_choice_words=most)
    if not kept:
        with pytest.raises(UserError, match="empty"):
            dataset.questions("test")
    else:
        assert {question.id for question in dataset.questions("test")} == kept


@pytest.mark.parametrize("limit", [0, -1, 1.5, "10", True])
def test_a_bad_limit(limit):
    with pytest.raises(UserError, match=r"dataset\.limit\.test must be a positive integer or null"):
        Dataset("d", numbered, TEMPLATE, limit={"test": limit}).questions("test")


def test_worked_examples_leave_the_training_split_before_the_limit():
    plain = Dataset("d", numbered, TEMPLATE, limit={"train": 5}).questions("train")
    shown = {"id": plain[0].id, "rationale": "So."}
    dataset = Dataset("d", numbered, TEMPLATE, [shown], {"train": 5})
    assert dataset.questions("train")[:4] == plain[1:]
    assert len(dataset.questions("train")) == 5
    assert dataset.worked_examples()[0].question == plain[0]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"id": "train-99", "rationale": "So."}, "no question with the id 'train-99'"),
        ({"id": "train-1"}, "needs a `rationale`"),
        ({"question": "?", "rationale": "So."}, "needs the `id` of a training question, or a `question` and its `answer`"),
        ({"question": "?", "answer": "C", "choices": ["a", "b"], "rationale": "So."}, "must be one of the letters AB, not 'C'"),
    ],
)
def test_a_bad_worked_example(example, message):
    with pytest.raises(UserError, match=message) as error:
        Dataset("d", numbered, TEMPLATE, [example]).worked_examples()
    assert "dataset.demonstrations[0]" in str(error.value)


def test_written_worked_examples():
    examples = [
        {"question": "1 + 1?", "answer": 2, "rationale": "One more than 1."},
        {"question": "Which?", "answer": "B", "choices": ["x", "y"], "rationale": "y."},
        {"question": "Who?", "answer": "Ada", "rationale": "She."},
    ]
    kinds = [example.question.kind for example in Dataset("d", numbered, TEMPLATE, examples).worked_examples()]
    assert kinds == ["number", "choice", "text"]
    by_number = Dataset("d", lambda _: [Question("9", "a?", "1", "number")], TEMPLATE, [{"id": 9, "rationale": 5}])
    assert [(example.question.id, example.rationale) for example in by_number.worked_examples()] == [("9", "5")]


@pytest.mark.parametrize(("choices", "answer", "letter"), [(["YES", "NO"], "NO", "B"), (["B", "A"], "A", "A"), (["x", "DE"], "DE", "B")])
def test_a_worked_examples_answer_is_a_letter_or_a_choice(choices, answer, letter):
    example = {"question": "?", "answer": answer, "choices": choices, "rationale": "So."}
    assert Dataset("d", numbered, TEMPLATE, [example]).worked_examples()[0].question.answer == letter


def test_bad_splits():
    with pytest.raises(UserError, match="the test split is empty"):
        Dataset("d", lambda _: [], TEMPLATE).questions("test")
    with pytest.raises(UserError, match="have the id 'x'"):
        Dataset("d", lambda _: [Question("x", "a?", "1", "number"), Question("x", "b?", "2", "number")], TEMPLATE).questions("test")
    with pytest.raises(UserError, match="must be one of the letters AB, not 'C'"):
        Dataset("d", lambda _: [Question("x", "a?", "C", "choice", ("a", "b"))], TEMPLATE).questions("test")


# --- generated questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terms", "seed"), [(2, 0), (3, 0), (3, 1), (7, 0)])
def test_sums(terms, seed):
    splits = {split: make_sums(split, terms, seed) for split in SPLITS}
    texts = [question.text for questions in splits.values() for question in questions]
    texts += [example.question.text for example in sum_examples(terms, seed, 8)]
    assert len(set(texts)) == len(texts) == min(9**terms, 20_000)
    for question in splits["test"][:20]:
        numbers = [int(word) for word in question.text.removeprefix("What is ").removesuffix("?").split(" + ")]
        assert len(numbers) == terms
        assert all(1 <= number <= 9 for number in numbers)
        assert sum(numbers) == parse_number(question.answer)
    assert splits["train"] == make_sums("train", terms, seed) != make_sums("train", terms, seed + 1)


def test_worked_sums():
    assert explain_sum([3, 5, 9]) == "3 + 5 = 8. 8 + 9 = 17."
    assert explain_sum([1, 2]) == "1 + 2 = 3."
    dataset = build("sums", "dataset.load.terms=4")
    assert dataset.worked_examples()[0].rationale.count("=") == 3
    assert [len(dataset.questions(split)) for split in SPLITS] == [128, 64, 100]
    with pytest.raises(UserError, match=r"dataset\.load\.terms"):
        make_sums("train", 1)
    with pytest.raises(UserError, match=r"between 0 and 8"):
        sum_examples(3, 0, 9)


def test_reasoning_gym_errors(monkeypatch):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=r"dataset\.load\.task='no_such_task'"):
        build("reasoning_gym", "dataset.load.task=no_such_task").questions("train")
    with pytest.raises(UserError, match="gold answer is missing"):
        build("reasoning_gym", "dataset.load.task=rush_hour", "dataset.load.kind=text").questions("train")
    with pytest.raises(UserError, match=r"dataset\.load\.kind=text and prompt@dataset\.prompt=text"):
        build("reasoning_gym", "dataset.load.task=spell_backward").questions("train")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'emreason\[gym\]'"):
        build("reasoning_gym").questions("train")


def test_reasoning_gym_splits_share_no_question():
    dataset = build("reasoning_gym", "+dataset.load.params={min_terms:2,max_terms:2,min_digits:1,max_digits:1}")
    assert dataset.overlap()["train_test"] == dataset.overlap()["train_validation"] == 0
    texts = [question.text for split in SPLITS for question in dataset.questions(split)]
    assert len(set(texts)) == len(texts)


# --- no Hub ------------------------------------------------------------------------------------------------------------


def test_no_hub_names_the_three_ways_out(monkeypatch):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError) as error:
        build("arc_easy").questions("test")
    for way in ("access to the Hub", "data_root=DIR", "EMREASON_DATA_ROOT", "make data"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_root_without_the_data(tmp_path):
    with pytest.raises(UserError, match=r"has no allenai/openbookqa; `make data`"):
        build("openbookqa", data_root=tmp_path).questions("test")


def test_importing_the_module_does_not_import_the_library():
    import subprocess

    code = "import sys, emreason.questions.datasets; sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

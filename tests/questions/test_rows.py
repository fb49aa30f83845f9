"""The shapes that a row of a user's file or of a Hub dataset may have. Nothing is read wrongly in silence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_datasets import TEMPLATE, numbered

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import correct, extract, parse_number
from emreason.questions.cells import final
from emreason.questions.datasets import Dataset
from emreason.questions.prompts import Prompts, render_completion
from emreason.questions.reading import Row, asked_of
from emreason.questions.rows import read
from emreason.types import Question, UserError

PQRS = ["p", "q", "r", "s"]
NAN = float("nan")


def questions(records: list, **asked) -> list[Question]:
    return read([Row(f"f, line {n}", f"f-{n}", record) for n, record in enumerate(records, start=1)], asked_of(**asked), "f")


def rows(n: int = 5, **columns) -> list[dict]:
    """n rows; a function gives a row's value by its number."""
    return [{"question": f"Q{i}?", **{k: v(i) if callable(v) else v for k, v in columns.items()}} for i in range(n)]


def said(found: list[Question]) -> list[tuple]:
    return [(q.answer, q.choices) for q in found]


# --- choices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["A B C D", "a b c d", "option_a option_b option_c option_d", "choice1 choice2 choice3 choice4",
                                    "option_0 option_1 option_2 option_3", "Option A,Option B,Option C,Option D", "opa opb opc opd",
                                    "(A) (B) (C) (D)"])  # fmt: skip
@pytest.mark.parametrize("gold", ["ABCD", "abcd", ["(A)", "(B)", "(C)", "(D)"], PQRS, ["A) p", "B) q", "C) r", "D) s"]])
def test_options_in_columns(header, gold):
    names = header.split("," if "," in header else " ")
    found = questions([{"question": f"Q{i}?", **dict(zip(names, PQRS, strict=True)), "answer": gold[i]} for i in range(4)])
    assert said(found) == [(letter, tuple(PQRS)) for letter in "ABCD"]


@pytest.mark.parametrize(
    "shape",
    [
        {"choices": {"label": list("ABCD"), "text": PQRS}, "answerKey": "B"},
        {"choices": {"label": list("1234"), "text": PQRS}, "answerKey": "2"},
        {"choices": {"label": list("1234"), "text": PQRS}, "answerKey": "B"},
        {"choices": {"text": PQRS, "label": ["w", "x", "y", "z"]}, "answerKey": "x"},
        {"choices": [{"label": letter, "text": text} for letter, text in zip("ABCD", PQRS, strict=True)], "answer": "B"},
        {"choices": [{"text": text, "label": letter} for letter, text in zip("1234", PQRS, strict=True)], "answer": 2},
        {"options": {"A": "p", "B": "q", "C": "r", "D": "s"}, "answer": "q", "answer_idx": "B"},
        {"options": list(zip("ABCD", PQRS, strict=True)), "answer": "B"},
        {"options": ["A)p", "B)q", "C)r", "D)s"], "correct": "B"},
        {"options": ["A. p", "B. q", "C. r", "D. s"], "correct": "B"},
        {"choices": json.dumps(PQRS), "answer": "B"},
        {"choices": str(PQRS), "answer": "B"},
        {"choices": json.dumps({"label": list("ABCD"), "text": PQRS}), "answer": "B"},
        {"choices": PQRS, "answer": ["B"]},
        {"choices": [*PQRS, None], "answer": "B"},
        {"choices": [*PQRS, ""], "answer": "B"},
        {"choices": [*PQRS, NAN], "answer": "B"},
        {"choices": [*PQRS, "nan"], "answer": "B"},  # pandas' filling
        {"choices": ["p", None, "q", "r", "s"], "answer": "C"},  # the letter counts the empty place, what is shown does not
        {"option_a": "p", "option_b": "q", "option_c": "r", "option_d": "s", "option_e": None, "answer": "B"},
    ],
)
def test_shapes_of_choices(shape):
    assert said(questions(rows(3, **shape))) == [("B", tuple(PQRS))] * 3


def test_arc_as_released():
    choices = [{"label": "A", "text": "a dog"}, {"label": "B", "text": "a stone"}]
    found = questions(
        [{"id": f"q{i}", "question": {"stem": f"Which of {i} barks?", "choices": choices}, "answerKey": "A"} for i in range(3)]
    )
    assert [(q.id, q.text, q.answer, q.choices) for q in found][1] == ("q1", "Which of 1 barks?", "A", ("a dog", "a stone"))


@pytest.mark.parametrize("column", ["answer", "label", "answer_idx", "cop"])
@pytest.mark.parametrize("as_text", [False, True])
def test_an_index_is_read_where_the_rows_say_from_where_it_counts(column, as_text):
    def index(start):
        return lambda i: str(i % 4 + start) if as_text else i % 4 + start

    from_0, from_1 = rows(choices=PQRS, **{column: index(0)}), rows(choices=PQRS, **{column: index(1)})
    assert said(questions(from_0)) == said(questions(from_1)) == [(letter, tuple(PQRS)) for letter in "ABCDA"]
    neither = rows(3, choices=PQRS, **{column: lambda i: i % 2 + 1})
    with pytest.raises(UserError, match=r"f, line 1: .*an index from 0 or as an index from 1.*dataset\.load\.gold=index0 or dataset"):
        questions(neither)
    assert [q.answer for q in questions(neither, gold="index0")] == ["B", "C", "B"]
    assert [q.answer for q in questions(neither, gold="index1")] == ["A", "B", "A"]
    with pytest.raises(UserError, match="line 2: the gold answer must be an index from 0 to 3, not '7'"):
        questions([*from_0[:1], {**from_0[1], column: 7}, *from_0[2:]])


def test_digits_of_an_answer_key_count_from_1_and_numbers_of_columns_are_labels():
    assert [q.answer for q in questions(rows(3, choices=PQRS, answerKey=lambda i: str(i + 1)))] == ["A", "B", "C"]
    assert [q.answer for q in questions(rows(3, option1="x", option2="y", option3="z", answer="2"))] == ["B"] * 3  # Winogrande
    copa = {"premise": "It rained.", "choice1": "x", "choice2": "y"}
    assert [q.answer for q in questions(rows(4, **copa, label=lambda i: i % 2))] == ["A", "B"] * 2
    with pytest.raises(UserError, match=r"dataset\.load\.gold=index0"):
        questions(rows(4, **copa, label=1))


def test_a_label_that_is_another_choice_s_text_is_not_guessed():
    with pytest.raises(UserError, match=r"a choice's label or as a choice's text.*dataset\.load\.gold=label or dataset\.load\.gold=text"):
        questions(rows(choices=["B", "A"], answer="A"))
    assert questions(rows(choices=["B", "A"], answer="A"), gold="text")[0].answer == "B"
    assert questions(rows(choices={"label": ["A", "B"], "text": ["B", "A"]}, answer="A"))[0].answer == "A"  # the file's own label


def test_choices_that_are_words_for_nothing_stay():
    asked = rows(3, choices=["null", "undefined", "NaN", "0"], answer="B")
    assert said(questions(asked)) == [("B", ("null", "undefined", "NaN", "0"))] * 3
    assert said(questions(rows(3, A="p", B="q", C="null", answer="B"))) == [("B", ("p", "q"))] * 3  # a table's column


def test_choices_that_differ_in_case_or_marks_stay():
    assert said(questions(rows(3, choices=["TT", "Tt", "tt"], answer="Tt"))) == [("B", ("TT", "Tt", "tt"))] * 3
    assert said(questions(rows(3, choices=["5", "5!", "4"], answer=["A", "B", "C"][1]))) == [("B", ("5", "5!", "4"))] * 3


def test_a_gold_number_is_its_choice_however_it_is_written():
    in_columns = {"A": "1,000", "B": "2,000", "C": "3,000", "D": "4,000"}
    assert said(questions(rows(3, **in_columns, answer="2000"))) == [("B", tuple(in_columns.values()))] * 3
    assert [q.answer for q in questions(rows(3, choices=["$5", "$6"], answer=5))] == ["A"] * 3
    with pytest.raises(UserError, match=r"dataset\.load\.gold="):  # the second place, or the choice 1.0
        questions(rows(3, choices=["3.0", "1.0", "2.0"], answer=1))


def test_an_array_as_pandas_writes_it_is_refused():
    with pytest.raises(UserError, match="line 1: `answer` is a list without commas"):
        questions(rows(3, answer="['14' '15']"))
    assert questions(rows(3, answer="['it is', \"a 'b' 'c'\"]"))[0].aliases == ("a 'b' 'c'",)


def test_numbers_called_a_and_b_are_no_choices():
    found = questions(rows(a=3, b=lambda i: i, answer=lambda i: 30 + i))
    assert {q.kind for q in found} == {"number"}


def test_a_list_of_answers_and_which_is_right_are_choices():
    assert said(questions(rows(2, answers=["x", "y"], label=lambda i: i))) == [("A", ("x", "y")), ("B", ("x", "y"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["p", "q", None], "answer": "C"}, "line 3: the gold answer 'C' points to an empty choice"),
        ({"choices": ["p", "q"], "answer": "C"}, "line 3: the gold answer must be one of the letters AB, not 'C'"),
        ({"choices": ["p", "q"], "answer": None}, "line 3: `answer` is missing"),
        ({"choices": ["p", "q"], "answer": ["A", "B"]}, "line 3: several choices are right (A, B)"),
        ({"choices": None, "answer": "A"}, "line 3: `choices` is missing"),
        ({"choices": ["p"], "answer": "A"}, "line 3: `choices` must be a list of 2 to 26 strings"),
        ({"choices": ["p", ["q"]], "answer": "A"}, "line 3: `choices` is a list, where a text belongs"),
        ({"choices": ["p", b"q"], "answer": "A"}, "line 3: `choices` is bytes, where a text belongs"),
        ({"choices": ["p", "\ud800"], "answer": "A"}, "line 3: `choices` holds half a character"),
        ({"choices": ["p", {"name": "q"}], "answer": "A"}, "line 3: a choice must have a `text` (and a `label`), not name"),
        ({"choices": {"label": ["A"], "text": ["p", "q"]}, "answer": "A"}, "line 3: `choices` has 1 labels for 2 texts"),
        ({"choices": 4, "answer": "A"}, "line 3: `choices` must be a list of 2 to 26 strings"),
    ],
)
def test_one_bad_row_of_choices_is_refused_or_left_out(row, message, caplog):
    good = rows(4, choices=["p", "q"], answer=lambda i: "AB"[i % 2])
    mixed = [*good[:2], {"question": "Bad?", **row}, *good[2:]]
    with pytest.raises(UserError) as error:
        questions(mixed)
    assert message in str(error.value)
    assert said(questions(mixed, skip_unusable=True)) == said(questions(good))
    assert "f: 1 of 5 rows skipped, the first: f, line 3" in caplog.text


# --- other answers ------------------------------------------------------------------------------------------------------


def test_the_gold_of_a_worked_solution_is_what_it_ends_with_and_the_hint_shows_no_more():
    solution = "Each box has 4 pens.\nSo she has 2*4=<<2*4=8>>8 pens.\n#### {}"
    found = questions(rows(answer=lambda i: solution.format(f"1,00{i}")))
    assert [(q.kind, q.answer) for q in found] == [("number", f"1,00{i}") for i in range(5)]
    hinted = Prompts(tiny_tokenizer(), TEMPLATE).text(found[1], "rationalization")
    assert "SENTINEL-77 1,001" in hinted
    assert "pens" not in hinted
    assert {q.answer for q in questions(rows(answer="So.\n#### yes"))} == {"yes"}
    assert {q.answer for q in questions(rows(answer="She has 8 pens. #### 8"))} == {"8"}
    assert [q.answer for q in questions([{"problem": "?", "solution": r"So $\boxed{\frac{1}{2}}$."}] * 1)] == [r"\frac{1}{2}"]
    with pytest.raises(UserError, match="line 3: `answer` is a worked solution that does not end with"):
        questions([*rows(2, answer="So.\n#### 8"), *rows(1, answer="So 8 pens"), *rows(3, answer="So.\n#### 8")])
    with pytest.raises(UserError, match="line 3: `answer` is a worked solution that does not end with"):
        questions([*rows(2, answer="So.\n#### yes"), *rows(1, answer="So yes"), *rows(3, answer="So.\n#### yes")])


@pytest.mark.parametrize(
    ("answer", "first", "aliases"),
    [
        (["Townville", "City of Townville"], "Townville", ("City of Townville",)),
        ({"value": "T", "aliases": ["T", "City of T"], "normalized_value": "t"}, "T", ("City of T",)),
        ({"text": ["T", "City of T"], "answer_start": [3, 9]}, "T", ("City of T",)),
        ('["T", "City of T"]', "T", ("City of T",)),
        ("['T', 'City of T']", "T", ("City of T",)),
        (["T"], "T", ()),
        (["T", None, ""], "T", ()),
        ("[0, 1]", "[0, 1]", ()),  # an interval
        ("[T]", "[T]", ()),
        (True, "yes", ("true",)),
        (False, "no", ("false",)),
    ],
)
def test_aliases(answer, first, aliases):
    question = questions(rows(answer=answer))[0]
    assert (question.kind, question.answer, question.aliases) == ("text", first, aliases)
    assert (
        questions(rows(answer=first, aliases=list(aliases) or None))[0].aliases == (() if isinstance(answer, bool) else aliases) or aliases
    )


GONE = [None, NAN, "", "  ", "N/A", "n/a", "nan", "NaN", "null", "NA", "None", "#N/A", "<NA>", "#DIV/0!", [], float("inf")]


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("answer", [lambda i: f"1,00{i}", lambda i: ["red", "blue"][i % 2]])
def test_a_gold_that_is_none_is_refused_and_changes_nothing_else(gone, answer):
    good = rows(answer=answer)
    mixed = [*good[:2], {"question": "Bad?", "answer": gone}, *good[2:]]
    with pytest.raises(UserError, match=r"f, line 3: `answer` is .*dataset\.load\.skip_unusable=true"):
        questions(mixed)
    assert [(q.text, q.answer, q.kind) for q in questions(mixed, skip_unusable=True)] == [
        (q.text, q.answer, q.kind) for q in questions(good)
    ]


@pytest.mark.parametrize("word", ["unknown", "twelve or so", "12 or 13", "?", "see above"])
def test_one_line_does_not_change_the_kind_of_a_file(word):
    numbers = rows(answer=lambda i: f"1,00{i}")
    with pytest.raises(UserError, match=r"line 6: the gold answer .* is not a number"):
        questions([*numbers, {"question": "Bad?", "answer": word}])
    with pytest.raises(UserError, match=r"line 6: it has choices, most other rows have none"):
        questions([*numbers, {"question": "Bad?", "answer": "7", "choices": ["6", "7"]}])
    words = rows(answer=lambda i: ["red", "blue"][i % 2])
    assert {q.kind for q in questions([*words, {"question": "Year?", "answer": 1789}])} == {"text"}
    assert {q.kind for q in questions([*numbers, {"question": "Bad?", "answer": word}], kind="text")} == {"text"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": ["a"], "answer": 1}, "`question` is a list, where a text belongs"),
        ({"question": {"x": "a"}, "answer": 1}, "`question` is an object, where a text belongs"),
        ({"question": b"a", "answer": 1}, "`question` is bytes, where a text belongs"),
        ({"question": NAN, "answer": 1}, "`question` is missing"),
        ({"question": "\udcff", "answer": 1}, "`question` holds half a character"),
        ({"question": "a", "answer": "\udcff"}, "`answer` holds half a character"),
        ({"question": "a", "answer": {"x": 1}}, "`answer` is an object, where a text belongs"),
        ({"question": "a", "answer": [[1]]}, "`answer` is a list, where a text belongs"),
        ({"question": "a", "answer": [1, 2]}, "`answer` is a list of numbers"),
        ({"question": "a", "answer": b"1"}, "`answer` is bytes, where a text belongs"),
        ({"question": "a", "answer": 1, "id": ["x"]}, "`id` is a list, where a text belongs"),
        ([1, 2], "expected an object"),
        ("a", "expected an object"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(record, message):
    with pytest.raises(UserError) as error:
        questions([*rows(3, answer=1), record])
    assert str(error.value).startswith(f"f, line 4: {message}")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_floats_stay_values(values):
    found = questions([{"question": f"{i}?", "answer": value} for i, value in enumerate(values)])
    assert [float(q.answer) for q in found] == values
    assert all(q.kind == "number" and parse_number(q.answer) is not None for q in found)


# --- names --------------------------------------------------------------------------------------------------------------


def test_any_names():
    record = {"info": {"text": "Which?", "more": "Look."}, "sol": {"v": ["x", "A"]}, "l": "red", "r": "blue", "key": "k1"}
    columns = {"question": ["info.more", "info.text"], "answer": "sol.v.1", "choices": ["l", "r"], "id": "key", "aliases": None}
    (question,) = questions([record], columns=columns)
    assert (question.id, question.text, question.answer, question.choices) == ("k1", "Look.\nWhich?", "A", ("red", "blue"))
    assert questions([{"a.b": "Which?", "y": "red"}], columns={"question": "a.b", "answer": "y"})[0].text == "Which?"
    with pytest.raises(
        UserError, match=r"dataset\.columns\.question=info\.txt: f has no such column, or nothing in it; there are info, sol"
    ):
        questions([record], columns={"question": "info.txt"})
    with pytest.raises(UserError, match=r"f: no column holds the question; there are frage.*dataset\.columns\.question=…"):
        questions([{"frage": "a", "answer": 1}])
    with pytest.raises(UserError, match=r"f: no column holds the answer; there are question, antwort"):
        questions([{"question": "a", "antwort": 1}])
    with pytest.raises(UserError, match=r"dataset\.columns\.frage: it must be one of question"):
        questions([record], columns={"frage": "x"})
    with pytest.raises(UserError, match=r"dataset\.load\.gold must be one of label, text, index0, index1, or null"):
        questions([record], gold="first")
    with pytest.raises(UserError, match=r"dataset\.load: .*'nosuch'"):
        questions([record], nosuch=1)


def test_what_is_not_shown_is_said(caplog):
    questions(rows(context="A passage.", answer="red"))
    assert "f: context is not shown; dataset.columns.question=[context,question] puts it before the question" in caplog.messages


def test_what_makes_another_task_of_a_table_is_said(caplog):
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2)}
    questions([{"Question": "Which?", "Correct Answer": "right", **wrong}])  # GPQA
    assert "Incorrect Answer 1, Incorrect Answer 2 is not read, the questions are asked without choices" in caplog.text
    caplog.clear()
    questions(rows(answer="red", distractor1="blue", hint=lambda i: "A hint." if i else ""))  # SciQ, ScienceQA
    assert "distractor1 is not read" in caplog.text
    assert "hint is not shown" in caplog.text
    caplog.clear()
    questions(rows(choices=PQRS, answer="B", image=lambda i: {"bytes": "x"} if i else None, distractor1="p"))
    assert "image is not shown; models of text" in caplog.text
    assert "distractor1" not in caplog.text
    caplog.clear()
    questions(rows(label=lambda i: i % 2))  # SuperGLUE's BoolQ
    assert "label is 0 or 1, read as a number; dataset.load.choices=[no,yes]" in caplog.text
    assert said(questions(rows(label=lambda i: i % 2), choices=["no", "yes"]))[1] == ("B", ("no", "yes"))
    caplog.clear()
    questions(rows(label=lambda i: i))
    assert not caplog.text


def test_a_column_of_nothing_is_not_the_answer():
    """MGSM: the test rows' `answer` is null, the training rows' a sentence; `answer_number` is the answer."""
    found = questions(rows(answer=None, answer_number=lambda i: i + 3))
    assert [(q.answer, q.kind) for q in found][:2] == [("3", "number"), ("4", "number")]
    found = questions(rows(answer=lambda i: f"Die Antwort ist {i}.", answer_number=lambda i: i))
    assert found[2].answer == "2"
    assert questions(rows(gold=None, solution="red"))[0].answer == "red"
    assert questions(rows(answer="city 3", answer_number=1))[0].answer == "city 3"


def test_one_of_a_list_of_marks_is_right():
    """TruthfulQA's mc1_targets."""
    targets = {"mc1_targets": lambda i: {"choices": PQRS, "labels": [int(j == i % 4) for j in range(4)]}}
    found = questions(rows(**targets), columns={"choices": "mc1_targets.choices", "answer": "mc1_targets.labels"})
    assert [q.answer for q in found] == ["A", "B", "C", "D", "A"]
    never = rows(choices=PQRS, answer=lambda i: [int(j == 1 + i % 3) for j in range(4)])
    assert [q.answer for q in questions(never)] == ["B", "C", "D", "B", "C"]  # the first is never right: no index from 1
    for several in ([1, 0, 1, 0], [0, 1]):  # marks of two; two indices
        with pytest.raises(UserError, match="list of numbers"):
            questions(rows(choices=PQRS, answer=several))
    with pytest.raises(UserError, match="list of numbers"):
        questions(rows(answer=[0, 1]))


def test_a_box_may_be_without_braces_or_framed():
    told = [r"So $\boxed 2$.", r"So $\fbox{3}$.", r"So \boxed {4}.", r"First \boxed{1}, then \boxed{\frac{1}{2}}."]
    assert [q.answer for q in questions([{"problem": f"P{i}", "solution": s} for i, s in enumerate(told)])] == [
        "2",
        "3",
        "4",
        r"\frac{1}{2}",
    ]
    assert final(r"\boxed{\left\{ 1 \right.}") == r"\left\{ 1 \right."  # a brace that is a sign
    with pytest.raises(UserError, match=r"does not end with.*skip_unusable=true"):
        questions([{"problem": f"P{i}", "solution": s} for i, s in enumerate([*told, r"So \boxed 23."])])


def test_the_same_choices_for_all():
    found = questions(rows(4, answer=lambda i: i % 2 == 0), choices=["yes", "no"])
    assert said(found) == [("A", ("yes", "no")), ("B", ("yes", "no"))] * 2


def test_yes_and_no_of_yaml_stay_words():
    examples = [
        {"question": "Is it?", "answer": True, "rationale": "It is."},
        {"question": "Is it?", "choices": [True, False], "answer": False, "rationale": "It is not."},
    ]
    word, choice = (example.question for example in Dataset("d", numbered, TEMPLATE, examples).worked_examples())
    assert (word.answer, choice.choices, choice.answer) == ("yes", ("yes", "no"), "B")


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12).filter(lambda s: s.strip() == s)


@given(st.lists(TEXTS, min_size=2, max_size=6, unique_by=lambda s: s.casefold().rstrip(".!?,;: ")), st.data())
def test_every_gold_that_is_read_is_one_that_a_completion_states(texts, data):
    """Whatever the options are called: the gold's rendering is right, and no other letter is."""
    gold = data.draw(st.integers(0, len(texts) - 1))
    try:
        (question,) = questions([{"question": "Which?", "choices": texts, "answer": "ABCDEF"[gold]}])
    except UserError:
        return  # two readings, or two choices alike
    assert question.choices[question.letters.index(question.answer)] == texts[gold]
    assert correct(extract(render_completion(question, "So."), question), question)

"""Extraction and reward (DESIGN §5.3): strict, the last statement decides, and no answer is never a guess."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emreason.questions.answers import answer_line_complete, check, correct, extract, normalise, parse_number
from emreason.questions.prompts import render_completion
from emreason.types import Question, UserError

settings.register_profile("emreason", deadline=None)  # the cores may be busy
settings.load_profile("emreason")

CHOICE = Question("c", "What gives light?", "B", "choice", ("the moon", "the sun", "a dog", "dry palms"))
FIVE = Question("5", "Which?", "E", "choice", ("one", "two", "three", "four", "five"))
THREE = Question("3", "Which?", "A", "choice", ("one", "two", "three"))
NUMBER = Question("n", "What is 9 + 8?", "17", "number")
TEXT = Question("t", "Capital of France?", "Paris", "text")


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B",
        "answer: B",
        "Answer:B",
        "Answer: (B)",
        "Answer: [B]",
        "Answer: B)",
        "Answer: B.",
        "Answer: b",
        "Answer: (b)",
        "**Answer:** B",
        "**Answer: B**",
        "**Answer**: B",
        "*Answer*: **B**",
        "__Answer:__ B",
        "### Answer: B",
        "> Answer: `B`",
        "Answer: **B.**",
        "Answer: **B**. The sun",
        "Answer: option B",
        "Final answer: B",
        "**Final Answer:** (B)",
        "The final answer is: B",
        "The correct answer is B.",
        "The answer is **(B)**.",
        "Answer: B. The sun",
        "Answer: B) the sun",
        "Answer: (B) the sun",
        "Answer: B: The sun.",
        "Answer: B, because it burns.",
        "The answer is (B). A common mistake is to say (A), but the moon only reflects.",
        "So the answer is B.",
        "Thus, the answer is B, not A.",
        "This means that the answer is B.",
        "The sun burns. Answer: B",
        "Answer: B\n",
        "Answer: B\r\n",
        "Answer: B\nIt burns, and a dog does not.",
        "Answer: A\nNo, wait.\nAnswer: B",
        "The answer is A.\nAnswer: B",
        "Answer: B\nIf the answer is A, the moon would burn.",
        'Write "Answer: A" at the end.\nAnswer: B',
    ],
)
def test_letter_found(text):
    assert extract(text, CHOICE) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "(B)",
        "The sun burns, so it must be B.",
        "Answer:",
        "Answer: ",
        "Answer:\nB",
        "Answer: Because the sun burns",
        "Answer: A dog barks",
        "Final answer: dry palms",
        "Answer: dog",
        "Answer: E",
        "Answer: X",
        "Answer: the sun",
        "Answer: B or C",
        "Answer: B, C",
        "Answer: B, or C",
        "Answer: B. C.",
        "Answer: B and (C)",
        "Answer: A/B",
        "Answer: B.C.",
        "Answer: A-level",
        "Answer: AB",
        "Answer: (B",
        "Answer: B. A dog",  # the letter of one choice with the text of another
        "Answer: a dog",
        "the answer is a, i think",
        "The answer is not B.",
        "The answer is clear.",
        "The answer is (B)?",
        "If the answer is B, it burns.",
        "Answers: B",
        "Answer choices: A, B",
        'the format is "Answer: B"',
        "Answer: B\nAnswer: Because",
        "Answer: B\nAnswer: A or B",
        "Answer: B\nAnswer:",
        "Answer: 2",
        "I cannot answer: it is hard",
    ],
)
def test_no_letter(text):
    assert extract(text, CHOICE) is None


def test_letters_are_those_of_the_question():
    assert extract("Answer: E", FIVE) == "E"
    assert extract("Answer: D", THREE) is None
    assert extract("Answer: F", FIVE) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 17", "17"),
        ("3 + 5 = 8. 8 + 9 = 17.\nAnswer: 17.", "17"),
        ("Answer: 1,234", "1234"),
        ("Answer: 17.0", "17.0"),
        ("Answer: -5", "-5"),
        ("Answer: −5", "-5"),
        ("Answer: $5", "5"),
        ("**Answer:** **17**", "17"),
        ("The answer is 17.", "17"),
        ("The answer is 17. A common mistake is 16.", "17"),
        ("11 + 9 = 19. Answer: 20", "20"),
        ("Answer: 16\nAnswer: 17", "17"),
        ("Answer: .5", ".5"),
        ("Answer: 12 + 3 = 15", None),
        ("Answer: 12+3", None),
        ("Answer: 1*2", None),
        ("Answer: 1/2", None),
        ("Answer: 12 apples", None),
        ("Answer: 12%", None),
        ("Answer: 17 or 18", None),
        ("Answer: 17, 18", None),
        ("Answer: 17. 18", None),
        ("Answer: 1,23", None),
        ("Answer: 12 34", None),
        ("Answer: seventeen", None),
        ("Answer: 17th", None),
        ("Answer: = 17", None),
        ("Answer: B", None),
        ("8 + 9 = 17", None),
        ("Answer: 17\nAnswer: unknown", None),
    ],
)
def test_numbers(text, answer):
    assert extract(text, NUMBER) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: Paris", "Paris"),
        ("**Answer: Paris**", "Paris"),
        ('Answer: "Paris"', "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("**Answer:** **Paris**", "Paris"),
        ("Answer: :-)", ":-)"),
        ("Answer: 2 * 3 * 4", "2 * 3 * 4"),
        ("Answer:  ", None),
        ("The answer is Paris, I believe.", None),
        ("Paris", None),
        ("Answer: Rome\nAnswer: Paris\nIt is in France.", "Paris"),
    ],
)
def test_text(text, answer):
    assert extract(text, TEXT) == answer


def test_gold_of_several_lines_runs_to_the_end():
    grid = Question("g", "Fill the grid.", "1 2\n3 4", "text")
    completion = render_completion(grid, "Row by row.")
    assert correct(extract(completion, grid), grid)
    assert not answer_line_complete("Answer: 1 2\n", grid)


def test_reward():
    assert correct("B", CHOICE)
    assert not correct("A", CHOICE)
    assert not correct(None, CHOICE)
    assert correct("17.0", NUMBER)
    assert correct("1,234", Question("n", "?", "1234", "number"))
    assert not correct("18", NUMBER)
    assert not correct("B", NUMBER)
    assert correct("  paris. ", TEXT)
    assert not correct("Parisian", TEXT)


def test_reward_of_a_dataset_with_its_own_verifier():
    even = Question("v", "Name an even number.", "2", "number", verify=lambda answer: int(answer) % 2 == 0)
    assert correct("4", even)
    assert not correct("3", even)
    assert not correct(None, even)


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("Answer: B", False),
        ("Answer: B\n", True),
        ("Because.\n**Answer: B**\n\n", True),
        ("Answer: B\nAnd", True),
        ("Answer: Because\n", False),
        ("The answer is B.\n", False),  # prose: the answer line is still to come
        ("Answer: B\nAnswer: oops\n", False),
        ("\n", False),
        ("", False),
    ],
)
def test_answer_line_complete(text, complete):
    assert answer_line_complete(text, CHOICE) is complete


@pytest.mark.parametrize(
    "question",
    [
        Question("q", "?", "E", "choice", ("a", "b", "c", "d")),
        Question("q", "?", "AB", "choice", ("a", "b")),
        Question("q", "?", "", "text"),
        Question("q", "", "x", "text"),
        Question("q", "?", "many", "number"),
    ],
)
def test_impossible_gold_is_refused(question):
    with pytest.raises(UserError, match=r"^here: "):
        check(question, "here")


any_text = st.text(max_size=200) | st.lists(
    st.sampled_from([*"ABCDE ()*.,:\n", "Answer:", "The answer is ", "answer", " dog", "17", "1,234", "if ", "Because"]), max_size=30
).map("".join)


@given(any_text, st.sampled_from([CHOICE, FIVE, THREE]))
def test_a_letter_of_the_question_or_none(text, question):
    answer = extract(text, question)
    assert answer is None or (len(answer) == 1 and answer in question.letters)


@given(any_text)
def test_a_number_or_none(text):
    answer = extract(text, NUMBER)
    assert answer is None or parse_number(answer) is not None


@given(any_text, st.sampled_from([CHOICE, FIVE, THREE, NUMBER, TEXT]))
def test_whatever_was_said_before_the_gold_line_decides(text, question):
    completion = render_completion(question, text)
    assert correct(extract(completion, question), question)
    assert answer_line_complete(completion + "\n", question)
    assert not answer_line_complete(render_completion(question, "So."), question)


@given(any_text, st.sampled_from([CHOICE, NUMBER, TEXT]))
def test_a_malformed_last_line_is_no_answer(text, question):
    assert extract(f"{text}\nAnswer:", question) is None
    if question.kind != "text":
        assert extract(f"{text}\nAnswer: Because it is so", question) is None


@given(st.text(alphabet="abcdefgABCDEFG", min_size=2, max_size=8), st.sampled_from(["Answer: ", "The answer is ", "Answer: ("]))
def test_a_letter_inside_a_word_is_no_answer(word, cue):
    assert extract(cue + word, CHOICE) is None


@given(st.text(max_size=60).filter(lambda text: "answer" not in text.casefold()))
def test_no_statement_no_answer(text):
    assert extract(text, CHOICE) is extract(text, NUMBER) is extract(text, TEXT) is None


@given(any_text, st.sampled_from([CHOICE, NUMBER, TEXT]))
def test_stopping_never_changes_the_answer(text, question):
    """Where generation would have stopped, the text up to there has an answer."""
    for end in [i + 1 for i, character in enumerate(text) if character == "\n"]:
        if answer_line_complete(text[:end], question):
            assert extract(text[:end], question) is not None
            break


@given(st.integers(-(10**9), 10**9))
def test_numbers_are_compared_as_numbers(value):
    question = Question("n", "?", str(value), "number")
    assert correct(extract(f"Answer: {value:,}.00", question), question)
    assert not correct(extract(f"Answer: {value + 1}", question), question)


golds = (
    (st.text(min_size=1, max_size=40) | st.text(alphabet='*_`:."ab ', min_size=1, max_size=6))
    .map(str.strip)
    .filter(lambda gold: gold and "answer" not in gold.casefold())
)


@given(golds, any_text)
def test_any_gold_string_is_found_again(gold, rationale):
    question = Question("t", "?", gold, "text")
    assert correct(extract(render_completion(question, rationale), question), question)


def test_normalise():
    assert normalise("?") != normalise("!")
    assert normalise("  The  Sun.\n") == normalise("the sun") == "the sun"

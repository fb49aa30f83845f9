"""Extraction and reward (DESIGN §5.3): strict, the last statement decides, and no answer is never a guess."""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest
from answer_none import BY_HAND, NONE
from answer_rows import GASES, LETTERS, NUMBERS, STRINGS, TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import (
    TAIL,
    answer_line_complete,
    check,
    correct,
    extract,
    normalise,
    parse_number,
    statement_start,
    stop_at_answer,
)
from emreason.questions.grammar.thinking import said
from emreason.questions.prompts import render_completion
from emreason.schemes.samplers import is_trivial
from emreason.types import Question, UserError

settings.register_profile("emreason", deadline=None)  # the cores may be busy
settings.load_profile("emreason")

CHOICE = Question("c", "What gives light?", "B", "choice", ("the moon", "the sun", "a dog", "dry palms"))
FIVE = Question("5", "Which?", "E", "choice", ("one", "two", "three", "four", "five"))
THREE = Question("3", "Which?", "A", "choice", ("one", "two", "three"))
NUMBER = Question("n", "What is 9 + 8?", "17", "number")
TEXT = Question("t", "Capital of France?", "Paris", "text")
GAS = Question("g", "Which gas do plants take in?", "B", "choice", GASES)
GAS_TEXT = dataclasses.replace(GAS, answer_as="text")


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
        ("Answer: 1/2", "1/2"),
        ("Answer: 12 apples", "12"),
        ("Answer: 12%", "12"),
        ("Answer: 12 + 3 = 15", None),
        ("Answer: 12+3", None),
        ("Answer: 1*2", None),
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


@pytest.mark.parametrize(
    ("gold", "answer", "alike"),
    [
        (r"\frac{5}{12}", r"\dfrac{5}{12}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\left(3, \frac{\pi}{2}\right)", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})", True),
        ("p - q", "p-q", True),
        (r"70 \sqrt{2}", r"70\sqrt{2}", True),
        ("10,080", "10080", True),
        (r"11,\! 111", "11111", True),
        ("x^3+3x-6", "x^3 + 3x - 6", True),
        ("(A)", "A", True),
        (r"\text{(C)}", "C", True),
        ("(A)", "B", False),
        (r"\frac{1}{2x}", r"\frac{1}{2}x", False),
        ("x^{12}", "x^12", False),
        ("1 2 3", "123", False),
        ("(1,234)", "(1234)", False),
        ("1,2", "12", False),
        ("100, 200", "100200", False),
        ("1, 234", "1234", False),
        (r"2\ 3", "23", False),
        ("0,123", "123", False),
        ("3.10", "3.1", False),
        (r"\sqrt{2}", "2", False),
        (r"\frac{3}{4}", r"\frac34", True),
        (r"\frac{3}{4}", "3/4", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "0.4", False),
        (r"10\%", "10%", True),
        (r"90^\circ", "90°", True),
        (r"90^{\circ}", r"90^\circ", True),
        ("10,080", "10{,}080", True),
        (r"2\sqrt{3}", r"2\sqrt3", True),
        ("New York", "NewYork", False),
        ("New-York", "New York", False),
    ],
)
def test_a_formula_is_the_same_however_it_is_set(gold, answer, alike):
    """Golds of MATH and of BIG-bench, and what models make of them."""
    assert correct(answer, Question("m", "?", gold, "text")) == alike


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


# --- rows: what real completions look like ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "answer"), LETTERS)
def test_letter_rows(text, answer):
    assert extract(text, GAS) == answer


@pytest.mark.parametrize(("text", "answer"), NUMBERS)
def test_number_rows(text, answer):
    found = extract(text, NUMBER)
    assert found is None if answer is None else correct(found, dataclasses.replace(NUMBER, answer=answer))


@pytest.mark.parametrize(("gold", "text", "right"), STRINGS)
def test_string_rows(gold, text, right):
    question = dataclasses.replace(TEXT, answer=gold)
    assert correct(extract(text, question), question) is right


@pytest.mark.parametrize(("text", "answer"), TEXTS)
def test_rows_of_choices_by_their_text(text, answer):
    assert extract(text, GAS_TEXT) == answer


def test_completions_that_state_no_answer():
    """The hunt for false positives: none of some hundred made-up completions is read as an answer, whatever is asked."""
    assert len(set(NONE)) > 400
    assert len(BY_HAND) > 150
    found = [(text, q.kind, q.answer_as, a) for text in NONE for q in (GAS, GAS_TEXT, NUMBER) if (a := extract(text, q)) is not None]
    assert not found


# --- choices by their text ----------------------------------------------------------------------------------------------------


def test_a_choice_is_matched_by_its_text():
    assert correct(extract("Answer: Carbon dioxide.", GAS_TEXT), GAS_TEXT)
    assert not correct(extract("Answer: oxygen", GAS_TEXT), GAS_TEXT)
    assert render_completion(GAS_TEXT, "They do.") == "They do.\nAnswer: carbon dioxide"
    assert answer_line_complete("Answer: carbon dioxide\n", GAS_TEXT)
    assert not answer_line_complete("Answer: carbon\n", GAS_TEXT)


def test_the_longest_choice_that_is_said():
    question = Question("q", "Where?", "A", "choice", ("Paris", "Paris, Texas", "Par"), answer_as="text")
    assert extract("Answer: Paris", question) == "A"
    assert extract("Answer: Paris, Texas", question) == "B"
    assert extract("Answer: Paris, Texas. It is hot.", question) == "B"
    assert extract("Answer: Paris, because it is large", question) == "A"


def test_choices_that_read_alike():
    """Case alone tells them apart; where nothing does, either is right."""
    case = Question("q", "Which?", "B", "choice", ("Us", "US", "both"), answer_as="text")
    assert extract("Answer: US", case) == "B"
    assert extract("Answer: us", case) is None
    same = Question("q", "Which?", "B", "choice", ("one", "one", "two"), answer_as="text")
    assert correct(extract("Answer: one", same), same)
    assert not correct(extract("Answer: two", same), same)
    assert not correct("A", dataclasses.replace(same, answer_as="letter"))
    bare = Question("q", "Which literal is an empty dict?", "B", "choice", ("[]", "{}", "()"))  # a choice of braces alone
    assert (extract("Answer: b", bare), extract("Answer: b.", bare)) == ("B", "B")


@given(st.lists(st.text(min_size=1, max_size=20).filter(lambda text: text.strip()), min_size=2, max_size=6), st.data())
def test_any_choice_is_found_again_by_its_text(choices, data):
    letter = data.draw(st.sampled_from("ABCDEF"[: len(choices)]))
    question = Question("q", "Which?", letter, "choice", tuple(choices), answer_as="text")
    answer = extract(render_completion(question, "So."), question)
    assert answer is None or answer in question.letters
    shown = [" ".join(choice.split()) for choice in choices]
    if shown.count(shown[ord(letter) - 65]) == 1 and not set(shown[ord(letter) - 65]) & set("<[◁"):
        assert correct(answer, question)


@pytest.mark.parametrize(
    "choices",
    [
        ("/", "//", "%"),
        ("The answer cannot be determined.", "The answer is (A).", "\\boxed{A}"),
        ("If A is true, then B is false.", "If A is false, then B is false.", "Wait, A is wrong."),
        ("(A) and (B)", "A", "none"),
        ("\u201cNo. It\u2019s not possible!\u201d", '"If you can, wait."', "probably"),
        ("f(x)", "$5", "-5"),
    ],
)
def test_a_choice_may_say_anything(choices):
    """Its own text after the letter, or in the letter's place, takes nothing back."""
    for letter, choice in zip("ABC", choices, strict=True):
        question = Question("q", "Which?", letter, "choice", choices)
        assert extract(f"Because.\nAnswer: {letter}. {choice}", question) == letter
        said = dataclasses.replace(question, answer_as="text")
        assert extract(render_completion(said, "Because."), said) == letter


# --- equality -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "said", "right"),
    [
        ("0.5", "1/2", True),
        ("0.3", "0.30000000000000004", True),
        ("0.30000000000000004", "0.3", True),
        ("0.1", str(0.1 + 1e-17), True),
        ("1/3", "0.333333", False),
        ("1/3", "0.3333333333333333", True),
        ("1000000000", "1000000001", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("18", "18.000", True),
        ("18", "18%", True),
        ("-5", "5", False),
        ("1e3", "1,000", True),
        ("0", "-0", True),
        ("0", "0.0000000001", False),
    ],
)
def test_equality_of_numbers_is_of_values(gold, said, right):
    question = dataclasses.replace(NUMBER, answer=gold)
    assert correct(extract(f"Answer: {said}", question), question) is right


def test_aliases_are_right_too():
    question = dataclasses.replace(TEXT, answer="USA", aliases=("United States", "the States"))
    assert all(correct(extract(f"Answer: {said}", question), question) for said in ("usa", "united states", "The States."))
    assert not correct("America", question)
    number = dataclasses.replace(NUMBER, aliases=("1/2",))
    assert correct("0.5", number)
    with pytest.raises(UserError, match="'many' is not a number"):
        check(dataclasses.replace(NUMBER, aliases=("many",)), "here")


@pytest.mark.parametrize(("text", "value"), [("1,234", 1234), ("1/2", Fraction(1, 2)), ("-$5", -5), ("18 %", 18), (".5", Fraction(1, 2))])
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "many", "12 apples", "3:30", "17 or 18", "1.2.3", "5m", "B", "nan", "inf", "1" * 5000])
def test_what_is_no_number(text):
    assert parse_number(text) is None


# --- where a statement begins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("So.\nAnswer: B", 4),
        ("So.\n**Answer:** B", 4),
        ("So. The answer is B.", 4),
        ("So.\n#### 18", 4),
        ("So.\n\\boxed{18}", 4),
        ("So.\nAnswer: \\boxed{18}", 4),
        ("So.\n<answer>B</answer>", 4),
        ("So.\n#### Steps\nand on", None),
        ("If the answer is B, it burns.", None),
        ("<think>Answer: A", None),
        ("<think>Answer: A</think>Answer: B", 24),
    ],
)
def test_statement_start(text, start):
    assert statement_start(text) == start


# --- time -----------------------------------------------------------------------------------------------------------------------

PIECES = [
    *"_ *\n\\{}$()<>\"'`.,;!?-1Bé", "\u00a0", "\u200b", "answer is ", "the answer is B ", "if the answer is B ", "it is not true that ",
    "Answer: ", "Answer: B\n", "<think>", "</think>", "<answer>", "\\boxed{", "\\boxed{B} ", "\\frac{1}", "\\text{", "#### 18\n", "1,234,",
    "wait, ", "B is wrong. ", "no ", "the ", "&lt;", "the answer is not C. ", "I don't think the answer is C.\n",
]  # fmt: skip
LIMIT = 0.02
"""Seconds for 10,000 characters of anything."""


def seconds(text: str, question: Question) -> float:
    """Processor time of all that reads a completion; the best of up to five, for the cores may be busy."""
    best = 9.0
    for _ in range(5):
        start = time.process_time()
        extract(text, question)
        is_trivial(text)
        best = min(best, time.process_time() - start)
        if best < LIMIT / 2:
            break
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.sampled_from(["", "Answer: B ", "\\boxed{B} "]), st.booleans())
def test_any_10000_characters_take_at_most_20_ms(pieces, before, ends):
    unit = "".join(pieces)
    text = before + (unit * (10_000 // len(unit) + 1))[: 10_000 - len(before) - 10] + ("\nAnswer: B" if ends else "")
    for question in (GAS, GAS_TEXT, NUMBER, TEXT):
        assert seconds(text, question) < LIMIT


@pytest.mark.parametrize(
    "unit", ["_", " ", "*", "\n", "\\", "{", '"', "answer is ", "if the answer is B ", "<think>", "B is wrong. ", "1,234,", "wait. "]
)
def test_time_is_linear_in_length(unit):
    for question in (GAS, TEXT):
        short, long = (seconds("Answer: B " + unit * (n // len(unit)), question) for n in (20_000, 40_000))
        assert long < 3 * short + 0.005


PIECES = ["Answer: B\n", "Answer: 7\n", "so\n", "the answer is B\n", "#### 7\n", "\\boxed{\n7\n}\n", "Answer: \\boxed{\n7\n}\n", "\n",
          "<answer>\nB\n</answer>\n", "<think>\n", "</think>\n", "if so, ", "Wait, no.\n",
          "1 + 1 = 2, and then 3 + 4 = 7, as was asked\n"]  # fmt: skip


@pytest.mark.parametrize("question", [CHOICE, Question("n", "3 + 4 = ?", "7", "number")], ids=["choice", "number"])
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_the_stop_check_ends_where_the_whole_text_would_end_it(question, pieces):
    """It reads the end first; where that holds no cue, nothing more is decoded."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("".join(pieces), add_special_tokens=False)
    stop = stop_at_answer(question, tokenizer, ())
    ends = [n for n in range(1, len(ids) + 1) if "\n" in tokenizer.decode(ids[n - 1 : n])]
    whole = next((n for n in ends if answer_line_complete(said(ids[:n], (), tokenizer), question)), None)
    assert next((n for n in ends if stop(ids[:n])), None) == whole


def test_the_stop_check_of_a_long_text_decodes_its_end_only():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("three and four are seven\n" * 40, add_special_tokens=False)
    decoded = []
    counting = SimpleNamespace(decode=lambda some: (decoded.append(len(some)), tokenizer.decode(some))[1])
    assert not stop_at_answer(CHOICE, counting, ())(ids)
    assert decoded == [TAIL]

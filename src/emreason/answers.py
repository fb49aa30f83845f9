"""Answers: what a completion says its answer is, and the 0/1 reward r(ŷ, y*).

Extraction is strict. An answer counts only where the text *states* one (`statements.py` has the grammar), the last statement decides, and
a malformed last statement is no answer: a false positive would be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from emreason.numbers import CLOSING, OPENING, parse_number, read_number, same_number
from emreason.statements import Statement, box_stands, stands, statements, withdrawn
from emreason.thinking import said
from emreason.typeset import normalise, undressed, unwrapped
from emreason.types import Question, UserError

__all__ = ["answer_line_complete", "answer_stop", "check", "correct", "extract", "gold_text", "normalise", "parse_number", "statement_start"]

LINE = 1000
"""Characters of a line in which a letter or a number is looked for."""


def extract(text: str, question: Question) -> str | None:
    """The answer that a completion states, or None.

    Args:
        text: the completion, without the prompt but with the thinking mark that the prompt may have opened (`thinking.said`).
        question: gives the kind of answer and the choices allowed. The gold answer is not looked at, except for
            whether it spans several lines (then the answer runs to the end of the text).

    Returns:
        A letter of `question.letters`, a number without grouping commas, or a stripped string.
    """
    decided = _decide(text, question)
    return None if decided is None else decided[1]


def correct(answer: str | None, question: Question) -> bool:
    """The reward r(ŷ, y*): `question.verify` where set, else the same letter, number or normalised string as the gold one or an alias."""
    if answer is None:
        return False
    if question.verify is not None:
        return bool(question.verify(answer))
    golds = (question.answer, *question.aliases)
    if question.kind == "choice":
        # two choices may read the same, and shown without letters nothing else tells them apart
        return answer in golds or (question.answer_as == "text" and _shown(question, answer) == _shown(question, question.answer))
    return any(same_number(answer, gold) if question.kind == "number" else _plain(answer) == _plain(gold) for gold in golds)


def gold_text(question: Question) -> str:
    """The gold answer in the words that a completion should end with: the letter, or the choice's text on one line."""
    return question.answer if question.answer_as == "letter" or question.kind != "choice" else _shown(question, question.answer)


def answer_line_complete(text: str, question: Question) -> bool:
    """True once `text` holds a well-formed `Answer: X` line that a newline has ended: generation may stop there."""
    if question.kind == "text" and "\n" in question.answer:
        return False
    decided = _decide(text[: text.rfind("\n") + 1], question)
    return decided is not None and decided[0].form in ("line", "tag", "heading")


def answer_stop(question: Question, prompt_ids: Sequence[int], tokenizer: Any) -> Callable[[list[int]], bool]:
    """A request's `stop`: whether the ids drawn so far hold a complete answer line."""
    return lambda ids: answer_line_complete(said(ids, prompt_ids, tokenizer), question)


def statement_start(text: str) -> int | None:
    """Where the last statement of an answer begins in `text`: what comes before it is the rationale. None if there is none."""
    for statement in statements(text):
        value = text[statement.begin : statement.end].strip()
        if statement.form != "denial" and (statement.form != "heading" or _is_answer_heading(text, statement, value)):
            return statement.start
    return None


def check(question: Question, where: str) -> None:
    """Raise a `UserError` that begins with `where` unless the gold answer is one that a completion could state."""
    if not question.text:
        raise UserError(f"{where}: the question is empty.")
    if not question.answer:
        raise UserError(f"{where}: the gold answer is missing.")
    if question.kind == "choice" and (len(question.answer) != 1 or question.answer not in question.letters):
        raise UserError(f"{where}: the gold answer must be one of the letters {question.letters}, not {question.answer!r}.")
    for gold in (question.answer, *question.aliases):
        if question.kind == "number" and parse_number(gold) is None:
            raise UserError(
                f"{where}: the gold answer {gold!r} is not a number; for other answers set dataset.load.kind=text "
                "and prompt@dataset.prompt=text."
            )


def _decide(text: str, question: Question) -> tuple[Statement, str] | None:
    denied: set[str] = set()
    for statement in statements(text):
        answer = _value(text, statement, question)
        if statement.form == "heading" and answer is None:
            continue  # any other heading
        if statement.form == "denial" and answer is not None:
            denied.add(answer)
            continue
        if answer is None or answer in denied or withdrawn(text, statement, answer):
            return None
        return statement, answer
    return None


def _value(text: str, statement: Statement, question: Question) -> str | None:
    value, form = text[statement.begin : statement.end], statement.form
    if form == "box" and not (value.strip() and box_stands(undressed(text[statement.resume :][:LINE].split("\n", 1)[0]))):
        return None
    if question.kind == "text" or question.answer_as == "text":
        if form == "heading" and not _is_answer_heading(text, statement, value.strip()):
            return None
        if question.kind == "choice":
            return _choice(value, question)
        if form in ("prose", "denial"):  # where a string ends within prose cannot be told
            return None
        return _string(text, statement, question)
    line = undressed(value[:LINE]).strip()
    if "\n" in line:
        return None
    if question.kind == "choice":
        return _letter(line, question, strict=form == "heading")
    read = read_number(line)
    if read is None or (form == "heading" and any(c.isalnum() for c in read[1])):
        return None
    number, rest = read
    after = re.match(r"[\s*_`\"')\]$.,;:(]*", rest)
    goes_on = after is not None and re.match(r"(?:and|or)\b|[-+−]?[$£€]?\.?[0-9]", rest[after.end() :])
    return None if goes_on or not stands(rest) else number


def _letter(line: str, question: Question, strict: bool = False) -> str | None:
    match = _LETTER.match(line)
    if match is None:
        return None
    letter, opened, closed = match["letter"].upper(), match["open"] + (match["inner"] or ""), match["close"]
    rest = line[match.end() :]
    if letter not in question.letters or any(opened.count(left) > line.count(right, match.end("letter")) for left, right in ("()", "[]")):
        return None
    if not any(c.isalnum() for c in rest):
        return letter if stands(rest) else None
    choices = [normalise(undressed(choice)) for choice in question.choices]
    own = question.letters.index(letter)
    told = rest.strip(CLOSING + ".,:;!-–—([") if rest.strip(CLOSING)[:1] in "(-–—" else rest.lstrip(CLOSING + ".,:;").rstrip(CLOSING)
    said = {normalise(told), normalise(re.split(r"[.;!](?:\s|$)", told, maxsplit=1)[0])}
    if normalise(line) in choices:  # "A dog" may be a choice's text
        return letter if choices[own] == normalise(line) else None
    if choices[own] in said and (letter == match["letter"] or opened or rest[0] in ".:)") and (rest[0] in ".:),;" or not rest[0].isalnum()):
        return letter
    if strict or said & set(choices) or (match["letter"].islower() and not opened.strip(" \t")):
        return None  # the letter of one choice with the text of another; "a dog"
    another = rf"(?:and|or|both|&|/)\b|[(\[]?[{question.letters}][)\]]?(?:[.,:;)\]]|\s+(?:and|or)\b|\s*$)"
    if rest[:1] not in ".,;:!" and not rest[:1].isspace():
        return None
    return letter if not re.match(another, told) and stands(rest, separated=")" in closed or "]" in closed) else None


_LETTER = re.compile(
    rf"(?P<open>[{re.escape(OPENING)}]*)(?:(?:the\s{{1,2}})?(?:option|choice|letter)\s{{1,3}}(?P<inner>[{re.escape(OPENING)}]*))?"
    rf"(?P<letter>[A-Za-z])(?![^\W_]|['-]\w|\.\w)(?P<close>[{re.escape(CLOSING.strip())}]*)",
    re.IGNORECASE,
)


def _choice(value: str, question: Question) -> str | None:
    """The letter of the one choice whose text a statement says."""
    line = " ".join(value.split())
    shown = {letter: _shown(question, letter) for letter in question.letters}
    plain = {letter: _plain(text) for letter, text in shown.items()}
    line_plain = _plain(undressed_whole(line))
    for same in (
        [letter for letter, text in shown.items() if text == line.strip()],
        [letter for letter, text in plain.items() if text == line_plain],
        [letter for letter, text in plain.items() if _bare(text) == _bare(line_plain)],
    ):
        if same:
            return same[0] if len({shown[letter] for letter in same}) == 1 else None
    begun = [letter for letter, text in plain.items() if line_plain.startswith(text) and not line_plain[len(text)].isalnum()]
    longest = max((len(plain[letter]) for letter in begun), default=0)
    begun = [letter for letter in begun if len(plain[letter]) == longest]
    if len({shown[letter] for letter in begun}) != 1 or not stands(line_plain[longest:]):
        return None
    return begun[0]


def undressed_whole(line: str) -> str:
    """The line without wrappers, trailing marks of a sentence included."""
    return unwrapped(line.strip().rstrip(".!").strip())


def _bare(text: str) -> str:
    return re.sub(r"^(?:the|an?) ", "", text)


def _shown(question: Question, letter: str) -> str:
    return " ".join(question.choices[question.letters.index(letter)].split())


def _string(text: str, statement: Statement, question: Question) -> str | None:
    several = "\n" in question.answer and statement.form in ("line", "heading")
    value = text[statement.begin :] if several else text[statement.begin : statement.end]
    opened = re.match(r"[\s>#-]{0,20}([*_`]{1,4})", text[statement.start : statement.begin])
    if statement.form == "line" and opened:  # "**Answer:** X" and "**Answer: X**"
        value = value.removeprefix(opened[1]).strip()
        if value.count(opened[1]) == 1:
            value = value.removesuffix(opened[1])
    return unwrapped(value) or None


def _is_answer_heading(text: str, statement: Statement, value: str) -> bool:
    """Whether `#### …` is an answer line and no heading: it says a number or a letter, or nothing follows it."""
    return bool(value) and (not text[statement.resume :].strip() or bool(re.fullmatch(r"\W{0,4}(?:[A-Za-z]|[-+−]?[0-9][0-9.,/]{0,40})\W{0,4}", value)))


def _plain(text: str) -> str:
    """A string without wrappers, case and closing marks, whichever of them is outside."""
    while True:
        inner = normalise(unwrapped(text))
        if inner == text:
            return text
        text = inner

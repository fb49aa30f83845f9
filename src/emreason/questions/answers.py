"""Answers: what a completion says its answer is, and the 0/1 reward r(ŷ, y*).

Extraction is strict. An answer counts only where the text *states* one (`Answer: B`, "the answer is (B)"), the last
statement decides, and a malformed last statement is no answer: a false positive would be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from emreason.types import Question, UserError

_EMPHASIS = r"[*_`]*"
_ADJECTIVE = r"(?:(?:final|correct|right|best)[ \t]+)?"
# `Answer:` opens a line, or follows the end of a sentence on the same line.
_LINE_CUE = (
    r"(?:^[ \t>#*_`-]*|(?<=[.!?)])[ \t]+[*_`]*)"
    r"(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:(?:the|my)[ \t]+)?" + _ADJECTIVE + r"answer" + _EMPHASIS + r"[ \t]*(?:is[ \t]*)?:"
)
# A hypothesis ("if the answer is B, …") states nothing.
_PROSE_CUE = (
    r"(?<!\bif )(?<!\bwhether )(?<!\bsuppose )(?<!\bgiven that )"
    r"(?:^[ \t*_`]*" + _ADJECTIVE + r"|\b(?:(?:the|my)[ \t]+)" + _ADJECTIVE + r")answer[ \t]+is\b"
)
_STATEMENT = re.compile(rf"(?P<line>{_LINE_CUE})|{_PROSE_CUE}", re.IGNORECASE | re.MULTILINE)

_LETTER = re.compile(
    rf"[ \t]*{_EMPHASIS}[ \t]*(?:(?:option|choice)[ \t]+)?(?P<open>[(\[]?){_EMPHASIS}(?P<letter>[A-Za-z]){_EMPHASIS}"
    rf"(?P<close>[)\]]?){_EMPHASIS}(?P<mark>[.:,]?){_EMPHASIS}(?P<rest>.*)",
    re.IGNORECASE,
)
_NUMBER = r"[-+−]?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,4})?|[-+−]?\$?\.[0-9]+"
_NUMBER_ANSWER = re.compile(
    rf"[ \t]*{_EMPHASIS}[ \t]*{_EMPHASIS}(?P<number>{_NUMBER}){_EMPHASIS}(?P<mark>[.,;]?){_EMPHASIS}(?P<rest>.*)", re.IGNORECASE
)
_WHOLE_NUMBER = re.compile(_NUMBER, re.IGNORECASE)


def extract(text: str, question: Question) -> str | None:
    """The answer that a completion states, or None.

    Args:
        text: the completion, without the prompt.
        question: gives the kind of answer and the letters allowed. The gold answer is not looked at, except for
            whether it spans several lines (then the answer runs to the end of the text).

    Returns:
        A letter of `question.letters`, a number without grouping commas, or a stripped string.
    """
    statement = _last_statement(text)
    return None if statement is None else _parse(text, statement, question)


def correct(answer: str | None, question: Question) -> bool:
    """The reward r(ŷ, y*): `question.verify` where set, else the same letter, the same number, or the same normalised string."""
    if answer is None:
        return False
    if question.verify is not None:
        return bool(question.verify(answer))
    if question.kind == "choice":
        return answer == question.answer
    if question.kind == "number":
        value = parse_number(answer)
        return value is not None and value == parse_number(question.answer)
    return normalise(_unwrap(answer)) == normalise(_unwrap(question.answer))


def answer_line_complete(text: str, question: Question) -> bool:
    """True once `text` holds a well-formed `Answer: X` line that a newline has ended: generation may stop there."""
    if question.kind == "text" and "\n" in question.answer:
        return False
    ended = text[: text.rfind("\n") + 1]
    statement = _last_statement(ended)
    return statement is not None and statement["line"] is not None and _parse(ended, statement, question) is not None


def stop_at_answer(question: Question, tokenizer: Any) -> Callable[[list[int]], bool]:
    """The `stop` of a request: whether the tokens so far hold a complete answer line."""
    return lambda ids: answer_line_complete(str(tokenizer.decode(ids)), question)


def statement_start(text: str) -> int | None:
    """Where the last statement of an answer begins in `text`: what comes before it is the rationale. None if there is none."""
    statement = _last_statement(text)
    return None if statement is None else statement.start()


def check(question: Question, where: str) -> None:
    """Raise a `UserError` that begins with `where` unless the gold answer is one that a completion could state."""
    if not question.text:
        raise UserError(f"{where}: the question is empty.")
    if not question.answer:
        raise UserError(f"{where}: the gold answer is missing.")
    if question.kind == "choice" and (len(question.answer) != 1 or question.answer not in question.letters):
        raise UserError(f"{where}: the gold answer must be one of the letters {question.letters}, not {question.answer!r}.")
    if question.kind == "number" and parse_number(question.answer) is None:
        raise UserError(
            f"{where}: the gold answer {question.answer!r} is not a number; for other answers set dataset.load.kind=text "
            "and prompt@dataset.prompt=text."
        )


def parse_number(text: str) -> Decimal | None:
    """`"1,234"`, `"17.0"`, `"-$5"` as a number; None where `text` is anything else."""
    text = text.strip()
    if not _WHOLE_NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(_bare(text))
    except InvalidOperation:
        return None


def normalise(text: str) -> str:
    """Case, runs of white space and closing punctuation do not distinguish two strings."""
    plain = " ".join(text.casefold().split())
    return plain.rstrip(".!?,;: ") or plain


def _last_statement(text: str) -> re.Match[str] | None:
    last = None
    for match in _STATEMENT.finditer(text):
        last = match
    return last


def _parse(text: str, statement: re.Match[str], question: Question) -> str | None:
    tail = text[statement.end() :]
    line = tail.split("\n", 1)[0].rstrip()
    if question.kind != "text":
        line = re.sub(rf"^{_EMPHASIS}[ \t]*:?", "", line) if statement["line"] is None else line  # "the answer is: B"
        return _letter(line, question) if question.kind == "choice" else _number(line)
    if statement["line"] is None:  # where a string ends within prose cannot be told
        return None
    answer = tail if "\n" in question.answer else line
    opened = re.match(r"[\s>#-]*([*_`]+)", statement["line"])
    if opened:  # "**Answer:** X" and "**Answer: X**"
        answer = answer.removeprefix(opened[1]).strip()
        if answer.count(opened[1]) == 1:
            answer = answer.removesuffix(opened[1])
    return _unwrap(answer) or None


def _letter(line: str, question: Question) -> str | None:
    match = _LETTER.fullmatch(line)
    if match is None:
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    said = rest.strip(" \t*_`")
    if letter not in question.letters or (match["open"] and not match["close"]):
        return None
    if not said:
        return letter
    if match["letter"].islower() and not match["open"]:
        return None
    # "A dog", "B.C." and "B or C" name no choice; "B. The sun" and "(B) The sun" do.
    if not (match["mark"] or match["close"]) or not rest[0].isspace():
        return None
    if normalise(said) == normalise(question.choices[question.letters.index(letter)]):
        return letter
    if normalise(said) in {normalise(choice) for choice in question.choices}:
        return None  # the letter of one choice with the text of another
    another = rf"(?:and|or|both|&|/)\b|[(\[]?[{question.letters}][)\]]?(?:[.,:;)\]]|\s+(?:and|or)\b|\s*$)"
    return None if re.match(another, said) else letter


def _number(line: str) -> str | None:
    match = _NUMBER_ANSWER.fullmatch(line)
    if match is None:
        return None
    said = match["rest"].strip(" \t*_`")
    # "17. Because …" is 17; "12 + 3 = 15", "17 or 18", "17, 18" and "17 apples" are not plain numbers.
    if said and (not match["mark"] or not match["rest"][0].isspace() or re.match(r"(?:and|or)\b|[-+−]?\$?\.?[0-9]", said)):
        return None
    return _bare(match["number"])


def _bare(number: str) -> str:
    return number.replace("−", "-").translate(str.maketrans("", "", "$,+"))


def _unwrap(text: str) -> str:
    text = text.strip()
    for mark in ("**", "__", "`", "*", '"'):
        inner = text.removeprefix(mark).removesuffix(mark).strip()
        # only a pair around the whole: "2 * 3" and '"a" and "b"' keep their marks
        if inner and text == mark + text[len(mark) : -len(mark)] + mark and mark not in inner:
            text = inner
    return text

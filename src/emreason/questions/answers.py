"""Answers: what a completion says its answer is, and the 0/1 reward r(ŷ, y*).

Extraction is strict. An answer counts only where the text *states* one (`statements.py` has the grammar), the last statement decides, and
a malformed last statement is no answer: a false positive would be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args
from unicodedata import category

from emreason.questions.grammar.numbers import CLOSING, OPENING, parse_number, read_number, same_number
from emreason.questions.grammar.retractions import box_stands, stands, withdrawn
from emreason.questions.grammar.statements import Statement, may_state, statements
from emreason.questions.grammar.strings import asks, bare, same_string
from emreason.questions.grammar.thinking import said
from emreason.questions.grammar.typeset import normalise, undressed, unwrapped
from emreason.types import AnswerKind, Question, UserError

TAIL = 64
"""Tokens at the end of a completion that are looked at first."""

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
    return any(same(answer, gold, question) for gold in (question.answer, *question.aliases))


def same(answer: str, other: str, question: Question) -> bool:
    """Whether two answers to a question, as `extract` returns them, are one."""
    if question.kind == "choice":
        # two choices may read the same, and shown without letters nothing else tells them apart
        return answer == other or (question.answer_as == "text" and _shown(question, answer) == _shown(question, other))
    return same_number(answer, other) if question.kind == "number" else same_string(answer, other)


MaybeStr = TypeVar("MaybeStr", str, str | None)


def in_words(question: Question, answer: MaybeStr) -> MaybeStr:
    """An answer, as `extract` returns it, in the words that a completion ends with: the letter, or the choice's text on one line."""
    return answer if answer is None or question.answer_as == "letter" or question.kind != "choice" else _shown(question, answer)


def gold_text(question: Question) -> str:
    """The gold answer in the words that a completion should end with."""
    return in_words(question, question.answer)


def answer_line_complete(text: str, question: Question) -> bool:
    """True once `text` holds a well-formed `Answer: X` line that a newline has ended: generation may stop there."""
    if question.kind == "text" and "\n" in question.answer:
        return False
    decided = _decide(text[: text.rfind("\n") + 1], question)
    return decided is not None and decided[0].form in ("line", "tag", "heading")


def stop_at_answer(question: Question, tokenizer: Any, prompt_ids: Sequence[int]) -> Callable[[list[int]], bool]:
    """The `stop` of a request: whether the tokens so far hold a complete answer line.

    It is asked at every line's end, and most lines state nothing: where the last tokens hold a whole line and no cue, that is all that is
    decoded.
    """

    def stop(ids: list[int]) -> bool:
        if len(ids) > TAIL:
            end = str(tokenizer.decode(ids[-TAIL:]))
            if "\n" in end.rstrip() and not may_state(end):
                return False
        return answer_line_complete(said(ids, prompt_ids, tokenizer), question)

    return stop


def statement_start(text: str) -> int | None:
    """Where the last statement of an answer begins in `text`: what comes before it is the rationale. None if there is none."""
    for statement in statements(text):
        if statement.form not in ("denial", "claim") and (statement.form != "heading" or _is_answer_heading(text, statement)):
            return statement.start
    return None


def check_types(question: Any, where: str) -> None:
    """Raise a `UserError` that begins with `where` unless this is a `Question` of the types that it declares: loaders may be anybody's."""
    if not isinstance(question, Question):
        raise UserError(f"{where}: its loader must return a list of emreason.Question, not of {type(question).__name__}.")
    where = f"{where}, question {question.id!r}"
    for name in ("id", "text", "answer"):
        if not isinstance(value := getattr(question, name), str):
            raise UserError(f"{where}: its {name} must be a string, not {value!r}.")
    if question.kind not in get_args(AnswerKind):
        raise UserError(f"{where}: its kind must be {', '.join(get_args(AnswerKind))}, not {question.kind!r}.")
    for name in ("choices", "aliases"):
        if not isinstance(value := getattr(question, name), tuple) or not all(isinstance(item, str) for item in value):
            raise UserError(f"{where}: its {name} must be a tuple of strings, not {value!r}.")


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
    claimed: list[str] = []
    found = list(statements(text))
    for i, statement in enumerate(found):
        if statement.form in ("prose", "denial", "box", "claim") and not (statement.boxed and question.kind == "text"):
            outer = next((s for s in found[i:] if s.form == "line" and s.begin <= statement.start < s.end), None)
            if outer is not None and (value := _value(text, outer, question)) is not None and value[1] == outer.resume:
                statement = outer  # a choice's text may say what the answer is
        value = _value(text, statement, question)
        if statement.form in ("heading", "claim") and value is None:
            continue  # any other heading; "the answer must be positive"
        if value is None or value[0] in denied:
            return None
        answer, end = value
        if statement.form == "claim":
            claimed.append(answer)
        elif not all(same(answer, claim, question) for claim in claimed):
            return None
        elif statement.form == "denial":
            denied.add(answer)
        else:
            return None if withdrawn(text, statement, answer, end) else (statement, answer)
    return None


def _value(text: str, statement: Statement, question: Question) -> tuple[str, int] | None:
    """The answer of a statement, and from where on the text may take it back: after a choice's text, which may say anything."""
    if statement.boxed:
        after = text[statement.resume : statement.resume + LINE].split("\n", 1)[0]
        if statement.begin == statement.end or not box_stands(undressed(after)):
            return None
    heading = statement.form == "heading"
    answer: str | None = None
    whole = question.kind == "text" or question.answer_as == "text"
    if whole:
        if heading and not _is_answer_heading(text, statement):
            return None
        if question.kind == "choice":
            answer = _choice(_content(text, statement), question)
        elif statement.form not in ("prose", "denial", "claim") or statement.boxed:  # where a string ends within prose cannot be told
            several = "\n" in question.answer and not statement.boxed
            answer = unwrapped(_content(text, replace(statement, end=len(text)) if several else statement)) or None
    elif "\n" not in (line := undressed(text[statement.begin : statement.end][:LINE]).strip()):
        if question.kind == "number":
            answer = _number(line, heading)
        else:
            answer, whole = _letter(line, question, heading)
    return None if answer is None else (answer, statement.resume if whole else statement.begin)


def _content(text: str, statement: Statement) -> str:
    """What a statement says, without the emphasis that its cue has opened: "**Answer:** X", "**Answer: X**"."""
    value = text[statement.begin : statement.end].strip()
    opened = re.match(r"[\s>#-]{0,20}([*_`]{1,4})", text[statement.start : statement.begin])
    if opened and not statement.boxed:
        value = value.removeprefix(opened[1]).strip()
        if value.count(opened[1]) == 1:
            value = value.removesuffix(opened[1])
    return value


def _number(line: str, heading: bool) -> str | None:
    read = read_number(line)
    if read is None or (heading and any(c.isalnum() for c in read[1])):
        return None
    goes_on = re.match(rf"[{_CLOSE}.,;:(]*(?:(?:and|or)\b|[-+−]?[$£€]?\.?[0-9])", read[1])
    return None if goes_on or not stands(read[1]) else read[0]


_OPEN, _CLOSE = re.escape(OPENING), re.escape(CLOSING)
_LETTER = re.compile(
    rf"(?P<open>[{_OPEN}]*)(?:(?:the\s{{1,2}})?(?:option|choice|letter)\s{{1,3}}(?P<inner>[{_OPEN}]*))?"
    rf"(?P<letter>[A-Za-z])(?![^\W_]|['-]\w|\.\w)(?P<close>[{re.escape(CLOSING.strip())}]*)",
    re.IGNORECASE,
)
_LABEL = re.compile(rf"[{_CLOSE}]*[.,:;!]?[{_CLOSE}]*(?:[-–—]\s{{1,3}})?(?P<bracket>\()?")


def _letter(line: str, question: Question, heading: bool) -> tuple[str | None, bool]:
    """The letter that a line says, and whether its choice's text is the rest of the line."""
    none = (None, False)
    if (tight := re.match(rf"[{_OPEN}]*([{question.letters}])\.(?=\w)", line)) and _begins(
        _core(line[tight.end() :]), _core(undressed(question.choices[question.letters.index(tight[1])]))
    ):
        line = f"{line[: tight.end()]} {line[tight.end() :]}"  # "D.outer covering"
    match = _LETTER.match(line)
    if match is None or match["letter"].upper() not in question.letters:
        return none
    letter, opened = match["letter"].upper(), match["open"] + (match["inner"] or "")
    rest, set_off = line[match.end() :], bool(set(match["close"]) & set(")]"))
    if any(opened.count(left) > line.count(right, match.end("letter")) for left, right in ("()", "[]")):
        return none
    label = _LABEL.match(rest)
    assert label is not None  # it matches nothing, too
    told = rest[label.end() :].strip()
    bracketed = f"{label['bracket'] or ''}{told}"
    said = {_core(text) for text in (told, bracketed, re.split(r"[.;!](?:\s|$)", told, maxsplit=1)[0])}
    choices = [_core(undressed(choice)) for choice in question.choices]
    own = choices[question.letters.index(letter)]
    if _begins(_core(told), own) and _goes_on(
        _core(told)[len(own) :], [c for c in choices if c not in ("", own)], question.letters.lower()
    ):
        return none
    if _core(line) in choices and any(c.isalnum() for c in rest):  # "A dog" may be a choice's text
        return (letter if own == _core(line) else None), False
    small = match["letter"].islower() and not opened.strip()
    if own in said and not (small and not set_off and rest[:1] not in (".", ":")):
        return letter, own == _core(bracketed)
    if not any(c.isalnum() for c in rest):
        return (letter if stands(rest) else None), False
    if heading or small or said & set(choices):
        return none  # the letter of one choice with the text of another; "a dog"
    if label[0].strip(CLOSING)[:1] in ("", ":") and not _begins(_core(told), own) and any(_begins(_core(told), c) for c in choices if c):
        return none
    another = rf"(?:and(?! not)|or|both|&|/)\b|[(\[]?[{question.letters}][)\]]?(?:[.,:;)\]]|\s+(?:and|or)\b|\s*$)"
    return (letter if not re.match(another, told) and stands(rest, set_off) else None), False


def _core(text: str) -> str:
    plain = normalise(text)
    return plain.strip(" \"'.!?,;:()*_`$") or plain


def _begins(text: str, choice: str) -> bool:
    after = text[len(choice) :][:1]
    return text.startswith(choice) and not (after.isalnum() or category(after or " ").startswith("M"))  # कम is not कमी


def _goes_on(rest: str, others: Sequence[str], labels: str = "") -> bool:
    """Whether what follows a choice's text on its line is one more choice, by its label or its text: a list is no answer."""
    if labels and re.match(rf"[\s),.;]*(?:,|and|or|&|/|\+)\s*[(\[]?[{labels}][)\].]?\s*$", rest):
        return True
    between = _BETWEEN.match(rest)
    assert between is not None  # it matches nothing, too
    rest, label = rest[between.end() :], f"|[{labels}][).:(\\s]" if labels else ""
    rest = re.sub(rf"^[{labels}][).:\s(]{{1,4}}", "", rest) if labels else rest
    ends = re.compile(rf"\W*(?:$|[.,;/&)]|(?:and|or)\b{label})")
    return any(ends.match(rest[len(other) :]) for other in others if _begins(rest, other))


_BETWEEN = re.compile(r"[\s)\].,;:(*_`+]*(?:(?:and|or|also|as well as|both|&|/)\s{1,3})*[(\[]?(?:(?:the|an?) )?")


def _choice(value: str, question: Question) -> str | None:
    """The letter of the one choice whose text a statement says."""
    line = " ".join(value.split())
    said = bare(line)
    shown = {letter: _shown(question, letter) for letter in question.letters}
    plain = {letter: bare(text) for letter, text in shown.items()}
    without = {letter: _ARTICLE.sub("", text) for letter, text in plain.items()}
    for written, asked in ((shown, line), (plain, said), (without, _ARTICLE.sub("", said))):
        if alike := [letter for letter, text in written.items() if text == asked]:
            whole = len({shown[letter] for letter in alike}) == 1 and not asks(line, shown[alike[0]])
            return alike[0] if whole else None
    begun = [letter for letter, text in plain.items() if _begins(said, text)]
    longest = max((len(plain[letter]) for letter in begun), default=0)
    begun = [letter for letter in begun if len(plain[letter]) == longest]
    alone = len({shown[letter] for letter in begun}) == 1
    rest = said[longest:]
    # "a; b; c" is how the prompt shows the choices
    listed = _LISTED.match(rest) or _goes_on(rest, [c for letter, c in without.items() if letter not in begun])
    return begun[0] if alone and not listed and stands(rest) and not line.endswith("?") else None


_ARTICLE = re.compile(r"^(?:the|an?) ")
_LISTED = re.compile(r"[\s.)*_\"']*;\s*(?!(?:it|they|this|that|because|since|as|which)\b)\w")


def _shown(question: Question, letter: str) -> str:
    return " ".join(question.choices[question.letters.index(letter)].split())


def _is_answer_heading(text: str, statement: Statement) -> bool:
    """Whether `#### …` is an answer line and no heading: it says a number or a letter, or nothing follows it."""
    value = text[statement.begin : statement.end].strip()
    short = re.fullmatch(r"\W{0,4}(?:[A-Za-z]|[-+−]?[0-9][0-9.,/]{0,40})\W{0,4}", value)
    return bool(value) and (short is not None or not text[statement.resume :].strip())

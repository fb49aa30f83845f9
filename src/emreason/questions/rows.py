"""One row of a table, whatever its shape, to one `Question`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from emreason.questions.answers import check
from emreason.questions.cells import absent, as_text, lookup
from emreason.questions.grammar.numbers import parse_number
from emreason.questions.options import Option, position
from emreason.questions.reading import CONTEXT, WRONG, Asked, Reading, Row, plain_name, understand
from emreason.types import LETTERS, Question, UserError

log = logging.getLogger(__name__)


def read(rows: Sequence[Row], asked: Asked, source: str, together: Sequence[Row] | None = None) -> list[Question]:
    """The questions of a table.

    Args:
        source: the file or the dataset, for messages.
        together: the rows that say how they are all read, where these are only a part of them.

    Raises:
        UserError: a row cannot be read, or what the rows hold is not clear; the message says which key decides.
    """
    reading = understand(rows if together is None else together, asked, source)
    _tell(rows, reading, source)
    questions: list[Question] = []
    places: dict[str, str] = {}
    skipped: list[str] = []
    for row in rows:
        try:
            question = to_question(row, reading)
        except UserError as error:
            if not asked.skip_unusable:
                raise
            skipped.append(str(error))
            continue
        if question.id in places:
            raise UserError(f"{row.where}: the id {question.id!r} is already that of {places[question.id]}; ids must differ.")
        places[question.id] = row.where.rpartition(", ")[2]
        questions.append(question)
    if skipped:
        log.warning("%s: %s of %s rows skipped, the first: %s", source, f"{len(skipped):,}", f"{len(rows):,}", skipped[0])
    return questions


def _tell(rows: Sequence[Row], reading: Reading, source: str) -> None:
    """Say what of a table is left out that makes another task of it."""
    records = [row.record for row in rows if isinstance(row.record, Mapping)]
    held = [str(key) for key in dict.fromkeys(key for record in records for key in record)]
    held = [key for key in held if any(not absent(record.get(key)) for record in records)]
    if unread := [key for key in held if plain_name(key) in CONTEXT and key not in (*reading.question, reading.answer)]:
        shown = ",".join([*unread, *reading.question])
        log.warning("%s: %s is not shown; dataset.columns.question=[%s] puts it before the question", source, unread[0], shown)
    if reading.kind != "choice" and (wrong := [key for key in held if plain_name(key).startswith(WRONG) and key != reading.answer]):
        log.warning(
            "%s: %s is not read, the questions are asked without choices; a column with a list of choices, shuffled, would show it",
            *(source, ", ".join(wrong)),
        )
    if pictures := [key for key in held if plain_name(key) == "image"]:
        log.warning("%s: %s is not shown; models of text see the words alone", source, pictures[0])
    if reading.kind == "number" and plain_name(reading.answer) == "label":
        told = {str(lookup(record, reading.answer)) for record in records}
        if told <= {"0", "1"}:
            log.warning("%s: %s is 0 or 1, read as a number; dataset.load.choices=[no,yes] makes words of it", source, reading.answer)


def to_question(row: Row, reading: Reading) -> Question:
    """One row.

    Raises:
        UserError: it lacks something, or holds it in a form that is no text.
    """
    if row.fault:
        raise UserError(f"{row.where}{row.fault}")
    if not isinstance(row.record, Mapping):
        raise UserError(f"{row.where}: expected an object with question and answer.")
    parts = [lookup(row.record, column) for column in reading.question]
    if absent(parts[-1], words=False):
        raise UserError(f"{row.where}: `{reading.question[-1]}` is missing.")
    text = "\n".join(as_text(part, row.where, name) for part, name in zip(parts, reading.question, strict=True) if part is not None).strip()
    answers = reading.answers(row)
    if not answers:
        shown = lookup(row.record, reading.answer)
        said = "is missing" if shown in (None, "", []) else f"is {shown!r}, which is no answer"
        raise UserError(f"{row.where}: `{reading.answer}` {said}; mend the row, or leave such rows out: dataset.load.skip_unusable=true.")
    if not answers[0]:
        raise UserError(
            f"{row.where}: `{reading.answer}` is a worked solution that does not end with `#### ANSWER` or \\boxed{{ANSWER}}; "
            "mend the row, or leave such rows out: dataset.load.skip_unusable=true."
        )
    given = lookup(row.record, reading.id) if reading.id else None
    name = row.id if absent(given, words=False) else as_text(given, row.where, "id")
    options = reading.options(row) if reading.kind == "choice" or reading.asked.kind is None else []
    if reading.kind != "choice":
        if any(option.text is not None for option in options):
            raise UserError(f"{row.where}: it has choices, most other rows have none; set dataset.load.kind=choice or {reading.kind}.")
        others = [alias for alias in answers[1:] if alias and (reading.kind == "text" or parse_number(alias) is not None)]
        question = Question(name, text, answers[0], reading.kind, aliases=tuple(others))
    else:
        answer, choices = _choose(row, answers, options, reading)
        question = Question(name, text, answer, "choice", choices)
    check(question, row.where)
    return question


def _choose(row: Row, answers: Sequence[str], options: list[Option], reading: Reading) -> tuple[str, tuple[str, ...]]:
    """The gold letter among the options that have a text, and these."""
    where = row.where
    kept = [option.text for option in options if option.text is not None]
    if not kept:
        missing = reading.choices[0] if reading.choices else "choices"
        raise UserError(f"{where}: `{missing}` is missing; all questions of a file are answered in one way.")
    if not 2 <= len(kept) <= len(LETTERS):
        raise UserError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} strings.")
    counts = Counter(" ".join(choice.split()) for choice in kept)  # TT and Tt are two genotypes
    if not reading.asked.alike and (alike := [choice for choice in kept if counts[" ".join(choice.split())] > 1]):
        raise UserError(f"{where}: two choices are alike ({alike[0]!r}).")
    places = {place for answer in answers if (place := position(answer, options, reading.gold)) is not None}
    if len(places) > 1:
        raise UserError(f"{where}: several choices are right ({', '.join(answers)}); a question has one gold answer.")
    if not places:
        letters = LETTERS[: len(kept)]
        lettered = all((option.label or letter).upper() == letter for option, letter in zip(options, LETTERS, strict=False))
        what = {
            "label": f"one of the letters {letters}" if lettered else f"one of {', '.join(o.label or '' for o in options)}",
            "text": "the text of one choice",
            "index0": f"an index from 0 to {len(options) - 1}",
            "index1": f"an index from 1 to {len(options)}",
        }[reading.gold]
        raise UserError(f"{where}: the gold answer must be {what}, not {answers[0]!r}.")
    (place,) = places
    if options[place].text is None:
        raise UserError(f"{where}: the gold answer {answers[0]!r} points to an empty choice.")
    return LETTERS[sum(option.text is not None for option in options[:place])], tuple(kept)

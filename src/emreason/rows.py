"""One row of a table, whatever its shape, to one `Question`. How a table is read is decided over all its rows, never by one of them."""

from __future__ import annotations

import ast
import datetime
import decimal
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from emreason.answers import check, normalise, parse_number
from emreason.options import GOLDS, Gold, Option, column_groups, column_labels, position, read_options
from emreason.types import LETTERS, AnswerKind, Question, UserError

log = logging.getLogger(__name__)

# Names that the field's data sets use, the more telling first, without case, spaces and marks.
QUESTION = ("question", "problem", "query", "questionstem", "questiontext", "prompt", "stem")
ANSWER = (
    "answer", "answerkey", "correctanswer", "correctoption", "correct", "gold", "target", "finalanswer", "expectedanswer", "groundtruth",
    "answeridx", "answerindex", "answers", "label", "cop", "solution",
)  # fmt: skip
CHOICES = ("choices", "options", "endings", "answerchoices", "candidates")
ALIASES = ("aliases", "answeraliases", "possibleanswers")
CONTEXT = ("context", "passage", "paragraph", "article", "body", "premise", "story", "support")
INDEX = ("label", "answeridx", "answerindex", "correctidx", "correctindex", "cop")
WORKED = ("####", "\\boxed{")
ABSENT = frozenset(("nan", "null", "n/a", "#n/a", "<na>", "#value!", "#div/0!", "#ref!"))  # without case
ABSENT_AS_WRITTEN = frozenset(("NA", "None"))  # "Na" and "none" can be answers


@dataclass(frozen=True)
class Row:
    """A record, where it stands, and the id it has unless it brings one. `fault`: what makes it none."""

    where: str
    id: str
    record: Any
    fault: str | None = None


Seen = tuple[Row, list[str], list[Option]]
"""A row with its right answers and its options."""


@dataclass(frozen=True)
class Asked:
    """What the config says about a table; None: it is seen from the rows.

    Args:
        columns: role (question, answer, choices, aliases, id) → column, dotted where nested; several for a question are put below each
            other, several for the choices are one choice each.
        kind: of all answers.
        gold: what the answer of a choice question is: `label` (a letter, or the file's own label), `text`, `index0` or `index1`.
        choices: the same for every question, e.g. ["yes", "no"].
        skip_unusable: leave out rows that cannot be read, and say how many.
        alike: allow two choices that are alike.
    """

    columns: Mapping[str, Any] | None = None
    kind: AnswerKind | None = None
    gold: Gold | None = None
    choices: Sequence[Any] | None = None
    skip_unusable: bool = False
    alike: bool = False

    def __post_init__(self) -> None:
        for key, value, allowed in (("kind", self.kind, get_args(AnswerKind)), ("gold", self.gold, GOLDS)):
            if value is not None and value not in allowed:
                raise UserError(f"dataset.load.{key} must be one of {', '.join(allowed)}, or null, not {value!r}.")
        if unknown := sorted(set(self.columns or {}) - {"question", "answer", "choices", "aliases", "id"}):
            raise UserError(f"dataset.columns.{unknown[0]}: it must be one of question, answer, choices, aliases, id.")


def asked_of(**given: Any) -> Asked:
    """`Asked`, of the keys of `dataset.load`.

    Raises:
        UserError: one is unknown, or holds what it may not.
    """
    try:
        return Asked(**given)
    except TypeError as error:
        raise UserError(f"dataset.load: {str(error).removeprefix('Asked.__init__() ')}.") from error


@dataclass(frozen=True)
class Reading:
    """How the rows of a table are read: columns by role, the kind of all answers, and what the answer of a choice question is."""

    question: tuple[str, ...]
    answer: str
    choices: tuple[str, ...]
    aliases: str | None
    id: str | None
    kind: AnswerKind
    gold: Gold
    fixed: tuple[Option, ...]
    worked: bool
    asked: Asked

    def options(self, row: Row) -> list[Option]:
        """The options of a row, those without a text included."""
        if self.fixed:
            return list(self.fixed)
        if len(self.choices) > 1:
            labels = column_labels(self.choices, counted=plain_name(self.answer) in INDEX)
            cells = [lookup(row.record, column) for column in self.choices]
            return [Option(label, option_text(cell, row.where)) for label, cell in zip(labels, cells, strict=True)]
        value = lookup(row.record, self.choices[0]) if self.choices else None
        return read_options(value, lambda v: option_text(v, row.where), row.where)

    def answers(self, row: Row, whole: bool = False) -> list[str]:
        """The gold answer, then its aliases; empty where there is none. Of a worked solution its last part, unless `whole`.

        Raises:
            UserError: it is no text.
        """
        found = _alternatives(lookup(row.record, self.answer), row.where)
        extra = _alternatives(lookup(row.record, self.aliases), row.where) if self.aliases else []
        if not found or absent(found[0]):
            return []
        texts = [as_text(value, row.where, self.answer) for value in [*found, *extra] if not absent(value)]
        texts += [str(value).lower() for value in found if isinstance(value, bool)]  # who answers "true" is right, too
        return list(dict.fromkeys(final(text) if not whole and (self.worked or "####" in text) else text for text in texts))


def read(rows: Sequence[Row], asked: Asked, source: str, together: Sequence[Row] | None = None) -> list[Question]:
    """The questions of a table.

    Args:
        source: the file or the dataset, for messages.
        together: the rows that say how they are all read, where these are only a part of them.

    Raises:
        UserError: a row cannot be read, or what the rows hold is not clear; the message says which key decides.
    """
    reading = understand(rows if together is None else together, asked, source)
    first = rows[0].record if rows and isinstance(rows[0].record, Mapping) else {}
    read_columns = {*reading.question, reading.answer}
    if unread := [column for column in first if plain_name(column) in CONTEXT and column not in read_columns and not absent(first[column])]:
        shown = ",".join([*unread, *reading.question])
        log.warning("%s: %s is not shown; dataset.columns.question=[%s] puts it before the question", source, unread[0], shown)
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
        raise UserError(f"{row.where}: `{reading.answer}` is a worked solution that does not end with `#### ANSWER` or \\boxed{{ANSWER}}.")
    given = lookup(row.record, reading.id) if reading.id else None
    name = row.id if absent(given, words=False) else as_text(given, row.where, "id")
    options = reading.options(row) if reading.kind == "choice" or reading.asked.kind is None else []
    if reading.kind != "choice":
        if any(option.text is not None for option in options):
            raise UserError(f"{row.where}: it has choices, most other rows have none; set dataset.load.kind=choice or {reading.kind}.")
        question = Question(name, text, answers[0], reading.kind, aliases=tuple(filter(None, answers[1:])))
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
        raise UserError(f"{where}: `{reading.choices[0] if reading.choices else 'choices'}` is missing.")
    if not 2 <= len(kept) <= len(LETTERS):
        raise UserError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} strings.")
    counts = Counter(normalise(choice) for choice in kept)
    if not reading.asked.alike and (alike := [choice for choice in kept if counts[normalise(choice)] > 1]):
        raise UserError(f"{where}: two choices are alike ({alike[0]!r}).")
    places = {place for answer in answers if (place := position(answer, options, reading.gold)) is not None}
    if len(places) > 1:
        raise UserError(f"{where}: several choices are right ({', '.join(answers)}); a question has one gold answer.")
    if not places:
        letters = LETTERS[: len(kept)]
        what = {
            "label": f"one of the letters {letters}" if _lettered(options) else f"one of {', '.join(o.label or '' for o in options)}",
            "text": "the text of one choice",
            "index0": f"an index from 0 to {len(options) - 1}",
            "index1": f"an index from 1 to {len(options)}",
        }[reading.gold]
        raise UserError(f"{where}: the gold answer must be {what}, not {answers[0]!r}.")
    (place,) = places
    if options[place].text is None:
        raise UserError(f"{where}: the gold answer {answers[0]!r} points to an empty choice.")
    return LETTERS[sum(option.text is not None for option in options[:place])], tuple(kept)


def _lettered(options: Sequence[Option]) -> bool:
    return all((option.label or letter).upper() == letter for option, letter in zip(options, LETTERS, strict=False))


# --- how a table is read ----------------------------------------------------------------------------------------------


def understand(rows: Sequence[Row], asked: Asked, source: str) -> Reading:
    """Columns, kind and gold of a table, from all its rows together.

    Raises:
        UserError: they are not clear; the message says which key decides.
    """
    records = [row.record for row in rows if row.fault is None and isinstance(row.record, Mapping)]
    counts = Counter(str(key) for record in records for key in record)
    usual = [key for key, count in counts.items() if 2 * count >= len(records)]
    given = {role: _several(value) for role, value in (asked.columns or {}).items() if value not in (None, [])}
    for role, columns in given.items():
        for column in columns:
            if records and not any(lookup(record, column) is not None for record in records):
                raise UserError(f"dataset.columns.{role}={column}: {source} has no such column, or nothing in it; {_there(counts)}.")

    def named(role: str, names: Sequence[str], needed: bool) -> tuple[str, ...]:
        found = given.get(role) or tuple(_find(names, usual)[:1])
        if needed and not found and records:
            raise UserError(f"{source}: no column holds the {role}; {_there(counts)}. Name it: dataset.columns.{role}=….")
        return found or (role,)

    question = named("question", QUESTION, needed=True)
    choices = given.get("choices") or tuple(_find(CHOICES, list(counts))[:1])
    if "question" not in given and records:
        inside = Counter(str(key) for record in records if isinstance(part := record.get(question[0]), Mapping) for key in part)
        if stem := _find(("stem", "text", "question"), list(inside)):  # ARC as released
            choices = choices or tuple(f"{question[0]}.{key}" for key in _find(CHOICES, list(inside))[:1])
            question = (f"{question[0]}.{stem[0]}",)
    answer = named("answer", ANSWER, needed=True)[0]
    if not choices and "answer" not in given and plain_name(answer) == "answers" and (index := _find(INDEX, usual)):
        choices, answer = (answer,), index[0]  # a list of answers and which of them is right
    aliases, identity = (
        given.get(role) or tuple(_find(names, list(counts))[:1]) for role, names in (("aliases", ALIASES), ("id", ("id",)))
    )
    fixed = tuple(Option(None, option_text(choice, "dataset.load.choices")) for choice in asked.choices or ())
    reading = Reading(
        question, answer, choices, next(iter(aliases), None), next(iter(identity), None), "text", "label", fixed, False, asked
    )
    whole = [row for row in rows if row.fault is None and isinstance(row.record, Mapping)]
    if not choices and not fixed:
        reading = replace(reading, choices=_choice_columns(usual, list(counts), reading, whole))
    seen = list(_evidence(whole, reading)) if asked.kind in (None, "choice") else []
    if asked.kind == "choice" or (asked.kind is None and seen and 2 * len(seen) >= len(records)):
        return replace(reading, kind="choice", gold=asked.gold or _gold(seen, source, reading))
    golds = [answers[0] for row in whole if (answers := _quietly(reading, row))]
    worked = 2 * sum(any(mark in gold for mark in WORKED) for gold in golds) > len(golds)
    numbers = sum(parse_number(final(gold) if worked or "####" in gold else gold) is not None for gold in golds)
    # a word among numbers is a slip, to be told at its line; where more than a fifth are words, they are no numbers
    others = len(golds) - numbers
    number = numbers > others and others <= max(1, len(golds) // 5)
    return replace(reading, kind=asked.kind or ("number" if number else "text"), worked=worked)


def _choice_columns(usual: Sequence[str], columns: Sequence[str], reading: Reading, rows: Sequence[Row]) -> tuple[str, ...]:
    """Columns with one choice each; not the numbers a and b of a problem whose answer is another number."""
    for group in column_groups(usual, columns, {*reading.question, reading.answer}):
        draft = replace(reading, choices=tuple(group))
        seen = list(_evidence(rows, draft))
        cells = [option.text for _, _, options in seen for option in options if option.text is not None]
        borne_out = sum(any(_place(answers, options, gold) is not None for gold in GOLDS) for _, answers, options in seen)
        if seen and (2 * borne_out >= len(seen) or not all(parse_number(cell) is not None for cell in cells)):
            return tuple(group)
    return ()


def _quietly(reading: Reading, row: Row) -> list[str]:
    try:
        return reading.answers(row, whole=True)
    except UserError:  # told when its line is read
        return []


def _evidence(rows: Sequence[Row], reading: Reading) -> Iterator[Seen]:
    """Rows with choices and a gold answer."""
    for row in rows:
        try:
            options, answers = reading.options(row), reading.answers(row)
        except UserError:
            continue
        if any(option.text is not None for option in options) and answers:
            yield row, answers, options


def _place(answers: Sequence[str], options: Sequence[Option], gold: Gold) -> int | None:
    return next((place for answer in answers if (place := position(answer, options, gold)) is not None), None)


def _gold(seen: Sequence[Seen], source: str, reading: Reading) -> Gold:
    """What explains most answers; where two explain as many and differ, the file does not say it.

    Raises:
        UserError: names the key that decides.
    """
    places = {gold: [_place(answers, options, gold) for _, answers, options in seen] for gold in GOLDS}
    explained = {gold: sum(place is not None for place in found) for gold, found in places.items()}
    best: list[Gold] = [gold for gold in GOLDS if explained[gold] == max(explained.values())]
    if best[0] == "label" and all(option.label for _, _, options in seen for option in options):
        return "label"  # the file's own
    if "index1" in best and plain_name(reading.answer) == "answerkey":
        return "index1"  # ARC's digits count from 1
    for gold in best[1:]:
        for (row, answers, _), one, other in zip(seen, places[best[0]], places[gold], strict=True):
            if one is not None and other is not None and one != other:
                raise UserError(
                    f"{row.where}: the gold answer {answers[0]!r} can be read as {_GOLD_WORDS[best[0]]} or as {_GOLD_WORDS[gold]}, and no "
                    f"row of {source} decides it; set dataset.load.gold={best[0]} or dataset.load.gold={gold}."
                )
    return best[0]


_GOLD_WORDS: dict[Gold, str] = {
    "label": "a choice's label",
    "text": "a choice's text",
    "index0": "an index from 0",
    "index1": "an index from 1",
}


def _several(value: Any) -> tuple[str, ...]:
    return (str(value),) if isinstance(value, str | int) else tuple(str(part) for part in value)


def _there(counts: Mapping[str, int]) -> str:
    return f"there are {', '.join(list(counts)[:20])}" if counts else "there is none"


def plain_name(name: str) -> str:
    """A column's name without case, spaces and marks."""
    return re.sub(r"[^0-9a-z]", "", name.casefold())


def _find(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Columns with one of these names, in the order of the names."""
    return [column for name in names for column in columns if plain_name(column) == name]


# --- cells ------------------------------------------------------------------------------------------------------------


def lookup(record: Any, path: str) -> Any:
    """What a record holds under a name, or below it along a dotted path; None where there is nothing."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    head, _, rest = path.partition(".")
    if isinstance(record, Sequence) and not isinstance(record, str | bytes) and head.isdecimal() and int(head) < len(record):
        inner = record[int(head)]
    else:
        inner = record.get(head) if isinstance(record, Mapping) else None
    return lookup(inner, rest) if rest else inner


def absent(value: Any, words: bool = True) -> bool:
    """Whether a cell holds nothing: null, NaN, white space, an empty list, and with `words` what programs write for it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ([], {}):
        return True
    if not isinstance(value, str):
        return False
    text = value.strip()
    return not text or (words and (text.casefold() in ABSENT or text in ABSENT_AS_WRITTEN))


def as_text(value: Any, where: str, what: str) -> str:
    """A cell as text: true and false are yes and no, 8.0 is 8.

    Raises:
        UserError: it is a list, an object, bytes, NaN or no valid Unicode.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, str | int | decimal.Decimal | datetime.date | datetime.time):
        text = str(value).strip()
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: `{what}` holds half a character (a lone surrogate), which is no valid text.")
        return text
    names = {"list": "a list", "tuple": "a list", "dict": "an object", "float": "not a number", "NoneType": "nothing"}
    raise UserError(f"{where}: `{what}` is {names.get(type(value).__name__, type(value).__name__)}, where a text belongs.")


def option_text(value: Any, where: str) -> str | None:
    """An option's text; None where the place is empty."""
    missing = absent(value, words=False) or (isinstance(value, str) and value.strip().casefold() in ("nan", "<na>", "null"))
    return None if missing else as_text(value, where, "choices")


def final(text: str) -> str:
    r"""The answer that a worked solution ends with, after `####` (GSM8K) or in its last `\boxed{…}` (MATH); empty where there is none."""
    _, mark, last = text.rpartition("####")
    if mark:
        return last.strip() if "\n" not in last.strip() else ""
    _, mark, last = text.rpartition("\\boxed{")
    depth = 1
    for end, c in enumerate(last if mark else ""):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return last[:end].strip()
    return ""


def _alternatives(value: Any, where: str) -> list[Any]:
    """A cell that holds several right answers, as a list (TriviaQA, SQuAD), written as JSON or not."""
    if isinstance(value, str):
        value = parse_list(value) or value
    if isinstance(value, Mapping):
        first = [value[key] for key in ("value", "text", "answer") if key in value][:1]
        value = [*_flat(first), *_flat([value[key] for key in ("aliases", "normalized_aliases") if key in value])] or value
    if isinstance(value, tuple | list):
        if len(value) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value) and len(set(value)) > 1:
            raise UserError(f"{where}: `answer` is a list of numbers; where each is right they must be in quotation marks.")
        return list(value)
    return [value]


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]


def parse_list(text: str) -> list[str] | None:
    """A list of strings as JSON or Python writes it; None where `text` is anything else."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for parse in parsers:
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else None
    return None

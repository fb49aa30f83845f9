"""How a table is read: which column is what, of which kind its answers are. Decided over all its rows, never by one of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from emreason.questions.cells import absent, alternatives, as_text, final, lookup, marked_one, option_text
from emreason.questions.grammar.numbers import parse_number
from emreason.questions.options import GOLDS, Gold, Option, column_groups, column_labels, position, read_options
from emreason.types import AnswerKind, UserError

# Names that the field's data sets use, the more telling first, without case, spaces and marks.
QUESTION = ("question", "problem", "query", "questionstem", "questiontext", "prompt", "stem")
ANSWER = (
    "answer", "answerkey", "correctanswer", "correctoption", "correct", "gold", "target", "finalanswer", "expectedanswer",
    "groundtruth",
    "answeridx", "answerindex", "answers", "label", "cop", "solution",
)  # fmt: skip
CHOICES = ("choices", "options", "endings", "answerchoices", "candidates")
ALIASES = ("aliases", "answeraliases", "possibleanswers")
CONTEXT = ("context", "passage", "paragraph", "article", "body", "premise", "story", "support", "hint")
INDEX = ("label", "answeridx", "answerindex", "correctidx", "correctindex", "cop")
WORKED = ("####", "\\boxed", "\\fbox")
WRONG = ("incorrect", "distractor", "wrong")


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
            return [Option(label, option_text(cell, row.where, words=True)) for label, cell in zip(labels, cells, strict=True)]
        value = lookup(row.record, self.choices[0]) if self.choices else None
        return read_options(value, lambda v: option_text(v, row.where), row.where)

    def answers(self, row: Row, whole: bool = False) -> list[str]:
        """The gold answer, then its aliases; empty where there is none. Of a worked solution its last part, unless `whole`.

        Raises:
            UserError: it is no text.
        """
        value = lookup(row.record, self.answer)
        marked = marked_one(value, len(self.options(row))) if self.choices or self.fixed else None
        found = alternatives(value, row.where) if marked is None else [marked]
        extra = alternatives(lookup(row.record, self.aliases), row.where) if self.aliases else []
        if not found or absent(found[0]):
            return []
        texts = [as_text(value, row.where, self.answer) for value in [*found, *extra] if not absent(value)]
        texts += [str(value).lower() for value in found if isinstance(value, bool)]  # who answers "true" is right, too
        return list(dict.fromkeys(final(text) if not whole and (self.worked or "####" in text) else text for text in texts))


def understand(rows: Sequence[Row], asked: Asked, source: str) -> Reading:
    """Columns, kind and gold of a table, from all its rows together.

    Raises:
        UserError: they are not clear; the message says which key decides.
    """
    whole = [row for row in rows if row.fault is None and isinstance(row.record, Mapping)]
    records = [row.record for row in whole]
    counts = Counter(str(key) for record in records for key in record)
    usual = [key for key, count in counts.items() if 2 * count >= len(records)]
    given = {role: _several(value) for role, value in (asked.columns or {}).items() if value not in (None, [])}
    for role, columns in given.items():
        for column in columns:
            if records and not any(lookup(record, column) is not None for record in records):
                raise UserError(f"dataset.columns.{role}={column}: {source} has no such column, or nothing in it; {_there(counts)}.")

    def named(role: str, names: Sequence[str], needed: bool) -> tuple[str, ...]:
        there = _find(names, usual)
        filled = [name for name in there if 2 * sum(not absent(record[name]) for record in records if name in record) >= len(records)]
        found = given.get(role) or tuple((filled or there)[:1])
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
    if "answer" not in given and (named_number := _find(("answernumber",), usual)):  # MGSM, whose `answer` is a sentence or null
        both = [(record.get(answer), record.get(named_number[0])) for record in records]
        answer = named_number[0] if all(absent(words) or str(told) in str(words) for words, told in both) else answer
    if not choices and "answer" not in given and plain_name(answer) == "answers" and (index := _find(INDEX, usual)):
        choices, answer = (answer,), index[0]  # a list of answers and which of them is right
    aliases, identity = (
        given.get(role) or tuple(_find(names, list(counts))[:1]) for role, names in (("aliases", ALIASES), ("id", ("id",)))
    )
    fixed = tuple(Option(None, option_text(choice, "dataset.load.choices")) for choice in asked.choices or ())
    reading = Reading(
        question, answer, choices, next(iter(aliases), None), next(iter(identity), None), "text", "label", fixed, False, asked
    )
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
    if any(marked_one(lookup(row.record, reading.answer), len(options)) is not None for row, _, options in seen):
        return "index0"
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

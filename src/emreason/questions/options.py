"""The options of a multiple-choice question in the forms that files hold them in, and the one that a gold answer points to."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from emreason.questions.cells import absent, parsed
from emreason.questions.grammar.numbers import same_number
from emreason.questions.grammar.typeset import normalise
from emreason.types import LETTERS, UserError

Gold = Literal["label", "text", "index0", "index1"]
GOLDS: tuple[Gold, ...] = get_args(Gold)

LABEL_KEYS = ("label", "labels", "key", "keys", "letter", "id")
TEXT_KEYS = ("text", "texts", "content", "value", "choice", "option", "answer")


@dataclass(frozen=True)
class Option:
    """A place among the options. `label`: its own name, None: a letter by its place; `text` None: the place is empty."""

    label: str | None
    text: str | None


def read_options(value: Any, text: Callable[[Any], str | None], where: str) -> list[Option]:
    """A list of texts, of {label, text}, of "A) …"; {label: [...], text: [...]}; or {A: …, B: …}; or one of these written as JSON.

    Args:
        text: a cell's text, None where it is empty.

    Raises:
        UserError: it is none of these.
    """
    if absent(value, words=False):
        return []
    if isinstance(value, str) and (value := parsed(value.strip())) is None:
        raise UserError(f'{where}: `choices` must be a JSON list such as ["red", "blue"].')
    if isinstance(value, Mapping):
        label, content = _key(LABEL_KEYS, value), _key(TEXT_KEYS, value)
        if content is not None and isinstance(value[content], list | tuple):
            texts = list(value[content])
            labels = list(value[label]) if label is not None and isinstance(value[label], list | tuple) else [None] * len(texts)
            if len(labels) != len(texts):
                raise UserError(f"{where}: `choices` has {len(labels)} labels for {len(texts)} texts.")
            return [Option(None if name is None else str(name).strip(), text(item)) for name, item in zip(labels, texts, strict=True)]
        return [Option(str(name).strip(), text(item)) for name, item in value.items()]
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} strings.")
    if any(isinstance(item, Mapping) for item in value):
        return [_labelled(item, text, where) for item in value]
    if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map, as Parquet has it
        return [Option(str(name).strip(), text(item)) for name, item in value]
    return _unmarked([text(item) for item in value])


def _key(names: Sequence[str], value: Mapping[str, Any]) -> str | None:
    return next((key for name in names for key in value if str(key).casefold() == name), None)


def _labelled(item: Any, text: Callable[[Any], str | None], where: str) -> Option:
    if not isinstance(item, Mapping):
        return Option(None, text(item))
    content, label = _key(TEXT_KEYS, item), _key(LABEL_KEYS, item)
    if content is None:
        raise UserError(f"{where}: a choice must have a `text` (and a `label`), not {', '.join(map(str, item)) or 'nothing'}.")
    return Option(None if label is None or item[label] is None else str(item[label]).strip(), text(item[content]))


_MARKED = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.DOTALL)


def _unmarked(texts: list[str | None]) -> list[Option]:
    """Options that all carry their own letter, "A)21" (AQuA), lose it."""
    marks = [_MARKED.fullmatch(text) if text else None for text in texts]
    if len(texts) > 1 and all(mark and mark[1] == letter for mark, letter in zip(marks, LETTERS, strict=False)):
        return [Option(mark[1], mark[2].strip()) for mark in marks if mark]
    return [Option(None, text) for text in texts]


_PREFIXES = ("", "option", "opt", "op", "choice", "answer", "ending", "alternative", "candidate", "sol")


def column_groups(usual: Sequence[str], columns: Sequence[str], taken: Collection[str]) -> list[list[str]]:
    """Columns that hold one option each, in order: A–D, option_a, choice1, "Option A", opa, ending0; the longest group first.

    Args:
        usual: columns that most rows have; a group's first two are among them.
    """
    groups: dict[str, dict[str, str]] = {}
    for column in columns:
        plain = re.sub(r"[^0-9a-z]", "", column.casefold())
        if column not in taken and plain[:-1] in _PREFIXES and (plain[:-1] or plain.isalpha()):
            groups.setdefault(plain[:-1], {}).setdefault(plain[-1:], column)
    found = []
    for group in groups.values():
        for series in (LETTERS.lower(), "0123456789", "123456789"):
            run = []
            for mark in series:
                if mark not in group:
                    break
                run.append(group[mark])
            if len(run) > 1 and all(column in usual for column in run[:2]):
                found.append(run)
                break
    return sorted(found, key=len, reverse=True)


def column_labels(columns: Sequence[str], counted: bool) -> list[str | None]:
    """The labels that columns with one choice each carry in their names: `opb` b, `choice2` 2; None where they carry none.

    Args:
        counted: the answers are an index, for which the columns' own numbers from 1 are no label.
    """
    marks = "".join(re.sub(r"[^0-9a-z]", "", column.casefold())[-1:] or "?" for column in columns)
    if any(marks == series[: len(marks)] for series in (LETTERS.lower(), "0123456789", *(() if counted else ("123456789",)))):
        return list(marks)
    return [None] * len(columns)


_LETTER_LIKE = re.compile(r"(?:(?:option|choice)\s*)?[(\[]?\s*([0-9A-Za-z]{1,2})\s*[)\].:]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(r"[(\[]?([0-9A-Za-z])[)\].:]+\s*(\S.*)", re.DOTALL)


def position(answer: str, options: Sequence[Option], gold: Gold) -> int | None:
    """The place that a gold answer points to when it is read as a label, a text or an index; None where it points to none."""
    if gold == "text":
        alike: tuple[Callable[[str], bool], ...] = (
            lambda text: text.split() == answer.split(),
            lambda text: normalise(text) == normalise(answer),
            lambda text: same_number(text, answer),  # 1,000 and 1000, 3.0 and 3
        )
        for is_it in alike:
            if places := [place for place, option in enumerate(options) if option.text is not None and is_it(option.text)]:
                return places[0] if len(places) == 1 else None
        return None
    if gold == "label":
        letters = [letter.casefold() for letter, _ in zip(LETTERS, options, strict=False)]
        labels = [(option.label or letter).casefold() for option, letter in zip(options, letters, strict=False)]
        numbered = all(label.isdecimal() for label in labels)  # choice1 … and the answer B
        return next(
            (place for names in (labels, letters if numbered else []) if (place := _named(answer, names, options)) is not None), None
        )
    if not re.fullmatch(r"[0-9]{1,2}", answer):
        return None
    place = int(answer) - (gold == "index1")
    return place if 0 <= place < len(options) else None


def _named(answer: str, labels: Sequence[str], options: Sequence[Option]) -> int | None:
    """The place of a label: alone, in brackets, or before its choice's text."""
    if answer.casefold() in labels:
        return labels.index(answer.casefold())
    if (match := _LETTER_LIKE.fullmatch(answer)) and match[1].casefold() in labels:
        return labels.index(match[1].casefold())
    if (match := _LETTER_AND_TEXT.fullmatch(answer)) and match[1].casefold() in labels:  # "B) carbon dioxide"
        place = labels.index(match[1].casefold())
        return place if normalise(options[place].text or "") == normalise(match[2]) else None
    return None

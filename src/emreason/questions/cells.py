"""Cells of a table: what a record holds under a name, whether it is anything, and its text."""

from __future__ import annotations

import ast
import datetime
import decimal
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emreason.questions.grammar.typeset import braced
from emreason.types import UserError

ABSENT = frozenset(("nan", "null", "n/a", "#n/a", "<na>", "#value!", "#div/0!", "#ref!"))  # without case
ABSENT_AS_WRITTEN = frozenset(("NA", "None"))  # "Na" and "none" can be answers


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


def option_text(value: Any, where: str, words: bool = False) -> str | None:
    """An option's text; None where the place is empty. "null" and "NaN" are choices of a list, but not, with `words`, of a column."""
    said = value.strip() if isinstance(value, str) else ""
    missing = absent(value, words=False) or said in ("nan", "<NA>") or (words and said.casefold() in ("nan", "<na>", "null"))
    return None if missing else as_text(value, where, "choices")


def final(text: str) -> str:
    r"""The answer that a worked solution ends with, after `####` (GSM8K) or in its last `\boxed{…}`, `\boxed 2` (MATH); else empty."""
    _, mark, last = text.rpartition("####")
    if mark:
        return last.strip() if "\n" not in last.strip() else ""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>\w)(?!\w))", text))
    if not boxes:
        return ""
    if bare := boxes[-1]["bare"]:
        return bare
    end = braced(text, boxes[-1].end(), len(text))
    return "" if end is None else text[boxes[-1].end() : end].strip()


def marked_one(value: Any, choices: int) -> int | None:
    """Which of the choices is right, where a list says of each whether it is (TruthfulQA: [1, 0, 0]); None of any other cell."""
    marks = list(value) if isinstance(value, list | tuple) else []
    return marks.index(1) if len(marks) == choices and all(mark in (0, 1) for mark in marks) and sum(marks) == 1 else None


def alternatives(value: Any, where: str) -> list[Any]:
    """A cell that holds several right answers, as a list (TriviaQA, SQuAD), written as JSON or not."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        if _ARRAY.fullmatch(value):  # in which Python would read neighbours as one string
            raise UserError(f"{where}: `answer` is a list without commas, as pandas writes arrays; write the answers as a JSON list.")
        found = parsed(value)
        value = found if found and all(isinstance(item, str) for item in found) else value
    if isinstance(value, Mapping):
        first = [value[key] for key in ("value", "text", "answer") if key in value][:1]
        value = [*_flat(first), *_flat([value[key] for key in ("aliases", "normalized_aliases") if key in value])] or value
    if isinstance(value, tuple | list):
        if len(value) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value) and len(set(value)) > 1:
            raise UserError(f"{where}: `answer` is a list of numbers; where each is right they must be in quotation marks.")
        return list(value)
    return [value]


_QUOTED = r"(?:'[^']*'|\"[^\"]*\")"
_ARRAY = re.compile(rf"\[\s*{_QUOTED}(?:\s+{_QUOTED})+\s*\]")


def _flat(values: Sequence[Any]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]


def parsed(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or the object that `text` is as JSON or Python writes it; None where it is anything else."""
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for parse in parsers:
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None

"""A user's own questions: one JSONL, CSV or Parquet file, or one per split. Every complaint names the file and the line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from emreason.questions.answers import check, normalise, parse_number
from emreason.questions.datasets import Dataset
from emreason.types import LETTERS, AnswerKind, Question, Split, UserError


def dataset(path: str | None, load: Callable[..., list[Question]], **described: Any) -> Dataset:
    """The `Dataset` of a file: `path`, if any, goes to `load`, the rest (name, prompt, limit, …) to `Dataset`."""
    return Dataset(load=partial(load, path=path), **described)


def load_file(
    split: Split,
    kind: AnswerKind | None = None,
    path: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> list[Question]:
    """Questions of a JSONL, CSV or Parquet file, or of one file per split.

    A line holds `question`, `answer`, optionally `id`, and for choice questions `choices` (in CSV a JSON list); their answer is its letter.

    Args:
        kind: of all answers; None: `choice` if there are choices, else `number` if every answer is one, else `text`.
        path: one file for all splits: a fifth of its questions each validates and tests, at least one. A hash of a question's text
            places it, whatever its line, so that a question that is there twice is not both trained and tested on.

    Raises:
        UserError: a file is missing or malformed, or too small to be split.
    """
    if kind is not None and kind not in get_args(AnswerKind):
        raise UserError(f"dataset.load.kind must be one of {', '.join(get_args(AnswerKind))}, or null, not {kind!r}.")
    files = {f"dataset.load.{key}": name for key, name in (("train", train), ("validation", validation), ("test", test))}
    if path is not None:
        both = [key for key, name in files.items() if name is not None]
        if both:
            raise UserError(f"dataset.path is one file for all splits, and {both[0]} is given too; give it alone, or a file per split.")
        return _split(_questions("dataset.path", path, kind or _kind({"dataset.path": path})), path)[split]
    key = f"dataset.load.{split}"
    if files[key] is None:
        raise UserError(f"dataset=file needs dataset.path=FILE, or a file per split: {key}=FILE (.jsonl, .csv or .parquet).")
    given = {key: name for key, name in files.items() if name is not None}
    return _questions(key, given[key], kind or _kind(given))


def _split(questions: list[Question], name: str) -> dict[Split, list[Question]]:
    """60 / 20 / 20 % of the different texts, in the order of their hashes."""
    places: dict[str, list[Question]] = {}
    for question in questions:
        places.setdefault(hashlib.sha256(normalise(question.text).encode()).hexdigest(), []).append(question)
    if len(places) < 3:
        raise UserError(
            f"dataset.path: {name} has {len(places)} different question{'' if len(places) == 1 else 's'}; at least 3 are needed, "
            "one each to train, validate and test."
        )
    groups = [places[key] for key in sorted(places)]
    held = max(1, round(len(groups) / 5))
    parts: dict[Split, list[list[Question]]] = {"test": groups[:held], "validation": groups[held : 2 * held], "train": groups[2 * held :]}
    return {split: [question for group in part for question in group] for split, part in parts.items()}


def _kind(files: Mapping[str, str]) -> AnswerKind:
    """What the files' answers are; malformed lines are told later."""
    rows = [row for key, name in files.items() for _, row in _rows(_found(key, name)) if isinstance(row, Mapping)]
    if any(row.get("choices") not in (None, "", []) for row in rows):
        return "choice"
    return "number" if all(parse_number(str(row.get("answer"))) is not None for row in rows) else "text"


def _found(key: str, name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: there is no file {name}.")
    return path


def _questions(key: str, name: str, kind: AnswerKind) -> list[Question]:
    path = _found(key, name)
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for line, row in _rows(path):
        where = f"{name}, line {line}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with question and answer.")
        for column in ("question", "answer", *(("choices",) if kind == "choice" else ())):
            if row.get(column) is None or row[column] == "":
                raise UserError(f"{where}: `{column}` is missing.")
        choices = _choices(row["choices"], where) if kind == "choice" else ()
        given = row.get("id")
        question = Question(f"{path.stem}-{line}" if given in (None, "") else str(given), str(row["question"]).strip(),
                            str(row["answer"]).strip(), kind, choices)  # fmt: skip
        check(question, where)
        if question.id in lines:
            raise UserError(f"{where}: the id {question.id!r} is already that of line {lines[question.id]}; ids must differ.")
        lines[question.id] = line
        questions.append(question)
    if not questions:
        raise UserError(f"{key}: {name} is empty: it holds no question.")
    return questions


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f'{where}: `choices` must be a JSON list such as ["red", "blue"].') from None
    if not isinstance(value, Sequence) or not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} strings.")
    choices = tuple(str(choice).strip() for choice in value)
    alike = [choice for choice in choices if [normalise(other) for other in choices].count(normalise(choice)) > 1]
    if alike:
        raise UserError(f"{where}: two choices are alike ({alike[0]!r}).")
    return choices


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line (in Parquet: row) numbers from 1, and records."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file: {error}.") from None
    elif suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: the name must end in .jsonl, .csv or .parquet.")
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                if suffix == ".csv":
                    reader = csv.DictReader(file)
                    try:
                        for row in reader:
                            yield reader.line_num, row
                    except csv.Error as error:
                        raise UserError(f"{path}, line {reader.line_num + 1} is not CSV: {error}.") from None
                else:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield number, _json(line, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None

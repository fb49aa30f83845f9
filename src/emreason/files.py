"""A user's own questions: one JSONL, CSV or Parquet file per split. Every complaint names the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from emreason.answers import check, normalise
from emreason.types import LETTERS, AnswerKind, Question, Split, UserError


def load_file(
    split: Split, kind: AnswerKind = "choice", train: str | None = None, validation: str | None = None, test: str | None = None
) -> list[Question]:
    """A JSONL, CSV or Parquet file per split, with `question`, `answer`, for `kind="choice"` also `choices` (in CSV a JSON
    list), and optionally `id`. The answer of a choice question is its letter.
    """
    name = {"train": train, "validation": validation, "test": test}[split]
    if name is None:
        raise UserError(f"dataset=file needs dataset.load.{split}=FILE (.jsonl, .csv or .parquet).")
    if kind not in get_args(AnswerKind):
        raise UserError(f"dataset.load.kind must be one of {', '.join(get_args(AnswerKind))}, not {kind!r}.")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"dataset.load.{split}: there is no file {name}.")
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for line, row in _rows(path):
        where = f"{name}, line {line}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object with question and answer.")
        for key in ("question", "answer", *(("choices",) if kind == "choice" else ())):
            if row.get(key) is None or row[key] == "":
                raise UserError(f"{where}: `{key}` is missing.")
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
        raise UserError(f"dataset.load.{split}: {name} is empty: it holds no question.")
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

"""A user's own questions: one JSON, JSONL, CSV or Parquet file, or one per split. Every complaint names the file and the line."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from emreason.questions.datasets import SPLITS, Dataset, cut
from emreason.questions.reading import ANSWER, QUESTION, Asked, Row, asked_of, plain_name
from emreason.questions.rows import read
from emreason.types import Question, Split, UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def dataset(
    load: Callable[..., list[Question]], columns: Mapping[str, Any] | None = None, path: str | None = None, **described: Any
) -> Dataset:
    """The `Dataset` of a table: `columns`, and `path` if there is one, go to `load`, the rest (name, prompt, limit, …) to `Dataset`."""
    try:
        return Dataset(load=partial(load, columns=columns, **({} if path is None else {"path": path})), **described)
    except TypeError as error:
        raise UserError(f"dataset: {str(error).removeprefix('Dataset.__init__() ')}.") from error


def load_file(
    split: Split,
    path: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    **asked: Any,
) -> list[Question]:
    """Questions of a file, or of one file per split.

    A row holds a question and its answer, and for choice questions its choices, in any of the shapes that `emreason.questions.rows` knows.

    Args:
        path: one file for all splits: a fifth of its questions each validates and tests, at least one. A hash of a question's text
            places it, whatever its line, so that a question that is there twice is not both trained and tested on.
        asked: what the config says about the rows: `emreason.questions.reading.Asked`.

    Raises:
        UserError: a file is missing or malformed, or too small to be split.
    """
    how = asked_of(**asked)
    files = {f"dataset.load.{key}": name for key, name in (("train", train), ("validation", validation), ("test", test))}
    if path is not None:
        both = [key for key, name in files.items() if name is not None]
        if both:
            raise UserError(f"dataset.path is one file for all splits, and {both[0]} is given too; give it alone, or a file per split.")
        return cut(_questions("dataset.path", path, how), SPLITS, f"dataset.path: {path}")[split]
    key = f"dataset.load.{split}"
    if files[key] is None:
        raise UserError(f"dataset=file needs dataset.path=FILE, or a file per split: {key}=FILE ({', '.join(SUFFIXES)}).")
    given = {key: name for key, name in files.items() if name is not None}
    together = [row for other, name in given.items() for row in table(other, name)]
    return _questions(key, given[key], how, together)


def _questions(key: str, name: str, asked: Asked, together: Sequence[Row] | None = None) -> list[Question]:
    questions = read(table(key, name), asked, name, together)
    if not questions:
        raise UserError(f"{key}: {name} is empty: it holds no question{' that can be read' if asked.skip_unusable else ''}.")
    return questions


def table(key: str, name: str) -> Sequence[Row]:
    """The rows of the file `name`, which the config key `key` names; read once while it does not change.

    Raises:
        UserError: it is not there, or no table.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: there is no file {name}.")
    status = path.stat()
    return _table(name, path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=3)
def _table(name: str, path: Path, *_: int) -> Sequence[Row]:
    suffix = next((s for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{name}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    stem = path.name.partition(".")[0]
    if suffix == ".parquet":
        records = list(enumerate(read_parquet(path), start=1))
        return [Row(f"{name}, row {number}", f"{stem}-{number}", tidy(record)) for number, record in records]
    text = _text(path, name)
    if suffix in (".csv", ".tsv"):
        return [Row(f"{name}, line {n}", f"{stem}-{n}", record, fault) for n, record, fault in _csv(text, suffix, name)]
    whole = _whole(text, suffix, name)
    if whole is not None:
        return [Row(f"{name}, row {n}", f"{stem}-{n}", tidy(record)) for n, record in enumerate(whole, start=1)]
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a text
    return [Row(f"{name}, line {n}", f"{stem}-{n}", tidy(_json(line, f"{name}, line {n}"))) for n, line in lines if line.strip()]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file; numbers of 32 bits as they were written, 0.1 and not 0.10000000149.

    Raises:
        UserError: it is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}.") from None
    for place, field in enumerate(found.schema):
        if pyarrow.types.is_float32(field.type):
            found = found.set_column(place, field.name, found.column(place).cast(pyarrow.string()).cast(pyarrow.float64()))
    return list(found.to_pylist())


def tidy(record: Any) -> Any:
    """A record whose keys carry no white space around them."""
    return {str(key).strip(): value for key, value in record.items()} if isinstance(record, Mapping) else record


def _text(path: Path, name: str) -> str:
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name} is not a whole gzip file: {error}.") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4096]:
        raise UserError(f"{name} is not UTF-8 text but UTF-16 or no text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8 (iconv -f latin1 -t UTF-8)."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- JSON -------------------------------------------------------------------------------------------------------------


def _whole(text: str, suffix: str, name: str) -> list[Any] | None:
    """The records of a file that is one JSON value: a list, or an object with a list under `data` or another single name; None: lines."""
    lines = text.strip().split("\n", 1)
    first = _try(lines[0])
    alone = len(lines) == 1 or not lines[1].strip()
    if first is not None and not (alone and (suffix == ".json" or _records(first) is not None)):
        return None
    if first is None and not lines[0].lstrip().startswith(("[", "{")):
        return None
    value = first if first is not None else _try(text)
    if value is None:
        if suffix != ".json" and lines[0].strip() not in ("[", "{"):
            return None  # a broken first line, told with its number
        _json(text, name)  # tells where
    records = _records(value)
    if records is None and isinstance(value, Mapping) and not alone:
        raise UserError(
            f'{name}: a JSON file must be a list of objects, or hold one under "data"; this holds {", ".join(list(value)[:8])}.'
        )
    return records if records is not None else [value]


def _records(value: Any) -> list[Any] | None:
    """The list of objects that a JSON value is or holds."""
    if isinstance(value, list):
        return value if not value or any(isinstance(item, dict) for item in value) else None
    if isinstance(value, dict):
        lists = {key: item for key, item in value.items() if isinstance(item, list) and any(isinstance(part, dict) for part in item)}
        if {plain_name(key) for key in value} & {*QUESTION, *ANSWER}:
            return None  # a question itself
        return lists.get("data") or (next(iter(lists.values())) if len(lists) == 1 else None)
    return None


def _try(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where} is not JSON: {error.msg.removesuffix(' at')} at {place}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise ValueError(f"an object has {twice!r} twice")
    return found


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv(text: str, suffix: str, name: str) -> Iterator[tuple[int, dict[str, str], str | None]]:
    """The line on which each record starts, the record, and what is wrong with it."""
    separator = "\t" if suffix == ".tsv" else None
    skipped = 0
    if text.lower().startswith("sep=") and text[5:6] == "\n":  # what Excel writes
        separator, text, skipped = text[4], text[6:], 1
    reader = csv.reader(io.StringIO(text), delimiter=separator or _separator(text), skipinitialspace=True, strict=True)
    header: list[str] | None = None
    while True:
        start = skipped + reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{name}, line {start} is not CSV: {error}.") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if twice := [column for column in header if column and header.count(column) > 1]:
                raise UserError(f"{name}, line {start}: two columns are called {twice[0]!r}.")
            continue
        wrong = (
            None if len(cells) == len(header) else f" has {len(cells)} cells, the header {len(header)}; quote cells that hold a separator."
        )
        yield start, dict(zip(header, cells, strict=False)), wrong


def _separator(text: str) -> str:
    """The one under which the header names most columns that are known, or else most columns."""
    header = text.lstrip("\n").split("\n", 1)[0]

    def worth(separator: str) -> tuple[int, int]:
        columns = next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])
        return sum(plain_name(column) in {*QUESTION, *ANSWER} for column in columns), len(columns)

    return max(",;\t|", key=worth)

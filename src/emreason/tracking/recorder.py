"""What a run leaves behind as it goes: its iterations in the summary, `metrics.jsonl`, `predictions/`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from emreason.em.checkpoints import iterations_in
from emreason.em.e_step import EStep, iterations_done
from emreason.em.module import EMModule
from emreason.models.loading import weights_fingerprint
from emreason.progress import rank
from emreason.runs.journal import JsonLines, read_lines, to_line, write_atomic
from emreason.runs.summary import Summary, best_iteration, phase_memory_bytes, scalars, tokens_drawn
from emreason.scores.scoring import Prediction
from emreason.types import Question

_MEASURED: dict[tuple[Any, ...], tuple[dict[str, Any], list[Prediction]]] = {}
"""Baselines measured by this process: the jobs of a sweep often start from the same model."""


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
        self.memory: dict[str, int] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.summary.values["baseline"] is None:
            self.summary.update(baseline=self._baseline(trainer, pl_module))  # type: ignore[arg-type]
        phase_memory_bytes()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        # not in `on_fit_start`: a checkpoint's progress is restored after that
        done = iterations_done(trainer)
        self.tokens = tokens_drawn(self.summary.values["iterations"][:done])
        if trainer.is_global_zero and not done and (first := base_scores(self.summary.values)):  # the curves' first point
            for logger in trainer.loggers:
                logger.log_metrics({**first, "iteration": -1.0}, step=0)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        self.memory = {"e_step": phase_memory_bytes()}  # the loader, and so the E-step, is made before this hook

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        self.memory["m_step"] = phase_memory_bytes()

    def _baseline(self, trainer: L.Trainer, module: EMModule) -> dict[str, Any]:
        weights = weights_fingerprint(module.model) if self.baseline_splits else ""

        def evaluate(split: str, n_examples: int, label: str) -> dict[str, Any] | None:
            questions: list[Question] = trainer.datamodule.questions[split]  # type: ignore[attr-defined]
            if split not in self.baseline_splits:
                return None
            mine = questions[trainer.global_rank :: trainer.world_size]
            asked = module.evaluation
            key = (weights, module.prompts.fingerprint(), tuple(questions), n_examples, asked.max_new_tokens, asked.forced)
            if key not in _MEASURED:
                _MEASURED[key] = module.evaluate(mine, label, n_examples)
            score, predictions = _MEASURED[key]
            if split == "validation" and asked.bound:
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
        self.tokens += e_step.record["tokens"]
        record: dict[str, Any] = {
            "iteration": iteration,
            "e_step": {k: v for k, v in e_step.record.items() if k != "iteration"} | {"tokens_total": self.tokens},
            "m_step": pl_module.finish_m_step(),
            "validation": pl_module.scores.pop("validation", None),
        }
        if trainer.is_global_zero and "validation" in pl_module.predictions:
            write_predictions(self.folder, f"validation_iteration={iteration:03d}", pl_module.predictions.pop("validation"))
        self.memory["validation"] = phase_memory_bytes()
        record |= {"memory_bytes": self.memory, "tokens_per_second": _speeds(record)}
        earlier = [r for r in self.summary.values["iterations"] if r["iteration"] < iteration]
        logged = {"memory_bytes": self.memory, "tokens_per_second": record["tokens_per_second"], "e_step": {"tokens_total": self.tokens}}
        pl_module.log_dict({key: float(value) for key, value in scalars(logged).items()}, rank_zero_only=False, batch_size=1)
        if self.token_budget is not None and self.tokens >= self.token_budget:
            record["stopped"] = "token_budget"
            trainer.should_stop = True
        self.summary.update(iterations=[*earlier, record])


def base_scores(summary: dict[str, Any]) -> dict[str, float]:
    """The base model's scores, zero-shot, under the names that the trained one's have."""
    found = summary["baseline"] or {}
    return scalars({"validation": found.get("validation"), "test": found.get("zero_shot")})


def _speeds(record: dict[str, Any]) -> dict[str, float]:
    """Tokens a second: generated in the E-step and the validation, supervised in the M-step."""
    score = record["validation"] or {}
    tokens = {"e_step": record["e_step"].get("tokens", 0), "m_step": record["m_step"].get("tokens", 0)}
    tokens["validation"] = score.get("n", 0) * score.get("rationale_tokens_mean", 0)
    seconds = {part: (record[part] or {}).get("seconds", 0) for part in tokens}
    return {part: tokens[part] / seconds[part] for part in tokens if seconds[part]}


class Checkpoints(Checkpoint):
    """`best.ckpt`, the weights of the best iteration, and `last.ckpt`, what a resumed run goes on from; after the summary is written.

    Which one is the best is read from the summary: Lightning's `ModelCheckpoint` forgets it in a run folder that was moved.
    """

    def __init__(self, summary: Summary, folder: Path):
        self.summary = summary
        self.best, self.last, self.next = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last", "next"))

    def restore(self) -> int:
        """EM iterations that the run goes on from.

        Raises:
            UserError: a file is not a checkpoint.
        """
        done = iterations_in(self.last)
        if rank() == 0 and self.next.exists():
            if iterations_in(self.next) == done:
                self.next.replace(self.best)
            else:
                self.next.unlink()
        iterations_in(self.best)  # it is read at the end: better told now
        return done

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        # the first rank alone has the summary
        if trainer.is_global_zero and trainer.should_stop and "stopped" not in (done := self.summary.values["iterations"])[-1]:
            self.summary.update(iterations=[*done[:-1], done[-1] | {"stopped": "callback"}])  # and a finished run stays finished
        is_best = trainer.is_global_zero and best_iteration(self.summary.values["iterations"]) == trainer.current_epoch
        if trainer.strategy.broadcast(is_best):
            trainer.save_checkpoint(self.next, weights_only=True)
        trainer.save_checkpoint(self.last)
        if trainer.is_global_zero and is_best:  # killed before `last` was whole, the iteration is repeated and may be another's inferior
            self.next.replace(self.best)


def write_predictions(folder: Path, name: str, predictions: list[Prediction]) -> None:
    """Every question's prediction under `predictions/`, one JSON object a line; what paired tests are made from."""
    write_atomic(folder / "predictions" / f"{name}.jsonl", "".join(to_line(dataclasses.asdict(p)) for p in predictions))


class JsonlLogger(Logger):
    """Lightning's metrics as `metrics.jsonl`: one JSON object per logged step, on disk as it happens."""

    name, version = "jsonl", ""

    def __init__(self, folder: Path, keep_below: int | None = None):
        super().__init__()
        self.path = folder / "metrics.jsonl"
        if keep_below is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            # a resumed run repeats its last, unfinished iteration: what that had logged goes
            kept = [r for r in read_lines(self.path) if keep_below and r.get("iteration", 0) < keep_below]
            write_atomic(self.path, "".join(map(to_line, kept)))
        self._lines: JsonLines | None = None

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

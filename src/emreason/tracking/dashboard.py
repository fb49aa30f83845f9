"""Weights & Biases: one run per run folder, a row per EM iteration on an axis of its own, rationales as tables, model and journal as
artifacts. `emreason.tracking.workspace` lays the panels out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from emreason.em.e_step import iterations_done
from emreason.progress import console, say
from emreason.runs.journal import read_lines
from emreason.runs.summary import Summary, scalars
from emreason.tracking import trackers
from emreason.tracking.recorder import base_scores
from emreason.types import UserError, plain

COLUMNS = ["iteration", "question", "gold", "scheme", "attempt", "proposal", "text", "answer", "accepted", "tokens"]
TEXT_LIMIT = 2000  # characters of a question or a rationale in a table
AXES = {
    "iteration": ("e_step/*", "m_step/*", "memory_bytes/*", "tokens_per_second/*", "rationales", "questions"),
    "iterations_done": ("validation/*", "test/*", "e_step/tokens_total"),
    "optimizer_step": ("optimizer/*",),
}
DOZEN = 12  # validation questions whose answers are shown beside one another
RUN_ID = "wandb_id"  # file in the run folder: a random id, since two machines may have the same paths


class WandbRun(Logger):
    """Lightning's logger for the run in `folder`; begun again in the same folder it continues under the same id.

    Each optimizer step is a row on the axis `optimizer_step` (`optimizer/nll`, …), each EM iteration one on the axis `iteration`
    (`e_step/…`, `m_step/…`, the tables), its scores on the axis `iterations_done` (`validation/…`, `test/…`), which begins with the base
    model at 0; `e_step/tokens_total` can be an axis, too. W&B's own step is a function of these, so that a resumed run repeats rows rather
    than appending them.

    Args:
        group: what belongs together, e.g. the jobs of one sweep.
        offline: keep the run on disk; None: if there is no API key.
        artifacts: upload the journal and the exported model when the run is finished.

    Raises:
        UserError: `offline` is False and there is no API key.
    """

    name = "wandb"

    def __init__(
        self,
        folder: str,
        project: str,
        group: str,
        job_type: str,
        entity: str | None = None,
        offline: bool | None = None,
        tags: list[str] | None = None,
        artifacts: bool = True,
    ):
        super().__init__()
        self.folder = Path(folder).resolve()
        self.artifacts = artifacts
        self.experiment: Any = None
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            config = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"), resolve=True)
            # W&B's limits on names; a longer one is an error there
            named = {"group": plain(group)[:128], "job_type": plain(job_type)[:64], "tags": [plain(tag)[:64] for tag in tags or []]}
            self.experiment = _start(self.folder, offline, project=project, entity=entity, config=config, **named)

    @property
    def version(self) -> str:
        return trackers.known_as(self.folder / RUN_ID)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is given when the run starts."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Optimizer steps; what belongs to a whole iteration is logged once, by `Iterations`."""
        values = {k.replace("m_step/", "optimizer/"): v for k, v in metrics.items() if k.startswith("m_step/")}
        if values and step is not None:
            iteration = int(metrics["iteration"])
            self.experiment.log({**values, "optimizer_step": step}, step=step + iteration + 1)

    def log_iteration(self, done: int, steps: int, values: dict[str, Any]) -> None:
        """A row after `done` iterations and `steps` optimizer steps of the whole run."""
        row = {**values, **({"iteration": done - 1} if done else {}), "iterations_done": done}
        # now, not when the next row comes: that is an E-step later, and a killed run does not send this one again
        self.experiment.log(row, step=steps + done, commit=True)

    def publish(self, summary: dict[str, Any]) -> None:
        """The test scores of the chosen iteration, the journal and the exported model; when the run is finished."""
        steps = optimizer_steps(summary["iterations"])
        done = len(summary["iterations"])
        values = scalars({"test": summary["test"]})
        self.experiment.log({**values, "iterations_done": summary["best_iteration"] + 1}, step=steps + done + 1)
        if self.artifacts:
            self._upload("rationales")
            self._upload("model")

    def _upload(self, name: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.experiment.id}", type=name)
        # the files stay where they are: they are in the run folder anyway, and a model is large
        artifact.add_dir(str(self.folder / name), policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)


class Iterations(Callback):
    """Sends every iteration's record and up to `rows` of its rationales, accepted and rejected, to W&B if that is the logger.

    Runs after the `Recorder`, whose record it sends.
    """

    def __init__(self, summary: Summary, folder: Path, scheme: str, rows: int):
        self.summary = summary
        self.folder = folder
        self.scheme = scheme
        self.rows = rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        for logger in wandb_runs(trainer):
            logger.experiment.summary.update(scalars({"baseline": self.summary.values["baseline"]}))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        for logger in wandb_runs(trainer):
            first = base_scores(self.summary.values)
            if first and not iterations_done(trainer):  # which is known only now: a checkpoint's progress is restored after `on_fit_start`
                logger.log_iteration(0, 0, {**first, "e_step/tokens_total": 0})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        for logger in wandb_runs(trainer):
            import wandb

            records = self.summary.values["iterations"]
            values: dict[str, Any] = {**scalars(records[-1])}
            iteration = records[-1]["iteration"]
            if self.rows:
                values["rationales"] = wandb.Table(columns=list(COLUMNS), data=self._table(iteration), allow_mixed_types=True)
            columns, rows = fixed_questions(self.folder, iteration)
            values["questions"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
            logger.log_iteration(iteration + 1, optimizer_steps(records), values)

    def _table(self, iteration: int) -> list[list[Any]]:
        lines = read_lines(self.folder / "rationales" / f"iteration={iteration:03d}.jsonl")
        # spread over the file rather than its head: it is ordered by question
        chosen = lines[:: max(1, -(-len(lines) // self.rows))]
        return [[_cut({**line, "scheme": self.scheme, "tokens": line["n_tokens"]}[key]) for key in COLUMNS] for line in chosen]


def optimizer_steps(records: list[dict[str, Any]]) -> int:
    """Steps as Lightning counts them, for which an iteration that is skipped has one, an empty one."""
    return sum(max(1, record["m_step"]["steps"]) for record in records)


def fixed_questions(folder: Path, iteration: int) -> tuple[list[str | int], list[list[str]]]:
    """Columns and rows of a table: the same dozen validation questions, what the base model and every iteration up to this one answer."""
    names = {"base": "baseline_zero_shot_validation"} | {f"iteration {i}": f"validation_iteration={i:03d}" for i in range(iteration + 1)}
    found = {column: {p["question_id"]: p for p in read_lines(folder / "predictions" / f"{name}.jsonl")} for column, name in names.items()}
    found = {column: predictions for column, predictions in found.items() if predictions}
    chosen = list(next(reversed(found.values()), {}).values())[:DOZEN]  # sorted by id when they were written
    rows = [
        [_cut(p["question"]), p["gold"], *(_verdict(predictions.get(p["question_id"])) for predictions in found.values())] for p in chosen
    ]
    return ["question", "gold", *found], rows


def _verdict(prediction: dict[str, Any] | None) -> str:
    return "" if prediction is None else f"{'✓' if prediction['correct'] else '✗'} {_cut(prediction['text'])}"


def wandb_runs(trainer: L.Trainer) -> list[WandbRun]:
    """The trainer's W&B logger, on rank 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRun)] if trainer.is_global_zero else []


def finish(status: str) -> None:
    """Close the current W&B or Trackio run, if any, so that the next job of a sweep gets one of its own; not `finished` shows as failed."""
    trackers.finish()
    if "wandb" in sys.modules:
        wandb = sys.modules["wandb"]
        if wandb.run is not None:
            wandb.run.summary["status"] = status
            wandb.finish(exit_code=0 if status == "finished" else 1)


def publish_comparison(folder: Path, tables: dict[str, list[dict[str, Any]]], offline: bool | None, **about: Any) -> None:
    """A sweep's comparison as tables of a W&B run of its own, which the next sweep in `folder` continues."""
    import wandb

    run = _start(folder, offline, job_type="comparison", config={}, **about)
    run.log({name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows]) for name, rows in tables.items() if rows})
    wandb.finish()


def lay_out(run: Any) -> None:
    """Save the view of `workspace.py` where this is the project's first run. Best effort: a dashboard is no reason to lose a run."""
    import wandb

    from emreason.tracking.workspace import NAME, workspace

    try:
        if len(wandb.Api().runs(f"{run.entity}/{run.project}")) <= 1:
            say(f"W&B view: {workspace(run.entity, run.project, NAME).save().url}")
    except Exception as error:  # whatever the server or the layout's library raises
        missing = isinstance(error, ImportError)
        reason = "it needs pip install 'emreason[dashboard]'" if missing else plain(str(error))[:200] or type(error).__name__
        say(f"W&B view not made ({reason}); later: python -m emreason.tracking.workspace {run.entity} --project {run.project}")


def _start(folder: Path, offline: bool | None, **about: Any) -> Any:
    import wandb

    given = os.environ.get("WANDB_MODE", "online") != "online"  # the environment decides where the config does not
    keyless = not given and not wandb.login(prompt=False, verify=False)
    if offline is False and keyless:
        raise UserError(
            "logger.wandb.offline=false needs an API key: run `wandb login`, set WANDB_API_KEY, or leave logger.wandb.offline=null."
        )
    if offline is None:
        offline = keyless or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    run = wandb.init(
        id=trackers.known_as(folder / RUN_ID),
        name="/".join(folder.parts[-4:]),
        dir=str(folder),
        mode="offline" if offline else None,
        resume=None if offline else "allow",  # offline, files under one id are joined when they are synced
        settings=wandb.Settings(silent=offline),
        **about,
    )
    for axis, names in AXES.items():
        run.define_metric(axis, hidden=True)
        for name in names:
            run.define_metric(name, step_metric=axis)
    if offline:
        console().print(f"W&B is offline; later: wandb sync {folder}/wandb/offline-run-*", highlight=False, soft_wrap=True)
    elif not run.disabled:
        lay_out(run)
    return run


def _cut(value: Any) -> Any:
    return value[:TEXT_LIMIT] + " […]" if isinstance(value, str) and len(value) > TEXT_LIMIT else value

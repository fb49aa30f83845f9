"""Weights & Biases: one run per run folder, metrics on an axis of iterations, a table of rationales, the journal as an artifact."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from emreason.experiment import console
from emreason.types import UserError, plain

COLUMNS: list[str | int] = ["iteration", "question", "gold", "scheme", "attempt", "proposal", "text", "answer", "accepted", "tokens"]


def make_logger(
    folder: str,
    project: str,
    group: str,
    job_type: str,
    entity: str | None = None,
    offline: bool | None = None,
    tags: list[str] | None = None,
) -> WandbLogger:
    """A W&B logger for the run in `folder`; begun again in the same folder it continues under the same id.

    Args:
        group: what belongs together, e.g. the jobs of one sweep.
        offline: keep the run on disk; None: if there is no API key.

    Raises:
        UserError: `offline` is False and there is no API key.
    """
    import wandb

    key = os.environ.get("WANDB_API_KEY") or wandb.api.api_key
    if offline is None:
        offline = not key or os.environ.get("WANDB_MODE") == "offline"
    elif not offline and not key:
        raise UserError("logger.offline=false needs an API key: run `wandb login`, set WANDB_API_KEY, or leave logger.offline=null.")
    path = Path(folder).resolve()
    config = OmegaConf.to_container(OmegaConf.load(path / "config.yaml")) if (path / "config.yaml").exists() else {}
    identity = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    logger = WandbLogger(
        project=project,
        entity=entity,
        group=plain(group)[:128],  # W&B's limits; a longer one is an error there
        job_type=plain(job_type)[:64],
        tags=[plain(tag)[:64] for tag in tags or []],
        name="/".join(path.parts[-4:]),
        id=identity,
        resume="allow",
        offline=offline,
        save_dir=str(path),
        config=config,
    )
    run = logger.experiment
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    if offline:
        console().print(f"W&B is offline; later: wandb sync {Path(run.dir).parent}", highlight=False)
    return logger


class RationaleTable(Callback):
    """Logs up to `rows` rationales of each iteration, accepted and rejected, and the journal as an artifact at the end."""

    def __init__(self, folder: Path, scheme: str, rows: int):
        self.folder = folder
        self.scheme = scheme
        self.rows = rows

    def _run(self, trainer: L.Trainer) -> Any:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        return loggers[0].experiment if loggers and trainer.is_global_zero else None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        import wandb

        run, iteration = self._run(trainer), trainer.current_epoch
        if run is None:
            return
        path = self.folder / "rationales" / f"iteration={iteration:03d}.jsonl"
        lines = [json.loads(line) for line in path.open(encoding="utf-8")]
        # spread over the file rather than its head: it is ordered by question
        chosen = lines[:: max(1, -(-len(lines) // self.rows))]
        rows = [
            [
                iteration,
                r["question"],
                r["gold"],
                self.scheme,
                r["attempt"],
                r["proposal"],
                r["text"],
                r["answer"],
                r["accepted"],
                r["n_tokens"],
            ]
            for r in chosen
        ]
        run.log({"rationales": wandb.Table(columns=COLUMNS, data=rows), "iteration": iteration})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        import wandb

        run = self._run(trainer)
        if run is not None:
            artifact = wandb.Artifact(f"rationales-{run.id}", type="rationales")
            artifact.add_dir(str(self.folder / "rationales"))
            run.log_artifact(artifact)


def finish() -> None:
    """Close the current W&B run, if any, so that the next job of a sweep gets one of its own."""
    import sys

    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()

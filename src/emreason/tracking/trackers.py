"""Trackio and MLflow: one run per run folder, continued where the folder's run is resumed."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from emreason.runs.journal import write_atomic
from emreason.runs.keys import flatten

MLFLOW_ID, TRACKIO_ID = "mlflow_id", "trackio_id"  # files in the run folder


def known_as(file: Path) -> str:
    """The id in a file of the run folder, made when first asked for."""
    if not file.exists():
        write_atomic(file, uuid.uuid4().hex[:12])
    return file.read_text().strip()


class TrackioRun(Logger):
    """Lightning's metrics in Trackio, under the run folder's name and a number of its own: other tags end in the same folders.

    Args:
        group: what belongs together, e.g. the jobs of one sweep.
        space_id: a Space of the Hub that shows them; None: this machine.
    """

    name = "trackio"

    def __init__(self, folder: str, project: str, group: str | None = None, space_id: str | None = None):
        super().__init__()
        self.folder = Path(folder).resolve()
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            import trackio

            about = {"project": project, "group": group, "space_id": space_id, "config": _config(self.folder)}
            name = f"{self.version} {known_as(self.folder / TRACKIO_ID)}"
            self._run = trackio.init(name=name, resume="allow", embed=False, **about)

    @property
    def version(self) -> str:
        return "/".join(self.folder.parts[-4:])

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is given when the run starts."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log(metrics, step=step)


def finish() -> None:
    """Send what Trackio still holds, so that the next job of a sweep begins a run of its own."""
    if "trackio" in sys.modules:
        trackio = sys.modules["trackio"]
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


def mlflow_run(folder: str, experiment: str, tracking_uri: str) -> MLFlowLogger:
    """Lightning's MLflow logger; the run's id stands in the run folder."""
    place = Path(folder).resolve()
    known = place / MLFLOW_ID
    name = "/".join(place.parts[-4:])
    logger = MLFlowLogger(experiment, name, tracking_uri, run_id=known.read_text().strip() if known.exists() else None)
    if rank_zero_only.rank == 0 and not known.exists():  # type: ignore[attr-defined]
        write_atomic(known, str(logger.run_id))
        logger.log_hyperparams(flatten(_config(place)))
    return logger


def _config(folder: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}

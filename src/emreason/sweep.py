"""What a Hydra multirun adds to its jobs: a failing job does not stop the others, and the comparison is printed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console


class SweepTable(Callback):
    """Collects the jobs' folders as they end and compares them when the sweep does; set as `hydra.callbacks.sweep`."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Remember the job's folder; tasks other than training leave no run in it."""
        if job_return.hydra_cfg is not None and config.task == "emreason.train.run":
            self.folders.append(Path(job_return.hydra_cfg.hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the table of all jobs.

        Raises:
            SystemExit: some job did not finish; names them. (Hydra turns any `Exception` of a callback into a warning and exits with 0.)
        """
        from emreason.recorder import read_summary
        from emreason.report import collect, print_runs

        known = [folder for folder in self.folders if (folder / "summary.json").exists()]
        if known:
            print_runs(collect(known), Console())
        unfinished = [folder for folder in self.folders if read_summary(folder).get("status") != "finished"]
        if unfinished:
            names = "; ".join(f"{folder}: {read_summary(folder).get('error', 'not finished')}" for folder in unfinished)
            raise SystemExit(f"error: {len(unfinished)} of {len(self.folders)} jobs failed, the same command tries them again: {names}")

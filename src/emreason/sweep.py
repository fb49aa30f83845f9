"""What a Hydra multirun adds to its jobs: a failing job does not stop the others, and the comparison is printed at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console


class SweepTable(Callback):
    """Notes the jobs' folders as they start and compares them when the sweep ends; set as `hydra.callbacks.sweep`.

    Launchers may run jobs in other processes or on other machines: there a copy of this callback writes into the same file.
    """

    def __init__(self) -> None:
        self.jobs: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the list of jobs."""
        self.jobs = Path(config.hydra.sweep.dir).resolve() / f".jobs-{os.getpid()}"
        self.jobs.parent.mkdir(parents=True, exist_ok=True)
        self.jobs.write_text("")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the job's folder to the list: at its start, since a killed job has no end."""
        if self.jobs is not None:  # not a single run
            with self.jobs.open("a") as file:
                file.write(f"{config.hydra.runtime.output_dir}\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the table of all jobs.

        Raises:
            SystemExit: some job did not finish; names them. (Hydra turns any `Exception` of a callback into a warning and exits with 0.)
        """
        from emreason.recorder import read_summary
        from emreason.report import collect, print_runs

        assert self.jobs is not None
        folders = [Path(line) for line in dict.fromkeys(self.jobs.read_text().splitlines())]  # a sweeper may try the same values twice
        self.jobs.unlink()
        known = [folder for folder in folders if (folder / "summary.json").exists()]
        if known:
            print_runs(collect(known), Console())
        unfinished = [folder for folder in folders if read_summary(folder).get("status") != "finished"]
        if unfinished:
            names = "; ".join(f"{folder}: {read_summary(folder).get('error', 'not finished')}" for folder in unfinished)
            raise SystemExit(f"error: {len(unfinished)} of {len(folders)} jobs failed, the same command tries them again: {names}")

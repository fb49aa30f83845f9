"""Ctrl-C, SIGTERM and SLURM's warning signal end a command cleanly; ranks and jobs whose launcher died do not stay behind."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emreason.progress import rank

STOPPING = (signal.SIGINT, signal.SIGTERM)

_commands: list[Stop] = []
"""This process's, if it was started as a command and not by a sweep's launcher."""


@dataclass
class Stop:
    """The signal that asked this process to end, if any did."""

    signal: signal.Signals | None = None

    def leave(self, again: str) -> None:
        """Say how to go on, put the SLURM job back into the queue where its warning signal came, and exit with 128 + the signal."""
        assert self.signal is not None
        if rank() == 0:
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            print(f"Interrupted by {self.signal.name}; the same command {again}: {command}", file=sys.stderr)
            if self.signal == signal.SIGUSR1:
                _requeue()
        sys.exit(128 + self.signal)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the first of the stopping signals into a KeyboardInterrupt; a second one has its default effect.

    In a SLURM job SIGUSR1 stops as well (`#SBATCH --signal=USR1@120`: two minutes before the time limit).
    """
    stop = Stop()
    _commands.append(stop)

    def handle(number: int, frame: Any) -> None:  # noqa: ARG001
        stop.signal = signal.Signals(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    numbers = [*STOPPING, signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [*STOPPING]
    before = {number: signal.signal(number, handle) for number in numbers}
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        _watch_parent(f"Rank {rank()}")
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    print(f"SLURM job {job} was not requeued: {problem}" if problem else f"Requeued SLURM job {job}", file=sys.stderr)


def leave_with_launcher() -> None:
    """In a process that a sweep's launcher made for its jobs: end with it, else they would go on unseen and meet those of a new sweep."""
    if not _commands:
        _watch_parent("Job of a sweep")


@functools.cache
def _watch_parent(who: str) -> None:
    """End this process within a second of its parent's death.

    A thread, because the main thread may be inside a collective that waits for the dead.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        print(f"{who}: the process that launched it is gone; the same command resumes the run.", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

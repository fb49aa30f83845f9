"""Jobs of a sweep that start ranks of their own run apart, as commands."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emreason.runs.summary import read_summary


def several_ranks(cfg: DictConfig) -> bool:
    """Whether Lightning would start processes for this job, unless SLURM or torchrun has started them already."""
    devices = cfg.trainer.get("devices", 1)
    if devices in (-1, "auto"):
        import torch

        devices = 1 if cfg.trainer.get("accelerator") == "cpu" else torch.cuda.device_count()
    return (devices > 1 or cfg.trainer.get("num_nodes", 1) > 1) and "LOCAL_RANK" not in os.environ and "SLURM_NTASKS" not in os.environ


def run_apart(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One job of a sweep as a command of its own; returns its summary.

    Lightning starts the other ranks with this process's own command line: inside a sweep each of them would begin the whole sweep again.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags = ("--config-dir", "--config-name", "--config-path")
    for short, flag in zip(("-cd", "-cn", "-cp"), flags, strict=True):
        parser.add_argument(short, flag)
    given = vars(parser.parse_known_args()[0])
    options = [f"{flag}={value}" for flag in flags if (value := given[flag.removeprefix("--").replace("-", "_")])]
    command = [sys.executable, "-m", "emreason.train", *options, *overrides, f'hydra.run.dir="{folder}"']
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # what it says on stderr is seen, its table is the sweep's
    return read_summary(folder)

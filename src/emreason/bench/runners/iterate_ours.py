"""EM contender: `emreason.train.train` up to the accuracy asked for. `python iterate_ours.py WORK RESULT seed=N`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from emreason import train
from emreason.bench.work import ITERATION, configured


def main(work: dict[str, Any], seed: str, folder: Path) -> dict[str, Any]:
    """The iterations in a fresh run folder."""
    shutil.rmtree(folder, ignore_errors=True)
    asked = work["iteration"]
    until = [
        "callbacks=early_stopping",
        f"+callbacks.early_stopping.stopping_threshold={asked['target'] - 1e-6}",  # which Lightning wants exceeded
        "callbacks.early_stopping.patience=99",
    ]
    summary = train.train(configured(*asked["overrides"], *until, seed), folder)
    iterations = summary["iterations"]
    row = {
        "work": ITERATION,
        "e_step_seconds": sum(i["e_step"]["seconds"] for i in iterations),
        "m_step_seconds": sum(i["m_step"]["seconds"] for i in iterations),
        "evaluation_seconds": sum(i["validation"]["seconds"] for i in iterations),
        "accepted": [i["e_step"]["accepted"] for i in iterations],
        "steps": [i["m_step"]["steps"] for i in iterations],
        "accuracies": [i["validation"]["accuracy"] for i in iterations],
    }
    return {"rows": [row], "dtype": summary["dtype"]}


if __name__ == "__main__":
    made = main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], Path(sys.argv[2]).parent / "run")
    Path(sys.argv[2]).write_text(json.dumps(made))

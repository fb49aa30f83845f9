"""Somebody's own parts, from a folder of his own, without a line changed in the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO

BIN = Path(sys.executable).parent
OUTSIDER = REPO / "tests" / "outsider"


@pytest.mark.slow
def test_an_outsiders_dataset_scheme_reward_callback_and_engine(tmp_path):
    """By `--config-dir` and `_target_`, from the folder they stand in; two callbacks, one of them Lightning's, which ends the run."""
    command = [BIN / "emreason", "--config-dir", "conf", "experiment=smoke", "dataset=legs", "sampler=patient", "engine=one_by_one"]
    command += ["callbacks=[bell,early_stopping]", "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=1"]
    command += [
        "trainer.max_epochs=5",
        "sampler.budget=2",
        "sampler.max_new_tokens=12",
        "dataset.limit.test=2",
        "dataset.limit.validation=4",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO / "src")}
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'run'}"], cwd=OUTSIDER, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["dataset"], summary["scheme"], summary["status"]) == ("legs", "patient-2", "finished")
    assert len(summary["iterations"]) == 2  # the first, and one that was not better by 1
    assert [record.get("stopped") for record in summary["iterations"]] == [None, "callback"]
    card = (tmp_path / "run/model/README.md").read_text()
    assert "\nemreason --config-dir=conf experiment=smoke dataset=legs sampler=patient engine=one_by_one" in card
    assert str(tmp_path) not in card
    rung = (tmp_path / "run/bell.txt").read_text().splitlines()
    assert rung == [f"iteration {i} {record['validation']['accuracy']:.3f}" for i, record in enumerate(summary["iterations"])]
    attempts = [json.loads(line) for line in (tmp_path / "run/rationales/iteration=000.jsonl").open()]
    assert {a["question_id"] for a in attempts} == {f"legs-{i}" for i in range(12)}
    assert all(a["proposal"] == "rationalization" for a in attempts if a["attempt"] == 1)
    assert any(a["accepted"] and a["answer"] != a["gold"] for a in attempts)  # by the outsider's reward
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["engine"] == {"_target_": "parts.OneByOne"}

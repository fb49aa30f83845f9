"""Whatever ends a run, nothing is lost: `kill -9` at random moments, Ctrl-C, SIGTERM, SLURM's warning, a rank that dies.

EMREASON_KILLS=N tries N kills instead of a handful.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def kills(*arguments: str) -> dict:
    """What `kills.py` reports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, HERE / "kills.py", *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    tried = int(os.environ.get("EMREASON_KILLS", "4"))
    found = kills("kill", str(tmp_path / "k"), str(tried), "1")
    print(found)
    assert found["survived"] == found["kills"] >= tried
    assert found["attempts_paid_twice"] == 0


@pytest.mark.slow
def test_two_sharded_ranks_that_are_killed_go_on_as_one_and_as_two(tmp_path):
    """With scoring passes of which each rank has its own number."""
    tried = int(os.environ.get("EMREASON_KILLS", "2"))
    found = kills("shards", str(tmp_path / "s"), str(tried), "1")
    print(found)
    assert found["kills"] == tried
    assert max(map(max, found["waits"].values())) < 60
    assert 0 < found["apart"]["weights"] < 1e-5
    assert 0 < found["apart"]["moments"] < 1e-3  # of gradients that are nearly 0 in the end


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop") / "s"
    return {(case["part"], case["code"]): case for case in kills("stop", str(folder))} | {"folder": folder}


@pytest.mark.slow
@pytest.mark.parametrize(("part", "code", "name"), [("baseline", 130, "SIGINT"), ("e-step", 143, "SIGTERM"), ("m-step", 130, "SIGINT")])
def test_a_signal_ends_a_run_cleanly(stopped, part, code, name):
    case = stopped[part, code]
    assert case["sent"]
    assert case["status"] == "interrupted"
    last = case["said"].splitlines()[-1]
    assert last.startswith(f"Interrupted by {name}; the same command goes on where it stopped: emreason experiment=smoke")
    assert "Traceback" not in case["said"]


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_cleanly(stopped):
    case = stopped["emreason-eval", 143]
    assert "Interrupted by SIGTERM; the same command begins again: emreason-eval run=" in case["said"]
    assert "Traceback" not in case["said"]


@pytest.mark.slow
def test_the_warning_of_a_slurm_time_limit_puts_the_job_back_into_the_queue(stopped):
    case = stopped["m-step", 138]
    assert (stopped["folder"] / "asked").read_text() == "requeue 1234\n"
    assert "Requeued SLURM job 1234" in case["said"]
    assert case["checkpoints"] == []  # Lightning's own handler would have saved in mid-iteration

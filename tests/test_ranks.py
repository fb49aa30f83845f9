"""Two CPU processes: whatever each rank accepts, nothing hangs or is lost; a rank that dies takes the other down; sweeps."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import two_ranks
from test_train import BIN, SMOKE, assert_same, learned, smoke

HERE = Path(__file__).parent
DDP = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1", "evaluation.baseline=[]"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks report of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, HERE / "two_ranks.py", folder]
    processes = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.CASES)
def test_two_ranks_do_what_one_does(ranks, tmp_path, name):
    one = two_ranks.run(tmp_path, name, 1)
    for two in (rank[name] for rank in ranks):
        assert two["rationales"] == one["rationales"]
        assert two["error"] == one["error"]
        assert two["files"] == one["files"]
        assert two["weights"] == pytest.approx(one["weights"], rel=1e-6)
    assert (one["error"] is not None) == (name == "none and none")
    assert ranks[0][name]["weights"] == ranks[1][name]["weights"]


def begin(folder: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A run of two ranks in its first E-step, and its second rank."""
    command = [BIN / "emreason", *SMOKE, *DDP, "sampler.budget=40", f"hydra.run.dir={folder}"]
    journal = folder / "rationales" / "iteration=000.rank=1.jsonl"

    def size() -> int:
        return journal.stat().st_size if journal.exists() else 0

    before = size()
    main = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    deadline = time.monotonic() + 240
    while size() <= before:
        assert main.poll() is None, main.stderr.read() if main.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other = next(c for c in psutil.Process(main.pid).children() if c.environ().get("LOCAL_RANK") == "1")
    return main, other


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_other_down_and_the_run_resumes(tmp_path):
    folder, whole = tmp_path / "died", tmp_path / "whole"
    main, other = begin(folder)
    other.send_signal(signal.SIGKILL)
    said = main.communicate(timeout=60)[1]
    assert main.returncode != 0
    assert "terminated with code -9" in said or "Another rank of this run has ended" in said
    assert "Traceback" not in said

    main, other = begin(folder)
    main.send_signal(signal.SIGKILL)
    main.wait()
    other.wait(timeout=60)  # raises if it outlives the first rank by a minute
    assert "the process that launched it is gone; the same command resumes the run" in (main.stderr.read() if main.stderr else "")

    one = ["trainer.max_epochs=1", "evaluation.baseline=[]", "sampler.budget=40"]
    smoke(folder, *one)  # on one rank: what two had sampled is used
    smoke(whole, *one)
    assert_same(learned(folder), learned(whole))


@pytest.mark.slow
def test_a_sweep_of_runs_of_two_ranks_starts_each_job_once(tmp_path):
    command = [BIN / "emreason", "-m", *SMOKE, *DDP, "seed=1,2", "dataset.limit.test=4", "dataset.limit.validation=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("E-step 0: 20/20") == 2
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/**/summary.json")]
    assert sorted((s["seed"], s["status"]) for s in summaries) == [(1, "finished"), (2, "finished")]

"""Two CPU processes: whatever each rank accepts, nothing hangs or is lost; a rank that dies takes the other down; sweeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import two_ranks
from test_config import compose_config
from test_train import BIN, SMOKE, assert_same, learned, smoke

from emreason import train
from emreason.runs.checks import check_values
from emreason.runs.experiment import CONF
from emreason.types import UserError

HERE = Path(__file__).parent
DDP = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1", "evaluation.baseline=[]"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, request):
    """What the two ranks report of the cases that are asked for."""
    names = [item.callspec.params["name"] for item in request.session.items if item.name.startswith("test_two_ranks_do_what_one_does[")]
    folder = tmp_path_factory.mktemp("ranks")
    shared = {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
    }
    command = [sys.executable, HERE / "two_ranks.py", folder, *names]
    processes = [subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(2)]


TOLERANCE = {"bfloat16": 0.1, "drawn": 1e-4, "adapters": 1e-4}
"""Of what moved, where it is not 1e-5: gradients in bfloat16, and Adam, which divides a small gradient's rounding by itself."""


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.CASES)
def test_two_ranks_do_what_one_does(ranks, tmp_path, name):
    one = two_ranks.run(tmp_path, two_ranks.CASES[name], 1)
    assert (float(one["moved"].norm()) > 1e-3) == (not name.startswith("none and none"))
    for kind in (None, "shard"):
        for two in (rank[name, kind] for rank in ranks if (name, kind) in rank):
            assert two["rationales"] == one["rationales"]
            assert two["error"] == one["error"]
            assert two["files"] == one["files"]
            assert two_ranks.difference(two, one) < TOLERANCE.get(name, 1e-5)
            assert torch.equal(two["moved"], ranks[0][name, kind]["moved"])
            assert kind is None or two["held"] <= 0.6 * one["held"]
    assert (one["error"] is not None) == (name == "none and none")
    if name == "drawn":  # a rank that runs out of memory goes on with half its batch, and the other does not wait for it
        assert ranks[0][name, "shard"]["max_batch"] == one["max_batch"] > 8 > ranks[1][name, "shard"]["max_batch"]


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
    # told by its watcher, or by the collective that it was in, whichever is first
    assert "same command resumes the run" in (main.stderr.read() if main.stderr else "")

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


def test_a_sweep_s_job_of_two_ranks_has_the_configs_of_the_sweep(tmp_path, monkeypatch):
    own, given = tmp_path / "own", tmp_path / "given"
    shutil.copytree(CONF, own)
    given.mkdir()
    commands = []

    def run(command, **_):
        commands.append(command[3:6])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emreason.reports.sweep.subprocess.run", run)
    monkeypatch.setattr(sys, "argv", ["emreason", "-m", f"--config-path={own}", f"--config-dir={given}", *SMOKE, *DDP, "seed=1"])
    with pytest.raises(SystemExit):
        train.main()
    assert commands == [[f"--config-path={own}", f"--config-dir={given}", "--config-name=train"]]


def as_nodes(launcher: str, *overrides: str) -> list[str]:
    """The same command on two nodes of one process, both this machine; what they say on stderr."""
    port = free_port()
    command = ["-m", "emreason.train", *SMOKE, "trainer.num_nodes=2", *overrides]
    if launcher == "torchrun":
        rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=em"]
        started = [([BIN / "torchrun", *rendezvous, *command], {})] * 2
    else:  # what srun tells its tasks
        job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "em", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "2"}
        job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0", "MASTER_PORT": str(port)}
        started = [([sys.executable, *command], {**job, "SLURM_PROCID": node, "SLURM_NODEID": node}) for node in "01"]
    processes = [subprocess.Popen(c, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | e) for c, e in started]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said


LITTLE = ["trainer.max_epochs=1", "evaluation.baseline=[]", "dataset.limit.test=5", "dataset.limit.validation=5"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process learns."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    smoke(folder, *LITTLE)
    return learned(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "strategy"), [("torchrun", "shard"), ("srun", "hybrid")])
def test_two_nodes_do_what_one_process_does(tmp_path, alone, launcher, strategy):
    two = tmp_path / "two"
    arguments = [*LITTLE, f"trainer.strategy={strategy}", f"hydra.run.dir={two}"]
    as_nodes(launcher, *arguments)
    weights, *rest = learned(two)
    assert rest == list(alone[1:])  # rationales and scores
    for name, weight in alone[0].items():
        assert float((weights[name] - weight).norm() / weight.norm()) < 1e-4, name  # not 0: sums in another order, divided by Adam
    assert [p.name for p in sorted((two / "rationales").iterdir())] == ["iteration=000.jsonl", "iteration=000.meta.json"]
    if launcher == "srun":  # the second rank does not wait for a first one that has nothing to do
        assert "".join(as_nodes(launcher, *arguments)).count("Finished already") == 1


def test_a_sweep_under_torchrun_is_refused_before_each_process_begins_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["emreason", "-m", *SMOKE, "trainer.devices=2", "seed=1,2"])
    for name, value in {"TORCHELASTIC_RUN_ID": "em", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="each would begin the whole sweep"):
        train.main()
    assert not list(tmp_path.rglob("summary.json"))
    assert "E-step" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({}, ["trainer.num_nodes=2"], "trainer.num_nodes=2: start the same command on every node with torchrun"),
        (
            {"TORCHELASTIC_RUN_ID": "em", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
            ["trainer.devices=2"],
            "torchrun has started 4 processes, .* is 1 × 2; set trainer.num_nodes=2 trainer.devices=2",
        ),
    ],
)
def test_nodes_that_do_not_fit_the_trainer(monkeypatch, environment, overrides, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_values(compose_config("experiment=smoke", *overrides))

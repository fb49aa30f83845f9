"""Sweeps through the launchers and sweepers that are extras; each test is skipped where its extra is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMOKE = ["experiment=smoke", "engine.dtype=float32", "trainer.max_epochs=1", "tag=sweep"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "emreason.train", "-m", *overrides, *SMOKE]


def sweep(cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*overrides), cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def statuses(cwd: Path) -> list[str]:
    return sorted(json.loads(path.read_text())["status"] for path in cwd.glob("outputs/sweep/**/summary.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "more"),
    [("parallel", "joblib", []), ("local", "submitit", []), ("cluster", "ray", ["hydra.launcher.ray.remote.num_gpus=0"])],
)
def test_jobs_in_processes_of_their_own_and_one_that_fails(tmp_path, launcher, package, more):
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher", reason=f"needs pip install 'emreason[{package}]'")
    done = sweep(tmp_path, f"hydra/launcher={launcher}", "sampler.budget=0,8", *more)
    assert statuses(tmp_path) == ["failed", "finished"], done.stderr
    assert done.returncode == 1
    assert "1 of 2 jobs failed" in done.stderr
    assert "sampler.budget" in done.stderr.split("1 of 2 jobs failed")[1]
    assert "RS-8" in done.stdout  # the table, though the jobs ran elsewhere
    assert not list(tmp_path.glob("outputs/sweep/.jobs-*"))


@pytest.mark.slow
def test_the_jobs_of_a_parallel_sweep_end_with_it(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'emreason[joblib]'")
    line = [*command("hydra/launcher=parallel", "seed=1,2"), "trainer.max_epochs=10000"]
    process = subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [tmp_path / f"outputs/sweep/sums/tiny_llama/rs-8/seed={seed}" for seed in (1, 2)]
    deadline = time.monotonic() + 300
    while not all((folder / "rationales/iteration=000.jsonl").exists() for folder in folders):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    jobs = [int((folder / ".lock").read_text()) for folder in folders]
    process.kill()
    process.wait()
    while any(alive(job) for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and ") Z " not in state.read_text()


@pytest.mark.slow
def test_a_killed_job_of_a_parallel_sweep_goes_on_with_the_same_command(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'emreason[joblib]'")
    arguments = ["hydra/launcher=parallel", "seed=1,2"]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = tmp_path / "outputs/sweep/sums/tiny_llama/rs-8/seed=1"
    deadline = time.monotonic() + 300
    while not (folder / "rationales/iteration=000.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((folder / ".lock").read_text()), signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    again = sweep(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert statuses(tmp_path) == ["finished", "finished"]


@pytest.mark.slow
def test_a_search_maximises_validation_accuracy_and_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna", reason="needs pip install 'emreason[optuna]'")
    search = ["hydra/sweeper=search", "hydra.sweeper.n_trials=1", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    for _ in range(2):
        done = sweep(tmp_path, *search)
        assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == ["finished"] * 2
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/outputs/sweep/study.db")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    found = {trial.params["optimizer.lr"]: trial.value for trial in study.trials}
    assert len(found) == 2
    for path in tmp_path.glob("outputs/sweep/**/summary.json"):
        lr = float(path.parent.name.split("optimizer.lr=")[1].split(",")[0])
        best = max(r["validation"]["accuracy"] for r in json.loads(path.read_text())["iterations"])
        assert found[lr] == pytest.approx(best)

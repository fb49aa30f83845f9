"""The real commands in subprocesses, on the tiny model: the run folder's contract, resuming, refusing, evaluating, reporting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BIN = Path(sys.executable).parent
SMOKE = ["experiment=smoke", "engine.dtype=float32"]
SCORE = {"accuracy", "forced_accuracy", "n", "ci95", "extraction_rate", "rationale_tokens_mean", "seconds"}
E_STEP = {"questions", "accepted", "attempts", "acceptance_rate", "chance_acceptance", "tokens", "rationale_tokens_mean", "seconds"}
ATTEMPT = {"question_id", "iteration", "attempt", "proposal", "text", "answer", "accepted", "n_tokens", "finish_reason", "logprob"}


def run(command: str, *arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    # any directory works: the configs are found beside the package
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([BIN / command, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} {arguments} failed:\n{done.stdout}\n{done.stderr}")
    return done


def smoke(folder: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("emreason", *SMOKE, f"hydra.run.dir={folder}", *overrides, cwd=folder.parent, check=check)


def learned(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], list]:
    """What must be the same in two runs of the same config: weights, rationales, scores."""
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    rationales = [json.loads(line) for path in sorted((folder / "rationales").glob("*.jsonl")) for line in path.open()]
    for record in rationales:
        del record["seconds"]
        record["logprob"] = round(record["logprob"], 3)  # the last digits depend on what was decoded beside it
    summary = json.loads((folder / "summary.json").read_text())
    scores = [
        [
            {k: v for k, v in record[part].items() if k not in ("seconds", "entropy") and not (part == "m_step" and k == "nll")}
            for part in ("e_step", "m_step", "validation")
        ]
        for record in summary["iterations"]
    ]
    return weights, rationales, scores


def assert_same(a, b):
    assert a[1] == b[1]
    assert a[2] == b[2]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seed=1"  # as run folders are called: Hydra wants such values quoted
    smoke(folder)
    return folder


@pytest.mark.slow
def test_the_run_folder_keeps_its_contract(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["dataset"], summary["model"], summary["sampler"], summary["seed"]) == ("sums", "tiny_llama", "rs", 1)
    assert {"baseline", "test", "iterations", "seconds", "peak_memory_bytes", "versions", "git_commit"} <= summary.keys()
    assert summary["baseline"].keys() >= {"zero_shot", "few_shot"}
    assert summary["test"].keys() >= SCORE
    assert [r["iteration"] for r in summary["iterations"]] == [0, 1, 2]
    for record in summary["iterations"]:
        assert record["e_step"].keys() >= E_STEP
        assert record["m_step"].keys() >= {"nll", "steps", "tokens", "seconds"}
        assert record["validation"].keys() >= SCORE
        e_step = record["e_step"]
        assert e_step["accepted"] + e_step["rejected"] + e_step["errored"] == e_step["questions"] == 40
        lines = [json.loads(x) for x in (finished / "rationales" / f"iteration={record['iteration']:03d}.jsonl").open()]
        assert len(lines) == e_step["attempts"]
        assert sum(x["n_tokens"] for x in lines) == e_step["tokens"]
        assert all(x.keys() >= ATTEMPT and x["attempt"] >= 1 for x in lines)
    assert (finished / ".hydra" / "config.yaml").exists()
    assert "${" not in (finished / "config.yaml").read_text()
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert {"m_step/nll", "e_step/acceptance_rate", "validation/accuracy"} <= {k for m in metrics for k in m}
    AutoTokenizer.from_pretrained(finished / "model")
    AutoModelForCausalLM.from_pretrained(finished / "model")


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_another_config_is_refused(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    again = smoke(folder)
    assert "Finished already" in again.stderr
    assert again.stdout.endswith(f"Run folder: {folder}\nNext: emreason-eval run=copy samples=8, or emreason-report copy\n")
    refused = smoke(folder, "optimizer.lr=1", check=False)
    assert refused.returncode != 0
    assert "optimizer.lr" in refused.stderr
    assert "overwrite=true" in refused.stderr
    assert "Traceback" not in refused.stderr
    before = (folder / "summary.json").stat().st_mtime_ns
    (folder / "evaluation_test.json").write_text("{}")  # of the model that goes
    smoke(folder, "overwrite=true")
    assert not (folder / "evaluation_test.json").exists()
    assert (folder / "summary.json").stat().st_mtime_ns > before
    assert_same(learned(folder), learned(finished))  # and the same command gives the same result


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rationales/iteration=001.jsonl", "checkpoints/last.ckpt", "model.partial"])
def test_kill_9_and_the_same_command_gives_the_same_result(finished, tmp_path, moment):
    folder = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [BIN / "emreason", *SMOKE, f"hydra.run.dir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 60
    while not (folder / moment).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    smoke(folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert_same(learned(folder), learned(finished))


@pytest.mark.slow
def test_a_stale_journal_is_refused(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for name in ("summary.json", "checkpoints"):  # as if the weights had changed under the journal
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    meta = folder / "rationales" / "iteration=000.meta.json"
    meta.write_text(meta.read_text().replace('"weights": "', '"weights": "x'))
    refused = smoke(folder, check=False)
    assert refused.returncode != 0
    assert "weights differ" in refused.stderr


@pytest.mark.slow
def test_evaluating_and_reporting_a_finished_run(finished, tmp_path):
    done = run("emreason-eval", f"run={finished}", "dataset.limit.test=10", "samples=4", "bound=3", "trainer.accelerator=cpu", cwd=tmp_path)
    result = json.loads((finished / "evaluation_test.json").read_text())
    assert result["n"] == 10, done.stdout
    assert "parameters in float32" in done.stderr  # the run's, whatever is fastest here
    measured, again = (
        {row["question_id"]: row for row in map(json.loads, (finished / f"predictions/{name}.jsonl").open())}
        for name in ("test", "evaluation_test")
    )
    assert again == {key: measured[key] for key in again}  # greedy, of the chosen model: what the run itself measured
    assert 0 <= result["maj@4"] <= result["pass@4"]
    assert result["log_marginal"] < 0 < result["log_marginal_se"]
    assert 0 <= result["pass@1"] <= result["pass@2"] <= result["pass@4"] <= 1
    run("emreason-report", str(finished.parent), "--out", str(tmp_path / "report"), cwd=tmp_path)
    made = {p.name for p in (tmp_path / "report").rglob("*")}
    assert "report.html" in made
    assert any(name.endswith(".png") for name in made)


@pytest.mark.slow
def test_a_sweep_runs_every_job_in_a_folder_of_its_own(tmp_path):
    job = ["seed=1,2", "sampler=rs,pps", "trainer.max_epochs=1", "m_step.on_zero_accepted=skip"]
    assert run("emreason", "-m", *SMOKE, *job, cwd=tmp_path).stdout.endswith("emreason-report outputs/smoke\n")
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/**/summary.json")]
    assert sorted((s["sampler"], s["seed"], s["status"]) for s in summaries) == [
        ("pps", 1, "finished"),
        ("pps", 2, "finished"),
        ("rs", 1, "finished"),
        ("rs", 2, "finished"),
    ]


@pytest.mark.slow
def test_a_failing_job_does_not_stop_the_sweep(tmp_path):
    done = run("emreason", "-m", *SMOKE, "sampler.budget=0,8", "trainer.max_epochs=1", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "1 of 2 jobs failed" in done.stderr
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("outputs/**/summary.json")]
    assert sorted(s["status"] for s in summaries) == ["failed", "finished"]
    assert "RS-8" in done.stdout
    # under another config both are refused: what lies there is an earlier run's, and no result of this sweep
    again = run("emreason", "-m", *SMOKE, "sampler.budget=0,8", "trainer.max_epochs=1", "optimizer.lr=0.1", cwd=tmp_path, check=False)
    assert again.returncode != 0
    assert "2 of 2 jobs failed" in again.stderr
    assert "optimizer.lr" in again.stderr
    assert "RS-8" not in again.stdout


@pytest.mark.slow
def test_lora_trains_the_adapter_alone_and_exports_it(tmp_path):
    from peft import PeftModel

    from emreason.models.tiny import load_tiny

    folder = tmp_path / "lora"
    smoke(folder, "peft=lora", "trainer.max_epochs=1")
    model = PeftModel.from_pretrained(load_tiny("llama", seed=0)[0], folder / "model")
    assert any(float(p.abs().sum()) > 0 for n, p in model.named_parameters() if "lora_B" in n)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert all("lora" in key for key in checkpoint["state_dict"])
    run("emreason-eval", f"run={folder}", "trainer.accelerator=cpu", cwd=tmp_path)


@pytest.mark.slow
def test_the_exported_model_is_the_one_that_was_best_on_validation(finished):
    """Not the last one, and not the best on test."""
    summary = json.loads((finished / "summary.json").read_text())
    accuracies = [r["validation"]["accuracy"] for r in summary["iterations"]]
    assert summary["best_iteration"] == accuracies.index(max(accuracies))
    assert all("test" not in r for r in summary["iterations"])  # test is looked at once, after the choice
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == summary["best_iteration"]
    exported = AutoModelForCausalLM.from_pretrained(finished / "model").state_dict()
    assert all(torch.equal(exported[k.removeprefix("model.")], v) for k, v in best["state_dict"].items())


@pytest.mark.slow
def test_two_ranks_sample_the_rationales_of_one(finished, tmp_path):
    folder = tmp_path / "ranks"
    smoke(folder, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1")
    ours, theirs = learned(folder)[1], [r for r in learned(finished)[1] if r["iteration"] == 0]
    assert ours == theirs
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["iterations"][0]["e_step"]["questions"] == 40
    assert [p.name for p in sorted((folder / "rationales").iterdir())] == ["iteration=000.jsonl", "iteration=000.meta.json"]

"""W&B's offline run files read back; the other loggers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from test_config import compose_config
from test_report import write_run
from wandb_files import read_run

from emreason.reports.comparison import compare
from emreason.reports.reading import collect
from emreason.reports.writing import comparison_records
from emreason.tracking.dashboard import COLUMNS, RUN_ID, TEXT_LIMIT, Iterations, WandbRun, finish, lay_out, publish_comparison
from emreason.tracking.trackers import TrackioRun, known_as
from emreason.tracking.workspace import NAME, SECTIONS, workspace
from emreason.train import train
from emreason.types import UserError

SMOKE = ["experiment=smoke", "engine.dtype=float32", "trainer.max_epochs=2"]


def emreason(cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HOME": str(cwd), "WANDB_DATA_DIR": str(cwd / "data")}
    command = [sys.executable, "-m", "emreason.train", *overrides, *SMOKE]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """Two jobs without an API key, with two loggers, the second of which fails in its M-step; then the same command again."""
    folder = tmp_path_factory.mktemp("sweep")
    job = ["-m", "logger=[csv,wandb]", "tag=mine", "rationale_rows=20", "optimizer.lr=3e-3,1e38", "hydra.sweep.subdir=${hydra:job.num}"]
    return folder, [emreason(folder, *job), emreason(folder, *job)]


@pytest.mark.slow
def test_without_a_key_the_run_is_offline_and_says_how_to_send_it(sweep):
    folder, (first, _) = sweep
    assert "error: 1 of 2 jobs failed" in first.stderr, first.stderr
    for job in "01":
        assert f"wandb sync {folder}/outputs/mine/{job}/wandb/offline-run-*" in first.stderr


@pytest.mark.slow
def test_every_job_is_a_run_of_its_own_in_the_group_of_the_sweep(sweep):
    folder, _ = sweep
    runs = [read_run(run_files(folder / f"outputs/mine/{job}")[0]) for job in "01"]
    assert {run["group"] for run in runs} == {"mine"}
    assert {run["job_type"] for run in runs} == {"RS-8"}
    assert all(run["tags"] == ["sums", "tiny_llama", "rs"] for run in runs)
    assert runs[0]["id"] != runs[1]["id"]
    assert [run["config"]["optimizer"]["lr"] for run in runs] == [3e-3, 1e38]
    assert runs[0]["config"]["sampler"]["display"] == "RS-8"  # resolved
    assert [run["exit_code"] for run in runs] == [0, 1]
    assert list(folder.glob("outputs/mine/0/csv/*/metrics.csv"))  # the other logger's
    assert [run["summary"]["status"] for run in runs] == ["finished", "failed"]


@pytest.mark.slow
def test_a_retried_job_continues_its_run_and_a_finished_one_is_left_alone(sweep):
    folder, (_, again) = sweep
    assert f"Finished already: {folder}/outputs/mine/0" in again.stderr
    assert len(run_files(folder / "outputs/mine/0")) == 1
    files = run_files(folder / "outputs/mine/1")
    assert len(files) == 2
    assert len({read_run(file)["id"] for file in files}) == 1
    assert all(read_run(file)["exit_code"] == 1 for file in files)


@pytest.mark.slow
def test_iterations_and_optimizer_steps_have_axes_of_their_own(sweep):
    folder, _ = sweep
    run = read_run(run_files(folder / "outputs/mine/0")[0])
    assert run["axes"] == {
        **{f"{part}/*": "iteration" for part in ("e_step", "m_step", "memory_bytes", "tokens_per_second")},
        **{f"{part}/*": "iterations_done" for part in ("validation", "test")},
        "e_step/tokens_total": "iterations_done",
        "rationales": "iteration",
        "questions": "iteration",
        "optimizer/*": "optimizer_step",
    }
    summary = json.loads((folder / "outputs/mine/0/summary.json").read_text())
    first = run["rows"][0]  # the base model
    baseline = summary["baseline"]
    assert (first["iterations_done"], first["e_step/tokens_total"], "iteration" in first) == (0, 0, False)
    assert first["validation/accuracy"] == baseline["validation"]["accuracy"]
    assert first["test/forced_accuracy"] == baseline["zero_shot"]["forced_accuracy"]
    rows = [row for row in run["rows"] if "e_step/tokens" in row]
    assert [(row["iteration"], row["iterations_done"]) for row in rows] == [(0, 1), (1, 2)]
    tokens = [record["e_step"]["tokens"] for record in summary["iterations"]]
    assert [row["e_step/tokens_total"] for row in rows] == [tokens[0], sum(tokens)]
    assert all(row["memory_bytes/m_step"] > 1e8 < row["memory_bytes/e_step"] for row in rows)
    for row, record in zip(rows, summary["iterations"], strict=True):
        assert row["tokens_per_second/e_step"] == pytest.approx(record["e_step"]["tokens"] / record["e_step"]["seconds"])
    for row, record in zip(rows, summary["iterations"], strict=True):
        for part in ("e_step", "m_step", "validation"):
            for key in ("acceptance_rate", "tokens", "nll", "accuracy"):
                if record[part].get(key) is not None:
                    assert row[f"{part}/{key}"] == pytest.approx(record[part][key])
        e_step = record["e_step"]
        assert row["e_step/tokens_per_accepted"] == pytest.approx(e_step["tokens"] / e_step["accepted"])
    steps = [row["optimizer_step"] for row in run["rows"] if "optimizer/nll" in row]
    assert steps == list(range(sum(record["m_step"]["steps"] for record in summary["iterations"])))
    assert [row["_step"] for row in run["rows"]] == list(range(len(run["rows"])))  # no row was merged into another or dropped
    test = [row for row in run["rows"] if "test/accuracy" in row]
    assert [(row["iterations_done"], row["test/n"]) for row in test] == [(0, 18), (summary["best_iteration"] + 1, 18)]
    assert run["summary"]["baseline/zero_shot/accuracy"] == summary["baseline"]["zero_shot"]["accuracy"]


@pytest.mark.slow
def test_the_rationale_tables_hold_the_journals_rows(sweep):
    folder, _ = sweep
    job = folder / "outputs/mine/0"
    run = read_run(run_files(job)[0])
    tables = [row for row in run["rows"] if "rationales/path" in row]
    assert [row["iteration"] for row in tables] == [0, 1]
    for iteration, row in enumerate(tables):
        table = json.loads(next(job.glob(f"wandb/offline-run-*/files/{row['rationales/path']}")).read_text())
        assert table["columns"] == COLUMNS
        journal = [json.loads(line) for line in (job / f"rationales/iteration={iteration:03d}.jsonl").open()]
        assert 10 <= len(table["data"]) <= 20 < len(journal)
        first = dict(zip(COLUMNS, table["data"][0], strict=True))
        expected = {**journal[0], "scheme": "RS-8", "tokens": journal[0]["n_tokens"]}
        assert first == {column: expected[column] for column in COLUMNS}


@pytest.mark.slow
def test_the_same_questions_are_shown_after_every_iteration(sweep):
    folder, _ = sweep
    job = folder / "outputs/mine/0"
    tables = [row for row in read_run(run_files(job)[0])["rows"] if "questions/path" in row]
    for iteration, row in enumerate(tables):
        table = json.loads(next(job.glob(f"wandb/offline-run-*/files/{row['questions/path']}")).read_text())
        assert table["columns"] == ["question", "gold", "base", *(f"iteration {i}" for i in range(iteration + 1))]
        assert len(table["data"]) == 12
        names = ["baseline_zero_shot_validation", *(f"validation_iteration={i:03d}" for i in range(iteration + 1))]
        for column, name in enumerate(names, 2):
            given = {p["question"]: p for p in map(json.loads, (job / f"predictions/{name}.jsonl").open())}
            for shown in table["data"]:
                prediction = given[shown[0]]
                assert shown[column] == f"{'✓' if prediction['correct'] else '✗'} {prediction['text']}"
    assert len(tables) == 2


@pytest.mark.slow
def test_the_journal_and_the_model_are_artifacts(sweep):
    folder, _ = sweep
    artifacts = dict(read_run(run_files(folder / "outputs/mine/0")[0])["artifacts"])
    assert {"iteration=000.jsonl", "iteration=001.jsonl"} <= set(artifacts["rationales"])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(artifacts["model"])


def test_asking_for_a_server_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="run `wandb login`, set WANDB_API_KEY"):
        WandbRun(str(tmp_path), "project", "group", "job", offline=False)


@pytest.mark.slow
def test_the_dashboard_shows_what_is_logged(sweep):
    folder, _ = sweep
    logged = {key for row in read_run(run_files(folder / "outputs/mine/0")[0])["rows"] for key in row if not key.startswith("_")}
    logged -= {key for key in logged if key.split("/")[0] in ("rationales", "questions")}  # tables, which have panels of their own
    shown = {metric for charts in SECTIONS.values() for chart in charts for metric in (*chart.metrics, chart.axis)}
    assert logged - shown == set()
    assert {key for key in shown - logged if not re.fullmatch(r"(validation|test)/accuracy_by_position/[A-E]", key)} == {
        "e_step/chance_acceptance",  # needs choices, which sums have not
        *("e_step/effective_sample_size", "e_step/log_marginal_iw"),  # of schemes that weigh by importance
        *("e_step/move_rate", "e_step/kept"),  # of chains
        *("e_step/faithful_rate", "e_step/logprob_gap"),  # measured on request; of vLLM
        *(f"validation/{key}" for key in ("kl_per_token", "kl_per_token_se", "log_marginal", "log_marginal_se")),
        *(f"validation/{key}" for key in ("log_marginal_mc_se", "log_marginal_answered")),
    }


@pytest.mark.slow
def test_the_comparison_of_a_sweep_is_a_run_with_tables(sweep):
    folder, (first, _) = sweep
    assert "was not sent" not in first.stderr
    files = run_files(folder / "outputs/mine")
    runs = [read_run(file) for file in files]
    assert [(run["job_type"], run["group"], run["exit_code"]) for run in runs] == [("comparison", "mine", 0)] * 2
    assert len({run["id"] for run in runs}) == 1  # a sweep that is done again continues it
    (row,) = [row for row in runs[0]["rows"] if "schemes/path" in row]
    table = json.loads(next((folder / "outputs/mine").glob(f"wandb/offline-run-*/files/{row['schemes/path']}")).read_text())
    cells = compare(collect([folder / "outputs/mine"])).cells
    assert [dict(zip(table["columns"], line, strict=True)) for line in table["data"]] == [asdict(cell) for cell in cells]
    assert {"accuracy", "low", "high", "p_vs_best"} <= set(table["columns"])


def test_the_comparison_tells_which_schemes_differ(tmp_path, monkeypatch):
    """Differences, their intervals and Holm's p of every pair; where there is one run, there is no such table (above)."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    for scheme in ("rs", "star", "pps"):
        for seed in (1, 2):
            write_run(tmp_path / "runs" / scheme / str(seed), scheme, seed)
    found = compare(collect([tmp_path / "runs"]))
    (tmp_path / "sweep").mkdir()
    publish_comparison(tmp_path / "sweep", comparison_records(found), True, project="p", entity=None, group="g")
    wandb.teardown()  # its service has written everything only when it ends
    (file,) = run_files(tmp_path / "sweep")
    (row,) = read_run(file)["rows"]
    table = json.loads((file.parent / "files" / row["pairs/path"]).read_text())
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert [(r["first"], r["second"], r["estimate"], r["low"], r["high"], r["p_holm"]) for r in rows] == [
        (p.first, p.second, p.difference.estimate, p.difference.low, p.difference.high, p.p_holm) for p in found.pairs
    ]
    assert len(rows) == 6  # three schemes and the few-shot baseline
    assert any(r["p"] < r["p_holm"] < 0.05 for r in rows)


@pytest.mark.parametrize(
    ("known", "fails", "says"),
    [
        (1, None, "W&B view: there"),
        (7, None, ""),
        (1, ImportError(), "emreason[dashboard]"),
        (1, ValueError("no\nrights"), "not made (no rights)"),
    ],
)
def test_the_view_is_made_with_the_first_run_and_never_costs_one(known, fails, says, monkeypatch, capfd):
    made = []

    def workspace(*asked):
        if fails:
            raise fails
        made.append(asked)
        return SimpleNamespace(save=lambda: SimpleNamespace(url="there"))

    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(runs=lambda path: {"me/emreason": [None] * known}[path]))
    monkeypatch.setattr("emreason.tracking.workspace.workspace", workspace)
    lay_out(SimpleNamespace(entity="me", project="emreason"))
    told = capfd.readouterr().err
    assert says in told
    assert told or not says
    assert made == ([("me", "emreason", NAME)] if says == "W&B view: there" else [])


def test_the_dashboards_specification_has_every_chart():
    pytest.importorskip("wandb_workspaces", reason="needs pip install 'emreason[dashboard]'")
    view = json.loads(workspace("me", "emreason", NAME)._to_model().model_dump_json(by_alias=True, exclude_none=True))
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    panels = {(s["name"], p["config"]["chartTitle"]): p["config"] for s in sections for p in s["panels"] if "chartTitle" in p["config"]}
    assert panels.keys() == {(name, chart.title) for name, charts in SECTIONS.items() for chart in charts}
    chart = panels["E-step", "Acceptance against chance"]
    assert (chart["xAxis"], chart["metrics"]) == ("iteration", ["e_step/acceptance_rate", "e_step/chance_acceptance"])
    assert "rationales" in json.dumps(next(s for s in sections if s["name"] == "Tables"))
    assert {"section": "config", "name": "sampler.value.display"} in view["spec"]["section"]["runSets"][0]["grouping"]


def test_a_table_is_capped_in_rows_and_in_text(tmp_path):
    line = {"iteration": 0, "question": "q", "gold": "1", "attempt": 1, "proposal": "question", "answer": None, "accepted": False}
    path = tmp_path / "rationales" / "iteration=000.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({**line, "text": "x" * 9999, "n_tokens": i}) + "\n" for i in range(95)))
    summary: Any = None
    rows = Iterations(summary, tmp_path, "PPS", rows=10)._table(0)
    assert [row[-1] for row in rows] == list(range(0, 95, 10))  # from all over the file
    assert all(len(row[6]) < TEXT_LIMIT + 10 for row in rows)


def test_a_run_keeps_its_id_and_another_folder_has_another(tmp_path):
    assert known_as(tmp_path / RUN_ID) == known_as(tmp_path / RUN_ID)
    (tmp_path / "other").mkdir()
    assert known_as(tmp_path / "other" / RUN_ID) != known_as(tmp_path / RUN_ID)


@pytest.mark.slow
def test_iterations_that_learn_nothing_leave_no_gap(tmp_path, monkeypatch):
    """Lightning counts their empty step; rows under a step that has gone by W&B drops."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    cfg = compose_config(*SMOKE, "logger=wandb", "trainer.max_epochs=4", "sampler.reward=test_dashboard.later", *QUICK)
    cfg.hydra.runtime.output_dir = str(tmp_path / "run")
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        cfg.pop("hydra")
    summary = train(cfg, tmp_path / "run")
    assert [record["m_step"]["steps"] > 0 for record in summary["iterations"]] == [False, False, True, True]
    (file,) = run_files(tmp_path / "run")
    rows = read_run(file)["rows"]
    assert [row["iterations_done"] for row in rows if "e_step/tokens" in row] == [1, 2, 3, 4]
    assert "test/accuracy" in rows[-1]


QUICK = ["m_step.on_zero_accepted=skip", "evaluation.baseline=[]", "sampler.budget=1"]
QUICK += [f"dataset.limit.{split}=2" for split in ("train", "validation", "test")]


def later(text, answer, question, seen=[]):  # noqa: ARG001, B006
    """A reward: of two draws an iteration, those from the third iteration on."""
    seen.append(text)
    return len(seen) > 4


def test_an_iteration_is_sent_at_once():
    """Not with the next row, an E-step later: a run that is killed meanwhile does not send it again."""
    run = WandbRun.__new__(WandbRun)
    sent = []
    run.experiment = SimpleNamespace(log=lambda row, **how: sent.append((row, how)))
    run.log_iteration(2, 7, {"e_step/tokens": 5})
    assert sent == [({"e_step/tokens": 5, "iteration": 1, "iterations_done": 2}, {"step": 9, "commit": True})]


def test_trackio_tells_folders_apart_and_goes_on_in_its_own(tmp_path, monkeypatch):
    """Two tags end in the same folders."""
    names = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda name, **_: names.append(name)))
    folders = [tmp_path / tag / "sums/tiny/rs-8/seed=1" for tag in ("a", "b", "a")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("seed: 1\n")
        TrackioRun(str(folder), "emreason")
    assert all(name.startswith("sums/tiny/rs-8/seed=1 ") for name in names)
    assert names[0] == names[2] != names[1]


def test_finishing_without_a_run_is_harmless():
    finish("failed")


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "tensorboard", "trackio", "mlflow"])
def test_the_other_loggers_write_beside_metrics_jsonl(tmp_path, logger, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    if logger != "csv":
        pytest.importorskip(logger, reason=f"needs pip install 'emreason[{logger}]'")
    cfg = compose_config(*SMOKE, f"logger={logger}")
    cfg.hydra.runtime.output_dir = str(tmp_path / "run")
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        cfg.pop("hydra")
    train(cfg, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    expected = [m["validation/accuracy"] for m in metrics if "validation/accuracy" in m]
    assert len(expected) == 3  # the base model's, and one an iteration
    assert metrics[0]["iteration"] == -1
    if logger == "csv":
        import pandas as pd

        table = pd.read_csv(tmp_path / "run/csv/version_0/metrics.csv")
        assert table["validation/accuracy"].dropna().tolist() == pytest.approx(expected)
        assert table["e_step/acceptance_rate"].notna().sum() == 2
    elif logger == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        (name,) = SQLiteStorage.get_runs("emreason")
        assert name.endswith("/run")
        rows = SQLiteStorage.get_logs("emreason", name)
        assert [row["validation/accuracy"] for row in rows if "validation/accuracy" in row] == expected
    elif logger == "mlflow":
        from mlflow import MlflowClient

        client, known = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), (tmp_path / "run/mlflow_id").read_text()
        logged = client.get_metric_history(known, "validation/accuracy")
        assert [each.value for each in sorted(logged, key=lambda each: each.step)] == pytest.approx(expected)
        assert client.get_run(known).data.params["sampler.display"] == "RS-8"
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
        assert [e.value for e in events.Scalars("validation/accuracy")] == pytest.approx(expected)

"""`make reproduce`: plans, local models, and a small one killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console
from test_config import compose_config

from emreason.reproduce import local_model, main, parts, run
from emreason.types import UserError


@pytest.mark.parametrize(("scale", "runs"), [("gpu", 72), ("cpu", 24), ("tiny", 4)])
def test_a_plan_names_every_run_and_where_it_will_be(scale, runs):
    grids = parts(scale)
    assert sum(len(part.folders) for part in grids) == runs
    assert len({folder for part in grids for folder in part.folders}) == runs
    for part in grids:
        planned = set()
        for overrides in part.sweeps():
            values = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(overrides)}
            jobs = [[]]
            for key, override in values.items():
                swept = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.get_value_element_as_str()]
                jobs = [[*job, f"{key}={value}"] for job in jobs for value in swept]
            # composing takes long: the corners of the grid stand for it
            planned |= {compose_config(*job).hydra.run.dir for job in (jobs[0], jobs[-1])}
        assert planned <= {str(folder) for folder in part.folders}


def test_a_local_qwen_is_a_checkpoint_or_a_gguf(tmp_path):
    with pytest.raises(UserError, match=r"no folder with one, and no checkpoint"):
        local_model(tmp_path / "nowhere")
    folder = tmp_path / r"it's a\b, here"
    folder.mkdir()
    (folder / "a.gguf").touch()
    for path in (folder, folder / "a.gguf"):
        option, overrides = local_model(path)
        cfg = compose_config(f"model={option}", *overrides)
        assert (cfg.model.load.path, cfg.model.load._target_) == (str(folder / "a.gguf"), "emreason.models.loading.load_gguf")
    (folder / "b.gguf").touch()
    with pytest.raises(UserError, match=r"2 \.gguf files"):
        local_model(folder)
    (folder / "config.json").touch()
    assert local_model(folder)[0] == "qwen25_1_5b"


def test_a_signal_ends_it_and_a_failed_sweep_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emreason.reproduce.report.main", lambda _: None)
    seen = []

    def sweep():
        seen.append(sys.argv)
        raise SystemExit(code)

    monkeypatch.setattr("emreason.reproduce.train.main", sweep)
    code: int | str = "error: 1 of 2 jobs failed"
    assert not run(parts("tiny"), Console())
    assert len(seen) == 2
    assert "keep_model=false" in seen[0]
    code = 130
    with pytest.raises(SystemExit):
        run(parts("tiny"), Console())
    assert len(seen) == 3
    main(["tiny", "--plan", "--keep-models"])
    assert "models are kept" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_report(tmp_path):
    command = [sys.executable, "-m", "emreason.reproduce", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    root = tmp_path / "outputs/paper-tiny"
    second = root / "sums/tiny_llama/rs-8/seed=2/rationales/iteration=000.jsonl"
    deadline = time.monotonic() + 300
    while not second.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    first = process.communicate()[0].decode()
    assert "About 20 s left" in first  # the plan comes before the work
    assert first.index("About 20 s left") < first.index("emreason -m")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Finished already: {root}/sums/tiny_llama/rs-8/seed=1" in done.stderr
    summaries = [json.loads(path.read_text()) for path in root.glob("*/*/*/*/summary.json")]
    assert sorted((s["sampler"], s["seed"], s["status"]) for s in summaries) == [
        ("pps", 1, "finished"),
        ("pps", 2, "finished"),
        ("rs", 1, "finished"),
        ("rs", 2, "finished"),
    ]
    assert (root / "report/report.html").exists()

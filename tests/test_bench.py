"""`make bench`: rows, ratios, failures; the contenders that need no environment of their own on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hub
import pytest
from rich.console import Console

from emreason.bench import __main__ as bench


def test_a_contender_that_cannot_run_is_a_row_that_says_why(tmp_path):
    work = tmp_path / "work.json"
    work.write_text("{}")
    broken = bench.Contender("E-step", "broken", "sample_ours.py")
    result = bench.run(broken, work, tmp_path, "cpu", timeout=120)
    assert "KeyError" in result["error"]
    rows = bench.rows_of(broken, result, ["a", "b"])
    assert [row["work"] for row in rows] == ["a", "b"]
    bench.finish(rows, 10, 1.0)
    console = Console(width=200, record=True)
    console.print(bench.table_of({"device": "cpu", "peak_gflops": {"float32": 1.0}, "rows": rows}))
    assert console.export_text().count("cannot run") == 2


def test_ratios_and_shares():
    ours, other = bench.Contender("M-step", "emreason", ""), bench.Contender("M-step", "other", "")
    rows = bench.rows_of(other, {"rows": [{"work": "w", "tokens": 100, "seconds": 4.0}]}, [])
    rows += bench.rows_of(ours, {"rows": [{"work": "w", "tokens": 100, "seconds": 2.0}]}, [])
    bench.finish(rows, parameters=10**6, peak=1.0)
    assert [row["ours_is_faster_by"] for row in rows] == [2.0, 1.0]
    assert rows[1]["share_of_limit"] == pytest.approx(50 * 6e6 / 1e9)


def test_our_contenders_do_the_same_work(tmp_path):
    """The whole command on the tiny model: our sampler's sequences are what is trained on, and transformers runs beside it."""
    command = [sys.executable, "-m", "emreason.bench", "--out", str(tmp_path / "out"), "--model", "tiny_llama", "--only", "64 rows"]
    env = os.environ | {"EMREASON_DATA_ROOT": str(hub.find_or_build_hub()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {(row["phase"], row["contender"]) for row in result["rows"]} == {
        ("E-step", "emreason"),
        ("E-step", "transformers generate, 64 rows"),
        ("M-step", "emreason"),
    }
    assert not [row for row in result["rows"] if "error" in row]
    (m_step,) = [row for row in result["rows"] if row["phase"] == "M-step"]
    assert len(m_step["losses"]) == 4
    assert m_step["losses"][0] > 0

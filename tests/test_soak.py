"""Many EM iterations in one process: memory, file handles and throughput stay flat. EMREASON_SOAK=200 runs the long version."""

from __future__ import annotations

import json
import os
import statistics
import time

import psutil
import pytest
from test_config import compose_config

from emreason.em import e_step
from emreason.train import train

TINY = [
    "experiment=smoke",
    "engine.dtype=float32",
    "dataset.limit={train: 6, validation: 2, test: 2}",
    "sampler.budget=2",
    "sampler.max_new_tokens=12",
    "m_step.epochs=1",
    "m_step.on_zero_accepted=skip",
    "evaluation.baseline=[]",
]


@pytest.mark.slow
def test_memory_handles_and_throughput_stay_flat(tmp_path, monkeypatch):
    iterations = int(os.environ.get("EMREASON_SOAK", "24"))
    process = psutil.Process()
    curve: list[tuple[float, int, float]] = []  # resident MB, open files, CPU seconds
    release = e_step.release_memory

    def measured() -> None:  # called twice in an iteration: after the E-step and after the M-step
        release()
        curve.append((process.memory_info().rss / 2**20, process.num_fds(), time.process_time()))

    monkeypatch.setattr(e_step, "release_memory", measured)
    cfg = compose_config(*TINY, f"trainer.max_epochs={iterations}")
    summary = train(cfg, tmp_path / "run")
    assert len(summary["iterations"]) == iterations

    curve = curve[1::2]
    quarter = iterations // 4
    early, late = curve[quarter : 2 * quarter], curve[-quarter:]  # the first quarter warms up
    memory = [statistics.median(point[0] for point in part) for part in (early, late)]
    seconds = [(part[-1][2] - part[0][2]) / (len(part) - 1) for part in (early, late)]
    points = [curve[i] for i in range(0, iterations, max(1, iterations // 20))]
    print(json.dumps({"memory_mb": memory, "cpu_seconds_per_iteration": seconds, "curve": points}))
    assert memory[1] <= 1.05 * memory[0]
    assert late[-1][1] == early[0][1]
    assert seconds[1] <= 1.5 * seconds[0]

"""`make test-vllm`: whole runs on the vLLM engine: alone, in a sweep, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from test_ranks import free_port
from test_train import BIN

from emreason.engines.server import Server
from emreason.models.tiny import load_tiny
from emreason.types import UserError

pytest.importorskip("vllm")

RUN = [
    "experiment=smoke",
    "engine=vllm",
    "engine.dtype=float32",
    "engine.max_batch=8",
    "engine.max_length=256",
    "engine.options={enforce_eager: true, block_size: 32}",
    "+model.load.hidden_size=128",
    "dataset.limit={train: 8, validation: 4, test: 4}",
    "sampler.budget=4",
    "evaluation.baseline=[]",
    "trainer.max_epochs=2",
    "m_step.on_zero_accepted=skip",
]


def emreason(*arguments: str) -> None:
    """A command that ends well and leaves no process behind."""
    before = {p.pid for p in psutil.process_iter()}
    command = [BIN / "emreason", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    new = [p.info for p in psutil.process_iter(["pid", "status", "cmdline"]) if p.pid not in before]
    assert not [p for p in new if p["status"] != psutil.STATUS_ZOMBIE and "vllm" in " ".join(p["cmdline"] or ()).lower()]


def drawn(folder: Path) -> dict[tuple[int, str, int], str]:
    """Every attempt's text by iteration, question and attempt."""
    lines = [json.loads(line) for file in sorted((folder / "rationales").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {(line["iteration"], line["question_id"], line["attempt"]): line["text"] for line in lines}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    emreason(*RUN, "seed=2", f"hydra.run.dir={folder}")
    return folder


def test_a_run(alone):
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert {iteration for iteration, _, _ in drawn(alone)} == {0, 1}
    assert 0 <= summary["iterations"][0]["e_step"]["logprob_gap"] < 1e-3


def test_a_sweep_gives_each_job_what_it_draws_alone(alone, tmp_path):
    """The second job's vLLM starts where the first one's has ended."""
    emreason("-m", *RUN, "seed=1,2", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${seed}")
    assert drawn(tmp_path / "2") == drawn(alone)
    assert drawn(tmp_path / "1") != drawn(alone)


def test_two_ranks_draw_what_one_draws(alone, tmp_path):
    """Each rank has a vLLM of its own, which is not part of their process group."""
    emreason(*RUN, "seed=2", "trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
    assert drawn(tmp_path) == drawn(alone)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a vLLM server with another model's weights, as `engines/server.py` says to start it."""
    folder = tmp_path_factory.mktemp("server")
    model, tokenizer = load_tiny("llama", hidden_size=128, seed=7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    # `vllm serve MODEL`, which the CPU build's own command cannot be: it looks for a distribution of the other name
    served = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command = [*served, "--port", str(port), "--worker-extension-cls", "emreason.engines.handover.TakeWeights"]
    options = ["--dtype=float32", "--max-model-len=256", "--max-num-seqs=8", "--enforce-eager", "--block-size=32"]
    uncut = ["--no-enable-chunked-prefill", "--max-num-batched-tokens=4096"]  # on CPUs only, see engines/vllm.py
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *options, *uncut], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]  # noqa: PT018
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_draws_what_a_vllm_of_ones_own_draws(alone, server, tmp_path, ranks):
    """All ranks share it, and the first hands the weights over; when a run begins it holds those of another one."""
    several = ["trainer.devices=2", "trainer.strategy=ddp"] if ranks == 2 else []
    emreason(*RUN, "seed=2", f"engine.server={server}", *several, f"hydra.run.dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert drawn(tmp_path) == drawn(alone)
    assert 0 <= summary["iterations"][0]["e_step"]["logprob_gap"] < 1e-3


def test_a_server_that_is_not_there():
    with pytest.raises(UserError, match=r"engine\.server=http://127.0.0.1:1: no answer"):
        Server("http://127.0.0.1:1", 4)

"""Memory told beforehand: by a plan, by a run, and what would take less where there is too little."""

from __future__ import annotations

import dataclasses
import re

import hydra
import pytest
import torch
from test_config import compose_config

from emreason.models.footprint import GIB, Work, read_shape
from emreason.runs import experiment, needs, plan
from emreason.runs.needs import free_on_gpu, free_on_host, peak, too_little, work_of

LLAMA_3B = {"vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
SHAPE = read_shape(LLAMA_3B | {"num_key_value_heads": 8, "tie_word_embeddings": True})
WORK = Work("cuda", "bfloat16", "inprocess", None, True, 128, 192, 256, 16_384, False)
RANDOM = ("model=llama32_3b_random", "dataset=sums_2", "engine.max_batch=32", "sampler.max_new_tokens=64")


def memory_line(monkeypatch, *overrides, gpu=None, host=16 * GIB):
    monkeypatch.setattr(plan, "free_on_gpu", lambda: gpu)
    monkeypatch.setattr(plan, "free_on_host", lambda: host)
    return [line for line in plan.plan(compose_config(*RANDOM, *overrides), experiment.Path("nowhere")).splitlines() if "GiB" in line]


def gib(line, phase):
    return float(re.search(rf"{phase} ([\d.]+) GiB", line)[1])


def test_a_plan_tells_it_with_what_there_is(monkeypatch):
    (line,) = memory_line(monkeypatch, gpu=80 * GIB)
    assert line.startswith("Memory of each GPU, at most, estimated in bfloat16")
    assert line.endswith("free: 80.0 GiB")
    full = gib(line, "E-step"), gib(line, "M-step")
    (adapted,) = memory_line(monkeypatch, "peft=lora", gpu=80 * GIB)
    assert "masters" not in adapted
    assert gib(adapted, "M-step") < 0.4 * full[1]
    (beside,) = memory_line(monkeypatch, "engine=vllm", gpu=80 * GIB)
    assert "vLLM 6.6" in beside
    assert "vLLM" not in beside.partition("M-step")[2]  # it sleeps
    (server,) = memory_line(monkeypatch, "engine=vllm", "engine.server=http://elsewhere", gpu=80 * GIB)
    assert "K/V" not in server
    assert gib(server, "E-step") < min(gib(beside, "E-step"), full[0])


def test_where_there_is_too_little_a_sentence_says_what_would_do(monkeypatch):
    line, sentence = memory_line(monkeypatch)
    assert "estimated in float32" in line
    assert "packed copy" in line
    assert re.fullmatch(r"The [EM]-step may need [\d.]+ GiB and 16.0 are free; use .* or .*\.", sentence)
    assert len(memory_line(monkeypatch, "trainer.devices=2", host=3 * peak(SHAPE, dataclasses.replace(WORK, device="cpu")))) == 1
    assert "of 2 processes" in memory_line(monkeypatch, "trainer.devices=2")[0]


FREE = {75: "m_step.tokens_per_batch=4096 (", 70: "m_step.gradient_checkpointing=true (", 24: "all of ", 2: "a smaller model"}


@pytest.mark.parametrize(("free", "expected"), FREE.items())
def test_what_suffices_comes_first(free, expected):
    sentence = too_little(SHAPE, WORK, free * GIB)
    assert sentence.count("(") <= 3
    if expected == "a smaller model":
        assert sentence.endswith("or a smaller model.")
        return
    ways = sentence.partition("; use ")[2]
    assert float(re.search(r"\(([\d.]+)\)", ways)[1]) <= free
    assert ways.startswith(expected)  # not the one that needs least


def test_work_is_what_the_config_asks_for():
    cfg = compose_config(*RANDOM, "m_step.batch_size=4", "m_step.tokens_per_batch=100000", "peft=lora")
    dataset, scheme = hydra.utils.instantiate(cfg.dataset), hydra.utils.instantiate(cfg.sampler)
    work = work_of(cfg, dataset, scheme, 7, "float32", "cpu")
    assert (work.rows, work.drawn, work.adapter, work.engine) == (7, 64, (16, "all-linear"), "inprocess")
    assert 4 * 64 < work.tokens < 4 * (64 + work.prompt)
    assert work_of(cfg, dataset, scheme, 700, "float32", "cpu").rows == 32
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1}
    assert work_of(cfg, dataset, scheme, 7, "float32", "cpu").moments == 0


def test_a_run_tells_it_before_it_loads(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(experiment, "say", said.append)
    monkeypatch.setattr(experiment, "free_on_host", lambda: 1 * GIB)
    monkeypatch.setattr(
        experiment, "doing", lambda text, **_: (_ for _ in ()).throw(InterruptedError) if "Loading model" in text else DOING(text)
    )
    with pytest.raises(InterruptedError):
        experiment.build(compose_config(*RANDOM, "engine.dtype=bfloat16", "trainer.accelerator=cpu"))
    assert [line.split()[0] for line in said[-2:]] == ["Memory", "The"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GIB, 90 * GIB))
    cfg = compose_config(*RANDOM)
    (line,) = experiment.memory(cfg, hydra.utils.instantiate(cfg.dataset), "bfloat16", torch.device("cuda"))
    assert "free: 80.0 GiB" in line
    asked = compose_config("model=llama32_3b_random", "dataset=sums_2", name="evaluate")
    (line,) = experiment.memory(asked, hydra.utils.instantiate(asked.dataset), "bfloat16", torch.device("cuda"))
    assert "M-step" not in line
    assert "moments" not in line


DOING = experiment.doing


def test_what_is_free(monkeypatch, tmp_path):
    assert 0.1 * GIB < free_on_host() < 2**50
    monkeypatch.setattr(needs.shutil, "which", lambda _: None)
    assert free_on_gpu() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"; echo 79000; echo 24000\n')
    tool.chmod(0o755)
    monkeypatch.setattr(needs.shutil, "which", lambda _: str(tool))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert free_on_gpu() == 24000 * 2**20
    assert "-i 2,3" in (tmp_path / "nvidia-smi.asked").read_text()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert free_on_gpu() is None

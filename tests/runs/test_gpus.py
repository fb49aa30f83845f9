"""What is decided about GPUs, on a machine that has none: torch.cuda is made to say that there are some."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from test_config import compose_config

from emreason import evaluate
from emreason.em import ranks
from emreason.em.ranks import Ranks
from emreason.models.loading import choose_dtype
from emreason.models.memory import is_out_of_memory
from emreason.models.tiny import load_tiny
from emreason.questions.prompts import Prompts
from emreason.reports import sweep
from emreason.runs import experiment
from emreason.runs.checks import check_plain
from emreason.types import UserError


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("gpus")
def test_auto_is_the_gpu_where_there_is_one_and_never_an_apple_gpu(monkeypatch):
    config = compose_config("experiment=smoke", "trainer.accelerator=auto")
    assert experiment.on(config) == "cuda"
    assert experiment.on(compose_config("experiment=smoke", "trainer.accelerator=cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert experiment.on(config) == "cpu"
    assert experiment.read(config).trainer.keywords["accelerator"] == "cpu"  # Lightning's auto would be mps
    config.trainer.accelerator = "mps"
    with pytest.raises(UserError, match=r"accelerator=mps.*auto, cpu, gpu"):
        check_plain(config)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("devices", "nodes", "count"), [(1, 1, 1), (3, 1, 3), (-1, 1, 4), ("auto", 2, 8)])
def test_ranks_are_counted(devices, nodes, count):
    config = compose_config("experiment=smoke", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}", "trainer.accelerator=gpu")
    assert experiment.ranks_of(config) == count


def test_an_evaluation_moves_the_model_to_its_device(monkeypatch, tmp_path):
    model, tokenizer = load_tiny("llama", seed=0)
    config = compose_config("model=tiny_llama", "dataset.limit.test=2", "trainer.accelerator=cpu", name="evaluate")
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    built = experiment.build(config)
    prompts: Prompts = built.prompts
    where = []
    monkeypatch.setattr(type(built.model), "to", lambda self, device: (where.append(device), self)[1])
    device = torch.device("cuda", 3)
    replaced = experiment.Experiment(built.dataset, prompts, model, tokenizer, built.engine, built.dtype, device)
    monkeypatch.setattr(evaluate, "build", lambda *_: replaced)
    evaluate.evaluate(config, tmp_path)
    assert where == [device]
    assert not any(p.requires_grad for p in model.parameters())


def test_cudnn_attention_is_off_and_segments_grow_unless_vllm_shares_the_memory(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", said.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    experiment.prepare_cuda(expandable=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert said == []
    experiment.prepare_cuda(expandable=True)
    assert said == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    experiment.prepare_cuda(expandable=True)
    assert len(said) == 1  # the user's own settings stand
    assert "server" in compose_config("engine=vllm").engine  # what `build` tells vLLM by
    assert "server" not in compose_config().engine


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_in_all_its_words(error, full):
    assert is_out_of_memory(error) is full


CLAIM = "from emreason.reports import sweep; import os, torch; torch.cuda.device_count = lambda: 3; sweep.claim_gpus({}, {}); \
print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); input()"


def test_jobs_side_by_side_have_gpus_of_their_own(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    jobs: list[subprocess.Popen[str]] = []

    def job(wanted, number) -> str:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen([sys.executable, "-c", CLAIM.format(wanted, number)], env=environment, **pipes))
        return jobs[-1].stdout.readline().strip()

    try:
        assert [job(1, 0), job(2, 1)] == ["0", "1,2"]
        assert job(1, 5) == "2"  # none is left
        jobs[1].communicate("\n")
        assert job(1, 2) == "1"  # not the job's number but what is free
        assert job(-1, 3) == "None"
    finally:
        for process in jobs:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.usefixtures("gpus")
def test_a_process_keeps_its_gpu_from_job_to_job(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "_claims", [])
    monkeypatch.setattr(sweep.tempfile, "gettempdir", lambda: str(tmp_path))
    sweep.claim_gpus(1, 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    sweep.claim_gpus(1, 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_ranks_are_not_wrapped_and_begin_with_the_first_ones_weights(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: sent.append((tensor.data_ptr(), source)))
    model, _ = load_tiny("llama", seed=0)
    strategy = Ranks()
    strategy.model = model
    strategy.configure_ddp()
    assert strategy.model is model
    assert sent == [(p.data_ptr(), 0) for p in model.parameters()]


@pytest.mark.usefixtures("gpus")
def test_only_several_ranks_need_a_strategy():
    read = experiment.read
    assert not read(compose_config("experiment=smoke")).several_ranks
    assert read(compose_config("experiment=smoke", "trainer.devices=2")).several_ranks
    assert read(compose_config("experiment=smoke", "trainer.strategy=ddp")).several_ranks
    kinds = {name: read(compose_config("experiment=smoke", f"trainer.strategy={name}")) for name in ("ddp", "shard", "hybrid")}
    assert {name: (kind.several_ranks, kind.sharding) for name, kind in kinds.items()} == {
        "ddp": (True, None),
        "shard": (True, "shard"),
        "hybrid": (True, "hybrid"),
    }


def test_ranks_wait_for_days_for_what_may_take_hours(monkeypatch):
    made, used = [], []
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **asked: made.append(asked) or "patient")
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda parts, items, group=None: (parts.__setitem__(slice(None), [items] * 2), used.append(group)),
    )
    monkeypatch.setattr(torch.distributed, "barrier", used.append)
    ranks._patient.cache_clear()
    assert ranks.gather([1]) == [1, 1]
    Ranks().barrier("journal read")
    ranks._patient.cache_clear()
    assert used == ["patient"] * 2
    assert [asked["backend"] for asked in made] == ["gloo"]
    assert made[0]["timeout"].days >= 1


@pytest.mark.parametrize(("real", "emulated", "expected"), [(True, True, torch.bfloat16), (False, True, torch.float32)])
def test_auto_is_bfloat16_only_where_the_gpu_has_it(monkeypatch, real, emulated, expected):
    """A T4 or V100 says that it has, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulated if including_emulation else real)
    assert choose_dtype("auto", torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, 0), ({"LOCAL_RANK": "3"}, 3), ({"SLURM_LOCALID": "2"}, 2), ({"LOCAL_RANK": "5"}, 1)]
)
def test_every_rank_loads_onto_a_gpu_of_its_own(monkeypatch, environment, expected):
    """Quantised weights are there before Lightning chooses."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert experiment.own_gpu(4) == expected

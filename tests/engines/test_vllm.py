"""What the vLLM engine does around vLLM, with a `vllm` that only notes what is asked of it; with the real one: `vllm_engine.py`."""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
import types
from collections import deque
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from emreason.engines import handover, vllm
from emreason.engines.handover import packed, passing, pieces, roomy, unpacked, version
from emreason.engines.vllm import VllmEngine, apart, share
from emreason.models.loading import add_lora
from emreason.models.masters import dithered
from emreason.models.tiny import load_tiny
from emreason.types import EngineApart, Request, SamplingParams, UserError

GIB = 2**30


class FakeLLM:
    """Ends every request with the token 5; `log` has what was called, in order."""

    log: ClassVar[list[object]] = []
    made: ClassVar[dict[str, object]] = {}

    def __init__(self, **options):
        type(self).made = {"options": options, "environment": dict(os.environ)}
        self.llm_engine = self
        self.model_config = SimpleNamespace(enable_sleep_mode=options["enable_sleep_mode"])
        self.running: list[str] = []

    def add_request(self, name, *_):
        self.running.append(name)

    def step(self):
        outputs = [SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")]
        done, self.running = self.running, []
        return [SimpleNamespace(request_id=name, outputs=outputs, finished=True) for name in done]

    def abort_request(self, names):
        self.log.append(("abort", *names))

    def collective_rpc(self, name, **_):
        self.log.append(name)

    def reset_prefix_cache(self):
        self.log.append("reset_prefix_cache")

    def sleep(self, level):
        self.log.append(f"sleep {level}")

    def wake_up(self, tags):
        self.log.append(f"wake {tags[0]}")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """vLLM's engine on a GPU that is not there."""
    module, platforms = types.ModuleType("vllm"), types.ModuleType("vllm.platforms")
    module.LLM, module.SamplingParams = FakeLLM, lambda **given: given  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cuda_alike=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("EMREASON_CACHE", str(tmp_path))
    FakeLLM.log = []
    return FakeLLM


def draw(engine) -> list[object]:
    """What a `generate` asks of vLLM."""
    FakeLLM.log.clear()
    assert [c.token_ids for c in engine.generate(deque([Request(0, (3, 4), SamplingParams())]))] == [(5,)]
    return list(FakeLLM.log)


HAND_OVER = ["begin_weights", "take_weights", "end_weights", "reset_prefix_cache"]


def test_awake_from_call_to_call_and_weights_only_when_they_have_changed(fake, tiny):
    model, tokenizer = tiny
    engine = VllmEngine(model, tokenizer)
    assert isinstance(engine, EngineApart)
    engine.rest()  # before it was ever started: nothing
    assert draw(engine) == HAND_OVER
    assert draw(engine) == []
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert draw(engine) == HAND_OVER
    fake.log.clear()
    engine.rest()
    engine.rest()
    assert fake.log == ["sleep 2"]
    # the room for K/V is taken last; the weights are gone, though the model's are the same
    assert draw(engine) == ["wake weights", *HAND_OVER, "wake kv_cache"]


@pytest.mark.parametrize(("asked", "expected"), [(None, 512), (4096, 512), (100, 100)])
def test_its_context_is_no_longer_than_the_model_s(fake, tiny, asked, expected):
    draw(VllmEngine(*tiny, max_length=asked))
    assert fake.made["options"]["max_model_len"] == expected


def test_it_starts_from_a_folder_of_a_fixed_name(fake, tiny):
    model, tokenizer = tiny
    folders = []
    for _ in range(2):
        draw(VllmEngine(model, tokenizer))
        folders.append(fake.made["options"]["model"])
    assert folders[0] == folders[1]
    assert fake.made["options"]["load_format"] == "dummy"
    other, _ = load_tiny("llama", hidden_size=128)
    draw(VllmEngine(other, tokenizer))
    assert fake.made["options"]["model"] != folders[0]


def test_what_torchrun_and_the_allocator_say_is_hidden_from_it_and_restored(fake, tiny, monkeypatch):
    hidden = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_NAME"]
    hidden += ["TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "ROLE_RANK", "PYTORCH_CUDA_ALLOC_CONF"]
    for name in hidden:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("GROUPS", "kept")
    before = dict(os.environ)
    draw(VllmEngine(*tiny))
    seen = fake.made["environment"]
    assert not [name for name in hidden if name in seen]
    assert seen["GROUPS"] == "kept"
    assert seen["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("visible", "index", "ranks", "tensor_parallel", "expected"),
    [
        (None, 0, 1, 1, "0"),
        (None, 3, 4, 1, "3"),
        (None, 0, 1, 2, "0,1"),
        (None, 1, 2, 2, "1,3"),
        ("7,5,3,1", 1, 2, 2, "5,1"),
        (None, 0, 2, 3, None),
        (None, 0, 4, 2, None),
    ],
)
def test_tensor_parallel_gets_gpus_that_no_rank_trains_on(monkeypatch, visible, index, ranks, tensor_parallel, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = torch.device("cuda", index)
    if expected is None:
        with (
            pytest.raises(UserError, match=rf"tensor_parallel_size={tensor_parallel}: each of the {ranks} ranks.*engine\.server"),
            apart(gpu, tensor_parallel),
        ):
            pass
        return
    with apart(gpu, tensor_parallel):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


@pytest.mark.parametrize("told", ["2", "2(x3)", "2,1"])
def test_under_srun_ranks_are_counted_too(monkeypatch, told):
    """Neither srun nor Lightning says LOCAL_WORLD_SIZE there."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", told)
    with apart(torch.device("cuda", 0), 2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"


def model_of(billions: float, dtype: torch.dtype, trained: bool = True) -> torch.nn.Module:
    model = torch.nn.Module()
    with torch.device("meta"):
        model.weight = torch.nn.Parameter(torch.empty(int(billions * 1e9), dtype=dtype), requires_grad=trained)
    return model


@pytest.mark.parametrize(
    ("billions", "dtype", "trained", "reserved", "left", "pieces"),
    [
        (3.2, torch.bfloat16, True, 6, 0.92 * 79.6 - 14 * 3.2e9 / GIB, 1),  # weights, masters, moments
        (3.2, torch.bfloat16, True, 18, 0.92 * 79.6 - 14 * 3.2e9 / GIB, 1),  # the same once the masters are there
        (1.2, torch.float32, True, 5, 0.92 * 79.6 - 12 * 1.2e9 / GIB, 1),
        (8.0, torch.bfloat16, False, 15, 0.92 * 79.6 - 2 * 8e9 / GIB, 1),
        (8.0, torch.bfloat16, True, 15, None, 1),
        (8.0, torch.bfloat16, True, 20, 0.92 * 79.6 - (2 + 12 / 4) * 8e9 / GIB, 4),
        (8.0, torch.bfloat16, False, 20, 0.92 * 79.6 - (2 + 2 / 4) * 8e9 / GIB, 4),
    ],
)
def test_its_share_is_what_training_leaves(monkeypatch, billions, dtype, trained, reserved, left, pieces):
    """An 80 GB GPU; before, half of it was asked for, which no longer fitted after a 3B's first step."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int((79.6 - reserved) * GIB), int(79.6 * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(reserved * GIB))
    ask = lambda: share(model_of(billions, dtype, trained), torch.bfloat16, torch.device("cuda"), pieces)  # noqa: E731
    if left is None:
        with pytest.raises(UserError, match=r"of the GPU's 80 GiB training keeps 104 .* peft=lora"):
            ask()
        return
    assert ask() == pytest.approx(left / 79.6, abs=0.01)


def test_a_tensor_of_another_gpu_is_looked_for_on_the_first_that_vllm_sees(monkeypatch):
    """CUDA's handles name the trainer's GPU by the trainer's number."""
    values = torch.arange(10.0)
    opened = []

    def rebuild(*arguments):
        opened.append(arguments[6])
        return values

    handle = (
        rebuild_cuda_tensor,
        (torch.Tensor, (10,), (1,), 0, torch.UntypedStorage, torch.float32, 3, b"handle"),
        [("a", (2, 3)), ("b", (4,))],
    )
    monkeypatch.setattr(pickle, "loads", lambda _: handle)
    monkeypatch.setattr(handover, "rebuild_cuda_tensor", rebuild)
    handle = (rebuild, *handle[1:])
    found = dict(unpacked(b"", torch.device("cpu")))
    assert opened == [0]
    assert torch.equal(found["a"], values[:6].view(2, 3))
    assert torch.equal(found["b"], values[6:])
    assert found["b"].data_ptr() != values[6:].data_ptr()  # a copy: the trainer's memory is used again


def test_a_piece_passes_from_process_to_process_whole():
    piece = [("a", torch.randn(3, 4)), ("b", torch.randn(5))]
    kept = torch.cat([t.reshape(-1) for _, t in piece])
    for name, tensor in unpacked(packed(kept, piece), torch.device("cpu")):
        assert torch.equal(tensor, dict(piece)[name])


def test_pieces_hold_every_weight_once_and_stay_small(tiny, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(handover, "PIECE_BYTES", 20_000)
    found = list(pieces(model, torch.float32))
    assert [name for piece in found for name, _ in piece] == [name for name, _ in model.named_parameters()]
    assert all(len(piece) == 1 or sum(t.nbytes for _, t in piece) <= 20_000 for piece in found)
    assert len(found) > 3


def test_what_a_killed_run_left_in_shared_memory_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = passing(str(tmp_path)).name.partition(f"{os.getpid()}-")[0]  # of this host and this space of process numbers
    names = (f"{mine}{ended.pid}", f"{mine}1", f"emreason-{platform.node()}-1-{ended.pid}", "emreason-other-9")
    left, living, container, another = folders = [tmp_path / f"{name}-x" for name in names]
    for folder in folders:
        folder.mkdir()
    made = passing(str(tmp_path))
    assert [folder.exists() for folder in (left, living, container, another, made)] == [False, True, True, True, True]


def test_files_go_where_there_is_room(monkeypatch):
    monkeypatch.setattr(handover.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))  # a container's /dev/shm
    assert roomy(2**20) == "/dev/shm"
    assert roomy(2**30) is None
    monkeypatch.setattr(handover.Path, "is_dir", lambda _: False)
    assert roomy(1) is None


def test_every_way_of_writing_weights_is_noticed(tiny):
    model, _ = tiny
    seen = [version(model)]

    def changed() -> bool:
        seen.append(version(model))
        return seen[-1] != seen[-2]

    assert not changed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert not changed()
    optimizer.step()
    assert changed()
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    assert changed()
    model.to(torch.bfloat16)
    assert changed()
    parameter = next(model.parameters())
    dithered(torch.zeros(parameter.shape), 1, out=parameter.detach())  # by C code, where there is a compiler
    assert changed()
    parameter.data[0, 0] += 1
    assert changed()
    assert not changed()


def test_another_adapter_is_noticed(tiny):
    model, _ = tiny
    model = add_lora(model, r=2, alpha=4)
    model.add_adapter("other", model.peft_config["default"])
    before = version(model)
    model.set_adapter("other")
    assert version(model) != before


@pytest.mark.usefixtures("fake")
def test_tokens_drawn_ahead_after_the_answer_line_are_dropped(tiny, monkeypatch):
    """A server sends several tokens at once."""
    model, tokenizer = tiny
    engine = VllmEngine(model, tokenizer)
    monkeypatch.setattr(engine, "_has_newline", lambda token: token == 9)
    request = Request(0, (3,), SamplingParams(), stop=lambda ids: ids.count(9) == 2)
    done = engine._finished(request, 0, vllm.Drawn("0", [7, 9, 8, 9, 6, 9], [-1.0] * 6, "length"))
    assert (done.token_ids, done.logprob, done.finish_reason) == ((7, 9, 8, 9), -4.0, "answer")
    assert engine._finished(request, 4, vllm.Drawn("0", [7, 8, 9, 8], [-1.0] * 4, None)) is None


def test_an_adapter_of_the_embedding_is_refused_by_name():
    """vLLM knows no such parameters."""
    model, _ = load_tiny("llama", seed=0)
    adapted = add_lora(model, r=4, alpha=8, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="adapters of linear layers only"):
        dict(handover.merged_weights(adapted))

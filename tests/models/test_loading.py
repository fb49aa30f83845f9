"""A GGUF is converted once, to the run's precision, and mapped; nothing that is trained reaches the file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf_file import write_gguf
from transformers import AutoModelForCausalLM

from emreason.bench.runners import train_ours
from emreason.engines.decoder import FusedDecoder
from emreason.models import loading
from emreason.models.families import base_causal_lm, read_facts
from emreason.models.loading import load_gguf, weights_fingerprint
from emreason.models.memory import let_go
from emreason.models.sizes import gguf_cache, parameters
from emreason.models.tiny import load_tiny
from emreason.types import UserError


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def file(written, tmp_path, monkeypatch):
    """A GGUF whose copies are this test's own."""
    monkeypatch.setenv("EMREASON_CACHE", str(tmp_path / "cache"))
    return written


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mapped_from(tensor) -> str:
    """The file that a tensor's memory is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_is_kept_in_the_precision_of_the_run_and_mapped(file, dtype):
    raw = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    cached = gguf_cache(file, str(dtype).removeprefix("torch."))
    for _ in range(2):  # converted, and found again
        model, tokenizer = load_gguf(str(file), dtype)
        assert tokenizer.eos_token == "<|endoftext|>"
        for (name, weight), (expected_name, expected) in zip(model.named_parameters(), raw.named_parameters(), strict=True):
            assert name == expected_name
            assert weight.dtype == dtype
            assert torch.equal(weight, expected.to(dtype))  # rounded once, to nearest
            assert mapped_from(weight) == str(weights_of(cached))
        before = weights_of(cached).stat().st_mtime_ns
    assert weights_of(cached).stat().st_mtime_ns == before
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    assert weights_of(cached).stat().st_size < 1.1 * dtype.itemsize * sum(p.numel() for p in model.parameters())
    assert parameters({"path": str(file)}) == sum(p.numel() for p in model.parameters())


def test_a_family_of_which_values_would_be_computed_in_bfloat16_is_converted_from_float32(file, monkeypatch):
    read = AutoModelForCausalLM.from_pretrained

    def reading(*arguments, dtype, **options):
        model = read(*arguments, dtype=dtype, **options)
        if "gguf_file" in options:
            model.hf_quantizer = SimpleNamespace(supported=True)
            if dtype == torch.bfloat16:
                for parameter in model.parameters():
                    parameter.data.mul_(1.01)
        return model

    expected = weights_fingerprint(load_gguf(str(file), torch.float32)[0].to(torch.bfloat16))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reading)
    assert weights_fingerprint(load_gguf(str(file), torch.bfloat16)[0]) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_leaves_the_copy_as_it_was(file, dtype):
    start = weights_fingerprint(load_gguf(str(file), getattr(torch, dtype))[0])
    cached = gguf_cache(file, dtype)
    before = digest(weights_of(cached))
    sequences = [[list(range(4 + i)), [40 + i, 257, 41]] for i in range(4)]
    work = {"model": str(cached), "dtype": dtype, "device": "cpu", "batch": 4, "sequences": sequences * 3}
    losses = train_ours.main(work)["rows"][0]["losses"]
    assert losses[0] > losses[1] > losses[2]  # it was trained
    assert digest(weights_of(cached)) == before
    assert weights_fingerprint(load_gguf(str(file), getattr(torch, dtype))[0]) == start


def test_two_runs_that_convert_at_the_same_time_both_load(file, tmp_path):
    script = (
        "import sys, time, torch; from emreason.models.loading import load_gguf, weights_fingerprint\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(weights_fingerprint(load_gguf(sys.argv[1], torch.bfloat16)[0]))"
    )
    command = [sys.executable, "-c", script, str(file)]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert told[0] == told[1] != ""
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [gguf_cache(file, "bfloat16").name]


def test_the_copy_of_another_that_was_first_is_taken(file, monkeypatch):
    """The other process's copy appears between this one's look and its renaming."""
    convert, mine = loading._convert, gguf_cache(file, "float32")

    def late(folder, gguf_file, dtype, cached):
        convert(folder, gguf_file, dtype, cached)
        mark = cached / "of the other"
        mark.touch()
        convert(folder, gguf_file, dtype, cached)
        assert mark.exists()

    monkeypatch.setattr(loading, "_convert", late)
    load_gguf(str(file), torch.float32)
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    def full(_, folder, **__):
        (Path(folder) / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match=r"No space left on device.*EMREASON_CACHE"):
        load_gguf(str(file), torch.float32)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_nothing_has_loaded_for_a_month_is_removed_at_a_conversion(file, tmp_path):
    key, day = "0123456789ab", 86_400
    ages = {
        f"a-{key}": 31, f"b-{key}": 29, f"c-{key}-bfloat16": 31, f"d-{key}-float32": 29, "notes": 400, f"other {key}": 400,
        f"e-{key}-bfloat16.partial-17": 2, f"f-{key}-bfloat16.partial-17": 0.5,
    }  # fmt: skip
    for name, age in ages.items():
        folder = tmp_path / "cache" / name
        folder.mkdir(parents=True)
        (folder / "file").touch()
        os.utime(folder, times=(time.time() - age * day,) * 2)
    load_gguf(str(file), torch.bfloat16)
    mine = gguf_cache(file, "bfloat16").name
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {mine, f"b-{key}", f"d-{key}-float32", "notes", f"other {key}", f"f-{key}-bfloat16.partial-17"}
    old = time.time() - 40 * day
    os.utime(tmp_path / "cache" / mine, times=(old, old))
    load_gguf(str(file), torch.bfloat16)  # used: not old any more
    assert (tmp_path / "cache" / mine).stat().st_mtime > time.time() - day


# ---- letting mapped weights go -----------------------------------------------------------------------------------------------------------


def resident(tensor) -> int:
    """Pages of a tensor in this process's memory."""
    begin, end = -(-tensor.data_ptr() // 4096), (tensor.data_ptr() + tensor.nbytes) // 4096
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(8 * begin)
        return int((np.frombuffer(pagemap.read(8 * (end - begin)), dtype=np.uint64) >> 63).sum())


@linux
def test_a_mapped_weight_is_let_go_unless_it_was_written_to(file):
    model, _ = load_gguf(str(file), torch.float32)
    frozen, written = model.model.layers[0].mlp.up_proj.weight.data, model.model.layers[1].mlp.up_proj.weight.data
    of_its_own = torch.arange(2**16, dtype=torch.float32)
    before = [t.clone() for t in (frozen, of_its_own)]
    written[3, 5] = 7.0  # one page of it
    expected = written.clone()
    for tensor in (frozen, written, of_its_own):
        assert resident(tensor)
        let_go(tensor)
    assert resident(frozen) == 0
    assert resident(written) > 0
    assert torch.equal(frozen, before[0])
    assert torch.equal(written, expected)
    assert torch.equal(of_its_own, before[1])


@linux
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bfloat16 weights are packed where the processor has them")
@pytest.mark.parametrize("adapted", [False, True])
def test_packed_weights_take_the_place_of_the_mapped_ones(file, adapted):
    model, _ = load_gguf(str(file), torch.bfloat16)
    if adapted:
        model = loading.add_lora(model, r=2, alpha=4)
    facts = read_facts(base_causal_lm(model))
    weights = [
        getattr(module, "base_layer", module).weight
        for layer in facts.layers
        for module in (*layer.qkv, layer.o, *layer.gate_up, layer.down)
    ]

    def held() -> float:
        return sum(map(resident, weights)) / sum(weight.nbytes // 4096 for weight in weights)

    weights_fingerprint(model)
    assert held() < 0.25  # the kernel maps a few pages around the one that is read
    for weight in weights:
        weight.sum()
    assert held() > 0.9
    with torch.inference_mode():
        FusedDecoder(base_causal_lm(model), facts)
    assert held() < 0.25


@pytest.mark.parametrize(
    ("product", "expected"),
    [({"float32": 0.012, "bfloat16": 0.004}, torch.bfloat16), ({"float32": 0.004, "bfloat16": 0.009}, torch.float32)],
)
@pytest.mark.parametrize("busy_from", [0.0, 0.05, 0.09, 0.15])
def test_auto_is_the_faster_type_though_the_machine_is_busy_for_a_while(monkeypatch, product, expected, busy_from):
    """Two runs that started at once: every product took four times as long for a fifth of a second, which fell on bfloat16's alone."""
    now = [0.0]

    def linear(a, b):  # noqa: ARG001
        busy = busy_from <= now[0] < busy_from + 0.2
        now[0] += product[str(a.dtype).removeprefix("torch.")] * (4 if busy else 1)

    monkeypatch.setattr(loading.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loading.nn.functional, "linear", linear)
    assert loading.choose_dtype("auto", torch.device("cpu")) is expected
    assert now[0] < 0.5


def test_too_little_memory_is_not_told_as_a_wrong_path(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model, tokenizer = load_tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        loading.load_pretrained(str(tmp_path))

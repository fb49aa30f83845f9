"""Running out of memory: the E-step goes on with half the batch, the M-step says what to change."""

from __future__ import annotations

import subprocess
import sys
from collections import deque

import pytest
import torch

from emreason import train
from emreason.engines import inprocess
from emreason.engines.decoder import FusedDecoder, make_decoder
from emreason.engines.inprocess import InProcessEngine
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams, UserError


def too_full(decoder_class, monkeypatch, rows: int, error: type[BaseException] = torch.OutOfMemoryError) -> None:
    """Decoding more than `rows` rows runs out of memory."""
    decode = decoder_class.decode

    def limited(self, tokens, lengths, longest):
        if len(lengths) > rows:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return decode(self, tokens, lengths, longest)

    monkeypatch.setattr(decoder_class, "decode", limited)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_draws_the_same(monkeypatch, caplog, error) -> None:
    model, tokenizer = load_tiny("llama", seed=0)
    prompts = [tuple(range(5, 5 + n)) for n in (3, 9, 4, 600, 7, 5, 8, 6, 3, 4, 9)]  # the fourth does not fit the context

    def outcome(engine):
        queue = deque(Request(i, p, SamplingParams(max_new_tokens=12), seed=i) for i, p in enumerate(prompts))
        return {c.request.key: (c.token_ids, c.finish_reason) for c in engine.generate(queue)}

    expected = outcome(InProcessEngine(model, tokenizer, max_batch=8))
    too_full(FusedDecoder, monkeypatch, 3, error)
    engine = InProcessEngine(model, tokenizer, max_batch=8)
    assert outcome(engine) == expected
    assert expected[3][1] == "error"
    assert engine.max_batch == 2
    assert [r.getMessage() for r in caplog.records] == [
        "Out of memory with 8 completions at once; going on with engine.max_batch=4",
        "Out of memory with 4 completions at once; going on with engine.max_batch=2",
    ]
    caplog.clear()
    assert outcome(engine) == expected
    assert not caplog.records  # said once


@pytest.mark.parametrize("last", [3, 30])
def test_the_last_long_ones_do_not_halve_the_batch_for_ever(monkeypatch, caplog, last) -> None:
    """The cache keeps the rows of those that have ended, and it is the long ones' width that it has no room for."""
    model, tokenizer = load_tiny("llama", seed=0)
    grow = FusedDecoder.reserve

    def reserve(self, rows, width):
        have = self.keys[0].shape[0] if self.keys else 0
        if max(rows, have) * width > 48 * 192:
            raise torch.OutOfMemoryError("CUDA out of memory")
        grow(self, rows, width)

    engine = InProcessEngine(model, tokenizer, max_batch=48)
    engine.eos_ids = frozenset()

    def outcome():
        queue = deque(Request(i, (5, 6), SamplingParams(max_new_tokens=n), seed=i) for i, n in enumerate([20] * (60 - last) + [230] * last))
        return {c.request.key: c.token_ids for c in engine.generate(queue)}

    expected = outcome()
    monkeypatch.setattr(FusedDecoder, "reserve", reserve)
    monkeypatch.setattr(inprocess, "RESERVED", 16)
    assert outcome() == expected
    assert engine.max_batch == 48
    assert [r.getMessage() for r in caplog.records] == [f"Out of memory with the last {last} completions; they are drawn again"]


def test_out_of_memory_with_one_row_names_what_to_change(monkeypatch) -> None:
    model, tokenizer = load_tiny("llama", seed=0)
    make_decoder(model)  # which has checked itself then
    too_full(FusedDecoder, monkeypatch, 0)
    with pytest.raises(UserError, match=r"engine\.dtype=bfloat16.*sampler\.max_new_tokens"):
        list(InProcessEngine(model, tokenizer).generate(deque([Request(0, (5, 6), SamplingParams())])))


def test_other_errors_of_a_decoder_are_not_taken_for_a_lack_of_memory(monkeypatch) -> None:
    model, tokenizer = load_tiny("llama", seed=0)
    make_decoder(model)
    monkeypatch.setattr(FusedDecoder, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(InProcessEngine(model, tokenizer).generate(deque([Request(0, (5, 6), SamplingParams())])))


def test_out_of_memory_in_the_m_step_names_the_settings(monkeypatch, tmp_path, capfd) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("emreason.em.m_step.token_logprobs", full)
    monkeypatch.setattr(sys, "argv", ["emreason", "experiment=smoke", "engine.dtype=float32", f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for word in ("Out of memory", "m_step.tokens_per_batch", "m_step.gradient_checkpointing=true", "peft=lora"):
        assert word in error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_blocks_are_given_back_in_the_m_step_alone() -> None:
    script = """
import psutil, torch
from emreason.models.memory import LARGE, keep_freed_memory, map_large_blocks

def kept(size):
    before = psutil.Process().memory_info().rss
    block = torch.ones(size // 4)
    above = torch.ones(1024)  # what is free below it stays in the heap
    del block
    return (psutil.Process().memory_info().rss - before) / size > 0.9, above

keep_freed_memory()
map_large_blocks()
m_step, a = kept(4 * LARGE)
keep_freed_memory()
e_step, b = kept(4 * LARGE)
print(m_step, e_step)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "True"]


def test_out_of_memory_before_the_first_token_is_told_as_the_e_steps(monkeypatch) -> None:
    """Copies of the weights for decoding are made first; an M-step's advice would not help there."""
    model, tokenizer = load_tiny("llama", seed=0)

    def full(*_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(inprocess, "make_decoder", full)
    with pytest.raises(UserError, match=r"engine\.dtype=bfloat16.*sampler\.max_new_tokens"):
        list(InProcessEngine(model, tokenizer).generate(deque([Request(0, (5, 6), SamplingParams())])))

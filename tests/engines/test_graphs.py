"""A recorded step draws what the step draws: on a CPU, by a tape of its operations that is played on the same tensors, as a graph is."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import Looks
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from emreason.engines import decoder as room
from emreason.engines import inprocess, packing
from emreason.engines.inprocess import InProcessEngine
from emreason.engines.ops import TorchOps
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams


class Tape(TorchDispatchMode):
    """Keeps what is called, with which tensors; a look at a value, which no graph can have, raises as a capture does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in {*Looks.WAITS, "item"}:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(out, again, strict=True) if isinstance(out, list | tuple) else [(out, again)]
            for there, new in pairs:
                if isinstance(there, torch.Tensor) and there.data_ptr() != new.data_ptr():
                    there.copy_(new)


class Recorder:
    """Stands in for `cuda_recorder`."""

    def __init__(self) -> None:
        self.recorded, self.played = 0, 0

    def __call__(self) -> Any:
        return self.record

    def record(self, step: Callable[[], Any]) -> Any:
        tape = Tape()
        with tape:
            drawn = step()
        self.recorded += 1

        def play() -> None:
            self.played += 1
            tape.play()

        return play, drawn


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's operations, and adapters apart."""
    monkeypatch.setattr(room, "make_ops", lambda _dtype, _device, facts: TorchOps(facts))
    monkeypatch.setattr(packing, "COPIES", ())


def drawn(model: Any, tokenizer: Any, recorder: Recorder | None, rows: int = 11, temperatures: tuple[float, ...] = (1.0,)) -> Any:
    """24 requests of several lengths, over two widths of the cache and its growth; of `engine.stats.steps` some are played."""
    engine = InProcessEngine(model, tokenizer, max_batch=rows)
    engine.look_every, engine.recorder, engine.eos_ids = 4, recorder, frozenset()
    params = [SamplingParams(temperatures[i % len(temperatures)], 0.9 if i % 7 == 6 else 1.0, 40 + 9 * (i % 5)) for i in range(24)]
    work = deque(Request(i, tuple(range(5, 30 + i)), params[i], i) for i in range(24))
    done = {c.request.key: (c.token_ids, round(c.logprob, 3)) for c in engine.generate(work)}
    return done, engine.stats.steps


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_recorded_steps_draw_what_the_steps_draw(kind, monkeypatch):
    monkeypatch.setattr(inprocess, "RESERVED", 16)  # the cache grows on the way
    model, tokenizer = load_tiny(kind, seed=0)
    if kind == "llama":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    temperatures = (1.0, 0.7, 0.0)
    recorder = Recorder()
    (expected, _), (got, steps) = (drawn(model, tokenizer, way, temperatures=temperatures) for way in (None, recorder))
    assert got == expected
    print(f"{recorder.played} of {steps} steps played, {recorder.recorded} recorded")
    assert 2 < recorder.recorded < recorder.played / 3  # the cache has grown, the width passed 64 and 128
    assert recorder.played > steps / 4


def test_rows_in_between_are_nobody_s():
    """A batch of three takes the step of eight rows."""
    model, tokenizer = load_tiny("llama", seed=0)
    recorder = Recorder()
    assert drawn(model, tokenizer, recorder, rows=3)[0] == drawn(model, tokenizer, None, rows=3)[0]
    assert recorder.played


@pytest.mark.parametrize("planted", ["a look", "a number of the host"])
def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(planted, monkeypatch, caplog):
    model, tokenizer = load_tiny("llama", seed=0)
    expected, _ = drawn(model, tokenizer, None)
    decode, counted = inprocess._Batch._decode, iter(range(10**6))

    def wrong(self, longest):
        ids, logprobs = decode(self, longest)
        return ids, logprobs + (int(self.state[0, 0]) if planted == "a look" else float(next(counted)))

    monkeypatch.setattr(inprocess._Batch, "_decode", wrong)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        got, _ = drawn(model, tokenizer, recorder)
    assert {i: ids for i, (ids, _) in got.items()} == {i: ids for i, (ids, _) in expected.items()}
    assert caplog.text.count("Decoding goes on without CUDA graphs") == 1
    assert ("not permitted" in caplog.text) == (planted == "a look")


def test_memory_that_runs_out_is_told_as_such():
    """The engine halves its batch then; a graph is not given up for it."""
    model, tokenizer = load_tiny("llama", seed=0)
    recorder = Recorder()
    record, left = recorder.record, [1]

    def full(step):
        if left and left.pop():
            raise torch.OutOfMemoryError("planted")
        return record(step)

    recorder.record = full
    expected, _ = drawn(model, tokenizer, None)
    got, _ = drawn(model, tokenizer, recorder)
    assert got == expected
    assert recorder.played

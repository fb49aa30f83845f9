"""`make test-vllm`: the vLLM engine for real. Not part of `make test`: vLLM needs an environment of its own."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from conftest import numbers

from emreason.engines.inprocess import InProcessEngine
from emreason.model import add_lora
from emreason.tiny import load_tiny
from emreason.types import Request, SamplingParams

vllm_engine = pytest.importorskip("emreason.engines.vllm")
pytest.importorskip("vllm")

GREEDY = SamplingParams(0.0, 1.0, 16)


@pytest.fixture(scope="module", params=["llama", "qwen2", "lora"])
def pair(request):
    """A model, and both engines on it."""
    model, tokenizer = load_tiny("llama" if request.param == "lora" else request.param, hidden_size=128, dtype=torch.float32)
    if request.param == "lora":
        model = add_lora(model, r=4, alpha=8)
    ours = InProcessEngine(model, tokenizer)
    theirs = vllm_engine.VllmEngine(model, tokenizer, max_batch=4, max_length=256, options={"enforce_eager": True})
    return model, tokenizer, ours, theirs


def prompts(tokenizer, n=6):
    return [tuple(tokenizer.encode(question.text)) for question in numbers(n)]


def draw(engine, tokenizer, params=GREEDY, seed=0, stop=None):
    queue = deque(Request(i, p, params, seed + i, stop) for i, p in enumerate(prompts(tokenizer)))
    return {c.request.key: c for c in engine.generate(queue)}


def perturb(model, scale):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def ids(completions):
    return {key: c.token_ids for key, c in completions.items()}


def test_greedy_outputs_follow_the_weights(pair):
    """Stale weights, adapters or cached prefixes would give yesterday's tokens (vllm#32718, trl#6007)."""
    model, tokenizer, ours, theirs = pair
    seen = []
    for _ in range(3):
        expected, got = draw(ours, tokenizer), draw(theirs, tokenizer)
        assert ids(got) == ids(expected)
        for key, completion in got.items():
            assert completion.logprob == pytest.approx(expected[key].logprob, abs=1e-2)
            assert completion.finish_reason == expected[key].finish_reason
        seen.append(ids(got))
        perturb(model, 0.2)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_a_draw_depends_on_its_seed(pair):
    _, tokenizer, _, theirs = pair
    params = SamplingParams(1.0, 1.0, 16)
    first, again, other = (ids(draw(theirs, tokenizer, params, seed)) for seed in (0, 0, 100))
    assert first == again
    assert first != other


def test_a_next_attempt_enters_while_others_run_and_long_prompts_are_errors(pair):
    _, tokenizer, _, theirs = pair
    some = prompts(tokenizer)
    queue = deque([Request("long", some[0] * 100, GREEDY), *(Request(i, p, GREEDY) for i, p in enumerate(some))])
    done = []
    for completion in theirs.generate(queue):
        done.append(completion)
        if completion.request.key == 0:
            queue.appendleft(Request("again", some[0], GREEDY))
    by_key = {c.request.key: c for c in done}
    assert by_key["long"].finish_reason == "error"
    assert by_key["again"].token_ids == by_key[0].token_ids
    assert len(done) == len(some) + 2


def test_a_completion_ends_at_its_answer_line(pair, monkeypatch):
    _, tokenizer, _, theirs = pair
    monkeypatch.setattr(theirs, "_has_newline", lambda _: True)
    done = draw(theirs, tokenizer, stop=lambda drawn: len(drawn) >= 3)
    assert {c.finish_reason for c in done.values()} <= {"answer", "stop"}
    assert all(len(c.token_ids) <= 3 for c in done.values())
    assert set(ids(draw(theirs, tokenizer))) == set(done)  # nothing of the ended requests is left behind

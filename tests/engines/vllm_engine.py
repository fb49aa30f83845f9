"""`make test-vllm`: the vLLM engine for real. Not part of `make test`: vLLM needs an environment of its own."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from conftest import numbers

from emreason.engines import handover
from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import add_lora
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams, UserError

vllm_engine = pytest.importorskip("emreason.engines.vllm")
pytest.importorskip("vllm")

GREEDY = SamplingParams(0.0, 1.0, 16)


@pytest.fixture(scope="module", params=["llama", "untied", "qwen2", "lora"])
def pair(request):
    """A model, and both engines on it."""
    model, tokenizer = load_tiny("qwen2" if request.param == "qwen2" else "llama", hidden_size=128, dtype=torch.float32)
    if request.param == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if request.param == "lora":
        model = add_lora(model, r=4, alpha=8)
    ours = InProcessEngine(model, tokenizer)
    # four prompts of `LONG` characters are more than a step may hold, and each has whole blocks for the prefix cache
    options = {"enforce_eager": True, "max_num_batched_tokens": 256, "block_size": 32}
    theirs = vllm_engine.VllmEngine(model, tokenizer, max_batch=4, max_length=256, options=options)
    return model, tokenizer, ours, theirs


LONG = 100


def prompts(tokenizer, n=6):
    return [tuple(tokenizer.encode((question.text + " ") * (LONG // len(question.text)))) for question in numbers(n)]


def draw(engine, tokenizer, params=GREEDY, seed=0, stop=None):
    queue = deque(Request(i, p, params, seed + i, stop) for i, p in enumerate(prompts(tokenizer)))
    return {c.request.key: c for c in engine.generate(queue)}


def perturb(model, scale, name=""):
    """Add noise to the trainable parameters that have `name` in theirs."""
    generator = torch.Generator().manual_seed(1)
    found = [p for n, p in model.named_parameters() if p.requires_grad and name in n]
    assert found, name
    with torch.no_grad():
        for parameter in found:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def ids(completions):
    return {key: c.token_ids for key, c in completions.items()}


def test_greedy_outputs_follow_the_weights(pair):
    """Over three states of the weights, with the same log-probabilities and reasons to end."""
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


KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layernorm", "model.norm")


def test_every_kind_of_weight_is_replaced(pair):
    """vLLM fuses, packs and ties weights: each must arrive, also alone."""
    model, tokenizer, ours, theirs = pair
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = [kind for kind in KINDS if any(kind in name for name in names)] + ["lm_head"] * any("lm_head" in name for name in names)
    before = ids(draw(theirs, tokenizer))
    for kind in kinds:
        perturb(model, 0.5, kind)
        after = ids(draw(theirs, tokenizer))
        assert after != before, kind
        assert after == ids(draw(ours, tokenizer)), kind
        before = after


def test_weights_that_do_not_arrive_are_noticed(pair, monkeypatch):
    """The control of the test above: an engine whose reload does nothing (vllm#32718) gives yesterday's tokens."""
    model, tokenizer, ours, theirs = pair
    before = ids(draw(theirs, tokenizer))
    with monkeypatch.context() as patched:
        patched.setattr(theirs._vllm.llm, "collective_rpc", lambda *_, **__: None)
        perturb(model, 0.2)
        stale = ids(draw(theirs, tokenizer))
    assert stale == before
    theirs._held = None
    assert ids(draw(theirs, tokenizer)) == ids(draw(ours, tokenizer)) != before


def test_the_prefix_cache_does_not_outlive_the_weights(pair, monkeypatch):
    """trl#6007. The control: when it is not reset, the old weights' K/V show in what is drawn."""
    model, tokenizer, ours, theirs = pair
    draw(theirs, tokenizer)
    perturb(model, 0.2)
    assert ids(draw(theirs, tokenizer)) == ids(draw(ours, tokenizer))
    with monkeypatch.context() as patched:
        patched.setattr(theirs._vllm.llm, "reset_prefix_cache", lambda *_, **__: True)
        perturb(model, 0.2)
        stale = ids(draw(theirs, tokenizer))
    theirs._held = None
    fresh = ids(draw(theirs, tokenizer))
    assert fresh == ids(draw(ours, tokenizer))
    assert stale != fresh


def test_weights_are_handed_over_only_when_they_have_changed(pair, monkeypatch):
    model, tokenizer, _, theirs = pair
    draw(theirs, tokenizer)
    calls = []
    real = theirs._vllm.llm.collective_rpc
    monkeypatch.setattr(theirs._vllm.llm, "collective_rpc", lambda name, args: (calls.append(name), real(name, args=args)))
    draw(theirs, tokenizer)
    assert calls == []
    perturb(model, 0.1)
    draw(theirs, tokenizer)
    assert calls == ["begin_weights", "take_weights", "end_weights"]


def test_the_path_through_gpu_memory_with_tensors_in_shared_memory(pair, monkeypatch):
    """The same code as with CUDA's handles, which a CPU has none of: pieces pickled by torch, rebuilt in vLLM's process, copied there."""
    model, tokenizer, ours, theirs = pair
    before = ids(draw(theirs, tokenizer))
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        monkeypatch.setattr(theirs, "_through_gpu", lambda: True)
        monkeypatch.setattr(handover, "PIECE_BYTES", 100_000)  # several, which cut q from k and v
        perturb(model, 0.2)
        after = ids(draw(theirs, tokenizer))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    assert after == ids(draw(ours, tokenizer)) != before


@pytest.mark.parametrize("pair", ["lora"], indirect=True)
def test_another_adapter_under_the_same_name(pair):
    """Adapters cached by name or id would give the first one's tokens."""
    model, tokenizer, ours, theirs = pair
    before = ids(draw(theirs, tokenizer))
    config = model.peft_config["default"]
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    perturb(model, 0.3, "lora_B")
    after = ids(draw(theirs, tokenizer))
    assert after != before
    assert after == ids(draw(ours, tokenizer))


def test_quantised_weights_are_refused(tiny):
    """A merge into 4 or 8 bits loses the adapter's digits (trl#3466)."""
    model, tokenizer = tiny
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        vllm_engine.VllmEngine(model, tokenizer)


def test_a_draw_depends_on_its_seed(pair):
    """Also where the prompts of a step are more than it may hold: cut in two, a seeded one failed on CPUs."""
    _, tokenizer, _, theirs = pair
    params = SamplingParams(1.0, 1.0, 16)
    first, again, other = (ids(draw(theirs, tokenizer, params, seed)) for seed in (0, 0, 100))
    assert first == again
    assert first != other


def test_a_next_attempt_enters_while_others_run_and_long_prompts_are_errors(pair):
    _, tokenizer, _, theirs = pair
    some = prompts(tokenizer)
    queue = deque([Request("long", some[0] * 10, GREEDY), *(Request(i, p, GREEDY) for i, p in enumerate(some))])
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

"""What a batch of the M-step asks of a GPU: copies, waits, kernels; on tensors that only say they are there, and on real ones of a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fake_cuda import Counted, Looks, fake_cuda, on_the_gpu
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from emreason.em.m_step import accumulate, scorer
from emreason.models import families
from emreason.models.batches import Batch, Example, Marks, Step, collate
from emreason.models.tiny import load_tiny
from emreason.scores import scoring

SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
A_LAYER, THE_REST = 70, 60
UNSHARED, SHARED = [(7 + i, *range(9 + i)) for i in range(5)], [tuple(range(20 + i)) for i in range(5)]


@pytest.fixture(autouse=True)
def a_plain_head(monkeypatch):
    """Once per model numbers are multiplied on the CPU to see what its head does: not here, where there are none."""
    monkeypatch.setattr(families, "_measured_factor", lambda _: 1.0)


def batch_of(prompts: list[tuple[int, ...]]) -> Batch:
    return collate([Example(str(i), ids, tuple(range(12 - i))) for i, ids in enumerate(prompts)], [0.2] * len(prompts), 0)


def on_the_gpus_host(mode: Any, batch: Batch) -> Batch:
    """`batch` as it is where the model is on a fake GPU: in the host's memory, its values not to be looked at."""

    def faked(part: Any) -> Any:
        return mode.from_tensor(part) if isinstance(part, torch.Tensor) else part

    marks = Marks(**{f.name: faked(getattr(batch.marks, f.name)) for f in dataclasses.fields(Marks)})
    return Batch(faked(batch.input_ids), faked(batch.completion_mask), faked(batch.weights), batch.question_ids, marks)


def a_batch(prompts: list[tuple[int, ...]], layers: int = 2, adapters: bool = False, again: bool = False) -> Counted:
    """What is counted in the forward pass of one."""
    batch = batch_of(prompts)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).train()
    if adapters:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainable = [p.requires_grad for p in model.parameters()]
    with fake_cuda() as mode:
        model = on_the_gpu(model)
        for p, trains in zip(model.parameters(), trainable, strict=True):
            p.requires_grad_(trains)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        there = on_the_gpus_host(mode, batch)
        with Counted() as counted:
            logprobs = scoring.token_logprobs(model, there.input_ids, there.completion_mask, marks=there.marks)
        assert logprobs.requires_grad
        assert logprobs.device.type == "cuda"
    assert len(logprobs) == int(batch.completion_mask.sum())
    return counted


@pytest.mark.parametrize("prompts", [UNSHARED, SHARED])
@pytest.mark.parametrize(("adapters", "again"), [(False, False), (True, False), (False, True)])
def test_a_batch_waits_for_nothing(prompts, adapters, again):
    counted = a_batch(prompts, adapters=adapters, again=again)
    print(f"copies from the host: {counted.up}, waited for: {counted.waited}; looks at the device: {counted.down}")
    assert (counted.up, counted.waited, counted.down) == (4, 0, 0)  # ids and marks


def test_kernels_of_a_batch():
    two, four = (sum(a_batch(UNSHARED, layers).kernels.values()) for layers in (2, 4))
    a_layer = (four - two) // 2
    print(f"kernels a layer: {a_layer}, of the rest of a forward pass: {two - 2 * a_layer}")
    assert a_layer <= A_LAYER
    assert two - 2 * a_layer <= THE_REST


def test_on_real_tensors_a_step_is_looked_at_only_when_it_is_over(monkeypatch):
    """Backward included, which fake tensors do not run. One look is transformers' own, at each batch whose rows begin unlike."""
    monkeypatch.setattr(scoring, "can_pack_rows", lambda _: False)
    model, _ = load_tiny("llama", seed=0)
    step = Step([batch_of([tuple(i % 90 for i in ids) for ids in prompts]) for prompts in (UNSHARED, SHARED)])
    with Looks() as looks:
        accumulate(scorer(model), step.batches, torch.device("cpu"), 0)
    print(dict(looks.found))
    assert dict(looks.found) == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("planted", ["mask", "item", "arange", "copy"])
def test_what_a_gpu_would_suffer_from_is_noticed(planted, monkeypatch):
    head, layer = scoring.head_logprobs, LlamaDecoderLayer
    forward = layer.forward

    def by_mask(causal_lm, x, targets, *rest):
        return head(causal_lm, x[torch.ones(len(x), dtype=torch.bool, device=x.device)], targets, *rest)

    def looks(causal_lm, x, *rest):
        return head(causal_lm, x * float(x.detach().sum()), *rest)

    def copied(causal_lm, x, targets, *rest):
        return head(causal_lm, x, torch.zeros(len(targets), dtype=torch.long).to(x.device), *rest)

    def counts_anew(self, hidden_states, *rest, **more):
        for _ in range(40):
            torch.arange(3, device=hidden_states.device)
        return forward(self, hidden_states, *rest, **more)

    if planted == "arange":
        monkeypatch.setattr(layer, "forward", counts_anew)
        with pytest.raises(AssertionError):
            test_kernels_of_a_batch()
        return
    monkeypatch.setattr(scoring, "head_logprobs", {"mask": by_mask, "item": looks, "copy": copied}[planted])
    noticed = (RuntimeError, AssertionError, DataDependentOutputException, DynamicOutputShapeException)
    with pytest.raises(noticed):
        test_a_batch_waits_for_nothing(UNSHARED, False, False)
    if planted != "copy":  # on a CPU nothing is copied
        with monkeypatch.context() as inner, pytest.raises(AssertionError):
            test_on_real_tensors_a_step_is_looked_at_only_when_it_is_over(inner)

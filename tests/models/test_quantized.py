"""A base model in four or eight bits under adapters: trained on, and decoded from what it is; with bitsandbytes, on a CPU."""

from __future__ import annotations

import functools
import importlib.util
from collections import deque

import pytest
import torch

from emreason.em.m_step import MStep, accumulate, scorer
from emreason.em.module import EMModule
from emreason.engines.decoder import make_decoder
from emreason.engines.forward import BatchedDecoder
from emreason.engines.inprocess import InProcessEngine
from emreason.engines.vllm import VllmEngine
from emreason.models import loading
from emreason.models.batches import Example, Step, collate
from emreason.models.footprint import Work, footprint, read_shape
from emreason.models.loading import add_lora, export, load_adapter, load_pretrained, weights_fingerprint
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams, UserError

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra `quantized` is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    export(*load_tiny("llama", seed=0, hidden_size=128), path / "model")
    return str(path / "model")


def a_step(tokenizer):
    rows = [Example(str(i), tuple(range(5, 20 + i)), tuple(range(30, 42))) for i in range(4)]
    return Step([collate(rows, [1 / 48] * 4, tokenizer.pad_token_id)])


@installed
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_learn_on_it_and_it_is_decoded_from_what_it_is(folder, quantization, tmp_path):
    model, tokenizer = load_pretrained(folder, torch.bfloat16, quantization=quantization)
    floats, _ = load_pretrained(folder, torch.bfloat16)
    assert sum(p.nbytes for p in model.model.layers.parameters()) < 0.6 * sum(p.nbytes for p in floats.model.layers.parameters())
    model = add_lora(model, r=4, alpha=8)
    engine = InProcessEngine(model, tokenizer, max_batch=3)
    module = EMModule(model, tokenizer, engine, None, functools.partial(torch.optim.AdamW, lr=1e-2), MStep())
    optimizer = module.configure_optimizers()["optimizer"]
    assert {p.dtype for p in module.trainable()} == {torch.float32}
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    before, losses = weights_fingerprint(model), []
    for _ in range(6):
        losses.append(float(accumulate(scorer(model.train()), a_step(tokenizer).batches, torch.device("cpu"), 0)[0]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert weights_fingerprint(model) != before
    assert all(torch.equal(p, q) for p, q in zip(frozen, (p for p in model.parameters() if not p.requires_grad), strict=True))
    model.eval()
    assert isinstance(make_decoder(model), BatchedDecoder)
    requests = deque(Request(i, tuple(range(5, 12 + i)), SamplingParams(0.0, max_new_tokens=8), i) for i in range(5))
    for done in engine.generate(requests):
        ids = torch.tensor([[*done.request.prompt_ids, *done.token_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, -len(done.token_ids) - 1 : -1].float().log_softmax(-1)
        own = float(logprobs.gather(1, ids[0, -len(done.token_ids) :, None]).sum())
        assert done.logprob == pytest.approx(own, abs=0.1)
    export(model, tokenizer, tmp_path / "adapter")
    again = load_adapter(load_pretrained(folder, torch.bfloat16, quantization=quantization)[0], str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, again(input_ids=ids).logits, atol=0.02)
    with pytest.raises(UserError, match="quantised"):
        VllmEngine(model, tokenizer)


def test_bad_ways_are_told(folder, monkeypatch):
    with pytest.raises(UserError, match=r"quantization=int3.*nf4, int8 or null"):
        load_pretrained(folder, quantization="int3")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"emreason\[quantized\]"):
        load_pretrained(folder, quantization="nf4")


def test_eight_billion_parameters_fit_24_gib():
    """As the issue asks: 8B with adapters, by the estimate that a plan gives."""
    config = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape = read_shape(config | {"num_key_value_heads": 8, "vocab_size": 128_256})
    four, whole = (
        max(sum(parts.values()) for parts in footprint(shape, work).values())
        for work in (
            Work("cuda", "bfloat16", "inprocess", (16, "all-linear"), True, 32, 192, 256, 4096, True, quantization=quantization)
            for quantization in ("nf4", None)
        )
    )
    assert four < 0.6 * 24 * 2**30
    assert whole > 1.5 * four

"""Prompts end to end in one attention call, as on a GPU: by what torch says its attention does, on a CPU; counted on fake tensors."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Counted, fake_cuda, on_the_gpu
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from emreason.engines.decoder import FusedDecoder
from emreason.engines.gpu import prefill
from emreason.engines.gpu.prefill import Prompts, variable_length
from emreason.engines.inprocess import InProcessEngine
from emreason.models import families
from emreason.models.families import read_facts

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)),
    "mistral": lambda layers: MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=layers, sliding_window=5)),
}
JOBS = [(2, 0, range(5, 16)), (0, 0, range(30, 34)), (3, 0, range(40, 53))]
LATER = [(0, 4, range(60, 69)), (1, 0, range(70, 73)), (2, 11, range(80, 81))]


def as_documented(q, k, v, of_queries, of_keys, longest_q, longest_k, *, window_size, scale, enable_gqa):
    """`varlen_attn` by its documentation: causal, each sequence's last query on its last key; so many keys to the left."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    assert right == 0
    out = torch.empty_like(q)
    edges = list(zip(of_queries.tolist(), of_queries[1:].tolist(), of_keys.tolist(), of_keys[1:].tolist(), strict=False))
    assert (longest_q, longest_k) == (max(b - a for a, b, _, _ in edges), max(d - c for _, _, c, d in edges))
    for a, b, c, d in edges:
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        at, behind = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        seen = (behind <= at) & ((left < 0) | (behind >= at - left))
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    return out


def caches(decoder):
    return torch.cat([t.flatten() for t in (*decoder.keys, *decoder.values)])


@pytest.mark.parametrize("name", MODELS)
def test_all_prompts_at_once_cache_what_one_by_one_does(name):
    torch.manual_seed(0)
    model = MODELS[name](3).eval()
    got = []
    for together in (False, True):
        with torch.inference_mode():
            decoder = FusedDecoder(model, read_facts(model))
            decoder.varlen = as_documented if together else None
            decoder.reserve(4, 40)
            decoder.prefill(JOBS)
            decoder.prefill(LATER)
            got.append(caches(decoder))
    assert torch.allclose(*got, atol=1e-5)
    assert got[0].count_nonzero() > 4 * 40


def test_kept_prefixes_pass_at_once():
    torch.manual_seed(0)
    model = MODELS["llama"](2).eval()
    got = []
    for on_cpu in (True, False):
        with torch.inference_mode():
            decoder = FusedDecoder(model, read_facts(model))
            decoder.on_cpu = on_cpu
            decoder.reserve(4, 40)
            decoder.keep(50)
            decoder.kept.zero_()
            decoder.prefill(JOBS)
            decoder.save([(2, 11, 30), (0, 3, 0)])
            decoder.load([(1, 9, 30), (3, 2, 1)])
            got.append(torch.cat([caches(decoder), decoder.kept.flatten()]))
    assert torch.equal(*got)


def test_a_draw_is_the_same_whichever_way_prompts_go(monkeypatch):
    """Through the engine, with prefixes that are kept and found again."""
    from collections import deque

    from emreason.engines import decoder as room
    from emreason.models.tiny import load_tiny
    from emreason.types import Request, SamplingParams

    model, tokenizer = load_tiny("llama", seed=0)

    def drawn():
        prompts = [(*range(5, 25 + i % 3), 30 + i) for i in range(20)]
        engine = InProcessEngine(model, tokenizer, max_batch=6, prefix_tokens=80)
        requests = deque(Request(i, ids, SamplingParams(max_new_tokens=9), i) for i, ids in enumerate(prompts))
        done = {c.request.key: c.token_ids for c in engine.generate(requests)}
        return done, engine.stats.reused

    before, reused = drawn()
    monkeypatch.setattr(room, "variable_length", lambda *_: as_documented)
    made = FusedDecoder.__init__

    def elsewhere(self, *arguments, **named):
        made(self, *arguments, **named)
        self.on_cpu = False

    monkeypatch.setattr(FusedDecoder, "__init__", elsewhere)
    assert drawn() == (before, reused)
    assert reused > 100


def counted_prefill(monkeypatch, prompts: int, layers: int) -> Counted:
    """Of `prompts` prompts, half of which continue a cached beginning, in bfloat16."""
    monkeypatch.setattr(families, "_offset", lambda _: 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    model = MODELS["llama"](layers).to(torch.bfloat16).eval()
    with fake_cuda(), torch.no_grad():
        on_the_gpu(model)
        decoder = FusedDecoder(model, read_facts(model))
        varlen, calls = decoder.varlen, []
        decoder.varlen = lambda *given, **named: (calls.append(1), varlen(*given, **named))[1]
        decoder.reserve(prompts, 64)
        decoder.keep(256)
        jobs = [(row, 8 * (row % 2), range(5, 15 + row % 7)) for row in range(prompts)]
        with Counted() as counted:
            decoder.load([(row, 8, 8 * row) for row in range(1, prompts, 2)])
            decoder.prefill(jobs)
            decoder.save([(row, 10, 10 * row) for row in range(prompts)])
    assert len(calls) == layers - 1  # the last layer's output is not read
    return counted


def test_on_a_gpu_prompts_cost_the_same_kernels_however_many_they_are(monkeypatch):
    few, many, deep = (counted_prefill(monkeypatch, *of) for of in ((2, 2), (24, 2), (2, 4)))
    a_layer = (sum(deep.kernels.values()) - sum(few.kernels.values())) // 2
    print(f"kernels of a prefill: {sum(few.kernels.values())} for 2 prompts, {sum(many.kernels.values())} for 24; a layer: {a_layer}")
    assert many.kernels == few.kernels
    assert (many.up, many.waited, many.down) == (3, 0, 0)  # what is loaded, prefilled, saved
    assert a_layer <= 60


def test_where_torchs_kernel_would_not_do_prompts_go_one_by_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu, facts = torch.device("cuda"), read_facts(MODELS["llama"](1))
    assert variable_length(facts, torch.bfloat16, gpu) is not None
    assert variable_length(facts, torch.float32, gpu) is None
    assert variable_length(facts, torch.bfloat16, torch.device("cpu")) is None
    capped = Gemma2ForCausalLM(Gemma2Config(**SHAPE, num_hidden_layers=1))
    assert variable_length(read_facts(capped), torch.bfloat16, gpu) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert variable_length(facts, torch.bfloat16, gpu) is None


def test_slots_are_where_a_cache_has_them():
    cache = torch.arange(3 * 2 * 7).view(3, 2, 7, 1)
    rows, positions = torch.tensor([2, 0, 1]), torch.tensor([6, 1, 0])
    found = cache.view(-1)[prefill.slots(rows, positions, 2, 7)].view(3, 2)
    assert torch.equal(found, cache[rows, :, positions, 0])
    laid = Prompts.of(LATER, 2, 40, torch.device("cpu"))
    assert laid.queries.tolist() == [0, 9, 12, 13]
    assert laid.keys.tolist() == [0, 13, 16, 28]

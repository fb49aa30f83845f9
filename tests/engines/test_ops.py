"""`kernels.c` against torch's own operations, and the decoder without a compiler."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import replace

import pytest
import torch

from emreason.engines.inprocess import InProcessEngine
from emreason.engines.ops import Kernels, TorchOps
from emreason.models import kernels as compiled
from emreason.models.families import read_facts
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams

needs_compiler = pytest.mark.skipif(compiled.library(torch.float32) is None, reason="no C compiler here: torch's operations are used")

SHAPES = [(1, 9, 3, 64, 40), (5, 4, 2, 128, 70), (2, 4, 4, 32, 300), (130, 9, 3, 64, 300)]  # rows, heads, kv_heads, D, width


KINDS = {  # of a model: facts that the operations depend on, and its window
    "llama": ({}, None),
    "gemma": ({"offset": 1.0, "gelu": True, "cap": 0.7}, 7),
    "granite": ({"residual_multiplier": 0.3, "scale": 0.4}, None),
}


def both(dtype, heads, dim, kind="llama", kv_heads=1):
    facts = read_facts(load_tiny("llama")[0])
    changes, window = KINDS[kind]
    layers = tuple(replace(layer, window=window) for layer in facts.layers)
    facts = replace(
        facts, **({"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5, "eps": 1e-5, "layers": layers} | changes)
    )
    return Kernels(compiled.library(dtype), facts), TorchOps(facts)


def error(pair, reference):
    """Largest difference, relative to the largest value."""
    a, b = (t.double() for t in pair)
    return float((a - b).abs().max() / reference.double().abs().max())


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2**-6)])  # a few roundings of each
@pytest.mark.parametrize(("kind", "pairs"), [("llama", 1.0), ("gemma", 0.5), ("granite", 0.0)])  # pairs: share that is rotated
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compute_what_torch_does(dtype, tolerance, shape, kind, pairs):
    rows, heads, kv_heads, dim, width = shape
    torch.manual_seed(0)
    lengths = [0, *torch.randint(0, width - 1, (rows,)).tolist()][-rows:]
    lengths[0] = 0  # the first token of all
    at = torch.tensor(lengths)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = (torch.rand(width, int(pairs * dim) // 2).to(dtype) for _ in range(2))
    keys, values = (torch.randn(rows, kv_heads, width, dim).to(dtype) for _ in range(2))
    results = []
    for way in both(dtype, heads, dim, kind, kv_heads):
        k, v = keys.clone(), values.clone()
        results.append((way.attend(way.plan(at, max(lengths), width), qkv, cos, sin, k, v, KINDS[kind][1]), k, v))
    for pair in zip(*results, strict=True):
        assert error(pair, pair[1]) < tolerance


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 48), (3, 576), (200, 96)])
def test_norm_residual_and_activation(dtype, tolerance, size, kind):
    torch.manual_seed(0)
    x, y = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    after, before = torch.randn(size[1]).to(dtype), torch.randn(size[1]).to(dtype)
    gate_up = (torch.randn(size[0], 2 * size[1]) * 20).to(dtype)  # far into both tails of the sigmoid
    results = []
    for way in both(dtype, 2, 16, kind):
        found = [way.gate(gate_up), way.add_norm(x.clone(), None, None, before)]
        for weights in ((None, before), (after, before), (after, None)):
            total = x.clone()
            found += [way.add_norm(total, y.clone(), *weights), total]
        way.norm_heads(heads := gate_up.clone(), before[:16], 32, 16)
        results.append([*found, heads])
        assert torch.equal(heads[:, :32], gate_up[:, :32])
        assert torch.equal(heads[:, 48:], gate_up[:, 48:])
    for pair in zip(*results, strict=True):
        assert error(pair, pair[1]) < tolerance


@needs_compiler
def test_what_is_not_finite_stays_so():
    """Diverged weights must be told, not rounded to a number."""
    kernels, _ = both(torch.bfloat16, 2, 16)
    x = torch.full((2, 32), float("nan"), dtype=torch.bfloat16)
    assert kernels.add_norm(x, None, None, torch.ones(32, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("compiler", [None, "false"])  # there is none; it fails
def test_without_a_compiler_the_same_is_drawn(monkeypatch, compiler):
    model, tokenizer = load_tiny("llama", seed=0)
    work = [Request(i, tuple(range(5, 9 + i)), SamplingParams(max_new_tokens=12), seed=i) for i in range(6)]

    def outcome():
        return {c.request.key: c.token_ids for c in InProcessEngine(model, tokenizer).generate(deque(work))}

    expected = outcome()
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    compiled.compile_ahead.cache_clear()
    try:
        assert outcome() == expected
        assert compiled.library(torch.float32) is None
    finally:
        compiled.compile_ahead.cache_clear()

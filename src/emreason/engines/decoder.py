"""One decoding step over a preallocated K/V cache, fused for the usual families; `forward.py` has that of any other causal LM.

A decoder holds up to `rows` sequences. Row r has `length[r]` cached positions; the caller keeps the lengths. Rows 0 … B-1 are live, so
every tensor of a step is a contiguous slice and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emreason.engines.gpu.prefill import Prompts, VarlenAttention, kept_slots, put, variable_length
from emreason.engines.ops import TorchOps, make_ops
from emreason.engines.packing import PackedLinear
from emreason.models.families import Facts, Layer, agrees, base_causal_lm, final_logits, read_facts
from emreason.models.memory import trim
from emreason.models.training.packed import attention, rotate

PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
"""Prompt tokens per prefill forward (one prompt may exceed it): enough to feed the matmuls, small enough for a CPU's cache."""

ROWS_STEP, CACHE_STEP = 8, 64
"""Rows and positions by which the cache grows at least."""


class Decoder(Protocol):
    """What the engine needs from a model. Positions count from 0; all methods run under inference mode."""

    device: torch.device

    def reserve(self, rows: int, width: int) -> None:
        """Make room for `rows` sequences of `width` positions; what is cached stays. Best called once for many rows."""

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Cache the K/V of `tokens` at positions start, start + 1, … of `row`, for each job (row, start, tokens)."""

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """Logits [B, V] after `tokens` [B] at positions `lengths` [B], at most `longest`, of rows 0 … B-1; their K/V is cached.

        The caller has reserved `longest + 1` positions.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes a copy of the first `length` positions of row `source`, which is free afterwards."""


def make_decoder(model: nn.Module, dtype: torch.dtype | None = None) -> Decoder:
    """The fused decoder where it computes what this model's own forward does, otherwise that forward; in eval mode."""
    from emreason.engines.forward import forward_decoder  # it imports this module

    base = base_causal_lm(model)
    prompted = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    facts = None if prompted else read_facts(base)
    return FusedDecoder(base, facts, dtype) if facts and agrees(base, _logits) else forward_decoder(model)


def _logits(base: Any, facts: Facts, ids: list[int]) -> Tensor:
    """For `agrees`: two tokens at once, then one by one."""
    decoder = FusedDecoder(base, facts, ops=TorchOps(facts))  # it is the facts that are in question; float32's kernels need not be compiled
    decoder.prefill([(0, 0, ids[:2])])
    decoder.reserve(1, len(ids))
    at = torch.arange(len(ids), device=base.device)
    given = torch.tensor(ids, device=base.device)
    return torch.cat([decoder.decode(given[i : i + 1], at[i : i + 1], i) for i in range(2, len(ids))])


class _Layer:
    """The packed weights of one transformer layer."""

    def __init__(self, layer: Layer, dtype: torch.dtype):
        self.qkv, self.o = PackedLinear(layer.qkv, dtype), PackedLinear([layer.o], dtype)
        self.gate_up, self.down = PackedLinear(layer.gate_up, dtype), PackedLinear([layer.down], dtype)
        self.window, self.rotary = layer.window, layer.rotary
        norms = (layer.q_norm, layer.k_norm, layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp)
        self.q_norm, self.k_norm, self.before, self.after_attention, self.before_mlp, self.after_mlp = (_weight(n, dtype) for n in norms)


def _weight(norm: Any | None, dtype: torch.dtype) -> Tensor | None:
    return None if norm is None else norm.weight.to(dtype)


class FusedDecoder:
    """Any model that `facts` describe, with fused QKV and gate-up, an in-place cache and grouped-query attention over the live length.

    Takes a private, packed copy of the weights (of the adapters too) when it is made: one decoder per `generate` call.
    """

    def __init__(self, base: Any, facts: Facts, dtype: torch.dtype | None = None, ops: Any = None):
        self.facts, self.config = facts, base.config
        self.device, self.dtype = base.lm_head.weight.device, dtype or facts.embedding.weight.dtype
        self.heads, self.kv_heads, self.head_dim = facts.heads, facts.kv_heads, facts.head_dim
        self.layers = [_Layer(layer, self.dtype) for layer in facts.layers]
        self.norms = [*(layer.before for layer in self.layers), _weight(facts.norm, self.dtype)]  # before layer 0, 1, … and the head
        self.head = PackedLinear([facts.head], self.dtype)
        self.ops = ops or make_ops(self.dtype, self.device, facts)
        self.varlen, self.on_cpu = variable_length(facts, self.dtype, self.device), self.device.type == "cpu"
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.reserve(1, 1)

    def reserve(self, rows: int, width: int) -> None:
        have_rows, have_width = self.keys[0].shape[0::2] if self.keys else (0, 0)
        if rows <= have_rows and width <= have_width:
            return
        rows = max(-(-rows // ROWS_STEP) * ROWS_STEP, have_rows) if rows > have_rows else have_rows
        width = max(-(-width // CACHE_STEP) * CACHE_STEP, have_width)
        for caches in (self.keys, self.values):
            for i in range(len(self.layers)):  # layer by layer, so that the peak stays low
                new = torch.zeros(rows, self.kv_heads, width, self.head_dim, dtype=self.dtype, device=self.device)
                if i < len(caches):
                    new[:have_rows, :, :have_width] = caches[i]
                    caches[i] = new
                else:
                    caches.append(new)
        if self.device.type == "cpu":
            trim()  # what packing took in between, the narrower caches
        self.positions = torch.arange(width, device=self.device)
        tables = self.facts.tables(torch.empty(0, dtype=self.dtype, device=self.device), self.positions)
        self.tables = {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in tables.items()}

    def _embed(self, ids: Tensor) -> Tensor:
        return (self.facts.embedding(ids) * self.facts.embedding_multiplier).to(self.dtype)

    def _qkv(self, layer: _Layer, h: Tensor) -> Tensor:
        """q, k and v [N, (heads + 2 kv_heads) D], normalised where the model does that, not rotated."""
        qkv, (queries, keys, _) = layer.qkv(h), self.facts.head_sizes
        if layer.q_norm is not None and layer.k_norm is not None:
            self.ops.norm_heads(qkv, layer.q_norm, 0, queries)
            self.ops.norm_heads(qkv, layer.k_norm, queries, keys)
        return qkv

    def _finish(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        """Add layer i's attention output and MLP to the residual stream x, in place; what the next layer's products take."""
        layer = self.layers[i]
        h = self.ops.add_norm(x, layer.o(attended), layer.after_attention, layer.before_mlp)
        return self.ops.add_norm(x, layer.down(self.ops.gate(layer.gate_up(h))), layer.after_mlp, self.norms[i + 1])

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        batch: list[tuple[int, int, Sequence[int]]] = []
        for job in filter(lambda job: job[2], jobs):
            if batch and sum(len(tokens) for _, _, tokens in batch) + len(job[2]) > PREFILL_TOKENS[self.device.type]:
                self._prefill(batch)
                batch = []
            batch.append(job)
        if batch:
            self._prefill(batch)

    def _prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self._prefill_together(jobs, self.varlen) if self.varlen else self._prefill_each(jobs)

    def _prefill_together(self, jobs: Sequence[tuple[int, int, Sequence[int]]], varlen: VarlenAttention) -> None:
        """As `_prefill_each`, with so many kernels a layer for any number of prompts."""
        prompts = Prompts.of(jobs, self.kv_heads, self.keys[0].shape[2], self.device)
        x = self._embed(prompts.ids)
        tables = {kind: (cos[prompts.at, None], sin[prompts.at, None]) for kind, (cos, sin) in self.tables.items()}
        h = self.ops.add_norm(x, None, None, self.norms[0])
        for i, layer in enumerate(self.layers):
            qkv = self._qkv(layer, h).view(len(x), -1, self.head_dim)
            qk, v = rotate(qkv[:, : self.heads + self.kv_heads], *tables[layer.rotary]), qkv[:, self.heads + self.kv_heads :]
            q, k = qk[:, : self.heads], qk[:, self.heads :]
            put(self.keys[i], prompts.new, k)
            put(self.values[i], prompts.new, v)
            if i + 1 < len(self.layers):
                attended = prompts.attend(varlen, self.facts, layer.window, q, k, v, self.keys[i], self.values[i])
                h = self._finish(i, x, attended.flatten(1))

    def _prefill_each(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """All prompts of `jobs` end to end as one sequence through the linear layers; attention is per prompt. No padding."""
        ids = torch.tensor([t for _, _, tokens in jobs for t in tokens], device=self.device)
        at = torch.tensor([start + i for _, start, tokens in jobs for i in range(len(tokens))], device=self.device)
        x = self._embed(ids)
        tables = {kind: (cos[at, None], sin[at, None]) for kind, (cos, sin) in self.tables.items()}
        masks = {
            window: [self._mask(start, start + len(tokens), window) for _, start, tokens in jobs]
            for window in {layer.window for layer in self.layers}
        }
        h = self.ops.add_norm(x, None, None, self.norms[0])
        for i, layer in enumerate(self.layers):
            qkv = self._qkv(layer, h).view(len(x), -1, self.head_dim)
            qk, v = rotate(qkv[:, : self.heads + self.kv_heads], *tables[layer.rotary]), qkv[:, self.heads + self.kv_heads :]
            q, k = qk[:, : self.heads], qk[:, self.heads :]
            attended = torch.empty_like(q)
            begin = 0
            for (row, start, tokens), mask in zip(jobs, masks[layer.window], strict=True):
                end, stop = begin + len(tokens), start + len(tokens)
                keys, values = self.keys[i][row, :, :stop], self.values[i][row, :, :stop]
                keys[:, start:], values[:, start:] = k[begin:end].transpose(0, 1), v[begin:end].transpose(0, 1)
                if i + 1 < len(self.layers):  # nothing reads the last layer's output: the caller decodes the last prompt token
                    out = attention(self.facts, q[begin:end].transpose(0, 1)[None], keys[None], values[None], mask)
                    attended[begin:end] = out[0].transpose(0, 1)
                begin = end
            if i + 1 < len(self.layers):
                h = self._finish(i, x, attended.flatten(1))

    def _mask(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """Which of the first `stop` positions those from `start` on see; None: plainly causal."""
        if start == 0 and (window is None or stop <= window):
            return None
        keys, queries = self.positions[:stop], self.positions[start:stop, None]
        return keys <= queries if window is None else (keys <= queries) & (keys > queries - window)

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        x = self._embed(tokens)
        plan = self.ops.plan(lengths, longest, self.keys[0].shape[2])
        h = self.ops.add_norm(x, None, None, self.norms[0])
        for i, layer in enumerate(self.layers):
            cos, sin = self.tables[layer.rotary]
            attended = self.ops.attend(plan, self._qkv(layer, h), cos, sin, self.keys[i], self.values[i], layer.window)
            h = self._finish(i, x, attended)
        return final_logits(self.config, self.head(h))

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def keep(self, positions: int) -> None:
        """Room for `positions` positions to `save`; of one piece, for copies that come and go would leave holes in memory."""
        shape = (2 * len(self.layers), self.kv_heads, positions, self.head_dim)
        self.kept = torch.empty(shape, dtype=self.dtype, device=self.device)

    def save(self, jobs: Sequence[tuple[int, int, int]]) -> None:
        """Copy the first `length` positions of `row` to position `at` of what is kept, for each job (row, length, at)."""
        self._copy_kept(jobs, back=False)

    def load(self, jobs: Sequence[tuple[int, int, int]]) -> None:
        """Put `length` kept positions from position `at` on into `row`, for each job (row, length, at)."""
        self._copy_kept(jobs, back=True)

    def _copy_kept(self, jobs: Sequence[tuple[int, int, int]], back: bool) -> None:
        caches = (*self.keys, *self.values)
        if self.on_cpu:
            for row, length, at in jobs:
                for cache, part in zip(caches, self.kept, strict=True):
                    ends = part[:, at : at + length], cache[row, :, :length]
                    ends[back].copy_(ends[not back])
        elif jobs:
            widths = (self.keys[0].shape[2], self.kept.shape[2])
            in_cache, in_kept = kept_slots(jobs, self.kv_heads, widths, self.device)
            for cache, part in zip(caches, self.kept, strict=True):
                source, taken, target, put_at = (part, in_kept, cache, in_cache) if back else (cache, in_cache, part, in_kept)
                put(target, put_at, source.view(-1, self.head_dim).index_select(0, taken))

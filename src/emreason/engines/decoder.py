"""One decoding step over a preallocated K/V cache: a fused one for Llama and Qwen2, and any causal LM through its own forward.

A decoder holds up to `rows` sequences. Row r has `length[r]` cached positions; the caller keeps the lengths. Rows 0 … B-1 are live, so
every tensor of a step is a contiguous slice and nothing is gathered.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from emreason.engines.ops import make_ops, rotate
from emreason.engines.packing import PackedLinear
from emreason.models.families import base_causal_lm, can_fuse, linears

PREFILL_TOKENS = 512
"""Prompt tokens per prefill forward (one prompt may exceed it): enough to feed the matmuls, small enough for the cache."""

CACHE_STEP = 64
"""Positions by which the cache grows at least."""


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
    """The fused decoder where the architecture and every layer allow it, otherwise the model's own forward, row by row."""
    base = base_causal_lm(model)
    prompted = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    return FusedDecoder(base, dtype) if can_fuse(base) and not prompted else ForwardDecoder(model)


class _Layer:
    """The packed weights of one transformer layer."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        q, k, v, o, gate, up, down = linears(layer)
        self.qkv, self.o = PackedLinear([q, k, v], dtype), PackedLinear([o], dtype)
        self.gate_up, self.down = PackedLinear([gate, up], dtype), PackedLinear([down], dtype)
        self.norm2 = layer.post_attention_layernorm.weight.to(dtype)


class FusedDecoder:
    """Llama and Qwen2 with fused QKV and gate-up, an in-place cache and grouped-query attention over the live length.

    Takes a private, packed copy of the weights (of the adapters too) when it is made: one decoder per `generate` call.
    """

    def __init__(self, base: Any, dtype: torch.dtype | None = None):
        config = base.config
        self.device, self.dtype = base.lm_head.weight.device, dtype or base.model.embed_tokens.weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.rotary, self.embedding = base.model.rotary_emb, base.model.embed_tokens
        self.layers = [_Layer(layer, self.dtype) for layer in base.model.layers]
        norms = [*(layer.input_layernorm for layer in base.model.layers), base.model.norm]
        self.norms = [norm.weight.to(self.dtype) for norm in norms]  # before layer 0, 1, … and before the head
        self.head = PackedLinear([base.lm_head], self.dtype)
        self.ops = make_ops(self.dtype, self.device, self.heads, self.head_dim, config.rms_norm_eps)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.reserve(1, 1)

    def reserve(self, rows: int, width: int) -> None:
        have_rows, have_width = self.keys[0].shape[0::2] if self.keys else (0, 0)
        if rows <= have_rows and width <= have_width:
            return
        rows = max(-(-rows // 8) * 8, have_rows) if rows > have_rows else have_rows
        width = max(-(-width // CACHE_STEP) * CACHE_STEP, have_width)
        for caches in (self.keys, self.values):
            for i in range(len(self.layers)):  # layer by layer, so that the peak stays low
                new = torch.zeros(rows, self.kv_heads, width, self.head_dim, dtype=self.dtype, device=self.device)
                if i < len(caches):
                    new[:have_rows, :, :have_width] = caches[i]
                    caches[i] = new
                else:
                    caches.append(new)
        positions = torch.arange(width, device=self.device)
        cos, sin = self.rotary(self.norms[0], positions[None])
        half = self.head_dim // 2
        self.positions, self.cos, self.sin = positions, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _finish(self, i: int, x: Tensor, attended: Tensor) -> Tensor:
        """Add layer i's attention output and MLP to the residual stream x, in place; what the next layer's products take."""
        layer = self.layers[i]
        h = self.ops.add_norm(x, layer.o(attended), layer.norm2)
        return self.ops.add_norm(x, layer.down(self.ops.silu_mul(layer.gate_up(h))), self.norms[i + 1])

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        batch: list[tuple[int, int, Sequence[int]]] = []
        for job in filter(lambda job: job[2], jobs):
            if batch and sum(len(tokens) for _, _, tokens in batch) + len(job[2]) > PREFILL_TOKENS:
                self._prefill(batch)
                batch = []
            batch.append(job)
        if batch:
            self._prefill(batch)

    def _prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """All prompts of `jobs` end to end as one sequence through the linear layers; attention is per prompt. No padding."""
        ids = torch.tensor([t for _, _, tokens in jobs for t in tokens], device=self.device)
        at = torch.tensor([start + i for _, start, tokens in jobs for i in range(len(tokens))], device=self.device)
        x = self.embedding(ids).to(self.dtype)
        cos, sin = self.cos[at, None], self.sin[at, None]
        masks = [
            None if start == 0 else self.positions[: start + len(tokens)] <= self.positions[start : start + len(tokens), None]
            for _, start, tokens in jobs
        ]
        h = self.ops.add_norm(x, None, self.norms[0])
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(h).view(len(x), -1, self.head_dim)
            qk, v = rotate(qkv[:, : self.heads + self.kv_heads], cos, sin), qkv[:, self.heads + self.kv_heads :]
            q, k = qk[:, : self.heads], qk[:, self.heads :]
            attended = torch.empty_like(q)
            begin = 0
            for (row, start, tokens), mask in zip(jobs, masks, strict=True):
                end, stop = begin + len(tokens), start + len(tokens)
                keys, values = self.keys[i][row, :, :stop], self.values[i][row, :, :stop]
                keys[:, start:], values[:, start:] = k[begin:end].transpose(0, 1), v[begin:end].transpose(0, 1)
                if i + 1 < len(self.layers):  # nothing reads the last layer's output: the caller decodes the last prompt token
                    query = q[begin:end].transpose(0, 1)[None]
                    out = F.scaled_dot_product_attention(
                        query, keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
                    )
                    attended[begin:end] = out[0].transpose(0, 1)
                begin = end
            if i + 1 < len(self.layers):
                h = self._finish(i, x, attended.flatten(1))

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        x = self.embedding(tokens).to(self.dtype)
        plan = self.ops.plan(lengths, longest, self.keys[0].shape[2])
        h = self.ops.add_norm(x, None, self.norms[0])
        for i, layer in enumerate(self.layers):
            attended = self.ops.attend(plan, layer.qkv(h), self.cos, self.sin, self.keys[i], self.values[i])
            h = self._finish(i, x, attended)
        return self.head(h)

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def keep(self, positions: int) -> None:
        """Room for `positions` positions to `save`; of one piece, for copies that come and go would leave holes in memory."""
        shape = (2 * len(self.layers), self.kv_heads, positions, self.head_dim)
        self.kept = torch.empty(shape, dtype=self.dtype, device=self.device)

    def save(self, row: int, length: int, at: int) -> None:
        """Copy the first `length` positions of `row` to position `at` of what is kept."""
        for cache, part in zip((*self.keys, *self.values), self.kept, strict=True):
            part[:, at : at + length] = cache[row, :, :length]

    def load(self, row: int, length: int, at: int) -> None:
        """Put `length` kept positions from position `at` on into `row`."""
        for cache, part in zip((*self.keys, *self.values), self.kept, strict=True):
            cache[row, :, :length] = part[:, at : at + length]


class ForwardDecoder:
    """Any causal LM through its own forward, one row at a time with a cache of its own: slow, simple, without padding."""

    def __init__(self, model: Any):
        self.model = model
        self.device = next(model.parameters()).device
        self.caches: dict[int, DynamicCache] = {}
        last_only = "logits_to_keep" in inspect.signature(base_causal_lm(model).forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if last_only else {})

    def reserve(self, rows: int, width: int) -> None:
        pass

    def _forward(self, row: int, start: int, tokens: Tensor) -> Tensor:
        if start == 0:
            self.caches[row] = DynamicCache(config=base_causal_lm(self.model).config)
        positions = torch.arange(start, start + len(tokens), device=self.device)
        out = self.model(input_ids=tokens[None], position_ids=positions[None], past_key_values=self.caches[row], **self.options)
        return out.logits[:, -1]

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        for row, start, tokens in jobs:
            if tokens:
                self._forward(row, start, torch.tensor(tokens, device=self.device))

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:  # noqa: ARG002
        return torch.cat([self._forward(row, length, tokens[row : row + 1]) for row, length in enumerate(lengths.tolist())])

    def move(self, source: int, target: int, length: int) -> None:  # noqa: ARG002
        self.caches[target] = self.caches.pop(source)

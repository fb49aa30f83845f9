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

PREFILL_TOKENS = 2048
"""Prompt tokens per prefill forward; bounds its activations."""

FUSED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")


class Decoder(Protocol):
    """What the engine needs from a model. Positions count from 0; all methods run under inference mode."""

    shares_prefixes: bool

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Cache the K/V of `tokens` at positions start, start + 1, … of `row`, for each job (row, start, tokens)."""

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits [B, V] after `tokens` [B] at positions `lengths` of rows 0 … B-1; their K/V is cached."""

    def move(self, source: int, target: int, length: int) -> None:
        """Row `target` becomes a copy of the first `length` positions of row `source`, which is free afterwards."""

    def save(self, row: int, length: int) -> Any:
        """A copy of the first `length` positions of `row`, for `load`."""

    def load(self, row: int, saved: Any, length: int) -> None:
        """Put the first `length` positions of a `save`d copy into `row`."""


def make_decoder(model: nn.Module, dtype: torch.dtype | None = None) -> Decoder:
    """The fused decoder where the architecture and every layer allow it, otherwise the model's own forward, row by row."""
    base = base_model(model)
    return FusedDecoder(base, dtype) if can_fuse(base) else ForwardDecoder(model)


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def can_fuse(base: Any) -> bool:
    """Whether `FusedDecoder` computes exactly what this model's forward does (in eval mode)."""
    if type(base).__name__ not in FUSED_ARCHITECTURES:
        return False
    config, layers = base.config, base.model.layers
    if config.hidden_act != "silu" or config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return False
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return False
    if type(base.model.embed_tokens) is not nn.Embedding:
        return False
    linears = [m for layer in layers for m in _linears(layer)] + [base.lm_head]
    return all(_plain_linear(m) for m in linears) and len({p.device for p in base.parameters()}) == 1


def _linears(layer: Any) -> list[nn.Module]:
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]


def _plain_linear(module: Any) -> bool:
    """An nn.Linear, or one with ordinary LoRA adapters around it; anything else (quantised, DoRA, …) is not ours to fuse."""
    if type(module) is nn.Linear:
        return True
    if not hasattr(module, "lora_A") or type(module.get_base_layer()) is not nn.Linear:
        return False
    variants = getattr(module, "lora_variant", {})
    return not variants and not any(getattr(module, "lora_bias", {}).values())


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The effective weight [out, in]: the base weight plus the active adapters' W_up W_down · scale."""
    if type(module) is nn.Linear:
        return module.weight.to(dtype)
    weight = module.get_base_layer().weight
    if not (module.merged or module.disable_adapters):
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                weight = weight.float() + module.get_delta_weight(adapter).float()
    return weight.to(dtype)


class PackedLinear:
    """y = x Wᵀ + b for the stacked rows of one or more layers, packed once for the kernels of this device."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        weights = [_weight(m, dtype) for m in modules]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [getattr(m, "base_layer", m).bias for m in modules]
        self.bias = None
        if any(b is not None for b in biases):
            zeros = [w.new_zeros(w.shape[0]) for w in weights]
            self.bias = torch.cat([z if b is None else b.to(dtype) for b, z in zip(biases, zeros, strict=True)])

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Layer:
    """The packed weights of one transformer layer."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        q, k, v, o, gate, up, down = _linears(layer)
        self.qkv, self.o = PackedLinear([q, k, v], dtype), PackedLinear([o], dtype)
        self.gate_up, self.down = PackedLinear([gate, up], dtype), PackedLinear([down], dtype)
        self.norm1, self.norm2 = layer.input_layernorm.weight.to(dtype), layer.post_attention_layernorm.weight.to(dtype)


class FusedDecoder:
    """Llama and Qwen2 with fused QKV and gate-up, an in-place cache and grouped-query attention over the live length.

    Takes a private, packed copy of the weights (of the adapters too) when it is made: one decoder per `generate` call.
    """

    shares_prefixes = True

    def __init__(self, base: Any, dtype: torch.dtype | None = None):
        config = base.config
        self.device, self.dtype = base.lm_head.weight.device, dtype or base.model.embed_tokens.weight.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps, self.scale = config.rms_norm_eps, 1 / math.sqrt(self.head_dim)
        self.rotary, self.embedding = base.model.rotary_emb, base.model.embed_tokens
        self.layers = [_Layer(layer, self.dtype) for layer in base.model.layers]
        self.norm, self.head = base.model.norm.weight.to(self.dtype), PackedLinear([base.lm_head], self.dtype)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._reserve(1, 128)

    def _reserve(self, rows: int, width: int) -> None:
        """Grow the cache [rows, kv_heads, width, head_dim] of every layer, one layer at a time so that the peak stays low."""
        old_rows, old_width = self.keys[0].shape[0::2] if self.keys else (0, 0)
        if rows <= old_rows and width <= old_width:
            return
        rows, width = max(rows, old_rows), max(-(-width // 64) * 64, old_width)
        for cache in (self.keys, self.values):
            for i in range(len(self.layers)):
                new = torch.zeros(rows, self.kv_heads, width, self.head_dim, dtype=self.dtype, device=self.device)
                if i < len(cache):
                    new[:old_rows, :, :old_width] = cache[i]
                    cache[i] = new
                else:
                    cache.append(new)
        positions = torch.arange(width, device=self.device)
        cos, sin = self.rotary(self.norm, positions[None])
        self.positions, self.cos, self.sin = positions, cos[0, :, None], sin[0, :, None, : self.head_dim // 2]

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x [N, heads, D] by cos [N, 1, D], sin [N, 1, D/2]."""
        half = self.head_dim // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin, value=-1)
        y[..., half:].addcmul_(x[..., :half], sin)
        return y

    def _project(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, heads, D], keys and values [N, kv_heads, D] of hidden states x [N, hidden]."""
        qkv = layer.qkv(self._rms_norm(x, layer.norm1)).view(len(x), -1, self.head_dim)
        qk = self._rotate(qkv[:, : self.heads + self.kv_heads], cos, sin)
        return qk[:, : self.heads], qk[:, self.heads :], qkv[:, self.heads + self.kv_heads :]

    def _finish(self, layer: _Layer, x: Tensor, attended: Tensor) -> None:
        """Add the attention output and the MLP to the residual stream x, in place."""
        x += layer.o(attended)
        gate, up = layer.gate_up(self._rms_norm(x, layer.norm2)).chunk(2, dim=-1)
        x += layer.down(F.silu(gate).mul_(up))

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        jobs = [job for job in jobs if job[2]]
        if not jobs:
            return
        self._reserve(max(row for row, _, _ in jobs) + 1, max(start + len(tokens) for _, start, tokens in jobs) + 1)
        batch: list[tuple[int, int, Sequence[int]]] = []
        for job in jobs:
            if batch and sum(len(tokens) for _, _, tokens in batch) + len(job[2]) > PREFILL_TOKENS:
                self._prefill(batch)
                batch = []
            batch.append(job)
        self._prefill(batch)

    def _prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """All prompts of `jobs` end to end as one sequence through the linear layers; attention is per prompt. No padding."""
        ids = torch.tensor([t for _, _, tokens in jobs for t in tokens], device=self.device)
        at = torch.tensor([start + i for _, start, tokens in jobs for i in range(len(tokens))], device=self.device)
        x = self.embedding(ids).to(self.dtype)
        cos, sin = self.cos[at], self.sin[at]
        masks = [
            None if start == 0 else self.positions[: start + len(tokens)] <= self.positions[start : start + len(tokens), None]
            for _, start, tokens in jobs
        ]
        for i, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
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
                self._finish(layer, x, attended.flatten(1))

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        rows, width = len(lengths), max(lengths) + 1
        self._reserve(rows, width)
        at = torch.tensor(lengths, device=self.device)
        x = self.embedding(tokens).to(self.dtype)
        cos, sin = self.cos[at], self.sin[at]
        kv_rows = torch.arange(rows * self.kv_heads, device=self.device).view(rows, -1)
        slots = (kv_rows * self.keys[0].shape[2] + at[:, None]).flatten()
        mask = torch.zeros(rows, 1, 1, width, dtype=self.dtype, device=self.device)
        mask.masked_fill_((self.positions[:width] > at[:, None])[:, None, None], -math.inf)
        for i, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            self.keys[i].view(-1, self.head_dim).index_copy_(0, slots, k.reshape(-1, self.head_dim))
            self.values[i].view(-1, self.head_dim).index_copy_(0, slots, v.reshape(-1, self.head_dim))
            # The queries of a group attend as if they were successive positions: K and V are read once, never expanded.
            query = q.reshape(rows, self.kv_heads, -1, self.head_dim)
            keys, values = self.keys[i][:rows, :, :width], self.values[i][:rows, :, :width]
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
            self._finish(layer, x, out.reshape(rows, -1))
        return self.head(self._rms_norm(x, self.norm))

    def move(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]

    def save(self, row: int, length: int) -> Tensor:
        return torch.stack([cache[row, :, :length] for cache in (*self.keys, *self.values)])

    def load(self, row: int, saved: Tensor, length: int) -> None:
        self._reserve(row + 1, length + 1)
        for cache, part in zip((*self.keys, *self.values), saved, strict=True):
            cache[row, :, :length] = part[:, :length]


class ForwardDecoder:
    """Any causal LM through its own forward, one row at a time with a cache of its own: slow, simple, without padding."""

    shares_prefixes = False

    def __init__(self, model: Any):
        self.model = model
        self.device = next(model.parameters()).device
        self.caches: dict[int, DynamicCache] = {}
        last_only = "logits_to_keep" in inspect.signature(base_model(model).forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if last_only else {})

    def _forward(self, row: int, start: int, tokens: Tensor) -> Tensor:
        if start == 0:
            self.caches[row] = DynamicCache(config=base_model(self.model).config)
        positions = torch.arange(start, start + len(tokens), device=self.device)
        out = self.model(input_ids=tokens[None], position_ids=positions[None], past_key_values=self.caches[row], **self.options)
        return out.logits[:, -1]

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        for row, start, tokens in jobs:
            if tokens:
                self._forward(row, start, torch.tensor(tokens, device=self.device))

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        return torch.cat([self._forward(row, length, tokens[row : row + 1]) for row, length in enumerate(lengths)])

    def move(self, source: int, target: int, length: int) -> None:  # noqa: ARG002
        self.caches[target] = self.caches.pop(source)

    def save(self, row: int, length: int) -> None:
        raise NotImplementedError("prefixes are not shared here")

    def load(self, row: int, saved: Any, length: int) -> None:
        raise NotImplementedError("prefixes are not shared here")

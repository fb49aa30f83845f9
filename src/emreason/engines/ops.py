"""What a decoder does between its matrix products: `kernels.c` on a CPU with a C compiler, torch's own operations elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emreason.models.kernels import library

ATTENTION_ROWS = 16
"""Rows that attend together on a CPU without `kernels.c`, over the longest of them."""


def make_ops(dtype: torch.dtype, device: torch.device, heads: int, head_dim: int, eps: float) -> Any:
    """The faster of the two that works here."""
    functions = library(dtype) if device.type == "cpu" and head_dim % 2 == 0 else None
    if functions is None:
        return TorchOps(heads, head_dim, eps)
    return Kernels(functions, heads, head_dim, eps)


class Kernels:
    """The functions of `kernels.c`; all tensors are contiguous."""

    def __init__(self, functions: Any, heads: int, head_dim: int, eps: float):
        self.functions, self.heads, self.eps, self.scale = functions, heads, eps, 1 / math.sqrt(head_dim)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
        """x [N, d] += y, in place; returns RMSNorm(x) [N, d]."""
        out = torch.empty_like(x)
        pointer = None if y is None else y.data_ptr()
        self.functions.add_norm(x.data_ptr(), pointer, weight.data_ptr(), out.data_ptr(), *x.shape, self.eps)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up [N, d] of gate_up [N, 2 d]."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self.functions.silu_mul(gate_up.data_ptr(), out.data_ptr(), *out.shape)
        return out

    def plan(self, at: Tensor, longest: int, width: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """What the layers of one step share, for `attend`: rows have `at` [B] cached positions, at most `longest`, in caches `width` wide."""
        return at, torch.empty(len(at), self.heads, longest + 1)

    def attend(self, plan: tuple[Tensor, Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention [B, heads * D] of one new token per row, whose K/V is cached on the way.

        qkv: [B, (heads + 2 kv_heads) * D], not rotated yet; cos, sin: [positions, D / 2]; keys, values: [rows, kv_heads, width, D].
        """
        at, scores = plan
        _, kv_heads, width, dim = keys.shape
        out = qkv.new_empty(len(at), self.heads * dim)
        tensors = (qkv, cos, sin, keys, values, at, scores, out)
        sizes = (len(at), self.heads, kv_heads, dim, width, scores.shape[2])
        self.functions.attend(*(t.data_ptr() for t in tensors), *sizes, self.scale)
        return out


class TorchOps:
    """The same with torch's operations, on any device."""

    def __init__(self, heads: int, head_dim: int, eps: float):
        self.heads, self.eps, self.scale = heads, eps, 1 / math.sqrt(head_dim)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
        """See `Kernels.add_norm`."""
        if y is not None:
            x += y
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Kernels.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def plan(self, at: Tensor, longest: int, width: int) -> tuple[Tensor, list[tuple[slice, int, Tensor]]]:
        """`at`, and rows that attend together, over how many positions, under which mask [rows, 1, 1, positions]; see `Kernels.plan`."""
        rows, chunks = len(at), []
        size = ATTENTION_ROWS if at.device.type == "cpu" else rows
        positions = torch.arange(width, device=at.device)
        for begin in range(0, rows, size):
            part = slice(begin, min(begin + size, rows))
            live = int(at[part].max()) + 1 if size < rows else longest + 1  # the first on a CPU, where it is no wait
            chunks.append((part, live, positions[:live] <= at[part, None, None, None]))
        return at, chunks

    def attend(self, plan: tuple[Tensor, Sequence[Any]], qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Kernels.attend`."""
        _, kv_heads, width, dim = keys.shape
        rows, (at, chunks) = len(qkv), plan
        heads = qkv.view(rows, -1, dim)
        qk = rotate(heads[:, : self.heads + kv_heads], cos[at, None], sin[at, None])
        slots = ((torch.arange(rows * kv_heads, device=at.device).view(rows, -1)) * width + at[:, None]).flatten()
        keys.view(-1, dim).index_copy_(0, slots, qk[:, self.heads :].reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, slots, heads[:, self.heads + kv_heads :].reshape(-1, dim))
        # the queries of a group meet their K and V together, which are never expanded: [rows, kv_heads, group, D]
        query = qk[:, : self.heads].reshape(rows, kv_heads, -1, dim)
        out = torch.empty_like(query)
        for part, live, mask in chunks:
            out[part] = F.scaled_dot_product_attention(query[part], keys[part, :, :live], values[part, :, :live], mask, scale=self.scale)
        return out.view(rows, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, heads, D] by cos, sin [N, 1, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

"""What a decoder does between its matrix products: `kernels.c` on a CPU with a C compiler, torch's own operations elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emreason.models.families import Facts
from emreason.models.kernels import library
from emreason.models.training.packed import attention, rotate

ATTENTION_ROWS = 16
"""Rows that attend together on a CPU without `kernels.c`, over the longest of them."""

LIVE_STEP = 64
"""Positions by which the attention of a GPU grows: a new shape costs a kernel's plan."""


def make_ops(dtype: torch.dtype, device: torch.device, facts: Facts) -> Any:
    """The faster of the two that works here."""
    functions = library(dtype) if device.type == "cpu" and facts.head_dim % 2 == 0 else None
    return TorchOps(facts) if functions is None else Kernels(functions, facts)


class Kernels:
    """The functions of `kernels.c`; all tensors are contiguous."""

    def __init__(self, functions: Any, facts: Facts):
        self.functions, self.facts = functions, facts

    def add_norm(self, x: Tensor, y: Tensor | None, after: Tensor | None, before: Tensor | None) -> Tensor:
        """x [N, d] += the residual multiplier times y, itself normalised by the weight `after`, in place.

        Returns RMSNorm(x) [N, d] by the weight `before`, or x. A weight of None stands for no norm.
        """
        out = x if before is None else torch.empty_like(x)
        pointers = (None if t is None else t.data_ptr() for t in (x, y, after, before, out))
        self.functions.add_norm(*pointers, *x.shape, self.facts.eps, self.facts.offset, self.facts.residual_multiplier)
        return out

    def norm_heads(self, qkv: Tensor, weight: Tensor, begin: int, features: int) -> None:
        """RMSNorm of `features` columns of qkv [N, columns] from `begin` on, as many at a time as there are weights, in place."""
        sizes = (*qkv.shape, begin, features // len(weight), len(weight))
        self.functions.norm_heads(qkv.data_ptr(), weight.data_ptr(), *sizes, self.facts.eps, self.facts.offset)

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up [N, d], or gelu(gate) * up, of gate_up [N, 2 d]."""
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self.functions.gate(gate_up.data_ptr(), out.data_ptr(), *out.shape, self.facts.gelu)
        return out

    def plan(self, at: Tensor, longest: int, width: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """What the layers of a step share, for `attend`: rows have `at` [B] cached positions, at most `longest`, in caches `width` wide."""
        return at, torch.empty(len(at), self.facts.heads, longest + 1)

    def attend(
        self, plan: tuple[Tensor, Tensor], qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        """Attention [B, heads * D] of one new token per row, whose K/V is cached on the way.

        qkv: [B, (heads + 2 kv_heads) * D], not rotated yet; cos, sin: [positions, pairs]; keys, values: [rows, kv_heads, width, D];
        window: see `families.Layer`.
        """
        at, scores = plan
        heads, (_, kv_heads, width, dim) = self.facts.heads, keys.shape
        out = qkv.new_empty(len(at), heads * dim)
        tensors = (qkv, cos, sin, keys, values, at, scores, out)
        sizes = (len(at), heads, kv_heads, dim, width, scores.shape[2], cos.shape[1], window or width)
        self.functions.attend(*(t.data_ptr() for t in tensors), *sizes, self.facts.scale, self.facts.cap or 0.0)
        return out


@dataclass
class _Plan:
    """What the layers of a step share.

    Attributes:
        at: [B] cached positions.
        slots: [B * kv_heads] where K and V go, in a cache of [rows * kv_heads * width].
        chunks: for each window the rows that attend together, over how many positions, under which mask [rows, 1, 1, positions].
        angles: by table cos and sin [B, 1, pairs].
    """

    at: Tensor
    slots: Tensor
    chunks: dict[int | None, list[tuple[slice, int, Tensor]]]
    angles: dict[int, tuple[Tensor, Tensor]]


class TorchOps:
    """The same with torch's operations, on any device."""

    def __init__(self, facts: Facts):
        self.facts = facts

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.facts.offset:
            return F.rms_norm(x, (len(weight),), weight, self.facts.eps)
        return F.rms_norm(x.float(), (len(weight),), weight.float() + self.facts.offset, self.facts.eps).to(x.dtype)

    def add_norm(self, x: Tensor, y: Tensor | None, after: Tensor | None, before: Tensor | None) -> Tensor:
        """See `Kernels.add_norm`."""
        if y is not None:
            x.add_(y if after is None else self._norm(y, after), alpha=self.facts.residual_multiplier)
        return x if before is None else self._norm(x, before)

    def norm_heads(self, qkv: Tensor, weight: Tensor, begin: int, features: int) -> None:
        """See `Kernels.norm_heads`."""
        part = qkv[:, begin : begin + features].unflatten(1, (-1, len(weight)))
        part.copy_(self._norm(part, weight))

    def gate(self, gate_up: Tensor) -> Tensor:
        """See `Kernels.gate`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") if self.facts.gelu else F.silu(gate)).mul_(up)

    def plan(self, at: Tensor, longest: int, width: int) -> _Plan:
        """See `Kernels.plan`."""
        rows = len(at)
        chunks: dict[int | None, list[tuple[slice, int, Tensor]]] = {layer.window: [] for layer in self.facts.layers}
        size = ATTENTION_ROWS if at.device.type == "cpu" else rows
        positions = torch.arange(width, device=at.device)
        for begin in range(0, rows, size):
            part = slice(begin, min(begin + size, rows))
            live = int(at[part].max()) + 1 if size < rows else longest + 1  # the first on a CPU, where it is no wait
            if at.device.type != "cpu":
                live = min(-(-live // LIVE_STEP) * LIVE_STEP, width)
            last = at[part, None, None, None]
            for window, found in chunks.items():
                mask = positions[:live] <= last
                found.append((part, live, mask if window is None else mask & (positions[:live] > last - window)))
        kv_heads = self.facts.kv_heads
        slots = (torch.arange(rows * kv_heads, device=at.device).view(rows, -1) * width + at[:, None]).flatten()
        return _Plan(at, slots, chunks, {})

    def attend(self, plan: _Plan, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """See `Kernels.attend`."""
        rows, heads, (_, kv_heads, _, dim) = len(qkv), self.facts.heads, keys.shape
        if id(cos) not in plan.angles:  # one table for many layers
            plan.angles[id(cos)] = cos[plan.at, None], sin[plan.at, None]
        parts = qkv.view(rows, -1, dim)
        qk = rotate(parts[:, : heads + kv_heads], *plan.angles[id(cos)])
        keys.view(-1, dim).index_copy_(0, plan.slots, qk[:, heads:].reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, plan.slots, parts[:, heads + kv_heads :].reshape(-1, dim))
        # the queries of a group meet their K and V together, which are never expanded: [rows, kv_heads, group, D]
        query = qk[:, :heads].reshape(rows, kv_heads, -1, dim)
        out = torch.empty_like(query)
        for part, live, mask in plan.chunks[window]:
            out[part] = attention(self.facts, query[part], keys[part, :, :live], values[part, :, :live], mask)
        return out.view(rows, -1)

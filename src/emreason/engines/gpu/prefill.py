"""Prompts on a GPU: attention over all of them in one call a layer, their K and V moved in one copy a layer, however many there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from emreason.models.families import Facts

VarlenAttention = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`: of queries and keys end to end, each sequence's last query seeing its last key."""


def variable_length(facts: Facts, dtype: torch.dtype, device: torch.device) -> VarlenAttention | None:
    """Torch's, where it is there and does what the model does: FlashAttention's kernel, in bfloat16 from the Ampere generation on."""
    if device.type != "cuda" or dtype != torch.bfloat16 or facts.cap is not None or facts.head_dim % 8 or facts.head_dim > 256:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


@dataclass(frozen=True)
class Prompts:
    """What the layers of a prefill share; slots are of a cache [rows * kv_heads * width, D].

    Attributes:
        ids, at: [tokens] of the new tokens: id, position.
        new: [tokens * kv_heads] slots where their K and V go.
        seen: [positions * kv_heads] slots of all that the prompts see; None where that is the new tokens themselves.
        queries, keys: [prompts + 1] int32, where each prompt's new tokens and seen positions begin; of the longest, so many.
    """

    ids: Tensor
    at: Tensor
    new: Tensor
    seen: Tensor | None
    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @staticmethod
    def of(jobs: Sequence[tuple[int, int, Sequence[int]]], kv_heads: int, width: int, device: torch.device) -> Prompts:
        """`jobs` (row, start, tokens), in one copy to the device."""
        new = [(token, row, start + i) for row, start, tokens in jobs for i, token in enumerate(tokens)]
        fresh = all(not start for _, start, _ in jobs)
        seen = [] if fresh else [(row, i) for row, start, tokens in jobs for i in range(start + len(tokens))]
        lengths = [(len(tokens), start + len(tokens)) for _, start, tokens in jobs]
        edges = [*accumulate((q for q, _ in lengths), initial=0), *accumulate((k for _, k in lengths), initial=0)]
        flat = [*(n for one in new for n in one), *(n for one in seen for n in one), *edges]
        told = torch.tensor(flat).to(device, non_blocking=True)
        of_new, of_seen, of_edges = told.split([3 * len(new), 2 * len(seen), len(edges)])
        seen_row, seen_at = of_seen.view(-1, 2).T
        ids, row, at = of_new.view(-1, 3).T.contiguous()
        queries, keys = of_edges.int().view(2, -1)
        return Prompts(
            ids,
            at,
            slots(row, at, kv_heads, width),
            None if fresh else slots(seen_row, seen_at, kv_heads, width),
            queries,
            keys,
            max(q for q, _ in lengths),
            max(k for _, k in lengths),
        )

    def attend(
        self, varlen: VarlenAttention, facts: Facts, window: int | None, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention [tokens, heads, D] of the new tokens, whose K and V [tokens, kv_heads, D] are in the caches already."""
        if self.seen is not None:
            k, v = (cache.view(-1, cache.shape[3]).index_select(0, self.seen).view(-1, *k.shape[1:]) for cache in (keys, values))
        several: dict[str, Any] = {"scale": facts.scale, "enable_gqa": facts.heads != facts.kv_heads}
        edges = (self.queries, self.keys, self.longest_query, self.longest_key)
        attended: Tensor = varlen(q, k, v, *edges, window_size=(-1 if window is None else window - 1, 0), **several)
        return attended


def slots(row: Tensor, position: Tensor, kv_heads: int, width: int) -> Tensor:
    """Of each position [n] in a row [n] of a cache: [n * kv_heads]."""
    heads = torch.arange(kv_heads, device=row.device)
    return ((row[:, None] * kv_heads + heads) * width + position[:, None]).flatten()


def put(cache: Tensor, at: Tensor, new: Tensor) -> None:
    """Write `new` [n, kv_heads, D] to the slots `at` of a cache."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, at, new.reshape(-1, cache.shape[-1]))


def kept_slots(jobs: Sequence[tuple[int, int, int]], kv_heads: int, widths: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of `jobs` (row, length, first kept position): slots in a cache and in what is kept, of these widths; in one copy to the device."""
    told = [(row, i, at + i) for row, length, at in jobs for i in range(length)]
    row, position, kept = torch.tensor(told).to(device, non_blocking=True).T.contiguous()
    return slots(row, position, kv_heads, widths[0]), slots(torch.zeros_like(row), kept, kv_heads, widths[1])

"""The M-step's forward pass without padding: sequences end to end through the linear layers, attention per sequence.

Rows of an M-step differ threefold in length, so a padded batch spends up to half of its products on padding. Llama and Qwen2, on a CPU;
the modules of the model itself are called, so adapters, dropout and autograd work as they do in its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emreason.models.families import can_fuse
from emreason.models.products import product


def can_pack_rows(causal_lm: Any) -> bool:
    """Whether `packed_states` computes what this model's own forward does. On a GPU padded rows and one attention call are faster."""
    return (
        next(causal_lm.parameters()).device.type == "cpu" and can_fuse(causal_lm) and not getattr(causal_lm.config, "attention_dropout", 0)
    )


@dataclass(frozen=True)
class Segment:
    """Positions `begin` to `end` of `row` and of all rows that begin like it, behind those of the segments `before`, in their order."""

    row: int
    begin: int
    end: int
    before: tuple[int, ...]


def prefix_tree(rows: Sequence[Sequence[int]], least: int) -> tuple[list[Segment], list[tuple[int, ...]]]:
    """What rows of tokens begin with alike (an instruction, a question, words of its rationales), each piece of `least` tokens or more once.

    Returns:
        the segments, a segment behind those `before` it; and each row's segments, which together hold its tokens.
    """
    segments: list[Segment] = []
    paths: list[tuple[int, ...]] = [()] * len(rows)

    def grow(members: list[int], begin: int, before: tuple[int, ...]) -> None:
        first, alone = rows[members[0]], len(members) == 1
        end = min(len(rows[m]) for m in members)
        if not alone:
            end = next((i for i in range(begin, end) if any(rows[m][i] != first[i] for m in members)), end)
        if end - begin >= (1 if alone else least):
            segments.append(Segment(members[0], begin, end, before))
            before, begin = (*before, len(segments) - 1), end
        if alone:
            paths[members[0]] = before
            return
        parts: dict[int, list[int]] = {}
        for m in members:
            parts.setdefault(rows[m][end] if end < len(rows[m]) else -1 - m, []).append(m)
        for part in parts.values():
            grow(part, begin, before)

    if rows:
        grow(list(range(len(rows))), 0, ())
    return segments, paths


def packed_states(causal_lm: Any, input_ids: Tensor, completion_mask: Tensor, least: int) -> Tensor:
    """Hidden states [marked tokens, hidden], row by row, each of the position before a token that `completion_mask` marks; differentiable.

    Args:
        input_ids: [rows, length] int64; what follows a row's last marked token is not looked at.
        completion_mask: [rows, length] bool; the first column is not marked.
        least: tokens that rows must share from their beginning, or behind what they share already, to pass the layers once.
    """
    # a row's last token predicts nothing
    last = (completion_mask * torch.arange(completion_mask.shape[1])).amax(1).tolist()
    segments, paths = prefix_tree([row[:end] for row, end in zip(input_ids.tolist(), last, strict=True)], least)
    sizes = [s.end - s.begin for s in segments]
    places = torch.arange(sum(sizes)).split(sizes)
    rows = [torch.cat([places[i] for i in path])[completion_mask[r, 1 : last[r] + 1]] for r, path in enumerate(paths) if path]
    picked = torch.cat(rows)
    decoder = causal_lm.model
    embedded = decoder.embed_tokens(torch.cat([input_ids[s.row, s.begin : s.end] for s in segments]))
    x, dtype = embedded.float(), embedded.dtype  # the residual stream stays float32, as under autocast: it sums up 60 contributions
    positions = torch.cat([torch.arange(s.begin, s.end) for s in segments])
    cos, sin = (t[0, :, None] for t in decoder.rotary_emb(x[None], positions[None]))
    masks = [_mask(s.begin, s.end - s.begin) for s in segments]
    again = causal_lm.is_gradient_checkpointing and torch.is_grad_enabled()
    for layer in decoder.layers:
        # behind the last layer's attention nothing else is looked at
        arguments = (layer, x, dtype, cos, sin, segments, masks, picked if layer is decoder.layers[-1] else None)
        x = checkpoint(_layer, *arguments, use_reentrant=False) if again else _layer(*arguments)
    return _norm(decoder.norm, x, dtype)


def _layer(
    layer: Any,
    x: Tensor,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Segment],
    masks: Sequence[Tensor | None],
    picked: Tensor | None,
) -> Tensor:
    """One transformer layer on x [tokens, hidden] float32, of which the `picked` tokens are wanted; its products are of `dtype`."""
    attention, mlp = layer.self_attn, layer.mlp
    h = _norm(layer.input_layernorm, x, dtype)
    q, k, v = (product(p, h).view(len(x), -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    attended = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, segments, masks, attention.scaling)
    if picked is not None:
        x, attended = x.index_select(0, picked), attended.index_select(0, picked)
    x = x + product(attention.o_proj, attended.to(dtype))
    h = _norm(layer.post_attention_layernorm, x, dtype)
    return x + product(mlp.down_proj, product(mlp.gate_proj, h), product(mlp.up_proj, h))


def _norm(norm: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    normalized: Tensor = _RMSNorm.apply(x, norm.weight.float(), norm.variance_epsilon)
    return normalized.to(dtype)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) * weight of x [tokens, hidden], which keeps x and a number per token; torch's own keeps twice that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalized, (gradient,) = x * scale, gradients
        of_weight = (gradient * normalized).sum(0) if ctx.needs_input_grad[1] else None
        gradient = gradient * weight
        along = (gradient * normalized).mean(-1, keepdim=True)
        return gradient.sub_(normalized.mul_(along)).mul_(scale), of_weight, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, D] by cos, sin [tokens, 1, D]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def _mask(before: int, n: int) -> Tensor | None:
    """What is added to the scores [n, before + n] of a segment behind `before` positions; None: plainly causal."""
    if not before:
        return None
    return torch.zeros(n, before + n).masked_fill_(torch.ones(n, before + n, dtype=torch.bool).triu_(before + 1), -torch.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], masks: Sequence[Tensor | None], scale: float) -> Tensor:
    """Causal attention [tokens, heads * D] float32 of each segment to those before it and to itself."""
    # in float32: half the time of bfloat16 in the backward pass here. One split: a slice's gradient would be as large as all of q
    q, k, v = (t.float().transpose(0, 1)[None] for t in (q, k, v))
    sizes = [s.end - s.begin for s in segments]
    queries, keys, values = (t.split(sizes, dim=2) for t in (q, k, v))
    parts = []
    for i, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        behind = (*segment.before, i)
        key, value = ((t[i] if mask is None else torch.cat([t[j] for j in behind], dim=2)) for t in (keys, values))
        parts.append(
            F.scaled_dot_product_attention(queries[i], key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1).flatten(1)

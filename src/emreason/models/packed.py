"""The M-step's forward pass without padding: sequences end to end through the linear layers, attention per sequence.

Rows of an M-step differ threefold in length, so a padded batch spends up to half of its products on padding. Llama and Qwen2, on a CPU;
the modules of the model itself are called, so adapters, dropout and autograd work as they do in its own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emreason.models.families import can_fuse


def can_pack_rows(causal_lm: Any) -> bool:
    """Whether `packed_states` computes what this model's own forward does. On a GPU padded rows and one attention call are faster."""
    return (
        next(causal_lm.parameters()).device.type == "cpu" and can_fuse(causal_lm) and not getattr(causal_lm.config, "attention_dropout", 0)
    )


def packed_states(causal_lm: Any, input_ids: Tensor, completion_mask: Tensor, shared: int) -> Tensor:
    """Hidden states [marked tokens, hidden], row by row, each of the position before a token that `completion_mask` marks; differentiable.

    Args:
        input_ids: [rows, length] int64; what follows a row's last marked token is not looked at.
        completion_mask: [rows, length] bool; no row's first `shared + 1` columns are marked.
        shared: leading positions that hold the same tokens in all rows; they pass the layers once.
    """
    # a row's last token predicts nothing
    last = (completion_mask * torch.arange(completion_mask.shape[1])).amax(1).tolist()
    ids, positions, own = [input_ids[0, :shared]], [torch.arange(shared)], []
    begin = shared
    for row, end in enumerate(last):
        if end > shared:
            ids.append(input_ids[row, shared:end])
            positions.append(torch.arange(shared, end))
            own.append((begin, begin + end - shared))
            begin += end - shared
    decoder = causal_lm.model
    embedded = decoder.embed_tokens(torch.cat(ids))
    x, dtype = embedded.float(), embedded.dtype  # the residual stream stays float32, as under autocast: it sums up 60 contributions
    cos, sin = (t[0, :, None] for t in decoder.rotary_emb(x[None], torch.cat(positions)[None]))
    masks = [_mask(shared, end - begin) for begin, end in own]
    sizes = [shared, *(end - begin for begin, end in own)]
    again = causal_lm.is_gradient_checkpointing and torch.is_grad_enabled()
    for layer in decoder.layers:
        arguments = (layer, x, dtype, cos, sin, sizes, masks)
        x = checkpoint(_layer, *arguments, use_reentrant=False) if again else _layer(*arguments)
    picked = torch.cat([completion_mask[row, shared + 1 : end + 1] for row, end in enumerate(last) if end > shared])
    return _norm(decoder.norm, x[shared:][picked], dtype)


def _layer(layer: Any, x: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor, sizes: list[int], masks: Sequence[Tensor | None]) -> Tensor:
    """One transformer layer on x [tokens, hidden] float32; its products are of `dtype`."""
    attention, mlp = layer.self_attn, layer.mlp
    h = _norm(layer.input_layernorm, x, dtype)
    q, k, v = (p(h).view(len(x), -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    attended = _attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, sizes, masks, attention.scaling)
    x = x + attention.o_proj(attended.to(dtype))
    h = _norm(layer.post_attention_layernorm, x, dtype)
    # what goes into `down` is a tenth of all that a layer would keep for its backward pass; made again there, from gate and up
    down = functools.partial(checkpoint, _down, use_reentrant=False) if torch.is_grad_enabled() else _down
    return x + down(mlp, mlp.gate_proj(h), mlp.up_proj(h))


def _down(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = mlp.down_proj(F.silu(gate) * up)
    return product


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


def _mask(shared: int, n: int) -> Tensor | None:
    """What is added to the scores [n, shared + n] of a sequence behind the shared prefix; None: plainly causal."""
    if not shared:
        return None
    return torch.zeros(n, shared + n).masked_fill_(torch.ones(n, shared + n, dtype=torch.bool).triu_(shared + 1), -torch.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], masks: Sequence[Tensor | None], scale: float) -> Tensor:
    """Causal attention [tokens, heads * D] float32 of the prefix, `sizes[0]` tokens, and of each sequence to it and to itself."""
    # in float32: half the time of bfloat16 in the backward pass here. One split: a slice's gradient would be as large as all of q
    q, k, v = (t.float().transpose(0, 1)[None] for t in (q, k, v))
    (q0, k0, v0), *rest = zip(*(t.split(sizes, dim=2) for t in (q, k, v)), strict=True)
    attention = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    parts = [attention(q0, k0, v0, is_causal=True)] if sizes[0] else []
    for (query, keys, values), mask in zip(rest, masks, strict=True):
        if mask is not None:
            keys, values = torch.cat((k0, keys), dim=2), torch.cat((v0, values), dim=2)
        parts.append(attention(query, keys, values, attn_mask=mask, is_causal=mask is None))
    return torch.cat(parts, dim=2)[0].transpose(0, 1).flatten(1)

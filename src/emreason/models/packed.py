"""The M-step's forward pass without padding: sequences end to end through the linear layers, attention per sequence.

Rows of an M-step differ threefold in length, so a padded batch spends up to half of its products on padding. On a CPU, for models that
`families.Facts` describes; the modules of the model itself are called, so adapters, dropout and autograd work as they do in its own
forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emreason.models.families import Facts, Layer, agrees, final_logits, read_facts


def can_pack_rows(causal_lm: Any) -> bool:
    """Whether `packed_states` computes what this model's own forward does. On a GPU padded rows and one attention call are faster."""
    dropouts = ("attention_dropout", "resid_pdrop", "embd_pdrop")
    if next(causal_lm.parameters()).device.type != "cpu" or any(getattr(causal_lm.config, name, 0) for name in dropouts):
        return False
    return read_facts(causal_lm) is not None and agrees(causal_lm, _logits)


def _logits(causal_lm: Any, facts: Facts, ids: list[int]) -> Tensor:
    """For `agrees`."""
    marked = torch.ones(1, len(ids) + 1, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    states = packed_states(causal_lm, torch.tensor([[*ids, 0]]), marked, 0)
    return final_logits(causal_lm.config, facts.head(states))


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
    facts = read_facts(causal_lm)
    assert facts is not None
    embedded = facts.embedding(torch.cat(ids)) * facts.embedding_multiplier
    x, dtype = embedded.float(), embedded.dtype  # the residual stream stays float32, as under autocast: it sums up 60 contributions
    tables = {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in facts.tables(x, torch.cat(positions)).items()}
    sizes = [shared, *(end - begin for begin, end in own)]
    masks = {window: _masks(sizes, window) for window in {layer.window for layer in facts.layers}}
    again = causal_lm.is_gradient_checkpointing and torch.is_grad_enabled()
    for layer in facts.layers:
        arguments = (facts, layer, x, dtype, *tables[layer.rotary], sizes, masks[layer.window])
        x = checkpoint(_layer, *arguments, use_reentrant=False) if again else _layer(*arguments)
    picked = torch.cat([completion_mask[row, shared + 1 : end + 1] for row, end in enumerate(last) if end > shared])
    return _norm(facts, facts.norm, x[shared:][picked], dtype)


def _layer(
    facts: Facts, layer: Layer, x: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor, sizes: list[int], masks: Sequence[Tensor | None]
) -> Tensor:
    """One transformer layer on x [tokens, hidden] float32; its products are of `dtype`."""
    h = _norm(facts, layer.before_attention, x, dtype)
    q, k, v = _products(layer.qkv, h, facts.head_sizes)
    q, k = _norm(facts, layer.q_norm, q, dtype), _norm(facts, layer.k_norm, k, dtype)
    q, k, v = (t.view(len(x), -1, facts.head_dim) for t in (q, k, v))
    attended = _attend(facts, rotate(q, cos, sin), rotate(k, cos, sin), v, sizes, masks)
    x = _add(facts, x, layer.o(attended.to(dtype)), layer.after_attention)
    h = _norm(facts, layer.before_mlp, x, dtype)
    # what goes into `down` is a tenth of all that a layer would keep for its backward pass; made again there, from gate and up
    down = functools.partial(checkpoint, _down, use_reentrant=False) if torch.is_grad_enabled() else _down
    return _add(facts, x, down(layer, facts.gelu, *_products(layer.gate_up, h)), layer.after_mlp)


def _products(modules: tuple[Any, ...], h: Tensor, sizes: list[int] | None = None) -> Sequence[Tensor]:
    """Of each module; those of one for several are split, evenly or into `sizes`."""
    if len(modules) > 1:
        return [module(h) for module in modules]
    product: Tensor = modules[0](h)
    return product.split(sizes, dim=-1) if sizes else product.chunk(2, dim=-1)


def _down(layer: Layer, gelu: bool, gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = layer.down((F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up)
    return product


def _add(facts: Facts, x: Tensor, y: Tensor, norm: Any | None) -> Tensor:
    """The residual stream x with the contribution y, which a norm may follow."""
    return torch.add(x, y if norm is None else _norm(facts, norm, y, x.dtype), alpha=facts.residual_multiplier)


def _norm(facts: Facts, norm: Any | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, over as many neighbours as it has weights; x where there is none."""
    if norm is None:
        return x.to(dtype)
    weight = norm.weight.float()
    rows = x.float().view(-1, len(weight)) if len(weight) != x.shape[-1] else x.float()
    normalized: Tensor = _RMSNorm.apply(rows, weight + facts.offset if facts.offset else weight, facts.eps)
    return normalized.to(dtype).view(x.shape)


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first pairs of x [tokens, heads, D] by cos, sin [tokens, 1, pairs]."""
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _masks(sizes: list[int], window: int | None) -> list[Tensor | None]:
    """For the prefix, `sizes[0]` tokens, and each sequence behind it: which keys a query sees [n, prefix + n]; None: plainly causal."""
    shared, masks = sizes[0], [_mask(0, sizes[0], window)]
    return masks + [_mask(shared, n, window) for n in sizes[1:]]


def _mask(shared: int, n: int, window: int | None) -> Tensor | None:
    """What is added to the scores [n, shared + n] of a sequence behind the shared prefix; None: plainly causal."""
    seen = shared + n
    if not shared and (window is None or seen <= window):
        return None
    hidden = torch.ones(n, seen, dtype=torch.bool).triu_(shared + 1)
    if window is not None:
        hidden |= torch.ones(n, seen, dtype=torch.bool).tril_(shared - window)
    return torch.zeros(n, seen).masked_fill_(hidden, -torch.inf)


def _attend(facts: Facts, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], masks: Sequence[Tensor | None]) -> Tensor:
    """Attention [tokens, heads * D] float32 of the prefix, `sizes[0]` tokens, and of each sequence to it and to itself."""
    # in float32: half the time of bfloat16 in the backward pass here. One split: a slice's gradient would be as large as all of q
    q, k, v = (t.float().transpose(0, 1)[None] for t in (q, k, v))
    (q0, k0, v0), *rest = zip(*(t.split(sizes, dim=2) for t in (q, k, v)), strict=True)
    parts = [attention(facts, q0, k0, v0, masks[0])] if sizes[0] else []
    for (query, keys, values), mask in zip(rest, masks[1:], strict=True):
        if sizes[0]:
            keys, values = torch.cat((k0, keys), dim=2), torch.cat((v0, values), dim=2)
        parts.append(attention(facts, query, keys, values, mask))
    return torch.cat(parts, dim=2)[0].transpose(0, 1).flatten(1)


def attention(facts: Facts, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [rows, heads, n, D] under a mask that says what is seen or is added to the scores; None: plainly causal."""
    if facts.cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=facts.scale, enable_gqa=True)
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT  # softly capped scores are beyond torch's own
    scores = facts.cap * torch.tanh(scores.float() * (facts.scale / facts.cap))
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=q.device).triu_(1)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
    weights = (scores + mask.unsqueeze(-3)).softmax(-1).to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)

"""The M-step's forward pass without padding: sequences end to end through the linear layers, attention per sequence, what they share once.

Rows of an M-step differ threefold in length, so a padded batch spends up to half of its products on padding. On a CPU, for models that
`families.Facts` describes; linear layers are computed by `products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emreason.models.families import Facts, Layer, agrees, own_logits, read_facts
from emreason.models.training.products import product


def can_pack_rows(causal_lm: Any) -> bool:
    """Whether `packed_states` computes what this model's own forward does. On a GPU padded rows and one attention call are faster."""
    dropouts = ("attention_dropout", "resid_pdrop", "embd_pdrop")
    if next(causal_lm.parameters()).device.type != "cpu" or any(getattr(causal_lm.config, name, 0) for name in dropouts):
        return False
    return read_facts(causal_lm) is not None and agrees(causal_lm, _logits)


def _logits(causal_lm: Any, facts: Facts, ids: list[int]) -> Tensor:  # noqa: ARG001
    """For `agrees`."""
    marked = torch.ones(1, len(ids) + 1, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    states = packed_states(causal_lm, torch.tensor([[*ids, 0]]), marked, 1)
    return own_logits(causal_lm, states)


@dataclass(frozen=True)
class Segment:
    """Positions `begin` to `end` of `row` and of all rows that begin like it, behind those of the segments `before`, in their order."""

    row: int
    begin: int
    end: int
    before: tuple[int, ...]


def prefix_tree(rows: Sequence[Sequence[int]], least: int) -> tuple[list[Segment], list[tuple[int, ...]]]:
    """What rows of tokens begin with alike (instruction, question, words of a rationale), each piece of `least` tokens or more once.

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
    facts = read_facts(causal_lm)
    assert facts is not None
    embedded = facts.embedding(torch.cat([input_ids[s.row, s.begin : s.end] for s in segments])) * facts.embedding_multiplier
    x, dtype = embedded.float(), embedded.dtype  # the residual stream stays float32, as under autocast: it sums up 60 contributions
    positions = torch.cat([torch.arange(s.begin, s.end) for s in segments])
    tables = {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in facts.tables(x, positions).items()}
    windows = {layer.window for layer in facts.layers}
    masks = {window: [_mask(s.begin, s.end - s.begin, window) for s in segments] for window in windows}
    again = causal_lm.is_gradient_checkpointing and torch.is_grad_enabled()
    for layer in facts.layers:
        # behind the last layer's attention nothing else is looked at
        wanted = picked if layer is facts.layers[-1] else None
        arguments = (facts, layer, x, dtype, *tables[layer.rotary], segments, masks[layer.window], wanted)
        x = checkpoint(_layer, *arguments, use_reentrant=False) if again else _layer(*arguments)
    return _norm(facts, facts.norm, x, dtype)


def _layer(
    facts: Facts,
    layer: Layer,
    x: Tensor,
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    segments: Sequence[Segment],
    masks: Sequence[Tensor | None],
    wanted: Tensor | None,
) -> Tensor:
    """One transformer layer on x [tokens, hidden] float32, of which the `wanted` tokens are returned; its products are of `dtype`."""
    h = _norm(facts, layer.before_attention, x, dtype)
    q, k, v = _products(layer.qkv, h, facts.head_sizes)
    q, k = _norm(facts, layer.q_norm, q, dtype), _norm(facts, layer.k_norm, k, dtype)
    q, k, v = (t.view(len(x), -1, facts.head_dim) for t in (q, k, v))
    attended = _attend(facts, rotate(q, cos, sin), rotate(k, cos, sin), v, segments, masks)
    if wanted is not None:
        x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
    x = _add(facts, x, product(layer.o, attended.to(dtype)), layer.after_attention)
    h = _norm(facts, layer.before_mlp, x, dtype)
    gate, up = _products(layer.gate_up, h)
    return _add(facts, x, product(layer.down, gate, up, facts.gelu), layer.after_mlp)


def _products(modules: tuple[Any, ...], h: Tensor, sizes: list[int] | None = None) -> Sequence[Tensor]:
    """Of each module; those of one for several are split, evenly or into `sizes`."""
    if len(modules) > 1:
        return [product(module, h) for module in modules]
    together = product(modules[0], h)
    return together.split(sizes, dim=-1) if sizes else together.chunk(2, dim=-1)


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


def _mask(before: int, n: int, window: int | None) -> Tensor | None:
    """What is added to the scores [n, before + n] of a segment behind `before` positions; None: plainly causal."""
    seen = before + n
    if not before and (window is None or seen <= window):
        return None
    hidden = torch.ones(n, seen, dtype=torch.bool).triu_(before + 1)
    if window is not None:
        hidden |= torch.ones(n, seen, dtype=torch.bool).tril_(before - window)
    return torch.zeros(n, seen).masked_fill_(hidden, -torch.inf)


def _attend(facts: Facts, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], masks: Sequence[Tensor | None]) -> Tensor:
    """Attention [tokens, heads * D] float32 of each segment to those before it and to itself."""
    # in float32: half the time of bfloat16 in the backward pass here. One split: a slice's gradient would be as large as all of q
    q, k, v = (t.float().transpose(0, 1)[None] for t in (q, k, v))
    queries, keys, values = (t.split([s.end - s.begin for s in segments], dim=2) for t in (q, k, v))
    parts = []
    for i, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        behind = (*segment.before, i)
        key, value = (t[i] if len(behind) == 1 else torch.cat([t[j] for j in behind], dim=2) for t in (keys, values))
        parts.append(attention(facts, queries[i], key, value, mask))
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

"""Drawing a token: a seed per draw, counter-based uniform numbers, the inverse CDF of a row's distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emreason.types import SamplingParams

CDF_BLOCK = 256

GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB))
"""SplitMix64's constants as signed integers: torch's products wrap like those of unsigned ones."""


def signed(seed: int) -> int:
    """`seed` mod 2⁶⁴ as an int64; any Python integer is a seed."""
    return (seed + 2**63) % 2**64 - 2**63


def counter_uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """One uniform number in [0, 1) per (seed, counter), int64 [B] each, by SplitMix64: float64 [B], the same bits on every device."""
    bits = _mix(_mix(seeds + GOLDEN) + (counters + 1) * GOLDEN)
    return _shifted(bits, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by of the unsigned number with z's bits."""
    return (z >> by) & (2 ** (64 - by) - 1)


@dataclass(frozen=True)
class Shaping:
    """How the tokens of B rows are drawn: made when the rows change, so that a step takes nothing from the host.

    Attributes:
        inverse, top_p, cold: [B] float32: of the temperature, 1 where it is 0; top-p; 1 where the temperature is 0, else 0.
        warm, nucleus, greedy: whether any row has a temperature that is neither 0 nor 1, a top-p below 1, temperature 0.
    """

    inverse: Tensor
    top_p: Tensor
    cold: Tensor
    warm: bool
    nucleus: bool
    greedy: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device) -> Shaping:
        """`params`, one per row, in one copy to `device`."""
        rows = [[1 / (p.temperature or 1) for p in params], [p.top_p for p in params], [float(p.temperature == 0) for p in params]]
        warm = any(p.temperature not in (0, 1) for p in params)
        nucleus = any(p.top_p < 1 and p.temperature > 0 for p in params)
        inverse, top_p, cold = torch.tensor(rows).to(device, non_blocking=True)
        return Shaping(inverse, top_p, cold, warm, nucleus, any(p.temperature == 0 for p in params))


def draw(logits: Tensor, uniforms: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """One token id [B] per row of `logits` [B, V] by inverse CDF at `uniforms` [B], and its log-probability [B] at temperature 1.

    Temperature 0 takes the first most probable token. Float32 logits are overwritten.
    """
    logits = logits.float()
    logits = logits.sub_(logits.amax(dim=-1, keepdim=True))
    shaped = None
    if shaping.warm:
        shaped = (logits * shaping.inverse[:, None]).exp_()
    weights = logits.exp_()
    log_total = _blocks(weights).sum(-1).sum(-1).log_()
    shaped = weights if shaped is None else shaped
    if shaping.nucleus:
        shaped = torch.where(shaping.top_p[:, None] < 1, keep_nucleus(shaped, shaping.top_p), shaped)
    ids = inverse_cdf(shaped, uniforms)
    if shaping.greedy:
        ids = torch.where(shaping.cold > 0, first_maximum(weights), ids)
    return ids, weights.gather(1, ids[:, None])[:, 0].log_() - log_total


def keep_nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """`weights` [B, V] with everything but the smallest set of most probable tokens whose mass reaches top_p [B] set to zero."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None].double() * ordered.double().sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(weights).scatter_(1, order, ordered)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [B] at which the cumulated `weights` [B, V] (not normalised) pass uniforms [B] of their total.

    In two levels, blocks then tokens of the block: a float64 cumulation over the whole vocabulary costs ten times as much.
    """
    rows, vocabulary = weights.shape
    blocks = _blocks(weights)
    cumulated = blocks.sum(-1).double().cumsum(-1)
    target = (uniforms * cumulated[:, -1])[:, None]
    block = _first_above(cumulated, target)
    target = target - torch.where(block > 0, cumulated.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    return (block * CDF_BLOCK + _first_above(inside, target))[:, 0].clamp_(max=vocabulary - 1)


def first_maximum(weights: Tensor) -> Tensor:
    """Index [B] of the first maximum of each row of `weights` [B, V]; block by block, ten times as fast as `argmax` on a CPU."""
    blocks = _blocks(weights)
    block = blocks.amax(-1).argmax(-1)
    return block * CDF_BLOCK + blocks[torch.arange(len(blocks), device=weights.device), block].argmax(-1)


def _blocks(weights: Tensor) -> Tensor:
    """`weights` [B, V], none negative, as [B, V / CDF_BLOCK, CDF_BLOCK]; zeros fill the last block."""
    if weights.shape[1] % CDF_BLOCK:
        weights = nn.functional.pad(weights, (0, -weights.shape[1] % CDF_BLOCK))
    return weights.view(len(weights), -1, CDF_BLOCK)


def _first_above(cumulated: Tensor, target: Tensor) -> Tensor:
    """First index [B, 1] whose cumulated weight [B, n] exceeds target [B, 1]; rounding may not lift a target over the end."""
    target = torch.minimum(target, cumulated[:, -1:] * (1 - 1e-12))
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=cumulated.shape[-1] - 1)


def draw_seed(seed: int, iteration: int, question_id: str, attempt: int) -> int:
    """The 63-bit seed of one draw: a function of these four alone, so that ranks, batches and resumes do not matter."""
    digest = hashlib.blake2b(f"{seed}\0{iteration}\0{attempt}\0{question_id}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1

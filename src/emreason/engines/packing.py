"""Matrix products with weights laid out once, adapters merged in, for the fastest kernel of the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emreason.models.masters import dithered
from emreason.models.memory import let_go

PACK_ROWS = 512
"""Row count that packed weights are laid out for; measured best or equal from 4 rows to 512."""


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The effective weight [out, in]: the base weight plus scale · B A of each active adapter, summed in float32.

    In bfloat16 rounded as masters are published: to nearest, most of what a few steps taught an adapter would be lost here.
    """
    if type(module) is nn.Linear:
        return module.weight.to(dtype)
    weight = module.get_base_layer().weight
    active = [] if module.merged or module.disable_adapters else [a for a in module.active_adapters if a in module.lora_A]
    for a in active:
        weight = weight.float() + module.scaling[a] * (module.lora_B[a].weight.float() @ module.lora_A[a].weight.float())
    return dithered(weight) if active and dtype == torch.bfloat16 else weight.to(dtype)


@functools.cache
def can_prepack() -> bool:
    """Whether MKL's prepacked product is here, and right for other row counts than the one it was packed for (a hint only)."""
    if not torch.backends.mkl.is_available():
        return False
    weight, rows = torch.linspace(-1, 1, 192 * 160).view(192, 160), torch.linspace(-2, 3, 600 * 160).view(600, 160).sin()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, PACK_ROWS)
    return packed.is_mkldnn and all(
        torch.allclose(torch.ops.mkl._mkl_linear(rows[:n], packed, weight, None, n), rows[:n] @ weight.T, rtol=1e-4, atol=1e-3)
        for n in (1, 3, 17, 64, 130, 600)
    )


class PackedLinear:
    """y = x Wᵀ + b for the stacked rows of one or more layers, in the layout that this device multiplies fastest.

    On a CPU that is MKL's packed one in float32 (1.5 × plain `linear` at 4 rows, 1.15 × at 64, 1.08 × at 512; SmolLM2, one core) and
    oneDNN's in bfloat16 (1.5, 1.1, 1.03).
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        weights = [_weight(m, dtype) for m in modules]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [getattr(m, "base_layer", m).bias for m in modules]
        self.bias = None
        if any(b is not None for b in biases):
            zeros = [w.new_zeros(w.shape[0]) for w in weights]
            self.bias = torch.cat([z if b is None else b.to(dtype) for b, z in zip(biases, zeros, strict=True)])
        pack = None
        if self.weight.device.type == "cpu" and dtype == torch.float32 and can_prepack():
            pack = torch.ops.mkl._mkl_reorder_linear_weight
        elif self.weight.device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pack = torch.ops.mkldnn._reorder_linear_weight
        self.packed: Tensor | None = pack(self.weight.contiguous(), PACK_ROWS) if pack else None
        if pack:
            self.weight = self.weight.new_empty(1).expand(self.weight.shape)  # only its shape is read from here on
            for module in modules:
                let_go(getattr(module, "base_layer", module).weight)  # until the M-step

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        if x.dtype == torch.float32:
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, len(x))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

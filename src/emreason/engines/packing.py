"""Matrix products with weights laid out once, adapters merged in, for the fastest kernel of the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emreason.models.masters import active_adapters, effective_weight
from emreason.models.memory import let_go
from emreason.models.training.products import in_precision

PACK_ROWS = 512
"""Row count that packed weights are laid out for; measured best or equal from 4 rows to 512."""


COPIES = ("cpu",)
"""Devices on which packed copies of the weights, adapters merged, are worth their memory."""


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


@functools.cache
def bf16_products() -> bool:
    """Whether oneDNN is here and this processor multiplies in bfloat16. Builds without oneDNN do not know the question."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """y = x Wᵀ + b for the stacked rows of one or more layers, in the layout that this device multiplies fastest.

    On a CPU that is MKL's packed one in float32 (1.5 × plain `linear` at 4 rows, 1.15 × at 64, 1.08 × at 512; SmolLM2, one core) and
    oneDNN's in bfloat16 (1.5, 1.1, 1.03), adapters merged. On a GPU nothing is copied: the layers' own weights come to lie side by side,
    and adapters stay apart, added to the product's float32 sum. The M-step adds them so on a CPU; on a GPU it is peft's forward, which adds
    them to what is rounded already: of updates that small what is scored there is less than what is sampled here.
    """

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype):
        bases = [getattr(m, "base_layer", m) for m in modules]
        self.down: Tensor | None = None
        self.packed: Tensor | None = None
        if bases[0].weight.device.type in COPIES or bases[0].weight.dtype != dtype:
            weights = [effective_weight(m, dtype) for m in modules]
            self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        else:
            self.weight = side_by_side([base.weight for base in bases])
            self._take_adapters(modules, dtype)
        self.bias = None
        if any(base.bias is not None for base in bases):
            parts = [self.weight.new_zeros(len(b.weight)) if b.bias is None else b.bias.to(dtype) for b in bases]
            self.bias = torch.cat(parts)
        pack = None
        if self.weight.device.type == "cpu" and dtype == torch.float32 and can_prepack():
            pack = torch.ops.mkl._mkl_reorder_linear_weight
        elif self.weight.device.type == "cpu" and dtype == torch.bfloat16 and bf16_products():
            pack = torch.ops.mkldnn._reorder_linear_weight
        if pack and "cpu" in COPIES:
            self.packed = pack(self.weight.contiguous(), PACK_ROWS)
            self.weight = self.weight.new_empty(1).expand(self.weight.shape)  # only its shape is read from here on
            for base in bases:
                let_go(base.weight)  # until the M-step

    def _take_adapters(self, modules: Sequence[Any], dtype: torch.dtype) -> None:
        """`down` [Σ r, in] and `up` [out, Σ r], a block for each layer's adapters."""
        begin, found = 0, []
        for module in modules:
            stop = begin + len(getattr(module, "base_layer", module).weight)
            found += [(begin, stop, module, a) for a in active_adapters(module)]
            begin = stop
        if not found:
            return
        self.down = torch.cat([in_precision(dtype, module.lora_A[a].weight) for _, _, module, a in found])
        self.up, column = self.down.new_zeros(begin, len(self.down)), 0
        for begin, stop, module, a in found:
            factor = in_precision(dtype, module.lora_B[a].weight * module.scaling[a])
            self.up[begin:stop, column : (column := column + factor.shape[1])] = factor

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is not None:
            y = torch.addmm((x @ self.down.T) @ self.up.T, x, self.weight.T)
            return y if self.bias is None else y.add_(self.bias)
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        if x.dtype == torch.float32:
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, len(x))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """`weights` [out, in] as one tensor [Σ out, in] without a second copy: they become views of it, and stay what they are."""
    first, rows, at = weights[0].detach(), sum(map(len, weights)), weights[0].storage_offset()
    together = len(weights) > 1
    for weight in weights:
        together &= weight.untyped_storage()._cdata == first.untyped_storage()._cdata and weight.storage_offset() == at
        at += weight.numel()
    if together:
        return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
    if len(weights) == 1:
        return first
    with torch.inference_mode(False), torch.no_grad():  # they are to be trained
        whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return whole

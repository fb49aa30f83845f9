"""What the machine could do: the best measured matrix-multiplication rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from emreason.engines.packing import bf16_products


def matmul_peak(device: str, size: int = 2048, repeats: int = 10) -> dict[str, float]:
    """GFLOP/s of square matrix products per dtype, the best of the layouts that the work uses: the limit that the table's shares refer to.

    The layouts: x Wᵀ as a linear layer's forward has it, x W as its backward, and on a CPU x Wᵀ with W laid out beforehand.
    """
    size = size if device == "cpu" else 8192
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timers = [Timer("f(x)", globals={"f": f, "x": x}, num_threads=torch.get_num_threads()) for f in _layouts(w)]
        best = min(timer.timeit(1).mean for timer in timers for _ in range(repeats))
        peaks[str(dtype).removeprefix("torch.")] = 2 * size**3 / best / 1e9
    return peaks


def _layouts(w: Tensor) -> list[Callable[[Tensor], Tensor]]:
    layouts: list[Callable[[Tensor], Tensor]] = [lambda x: F.linear(x, w), lambda x: x @ w]
    if w.device.type == "cpu" and w.dtype == torch.bfloat16 and bf16_products():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(w))
        layouts.append(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return layouts

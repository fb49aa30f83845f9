"""What the machine could do: the best measured matrix-multiplication rate."""

from __future__ import annotations

import time

import torch


def matmul_peak(device: str, size: int = 2048, repeats: int = 10) -> dict[str, float]:
    """GFLOP/s of square matrix products, per dtype: the limit that shares in the table refer to."""
    size = size if device == "cpu" else 8192
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        best = float("inf")
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            a @ a
            _wait(device)
            best = min(best, time.perf_counter() - start)
        peaks[str(dtype).removeprefix("torch.")] = 2 * size**3 / best / 1e9
    return peaks


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()

"""Sums and lists over ranks. In a run of one rank what is given comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def several() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def total(values: Tensor) -> Tensor:
    """The sum over ranks, in place; on the device that the ranks talk through."""
    if several():
        dist.all_reduce(values)
    return values


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The weights of a step's rationales already hold the normalisation, so it is a sum, not a mean."""
    if several():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def gather(items: list[Any]) -> list[Any]:
    """The items of all ranks, on every rank."""
    if not several():
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]

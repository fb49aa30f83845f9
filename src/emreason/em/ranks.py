"""Sums and lists over ranks, and how Lightning holds these together. In a run of one rank what is given comes back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

PATIENCE = timedelta(days=7)
"""How long a rank waits for one whose E-step or evaluation takes longer; a rank that dies is heard of at once."""


class Ranks(DDPStrategy):
    """Ranks with the same weights, sent by the first one at the start.

    Without DDP's wrapper, whose gradient buckets are 4 bytes a parameter that nobody reads: the M-step sums gradients itself.
    """

    def configure_ddp(self) -> None:
        assert self.model is not None
        for parameter in self.model.parameters():
            dist.broadcast(parameter.detach(), 0)

    def barrier(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if several():
            dist.barrier(_patient(dist.group.WORLD))


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
    dist.all_gather_object(parts, items, _patient(dist.group.WORLD))
    return [item for part in parts for item in part]


@lru_cache(maxsize=1)
def _patient(world: Any) -> Any:  # noqa: ARG001  (another world is another group)
    """All ranks, for what may have to wait for hours: NCCL gives up after ten minutes, Lightning's default after thirty."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)

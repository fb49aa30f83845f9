"""Sums and lists over ranks, and how Lightning holds these together. In a run of one rank what is given comes back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from emreason.progress import doing
from emreason.runs.journal import named

PATIENCE = timedelta(days=7)
"""How long a rank waits for one whose E-step or evaluation takes longer; a rank that dies is heard of at once."""


class Ranks(DDPStrategy):
    """Ranks with the same weights, sent by the first one at the start.

    Without DDP's wrapper, whose gradient buckets are 4 bytes a parameter that nobody reads: the M-step sums gradients itself.

    Args:
        sharding: what the M-step trains is cut in pieces over all ranks (`shard`), or over those of a node (`hybrid`); None: it is not.
    """

    def __init__(self, sharding: Literal["shard", "hybrid"] | None = None):
        super().__init__()
        self.sharding = sharding

    def configure_ddp(self) -> None:
        assert self.model is not None
        for parameter in self.model.parameters():
            dist.broadcast(parameter.detach(), 0)
        if self.sharding is not None:
            module: Any = self.lightning_module
            several_nodes = self.sharding == "hybrid" and self.num_nodes > 1
            shape = (self.num_nodes, self.num_processes) if several_nodes else (self.world_size,)
            names = ("copies", "pieces")[-len(shape) :]
            module.shard(init_device_mesh(self.root_device.type, shape, mesh_dim_names=names))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As ever; what is in pieces is in a folder beside it that every rank writes to, and whole before the file names it."""
        path, pieces = Path(filepath), checkpoint.pop("shards", None)
        if pieces is not None:
            folder = path.with_name(f"{path.stem}-{checkpoint['epoch']:03d}")
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
            self.barrier()
            with doing(f"Writing {folder.parent.name}/{folder.name}", at_once=False), named(folder):
                try:
                    dcp.save(pieces, checkpoint_id=folder)
                except dcp.api.CheckpointException as error:
                    raise next(iter(error.failures.values()))[0] from error
            checkpoint["shards"] = folder.name
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if pieces is not None and self.is_global_zero:
            for other in path.parent.glob(f"{path.stem}-*"):
                if other != folder:
                    shutil.rmtree(other)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        if "shards" in checkpoint:
            checkpoint["shards"] = Path(checkpoint_path).parent / checkpoint["shards"]
        return checkpoint

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


def most(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    if not several():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


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

"""What a checkpoint holds beside what Lightning puts there: everything where training may go on from it, no optimizer where it will not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from emreason.progress import doing
from emreason.runs.journal import named
from emreason.types import UserError


def keep_trainable(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Leave the frozen weights out."""
    trainable = {f"model.{name}" for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}


def refuse_ended(checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """Raises UserError where training would go on without the optimizer's state."""
    if not checkpoint.get("ended"):
        return
    done = _processed(checkpoint)
    if max_epochs is None or max_epochs > done:
        raise UserError(
            f"This run had come to its end after {done} iterations and, with keep_checkpoints=false, kept no optimizer to go on "
            f"with: finish it with trainer.max_epochs={done} and the token_budget it had, or begin again with overwrite=true."
        )


def refuse_other_kind(checkpoint: dict[str, Any], sharded: bool) -> None:
    """Raises UserError where training would go on, sharded, from a checkpoint that is not, or the other way round."""
    if "optimizer_states" in checkpoint and ("shards" in checkpoint) != sharded:
        begun, mend = ("without", "auto") if sharded else ("with", "shard")
        raise UserError(f"This run was begun {begun} sharding: go on with trainer.strategy={mend}, or begin again with overwrite=true.")


def iterations_in(checkpoint: Path) -> int:
    """EM iterations that a checkpoint file completes.

    Raises:
        UserError: the file is not a checkpoint.
    """
    if not checkpoint.exists():
        return 0
    try:
        return _processed(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # whatever else the file may be; nothing in it is run
        raise UserError(f"{checkpoint} is not a checkpoint of this program; restore it, or begin again with overwrite=true.") from error


def _processed(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, streamed to a temporary file and renamed: no half-written checkpoint, no second copy in memory.

    Without CRC-32: computing it takes as long as writing, and a checkpoint is whole or not there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with doing(f"Writing {path.parent.name}/{path.name}", at_once=False), named(path), partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        finally:
            torch.serialization.set_crc32_options(before)
        partial.replace(path)

"""How Lightning's checkpoints are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from emreason.progress import doing
from emreason.runs.journal import named


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

"""The training weights on their way to vLLM: merged, cut into pieces, through GPU memory or files, and put in place by its workers."""

from __future__ import annotations

import os
import pickle
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from emreason.models.families import base_causal_lm
from emreason.models.masters import dithered
from emreason.types import UserError

PIECE_BYTES = 2**30
"""Weights copied at once: what handing them over takes beside them, on the GPU or in a file."""

Piece = list[tuple[str, Tensor]]
Call = Callable[..., Any]
"""`call(name, *arguments)`: a method of `TakeWeights`, in all of vLLM's workers."""


class TakeWeights:
    """What vLLM's workers learn: to replace their weights in place. A mix-in of vLLM's own worker class."""

    def begin_weights(self: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def take_weights(self: Any, source: str | bytes) -> None:
        """One piece, in any order: a file, or a tensor of the trainer as `packed` makes it."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(_of_file(source) if isinstance(source, str) else unpacked(source, self.device))
        torch.accelerator.synchronize() if self.device.type != "cpu" else None

    def end_weights(self: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
        # a head tied to the embedding is skipped by the loader, and on CPUs it multiplies by a packed copy made when the engine started
        head: Any = getattr(model, "lm_head", None)
        if hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)


def hand_over(model: nn.Module, dtype: torch.dtype, call: Call, *, on_device: bool, folder: str | None = None) -> None:
    """Give vLLM the weights that `model` has now, adapters merged.

    Args:
        on_device: through the memory of the GPU that both are on; else through a file at a time.
        folder: where that file may lie (None: shared memory if there is room, else the folder for temporary files).
    """
    call("begin_weights")
    where: Path | None = None
    try:
        for piece in pieces(model, dtype):
            if on_device:
                kept = torch.cat([tensor.reshape(-1) for _, tensor in piece])
                if kept.is_cuda:
                    torch.cuda.synchronize()
                call("take_weights", packed(kept, piece))
                continue
            # a first piece may be one tensor larger than PIECE_BYTES
            where = where or passing(folder or roomy(2 * sum(t.nbytes for _, t in piece)) or tempfile.gettempdir())
            file = where / "weights.safetensors"
            save_file({name: tensor.cpu().contiguous() for name, tensor in piece}, file)
            call("take_weights", str(file))
    finally:
        if where is not None:
            shutil.rmtree(where, ignore_errors=True)
    call("end_weights")


def passing(above: str) -> Path:
    """A folder in `above` for files that pass through; those that processes of this machine were killed over are removed."""
    space = Path("/proc/self/ns/pid")  # containers may share a host's name and have processes of their own
    mine = f"emreason-{platform.node()}-{space.stat().st_ino if space.exists() else 0}-"
    for left in Path(above).glob(f"{mine}*-*"):
        owner = left.name.removeprefix(mine).partition("-")[0]
        if owner.isdecimal():
            try:
                os.kill(int(owner), 0)  # asks whether it lives
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except OSError:
                continue  # somebody else's
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=above))


def roomy(needed: int) -> str | None:
    """Shared memory, unless it is missing or, as in a container, too small; None is the folder for temporary files."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > needed else None


@torch.no_grad()
def pieces(model: nn.Module, dtype: torch.dtype) -> Iterator[Piece]:
    """The weights in `dtype`, at most `PIECE_BYTES` or one tensor at a time."""
    piece: Piece = []
    size = 0
    for name, tensor in merged_weights(model):
        merged = tensor.dtype == torch.float32 and dtype == torch.bfloat16
        copy = (dithered(tensor) if merged else tensor).detach().to(dtype)
        if piece and size + copy.nbytes > PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append((name, copy))
        size += copy.nbytes
    yield piece


def packed(kept: Tensor, piece: Piece) -> bytes:
    """What another process finds `kept` by, the flat tensors of `piece` end to end; it must stay until that process is done."""
    return bytes(ForkingPickler.dumps((*reduce_tensor(kept), [(name, tuple(tensor.shape)) for name, tensor in piece])))


def unpacked(handle: bytes, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The weights, copied: vLLM keeps them until a layer is complete, the trainer does not. vLLM sees the trainer's GPU as its first."""
    rebuild, arguments, layout = pickle.loads(handle)
    if rebuild is rebuild_cuda_tensor:
        arguments = (*arguments[:6], 0, *arguments[7:])
    flat = rebuild(*arguments)
    sizes = [torch.Size(shape).numel() for _, shape in layout]
    for (name, shape), part in zip(layout, flat.split(sizes), strict=True):
        yield name, part.view(shape).to(device, copy=True)


def _of_file(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            yield name, file.get_tensor(name).clone()  # vLLM keeps those of a layer that is not whole yet; the next piece is this file


@torch.no_grad()
def version(model: nn.Module) -> int:
    """Another number whenever the weights or the adapters in use are others: the sums of their bits, one wait for the device.

    torch's own count of writes does not know those of fused optimizers.
    """
    adapters = tuple(getattr(model, "active_adapters", None) or ()) if hasattr(model, "peft_config") else ()
    sums = [p.view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
    return hash((adapters, *torch.stack(sums).tolist()))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter of the transformers model, LoRA adapters merged in fp32; tied parameters once.

    Raises:
        UserError: an adapter that is not a LoRA.
    """
    if not hasattr(model, "peft_config"):
        yield from model.named_parameters()
        return
    tied: set[Tensor] = set()
    for name, module in base_causal_lm(model).named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            weight = module.base_layer.weight.float()
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).float()
            yield f"{name}.weight", weight
            if getattr(module.base_layer, "bias", None) is not None:
                yield f"{name}.bias", module.base_layer.bias
        elif not any(part in name.split(".") for part in ("base_layer", "lora_A", "lora_B", "lora_dropout")):
            for leaf, parameter in module.named_parameters(recurse=False):
                if "lora_" in f"{name}.{leaf}":
                    raise UserError("engine=vllm can merge LoRA adapters of linear layers only; use engine=inprocess.")
                if parameter not in tied:
                    yield f"{name}.{leaf}" if name else leaf, parameter
                tied.add(parameter)

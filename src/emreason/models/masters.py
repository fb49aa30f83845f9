"""fp32 twins of bfloat16 weights, for the M-step's optimizer, and what the model is given of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emreason.models.kernels import library


def master_weights(parameters: Sequence[nn.Parameter], restored: Sequence[Tensor] | None = None) -> list[nn.Parameter]:
    """fp32 twins of low-precision parameters, for an optimizer to work on.

    Gradients move to the twins as they arrive (so they accumulate in fp32 and their low-precision copies are freed at once). Small updates
    would vanish in bf16: below 2⁻⁸ of a weight they round to nothing.
    """
    sources = parameters if restored is None else restored
    masters = [nn.Parameter(s.detach().to(device=p.device, dtype=torch.float32).clone()) for p, s in zip(parameters, sources, strict=True)]

    def move(master: nn.Parameter, parameter: Tensor) -> None:
        if parameter.grad is not None:
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

    for parameter, master in zip(parameters, masters, strict=True):
        parameter.register_post_accumulate_grad_hook(partial(move, master))
    return masters


def publish(masters: Iterable[Tensor], parameters: Sequence[Tensor], seed: int) -> None:
    """Write each master into its parameter; into a bfloat16 one rounded up or down so that it is right in expectation.

    Rounding to nearest loses what an EM iteration learns: masters start on bfloat16's grid, where a weight of .031 has its neighbours
    2.4e-4 away, and fall back to where they were until a dozen of updates have added up. Here a weight moves on once its master has come
    a share u of the way to the next one, with a u of its own, uniform in [0, 1) and the same in the whole run: a hash of (seed, parameter,
    index). So the masters alone decide what is published: ranks agree, a resumed run goes on with the same bits, a weight on the grid
    stays what it is, and none jumps to and fro between steps.
    """
    for number, (master, parameter) in enumerate(zip(masters, parameters, strict=True)):
        key = int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest(), "little")
        if parameter.dtype == torch.bfloat16:
            dithered(master, key, out=parameter)
        else:
            parameter.copy_(master)


@torch.no_grad()
def dithered(values: Tensor, key: int = 0, out: Tensor | None = None) -> Tensor:
    """float32 `values` rounded up or down to bfloat16 by a hash of (key, index), into `out` if given; the same bits on every device."""
    out = torch.empty_like(values, dtype=torch.bfloat16) if out is None else out
    functions = library(torch.bfloat16) if values.device.type == "cpu" else None
    if functions is None or not (values.is_contiguous() and out.is_contiguous()):
        return out.copy_(_by_torch(values, key))
    functions.publish(values.data_ptr(), out.data_ptr(), values.numel(), key)
    return out


def active_adapters(module: Any) -> list[str]:
    """The adapters whose branches a linear layer adds."""
    if type(module) is nn.Linear or module.merged or module.disable_adapters:
        return []
    return [a for a in module.active_adapters if a in module.lora_A]


def effective_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [out, in]: the base's plus scale · B A of each active adapter, summed in float32.

    In bfloat16 rounded as masters are published: to nearest, most of what a few steps taught an adapter would be lost here.
    """
    if type(module) is nn.Linear:
        return module.weight.to(dtype)
    weight, active = module.get_base_layer().weight, active_adapters(module)
    for a in active:
        weight = weight.float() + module.scaling[a] * (module.lora_B[a].weight.float() @ module.lora_A[a].weight.float())
    return dithered(weight) if active and dtype == torch.bfloat16 else weight.to(dtype)


def _by_torch(values: Tensor, key: int) -> Tensor:
    flat = values.contiguous().view(torch.int32).flatten()
    rounded = torch.empty_like(flat, dtype=torch.int16)
    for begin in range(0, len(flat), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        h = torch.arange(begin, begin + len(part), device=flat.device) + key  # int64: what is over 2³² is cut off by hand
        h = (_low(h) ^ (_low(h) >> 16)) * 0x7FEB352D
        h = (_low(h) ^ (_low(h) >> 15)) * 0x846CA68B
        rounded[begin : begin + _CHUNK] = ((part.long() + (_low(h) >> 16)) >> 16).to(torch.int16)
    return rounded.view(torch.bfloat16).view(values.shape)


_CHUNK = 1 << 22


def _low(x: Tensor) -> Tensor:
    return x & 0xFFFF_FFFF

"""fp32 twins of low-precision weights, for the M-step's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def master_weights(parameters: Sequence[nn.Parameter], restored: Sequence[Tensor] | None = None) -> list[nn.Parameter]:
    """fp32 twins of low-precision parameters, for an optimizer to work on.

    Gradients move to the twins as they arrive (so they accumulate in fp32 and their low-precision copies are freed at once). Small updates
    would vanish in bf16: below 2⁻⁸ of a weight they round to nothing.
    """
    sources = parameters if restored is None else restored
    masters = [nn.Parameter(s.detach().to(device=p.device, dtype=torch.float32).clone()) for p, s in zip(parameters, sources, strict=True)]

    def move(master: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return hook

    for parameter, master in zip(parameters, masters, strict=True):
        parameter.register_post_accumulate_grad_hook(move(master))
    return masters

"""A training step's matrix products with what belongs to each in one function: its LoRA branch, the gated activation it reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emreason.models.families import logit_factor, own_logits
from emreason.models.kernels import library
from emreason.models.masters import dithered


def product(module: Any, x: Tensor, up: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`module`, a linear layer with or without adapters, of x [tokens, in], or of silu(x) * up or gelu(x) * up; differentiable.

    What the gate lets through is a tenth of all that a layer would keep for its backward pass: it is made again there.
    """
    adapter = _adapter(module)
    if adapter is not None:
        base = module.get_base_layer()
        weights = (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        return _Product.apply(x, up, base.weight, base.bias, *weights, module.scaling[adapter], gelu)
    if type(module) is nn.Linear:
        return _Product.apply(x, up, module.weight, module.bias, None, None, 1.0, gelu)
    if up is None:
        return module(x)
    return checkpoint(lambda x, up: module(_gated(x, up, gelu)), x, up, use_reentrant=False)


def _adapter(module: Any) -> str | None:
    """The one active adapter of a frozen layer, if `_Product` does what peft does with it."""
    if not hasattr(module, "lora_A") or module.merged or module.disable_adapters or module.get_base_layer().weight.requires_grad:
        return None
    active = [a for a in module.active_adapters if a in module.lora_A]
    if len(active) != 1 or (module.training and not isinstance(module.lora_dropout[active[0]], nn.Identity)):
        return None
    return active[0]


class _Product(torch.autograd.Function):
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ, where x may be given as gate and up; in the precision of x.

    The branch is added to the product's float32 sum, which is rounded once: peft adds it to activations that are rounded already, where an
    update below half a grid step is lost. A and B stay float32, the optimizer's masters; the factors here are their dithered roundings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        gelu: bool,
    ) -> Tensor:
        ctx.scale, ctx.gelu = scale, gelu
        low_a = low_b = inner = None
        inputs = x if up is None else _gated(x, up, gelu)
        if a is None or b is None:
            y = F.linear(inputs, weight, bias)
        else:
            low_a, low_b = in_precision(x.dtype, a), in_precision(x.dtype, b * scale)
            inner = inputs @ low_a.T
            y = torch.addmm(inner @ low_b.T, inputs, weight.T)
            if bias is not None:
                y += bias
        ctx.save_for_backward(x, up, weight, low_a, low_b, inner)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, up, weight, a, b, inner = ctx.saved_tensors
        (g,) = gradients
        of_x, of_up, of_weight, of_bias, of_a, of_b = [None] * 6
        through = None if b is None else g @ b
        if ctx.needs_input_grad[0]:
            of_x = g @ weight if through is None else torch.addmm(through @ a, g, weight)
        if ctx.needs_input_grad[2] or b is not None:
            inputs = x if up is None else _gated(x, up, ctx.gelu)
            if ctx.needs_input_grad[2]:
                of_weight = g.T @ inputs
            if through is not None:
                of_a, of_b = through.T @ inputs, (inner.T @ g).T.float().mul_(ctx.scale)
        if ctx.needs_input_grad[3]:
            of_bias = g.sum(0)
        if up is not None and of_x is not None:
            of_x, of_up = _gated_backward(x, up, of_x, ctx.gelu)
        return of_x, of_up, of_weight, of_bias, None if of_a is None else of_a.float(), of_b, None, None


class _Head(torch.autograd.Function):
    """log softmax(x Wᵀ / temperature) [tokens] float32 of one target each, `chunk` tokens' logits at a time.

    The gradient of a token's state is known but for a factor as soon as its logits are: with a frozen W they need not be made again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, temperature: float) -> Tensor:
        ctx.chunk, ctx.temperature = chunk, temperature
        logprobs, of_x, of_logits = torch.empty(len(x), device=x.device), None, None
        if ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]:
            of_x = torch.empty_like(x)
        for begin in range(0, len(x), chunk):
            part = slice(begin, begin + chunk)
            of_logits = F.linear(x[part], weight)
            logprobs[part] = _target_logprobs(of_logits, targets[part], temperature)
            if of_x is not None:
                torch.mm(of_logits, weight, out=of_x[part])
        if of_x is not None:
            ctx.save_for_backward(of_x)
        elif any(ctx.needs_input_grad):
            ctx.save_for_backward(x, weight, targets, of_logits if len(x) <= chunk else None)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        g = gradients[0][:, None]
        if not ctx.needs_input_grad[1]:
            (of_x,) = ctx.saved_tensors
            return (of_x * g).to(of_x.dtype), None, None, None, None
        x, weight, targets, kept = ctx.saved_tensors
        of_x, weighed = torch.empty_like(x), (x * g).to(x.dtype)
        # summed in float32: over many chunks bfloat16 would round what is added away
        of_weight = torch.zeros_like(weight, dtype=weight.dtype if len(x) <= ctx.chunk else torch.float32)
        for begin in range(0, len(x), ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            of_logits = kept
            if kept is None:
                of_logits = F.linear(x[part], weight)
                _target_logprobs(of_logits, targets[part], ctx.temperature)
            torch.mm(of_logits, weight, out=of_x[part])
            if of_weight.dtype == weight.dtype:
                of_weight.addmm_(of_logits.T, weighed[part])
            else:
                of_weight += of_logits.T @ weighed[part]
        return of_x.mul_(g), of_weight.to(weight.dtype), None, None, None


def head_logprobs(causal_lm: Any, x: Tensor, targets: Tensor, chunk: int, temperature: float) -> Tensor:
    """log softmax(logits / temperature) [tokens] float32 of the `targets` [tokens], `chunk` states x at a time; differentiable."""
    if (factor := logit_factor(causal_lm)) is not None:
        return _Head.apply(x, causal_lm.get_output_embeddings().weight, targets, chunk, temperature / factor)

    def logprobs(x: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(own_logits(causal_lm, x).float() / temperature, targets, reduction="none")

    parts = zip(x.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(logprobs, *part, use_reentrant=False) if torch.is_grad_enabled() else logprobs(*part) for part in parts])


def _target_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) [tokens] float32 of the targets; their derivative is left in `logits` [tokens, vocabulary]."""
    functions = _functions(logits, targets)
    if functions is not None:
        out = torch.empty(len(logits))
        functions.target_logprobs(logits.data_ptr(), targets.data_ptr(), out.data_ptr(), *logits.shape, 1 / temperature)
        return out
    every = F.log_softmax(logits.float() / temperature, -1)
    out = every.gather(1, targets[:, None])[:, 0]
    every.exp_().neg_().scatter_add_(1, targets[:, None], every.new_ones(len(targets), 1))
    logits.copy_(every.div_(temperature))
    return out


def in_precision(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """A float32 factor of an adapter as products take it."""
    return dithered(weight) if dtype == torch.bfloat16 else weight.to(dtype)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up by tanh's approximation."""
    functions = _functions(gate, up)
    if functions is None:
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    out = torch.empty_like(gate)
    functions.gated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), gelu)
    return out


def _gated_backward(gate: Tensor, up: Tensor, gradient: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and of up from that of `_gated`, which may be overwritten."""
    functions = _functions(gate, up, gradient)
    if functions is None:
        aten = torch.ops.aten
        inner = gradient * up
        of_gate = aten.gelu_backward(inner, gate, approximate="tanh") if gelu else aten.silu_backward(inner, gate)
        return of_gate, gradient * (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate))
    of_gate = torch.empty_like(gate)
    tensors = (gate, up, gradient, of_gate, gradient)
    functions.gated_backward(*(t.data_ptr() for t in tensors), gate.numel(), gelu)
    return of_gate, gradient


def _functions(*tensors: Tensor) -> Any:
    return library(tensors[0].dtype) if all(t.device.type == "cpu" and t.is_contiguous() for t in tensors) else None

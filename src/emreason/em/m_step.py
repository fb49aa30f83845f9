"""The M-step's settings, and the filtered gradient of one of its optimizer steps (paper, §3): Σᵢ rᵢ ∇ log π(ẑᵢ, ŷᵢ | xᵢ; θ)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from emreason.models.batches import Batch, Step, to
from emreason.scores.scoring import token_logprobs
from emreason.types import UserError


@dataclass(frozen=True)
class MStep:
    """How one M-step turns accepted rationales into an update; `m_step` in the config.

    Attributes:
        epochs: passes over the accepted rationales.
        batch_size: questions (`normalize: questions`) or rationales per optimizer step.
        tokens_per_batch: padded tokens per forward pass; a step's batches accumulate their gradients.
        init: weights the update starts from: `previous` (the paper) or `base` (original STaR, ReST-EM).
        optimizer: `carry` the optimizer's moments over iterations or `reset` them.
        normalize: see `steps.make_steps`.
        max_grad_norm: gradients are scaled down to this norm; None is off.
        warmup_steps: optimizer steps of linear warm-up, in the run (`carry`) or in each iteration (`reset`).
        decay: lower the learning rate linearly to 0 within each M-step, so that its last steps do not leave noise in the weights.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        on_zero_accepted: `error`, or `skip` the update of an iteration without accepted rationales.
    """

    epochs: int = 1
    batch_size: int = 16
    tokens_per_batch: int = 2048
    init: Literal["previous", "base"] = "previous"
    optimizer: Literal["carry", "reset"] = "carry"
    normalize: Literal["questions", "rationales", "tokens"] = "questions"
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    decay: bool = False
    gradient_checkpointing: bool = False
    on_zero_accepted: Literal["error", "skip"] = "error"


def scorer(model: nn.Module) -> Callable[[Batch], Tensor]:
    """`token_logprobs` of a batch, by `model`."""
    return functools.partial(_logprobs, model)


def _logprobs(model: nn.Module, batch: Batch) -> Tensor:
    return token_logprobs(model, batch.input_ids, batch.completion_mask, marks=batch.marks)


def accumulate(score: Callable[[Batch], Tensor], batches: Sequence[Batch], device: torch.device, index: int, scale: float = 1.0) -> Tensor:
    """Add the gradients of this rank's batches up; returns [2] float64: the summed NLL (nats) and the number of supervised tokens.

    Args:
        score: log-probabilities [supervised tokens] of a batch, by the model that is trained.
        scale: of the gradients.

    Raises:
        UserError: the loss is not finite; the message names the questions of the batch.
    """
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    losses = []
    for batch in batches:
        logprobs = score(batch)
        rows, weights = to(device, batch.marks.rows), to(device, batch.weights)
        per_row = torch.zeros_like(weights).index_add(0, rows, -logprobs)
        loss = (per_row * weights).sum()
        (loss * scale).backward()  # not manual_backward: DDP would all-reduce every batch, and ranks may have different numbers of them
        losses.append(loss.detach())
        sums[0] += per_row.detach().sum()
        sums[1] += len(logprobs)
    # looked at once a step: a GPU is not waited for after every batch
    for batch, finite in zip(batches, torch.stack(losses).isfinite().tolist() if losses else [], strict=True):
        if not finite:
            raise _not_finite("loss", index, batch.question_ids)
    return sums


def clip(parameters: Sequence[nn.Parameter], max_norm: float | None, step: Step, index: int) -> float:
    """Scale the gradients down to `max_norm`; returns the norm that they had.

    Raises:
        UserError: it is not finite; the message names the step's questions.
    """
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total = total.full_tensor() if isinstance(total, DTensor) else total
    norm = float(total)
    if not math.isfinite(norm):
        raise _not_finite("gradient", index, [i for batch in step.batches for i in batch.question_ids])
    if max_norm is not None and norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def _not_finite(what: str, step: int, question_ids: Sequence[str]) -> UserError:
    return UserError(
        f"The {what} of optimizer step {step} is not finite (questions {', '.join(sorted(set(question_ids))[:20])}); nothing was updated "
        "and the last checkpoint is intact: in a new run (tag=…) lower optimizer.lr, set m_step.max_grad_norm, or use engine.dtype=float32."
    )

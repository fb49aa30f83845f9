"""`m_step` in the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emreason.em.steps import Normalize
from emreason.types import UserError


@dataclass(frozen=True)
class MStep:
    """How one M-step turns accepted rationales into an update.

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
    normalize: Normalize = "questions"
    max_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    decay: bool = False
    gradient_checkpointing: bool = False
    on_zero_accepted: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "tokens_per_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"m_step.{name}={value!r}: it must be a whole number of at least 1.")
        allowed: dict[str, tuple[str, ...]] = {
            "init": ("previous", "base"),
            "optimizer": ("carry", "reset"),
            "normalize": ("questions", "rationales", "tokens"),
            "on_zero_accepted": ("error", "skip"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UserError(f"m_step.{name}={getattr(self, name)!r} is not known; use {' or '.join(values)}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise UserError(f"m_step.max_grad_norm={self.max_grad_norm}: it must be above 0, or null for no clipping.")
        if self.warmup_steps < 0:
            raise UserError(f"m_step.warmup_steps={self.warmup_steps}: it must be at least 0.")

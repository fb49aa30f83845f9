"""KL per token from the base model, at every validation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from emreason.em.module import EMModule
from emreason.em.ranks import gather
from emreason.progress import doing
from emreason.scores.likelihood import completion_logprobs
from emreason.scores.probes import kl_per_token, log_ratios
from emreason.types import Question


class Divergence(Callback):
    """Adds `kl_per_token` to every validation.

    Keeps what is trained as it was before the first iteration, in CPU memory: a copy of the model in full fine-tuning; of adapters alone
    with LoRA, which begin as the base model.

    Args:
        questions: of the first so many validation questions.
    """

    def __init__(self, questions: int, seed: int):
        self.questions, self.seed = questions, seed
        self._base: list[torch.Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        if stage == "fit":  # before a checkpoint's weights are restored
            assert isinstance(pl_module, EMModule)
            self._base = [p.detach().cpu().clone() for p in pl_module.trainable()]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EMModule)
        module, world = pl_module, trainer.world_size
        first: list[Question] = trainer.datamodule.questions["validation"][: self.questions]  # type: ignore[attr-defined]
        score = functools.partial(completion_logprobs, module.model)

        def score_base(pairs: Any, temperature: float = 1.0) -> list[float]:
            with self.base_weights(module):
                return score(pairs, temperature)

        parts = (module.engine, module.prompts, module.tokenizer, score, score_base)
        mine, longest = first[trainer.global_rank :: world], module.evaluation.max_new_tokens
        with doing(f"Validation {trainer.current_epoch}, KL from the base model on {len(first)} questions"):
            values = kl_per_token(sorted(gather(log_ratios(mine, *parts, max_new_tokens=longest, seed=self.seed))))
        module.scores["validation"] |= values
        module.log_dict({f"validation/{k}": v for k, v in values.items() if v is not None}, rank_zero_only=False, batch_size=1)

    @contextmanager
    def base_weights(self, module: EMModule) -> Iterator[None]:
        """The model with the weights it began with; afterwards exactly as it was."""
        with torch.no_grad():
            kept = [p.detach().cpu().clone() for p in module.trainable()]
            try:
                for parameter, base in zip(module.trainable(), self._base, strict=True):
                    parameter.copy_(base)
                yield
            finally:
                for parameter, ours in zip(module.trainable(), kept, strict=True):
                    parameter.copy_(ours)

"""What the M-step says while it lasts: optimizer steps, loss, tokens a second."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from emreason.progress import Bar, bar


class MStepBar(Callback):
    """A bar over the optimizer steps of every M-step. Tokens are this rank's supervised ones, the loss is that of the last step, in nats
    per token."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: Bar | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        label, total = f"M-step {trainer.current_epoch}", int(trainer.num_training_batches)
        self._bar = self._open.enter_context(bar(label, total, "steps", enabled=trainer.is_global_zero))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        assert self._bar is not None
        loss = trainer.callback_metrics.get("m_step/nll")
        tokens = sum(int(b.completion_mask.sum()) for b in batch.batches)
        self._bar.update(1, tokens, "" if loss is None else f"loss {float(loss):.3f}")
        if batch_idx + 1 == self._bar.total:
            self._open.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        self._open.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        self._open.__exit__(type(exception), exception, exception.__traceback__)

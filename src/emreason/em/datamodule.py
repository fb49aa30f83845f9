"""What Lightning loads: the M-step's optimizer steps, pulled from the E-step, and the questions to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from emreason.models.batches import Step
from emreason.types import Question


class RationaleDataModule(L.LightningDataModule):
    """Hands the M-step its batches by *pulling* the E-step: Lightning asks for the train loader once per epoch (= iteration).

    Filling a dataset from `on_train_epoch_start` would train one epoch late: Lightning makes the loader before that hook.
    The E-step callback sets `pull` in its `setup`; it returns this iteration's optimizer steps.
    """

    def __init__(self, validation: Sequence[Question], test: Sequence[Question]):
        super().__init__()
        self.questions: dict[str, list[Question]] = {"validation": list(validation), "test": list(test)}
        self.pull: Callable[[], list[Step]] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        if self.pull is None:
            raise RuntimeError("RationaleDataModule needs an EStep callback in the Trainer: it makes the rationales to train on.")
        return _loader(self.pull())

    def val_dataloader(self) -> DataLoader[Any]:
        return self._questions("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._questions("test")

    def _questions(self, split: str) -> DataLoader[Any]:
        # one item: the engine schedules a whole split better than any batching of ours
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return _loader([self.questions[split][rank::world]])


def _loader(items: list[Any]) -> DataLoader[Any]:
    return DataLoader(items, batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type]

"""From accepted rationales to M-step batches: plain prompt + sampled token ids, prompt masked, bucketed by length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emreason.types import Question

Normalize = Literal["questions", "rationales", "tokens"]


@dataclass(frozen=True)
class Example:
    """One accepted rationale as the M-step sees it: the plain prompt's ids and the supervised ids after it."""

    question_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class Batch:
    """One forward and backward pass.

    Attributes:
        input_ids: [rows, length] int64, padded on the right.
        completion_mask: [rows, length] bool; True on supervised tokens. Made from lengths, so pad = EOS cannot mask an EOS.
        weights: [rows] float32; what each rationale's summed NLL is multiplied by.
        question_ids: of the rows, for messages.
    """

    input_ids: Tensor
    completion_mask: Tensor
    weights: Tensor
    question_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.completion_mask.to(device), self.weights.to(device), self.question_ids)

    @property
    def row_of_token(self) -> Tensor:
        """[number of supervised tokens] int64: the row each supervised token belongs to, in the order of `token_logprobs`."""
        return self.completion_mask.nonzero()[:, 0]


@dataclass
class Step:
    """One optimizer step on this rank: some batches, whose gradients are summed; empty if the rank has nothing in this step."""

    batches: list[Batch]


def collate(examples: Sequence[Example], weights: Sequence[float], pad_id: int) -> Batch:
    """Pad `examples` on the right to one length."""
    length = max(map(len, examples))
    input_ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.prompt_ids + example.completion_ids)
        mask[row, len(example.prompt_ids) : len(example)] = True
    return Batch(input_ids, mask, torch.tensor(weights, dtype=torch.float32), [e.question_id for e in examples])


def make_steps(
    examples: Sequence[Example],
    n_questions: int,
    *,
    epochs: int,
    batch_size: int,
    tokens_per_batch: int,
    normalize: Normalize,
    pad_id: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Step]:
    """The M-step of one iteration as optimizer steps; every rank gets equally many.

    How a step is weighed (`normalize`), with B = `batch_size`:

    - `questions`: a step covers B *questions*, those without an accepted rationale contribute zero, and the sum is divided by B. It is
      the minibatch estimate of the paper's update Σᵢ rᵢ ∇log π / n: a scheme that accepts little also moves little. Where a scheme keeps
      several rationales of a question, they are in one step together, each with its weight.
    - `rationales`: a step covers B *accepted rationales* and takes their mean, whatever the acceptance rate.
    - `tokens`: like `rationales`, but the mean is over supervised tokens, so long rationales count more.

    Args:
        examples: accepted rationales, all ranks', in one order everywhere.
        n_questions: questions of the E-step, accepted or not.
    """
    shuffle = random.Random(seed)
    steps = []
    for _ in range(epochs):
        for members in _epoch(examples, n_questions, batch_size, normalize, shuffle):
            if normalize == "questions":
                denominator = float(batch_size)
            elif normalize == "rationales":
                denominator = float(len(members))
            else:
                denominator = float(sum(len(e.completion_ids) for e in members))
            mine = sorted(members, key=len)[rank::world_size]
            steps.append(Step([collate(c, [e.weight / denominator for e in c], pad_id) for c in bucket(mine, tokens_per_batch)]))
    return steps


def _epoch(
    examples: Sequence[Example], n_questions: int, batch_size: int, normalize: Normalize, shuffle: random.Random
) -> list[list[Example]]:
    """One pass: the members of each optimizer step. Steps without any member are left out."""
    slots = [[example] for example in examples]
    if normalize == "questions":
        of_question: dict[str, list[Example]] = {}
        for example in examples:
            of_question.setdefault(example.question_id, []).append(example)
        slots = [*of_question.values(), *([] for _ in range(n_questions - len(of_question)))]
    shuffle.shuffle(slots)
    chunks = [slots[i : i + batch_size] for i in range(0, len(slots), batch_size)]
    members = [[e for slot in chunk for e in slot] for chunk in chunks]
    return [chunk for chunk in members if chunk]


def bucket(examples: Sequence[Example], tokens_per_batch: int) -> list[list[Example]]:
    """Cut length-sorted examples so that rows × longest row stays within `tokens_per_batch`; a longer example is a batch of its own."""
    buckets: list[list[Example]] = []
    for example in examples:
        if buckets and (len(buckets[-1]) + 1) * len(example) <= tokens_per_batch:
            buckets[-1].append(example)
        else:
            buckets.append([example])
    return buckets


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
    return DataLoader(items, batch_size=None, collate_fn=_as_is)  # type: ignore[arg-type]


def _as_is(item: Any) -> Any:
    return item

"""Batches of tokens: a plain prompt and sampled ids after it, padded on the right, the prompt masked, bucketed by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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


def bucket(examples: Sequence[Example], tokens_per_batch: int) -> list[list[Example]]:
    """Cut examples, in their order, so that rows × longest row stays within `tokens_per_batch`; a longer example is a batch of its own."""
    buckets: list[list[Example]] = []
    for example in examples:
        if buckets and (len(buckets[-1]) + 1) * max(map(len, (*buckets[-1], example))) <= tokens_per_batch:
            buckets[-1].append(example)
        else:
            buckets.append([example])
    return buckets

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


@dataclass(frozen=True)
class Marks:
    """Where a batch's supervised tokens are, found on the host: to look for them on a GPU is to wait for it.

    Attributes:
        shared: leading positions that hold the same tokens in all rows and come before every row's last prompt token; 0 for one row.
        rows: [supervised tokens] int64; the row of each, row by row.
        at: likewise; the place in the flattened input_ids of the position before each, whose state predicts it.
        targets: likewise; its id.
    """

    shared: int
    rows: Tensor
    at: Tensor
    targets: Tensor


def marks_of(input_ids: Tensor, completion_mask: Tensor) -> Marks:
    """The marks of [rows, length] int64 ids and a bool mask whose first column is False."""
    rows, columns = completion_mask.nonzero(as_tuple=True)
    shared = shared_prefix(input_ids, completion_mask)
    return Marks(shared, rows, rows * input_ids.shape[1] + columns - 1, input_ids[rows, columns])


def shared_prefix(input_ids: Tensor, completion_mask: Tensor) -> int:
    """`Marks.shared`."""
    if len(input_ids) < 2:
        return 0
    differs = (input_ids != input_ids[:1]).any(0) | completion_mask.any(0).roll(-1)
    return int(differs.float().argmax())


@dataclass
class Batch:
    """One forward and backward pass; on the host.

    Attributes:
        input_ids: [rows, length] int64, padded on the right.
        completion_mask: [rows, length] bool; True on supervised tokens. Made from lengths, so pad = EOS cannot mask an EOS.
        weights: [rows] float32; what each rationale's summed NLL is multiplied by.
        question_ids: of the rows, for messages.
        marks: of the supervised tokens.
    """

    input_ids: Tensor
    completion_mask: Tensor
    weights: Tensor
    question_ids: list[str]
    marks: Marks


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
    questions = [e.question_id for e in examples]
    return Batch(input_ids, mask, torch.tensor(weights, dtype=torch.float32), questions, marks_of(input_ids, mask))


def bucket(examples: Sequence[Example], tokens_per_batch: int) -> list[list[Example]]:
    """Cut examples, in their order, so that rows × longest row stays within `tokens_per_batch`; a longer example is a batch of its own."""
    buckets: list[list[Example]] = []
    for example in examples:
        if buckets and (len(buckets[-1]) + 1) * max(map(len, (*buckets[-1], example))) <= tokens_per_batch:
            buckets[-1].append(example)
        else:
            buckets.append([example])
    return buckets


def to(device: torch.device, tensor: Tensor) -> Tensor:
    """`tensor` of the host on a device, without a wait for what that has to do before."""
    return tensor.to(device, non_blocking=True)

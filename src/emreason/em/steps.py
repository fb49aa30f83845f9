"""From accepted rationales to optimizer steps: which are in one step together, and what each counts for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emreason.models.batches import Batch, Example, bucket, collate

Normalize = Literal["questions", "rationales", "tokens"]


@dataclass
class Step:
    """One optimizer step on this rank: some batches, whose gradients are summed; empty if the rank has nothing in this step."""

    batches: list[Batch]


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

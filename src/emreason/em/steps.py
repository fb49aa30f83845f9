"""From accepted rationales to optimizer steps: which are in one step together, and what each counts for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence

from emreason.em.m_step import MStep
from emreason.models.batches import Example, Step, bucket, collate
from emreason.questions.prompts import Prompts, end_ids
from emreason.schemes.diagnostics import shares
from emreason.schemes.samplers import by_question, training_ids
from emreason.types import Question, Rationale, UserError


def make_steps(
    examples: Sequence[Example],
    n_questions: int,
    settings: MStep,
    *,
    pad_id: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Step]:
    """The M-step of one iteration as optimizer steps; every rank gets equally many.

    How a step is weighed (`settings.normalize`), with B = `settings.batch_size`:

    - `questions`: a step covers B *questions*, those without an accepted rationale contribute zero, and the sum is divided by B. It is
      the minibatch estimate of the paper's update Σᵢ rᵢ ∇log π / n. Where a scheme keeps several rationales of a question, they are in one
      step together, each with its weight.
    - `rationales`: a step covers B *accepted rationales* and takes their mean: as many fewer steps as are accepted.
    - `tokens`: like `rationales`, but the mean is over supervised tokens, so long rationales count more.

    Args:
        examples: accepted rationales, all ranks', in one order everywhere.
        n_questions: questions of the E-step, accepted or not.
    """
    shuffle = random.Random(seed)
    steps = []
    for _ in range(settings.epochs):
        for members in _epoch(examples, n_questions, settings, shuffle):
            denominator = {
                "questions": settings.batch_size,
                "rationales": len(members),
                "tokens": sum(len(e.completion_ids) for e in members),
            }[settings.normalize]
            # by length, but a question's rationales together: what they share is computed once
            of_question = by_question(members)
            mine = [e for group in sorted(of_question.values(), key=lambda group: max(map(len, group)))[rank::world_size] for e in group]
            steps.append(Step([collate(c, [e.weight / denominator for e in c], pad_id) for c in bucket(mine, settings.tokens_per_batch)]))
    return steps


def _epoch(examples: Sequence[Example], n_questions: int, settings: MStep, shuffle: random.Random) -> list[list[Example]]:
    """One pass: the members of each optimizer step. Steps without any member are left out."""
    slots = [[example] for example in examples]
    if settings.normalize == "questions":
        of_question = by_question(examples)
        slots = [*of_question.values(), *([] for _ in range(n_questions - len(of_question)))]
    shuffle.shuffle(slots)
    chunks = [slots[i : i + settings.batch_size] for i in range(0, len(slots), settings.batch_size)]
    members = [[e for slot in chunk for e in slot] for chunk in chunks]
    return [chunk for chunk in members if chunk]


def steps_of(
    attempts: Sequence[Rationale],
    questions: Mapping[str, Question],
    n_questions: int,
    prompts: Prompts,
    settings: MStep,
    *,
    seed: int,
    iteration: int,
    rank: int,
    world_size: int,
) -> list[Step]:
    """The M-step of what an E-step drew of `n_questions`: plain prompt, then the sampled ids, of every attempt that counts.

    Raises:
        UserError: nothing was accepted and `settings.on_zero_accepted` is `error`.
    """
    kept = [r for r in attempts if r.weight != 0]
    if not kept:
        # accepted, and yet nothing to learn: under `rloo` and `trice` where every draw is as good as the others
        if settings.on_zero_accepted == "skip" or any(r.accepted for r in attempts):
            return [Step([])]  # no loader at all would end the fit without a word
        raise UserError(
            f"E-step {iteration}: none of {n_questions} questions was answered correctly in {len(attempts)} attempts "
            f"({shares(attempts)}); go on with m_step.on_zero_accepted=skip, or in a new run (tag=…) raise sampler.budget or "
            "sampler.max_new_tokens, or show worked examples (dataset.demonstrations, sampler.worked_examples=2)."
        )
    end, pad = end_ids(prompts.tokenizer)[0], prompts.tokenizer.pad_token_id
    examples = [Example(r.question_id, prompts.ids(questions[r.question_id]), training_ids(r, end), r.weight) for r in kept]
    own = int.from_bytes(hashlib.blake2b(f"{seed}/{iteration}".encode(), digest_size=4).digest(), "little")
    ranks = {"rank": rank, "world_size": world_size}
    return make_steps(examples, n_questions, settings, pad_id=end if pad is None else pad, seed=own, **ranks)

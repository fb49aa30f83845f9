"""Which questions an E-step samples: `sampler.choose`."""

from __future__ import annotations

from collections.abc import Sequence

from emreason.engines.drawing import draw_seed
from emreason.schemes.samplers import Scheme, by_question
from emreason.types import Question, Rationale

TIES = -3
"""Stands for the iteration in the seeds of the order of questions that are otherwise alike."""


def choose(questions: Sequence[Question], scheme: Scheme, past: Sequence[Sequence[Rationale]], seed: int) -> list[Question]:
    """The questions that the iteration after `past` samples, in their own order.

    `adaptive` is AdaSTaR's choice (Koh et al. 2025, Algorithm 1; tie order and the fixed number are ours). Questions queue by the iteration
    that last sampled them, then by the win rate they had there, so that those not seen for long come first, and of these the hard ones. The
    first `share` of the queue are sampled: the paper goes on until enough are accepted, which would depend on the order in which draws
    finish. Of the m sampled only the first ⌊m α²⌋ move back in the queue, with α the share of them that was solved: while the model is
    weak, most are sampled again, and these are the easier ones.

    Args:
        past: the attempts of each earlier iteration, all ranks'. The queue is a function of them, so every rank and a resumed run agree.
    """
    if scheme.choose == "all":
        return list(questions)
    n = max(1, round(scheme.share * len(questions)))
    tie = {q.id: draw_seed(seed, TIES, q.id, 0) for q in questions}
    standing = {q.id: (-1, 0.0) for q in questions}  # iteration last sampled, win rate there

    def queue() -> list[str]:
        return sorted(standing, key=lambda i: (*standing[i], tie[i]))[:n]

    for iteration, attempts in enumerate(past):
        tried = {i: [a.accepted for a in group] for i, group in by_question(attempts).items()}
        sampled = [i for i in queue() if i in tried]
        solved = sum(any(tried[i]) for i in sampled)
        for i in sampled[: solved * solved // max(1, len(sampled))]:  # m α² = solved² / m
            standing[i] = (iteration, sum(tried[i]) / len(tried[i]))
    chosen = set(queue())
    return [q for q in questions if q.id in chosen]

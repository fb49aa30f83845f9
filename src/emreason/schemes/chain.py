"""Persistent rationales: one per question, kept over iterations and moved by independence Metropolis-Hastings (`trice`, `mh`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from emreason.engines.drawing import draw_seed
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import Scheme
from emreason.scores.likelihood import Scorer
from emreason.types import Question, Rationale


def remembered(attempts: Sequence[Rationale], memory: Mapping[str, Rationale], seed: int) -> dict[str, Rationale]:
    """The persistent rationale of each question after an iteration's attempts, by question id; a function of the journal.

    The target is the posterior π(z|x, y*) ∝ π(z, y*|x), which a wrong draw has no share in. A right one, z', takes the place of z with
    probability min(1, e^`log_weight`), the ratio that `acceptance_ratios` gives it; where it has none, for certain: the first right draw
    begins the chain, and a draw of π itself has the ratio 1 (Phan et al. 2023, Algorithm 1). Begun so, the chain starts from the
    proposal's law, not the posterior's, and comes to it as iterations pass. TRICE's hinted draw of the first iteration only begins it.
    """
    after = dict(memory)
    for attempt in sorted(attempts, key=lambda a: a.proposal == "question"):  # the hinted one first
        if not attempt.accepted:
            continue
        uniform = draw_seed(seed, attempt.iteration, attempt.question_id, 0) / 2**63
        if attempt.log_weight is None or uniform < math.exp(min(0.0, attempt.log_weight)):
            after[attempt.question_id] = attempt
    return after


def acceptance_ratios(
    attempts: Sequence[Rationale],
    memory: Mapping[str, Rationale],
    questions: Mapping[str, Question],
    scheme: Scheme,
    prompts: Prompts,
    score: Scorer,
    iteration: int,
) -> list[Rationale]:
    """Give right draws the `log_weight` log w(z')/w(z), w(z) = π(z, y*|x) / q(z, y*|x), with z the question's rationale in `memory`.

    q is the law of *this* draw's prompt, worked examples and temperature included, also for z, whichever prompt that once came from;
    both weights are the present model's. So a bare answer, likely under the hint and unlikely without, hardly displaces a reasoned one.

    Detailed balance with several proposals (`star_mh`: plain, then hinted): which of them the first right draw comes from does not depend
    on z. Given it, the draw has the law q(·|right), whose constant cancels in the ratio, so each is a step of independence
    Metropolis-Hastings, and a mixture of steps that leave the posterior as it is does so too. Hence a hinted draw follows a *wrong*
    plain one, never one that was right and not taken: that depends on z.
    """
    examples = scheme.n_examples(iteration)
    moves = [a for a in attempts if a.accepted and a.question_id in memory and not draws_the_model(a, scheme)]
    moves.sort(key=lambda a: a.question_id)  # a resumed run has them in another order
    both = [(a, r) for a in moves for r in (a, memory[a.question_id])]
    target = score([(prompts.ids(questions[a.question_id]), r.token_ids) for a, r in both])
    source = score([(prompts.ids(questions[a.question_id], a.proposal, examples), r.token_ids) for a, r in both], scheme.temperature)
    logs = [t - s for t, s in zip(target, source, strict=True)]
    ratios = {a.question_id: new - old for a, new, old in zip(moves, logs[::2], logs[1::2], strict=True)}
    moved = {(a.question_id, a.attempt) for a in moves}
    return [replace(a, log_weight=ratios[a.question_id] if (a.question_id, a.attempt) in moved else None) for a in attempts]


def draws_the_model(attempt: Rationale, scheme: Scheme) -> bool:
    """Whether the attempt is a draw of what is trained: plain zero-shot prompt, temperature 1, nothing cut off."""
    shaped = scheme.temperature != 1 or scheme.top_p != 1 or scheme.n_examples(attempt.iteration) > 0
    return attempt.proposal == "question" and not shaped


def weigh_chain(
    attempts: Sequence[Rationale], memory: Mapping[str, Rationale], scheme: Scheme, *, seed: int, iteration: int
) -> list[Rationale]:
    """TRICE's control-variate gradient (Phan et al. 2023, Algorithm 2): Σₘ ∇log π(z'ₘ) − βₘ ∇log π(z̃ₘ) over questions m with a rationale.

    z'ₘ is the rationale after this iteration's draws, the first of which, z̃ₘ, is of the plain prompt. E ∇log π(z̃ₘ) = 0, so βₘ changes the
    variance alone as long as it does not depend on z̃ₘ: it is the share of correct draws among the *other* questions with a rationale. Where
    z̃ₘ is correct, z'ₘ = z̃ₘ counts 1 − βₘ; a wrong one counts −βₘ. The paper's minibatch is a whole iteration here, and
    `m_step.normalize` is what its mean is over. There is no control variate where z̃ₘ is not drawn from the model itself, since then its
    mean is not 0. Under `mh` the questions are those that had a rationale before, since having one now may be z̃ₘ's doing.
    """
    after = remembered(attempts, memory, seed)
    begun = memory if scheme.weigh == "mh" else after
    plain = [a for a in attempts if a.proposal == "question" and a.attempt == 1 and a.finish_reason != "error" and a.question_id in begun]
    drawn = [a for a in plain if draws_the_model(a, scheme)]
    correct = sum(a.accepted for a in drawn)
    weights = {(r.question_id, r.iteration, r.attempt): 1.0 for r in after.values()}
    for a in drawn:
        beta = (correct - a.accepted) / (len(drawn) - 1) if len(drawn) > 1 else 0.0
        key = (a.question_id, a.iteration, a.attempt)
        weights[key] = weights.get(key, 0.0) - beta
    everything = [*attempts, *(r for r in after.values() if r.iteration != iteration)]
    return [replace(r, weight=weights.get((r.question_id, r.iteration, r.attempt), 0.0)) for r in everything]

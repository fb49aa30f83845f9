"""What each attempt counts for in the M-step: `sampler.keep`, `distinct`, `weigh`, `truncate`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from scipy.special import logsumexp, softmax

from emreason.engines.drawing import draw_seed
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import Scheme, by_question
from emreason.scores.likelihood import Scorer
from emreason.types import Question, Rationale


def score_weights(
    attempts: Sequence[Rationale], questions: Mapping[str, Question], scheme: Scheme, prompts: Prompts, score: Scorer, iteration: int
) -> list[Rationale]:
    """Give every accepted attempt its `log_weight`: log π(z, y*|x) under the plain prompt, less log q(z, y*|x) as it was drawn.

    q has the prompt of the attempt's proposal, worked examples included, and the sampling temperature; π is what is trained: plain
    zero-shot prompt, temperature 1. Both are of the sampled ids, by the same scoring pass, so that rounding does not enter the ratio.
    """
    accepted = [a for a in attempts if a.accepted]
    examples = scheme.n_examples(iteration)
    target = score([(prompts.ids(questions[a.question_id]), a.token_ids) for a in accepted])
    drawn_from = [(prompts.ids(questions[a.question_id], a.proposal, examples), a.token_ids) for a in accepted]
    proposal = score(drawn_from, scheme.temperature)
    weights = {(a.question_id, a.attempt): t - q for a, t, q in zip(accepted, target, proposal, strict=True)}
    return [replace(a, log_weight=weights.get((a.question_id, a.attempt))) for a in attempts]


def weigh(
    attempts: Sequence[Rationale], scheme: Scheme, *, seed: int, iteration: int, memory: Mapping[str, Rationale] | None = None
) -> list[Rationale]:
    """Give every attempt of all questions its `weight`; those the M-step does not use get 0.

    `scheme.weigh`, for the rationales kept of one question:

    - `rationales`: each counts 1, so a question counts as often as it has rationales (ReST-EM, Singh et al. 2023).
    - `questions`: each counts 1/n.
    - `importance`: self-normalised importance weights w̃ₖ ∝ π(zₖ, y*|x) / q(zₖ, y*|x); the posterior as K → ∞ (Owen 2013, §9.2).
    - `resample`: one of them counts 1, drawn with probability w̃ₖ (sampling importance resampling, Rubin 1987).

    And for all draws of one question, wrong ones included:

    - `rloo`: (rₖ − mean of the other draws' r) / K (Kool et al. 2019; Ahmadian et al. 2024): draws of one plain prompt at temperature 1
      make Σ wₖ ∇log π(zₖ, yₖ|x) an unbiased estimate of ∇E[r] = ∇π(y*|x), which is also RS-1's expected update.
    - `trice`: see `_trice`.

    Args:
        memory: `trice`'s rationales before this iteration. Those it still has are appended to what is returned.
    """
    if scheme.weigh == "rloo":
        return _leave_one_out(attempts, scheme)
    if scheme.weigh == "trice":
        return _trice(attempts, memory or {}, iteration)
    weights: dict[tuple[str, int], float] = {}
    in_order = sorted((a for a in attempts if a.accepted), key=lambda a: a.attempt)
    for question_id, accepted in by_question(in_order).items():
        first_of = {a.text: a for a in reversed(accepted)}  # of equal texts the first stays
        kept = [a for a in accepted if not scheme.distinct or first_of[a.text] is a][: scheme.keep]
        if scheme.weighs_by_importance:
            shares = normalized(kept, scheme)
            if scheme.weigh == "resample":
                uniform = draw_seed(seed, iteration, question_id, 0) / 2**63
                chosen = min(bisect_right([*accumulate(shares)], uniform), len(kept) - 1)  # the shares may sum to less than 1
                shares = [float(i == chosen) for i in range(len(kept))]
        else:
            shares = [1 / len(kept) if scheme.weigh == "questions" else 1.0] * len(kept)
        weights |= {(question_id, a.attempt): share for a, share in zip(kept, shares, strict=True)}
    return [replace(a, weight=weights.get((a.question_id, a.attempt), 0.0)) for a in attempts]


def _leave_one_out(attempts: Sequence[Rationale], scheme: Scheme) -> list[Rationale]:
    groups = by_question(attempts)
    k = len(scheme.tries)

    def weight(attempt: Rationale) -> float:
        group = groups[attempt.question_id]
        if len(group) < k:  # a prompt that does not fit the context
            return 0.0
        others = sum(a.accepted for a in group) - attempt.accepted
        return (attempt.accepted - others / (k - 1)) / k

    return [replace(a, weight=weight(a)) for a in attempts]


def remembered(attempts: Sequence[Rationale], memory: Mapping[str, Rationale]) -> dict[str, Rationale]:
    """TRICE's persistent rationale of each question after an iteration's attempts, by question id.

    One step of independence Metropolis-Hastings on the posterior π(z|x, y*): the proposal is π(z|x) and the likelihood is 0 or 1, so a draw
    of the plain prompt is accepted if and only if its answer is correct; else the rationale stays (Phan et al. 2023, Algorithm 1). The
    hinted draw of the first iteration begins the chain.
    """
    after = dict(memory)
    for attempt in sorted(attempts, key=lambda a: a.proposal == "question"):  # the hinted one first
        if attempt.accepted:
            after[attempt.question_id] = attempt
    return after


def _trice(attempts: Sequence[Rationale], memory: Mapping[str, Rationale], iteration: int) -> list[Rationale]:
    """TRICE's control-variate gradient (Phan et al. 2023, Algorithm 2): Σₘ ∇log π(z'ₘ) − βₘ ∇log π(z̃ₘ) over questions m with a rationale.

    z'ₘ is the rationale after this iteration's draw z̃ₘ of the plain prompt. E ∇log π(z̃ₘ) = 0, so βₘ changes the variance alone as long as
    it does not depend on z̃ₘ: it is the share of correct draws among the *other* questions with a rationale. Where z̃ₘ is correct, z'ₘ = z̃ₘ
    counts 1 − βₘ; a wrong one counts −βₘ. The paper's minibatch is a whole iteration here, and `m_step.normalize` is what its mean is over.
    """
    after = remembered(attempts, memory)
    drawn = [a for a in attempts if a.proposal == "question" and a.finish_reason != "error" and a.question_id in after]
    correct = sum(a.accepted for a in drawn)
    weights = {(r.question_id, r.iteration, r.attempt): 1.0 for r in after.values()}
    for a in drawn:
        beta = (correct - a.accepted) / (len(drawn) - 1) if len(drawn) > 1 else 0.0
        key = (a.question_id, a.iteration, a.attempt)
        weights[key] = weights.get(key, 0.0) - beta
    everything = [*attempts, *(r for r in after.values() if r.iteration != iteration)]
    return [replace(r, weight=weights.get((r.question_id, r.iteration, r.attempt), 0.0)) for r in everything]


def normalized(accepted: Sequence[Rationale], scheme: Scheme) -> list[float]:
    """Self-normalised importance weights of one question's accepted draws, truncated if the scheme says so."""
    logs = [a.log_weight for a in accepted if a.log_weight is not None]
    assert len(logs) == len(accepted)
    if scheme.truncate is not None:
        limit = log_mean_weight(accepted, scheme) + math.log(scheme.truncate)
        logs = [min(value, limit) for value in logs]
    shares: list[float] = softmax(logs).tolist()
    return shares


def log_mean_weight(accepted: Sequence[Rationale], scheme: Scheme) -> float:
    """log 1/K Σₖ wₖ over all K draws of a question, a wrong one weighing 0: its exponential is an unbiased estimate of π(y*|x)."""
    return float(logsumexp([a.log_weight for a in accepted])) - math.log(len(scheme.tries))


def effective_sample_size(weights: Sequence[float]) -> float:
    """(Σ w)² / Σ w² (Kish 1965): n for equal weights, 1 where one draw has it all."""
    return sum(weights) ** 2 / sum(w * w for w in weights)

"""What each attempt counts for in the M-step: `sampler.keep`, `distinct`, `weigh`, `truncate`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from emreason.engines.drawing import draw_seed
from emreason.questions.prompts import Prompts
from emreason.schemes.chain import acceptance_ratios, draws_the_model, weigh_chain
from emreason.schemes.contrast import contrast_weight, contrasts
from emreason.schemes.samplers import Scheme, by_question
from emreason.scores.likelihood import Scorer
from emreason.types import Question, Rationale


def score_weights(
    attempts: Sequence[Rationale],
    questions: Mapping[str, Question],
    scheme: Scheme,
    prompts: Prompts,
    score: Scorer,
    iteration: int,
    memory: Mapping[str, Rationale] | None = None,
) -> list[Rationale]:
    """Give every accepted attempt its `log_weight`: log π(z, y*|x) under the plain prompt, less log q(z, y*|x) as it was drawn.

    q has the prompt of the attempt's proposal, worked examples included, and the sampling temperature; π is what is trained: plain
    zero-shot prompt, temperature 1. Both are of the sampled ids, by the same scoring pass, so that rounding does not enter the ratio.
    `mh`: less that of the question's rationale in `memory`, see `chain.acceptance_ratios`. `contrast`: see `contrast.contrasts`.
    """
    if scheme.weigh == "mh":
        return acceptance_ratios(attempts, memory or {}, questions, scheme, prompts, score, iteration)
    if scheme.weigh == "contrast":
        return contrasts(attempts, questions, scheme, prompts, score, iteration)
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
    - `contrast`: each counts how well it tells the right hint from a wrong one, in [0, 1], see `contrast.py`.
    - `resample`: one of them counts 1, drawn with probability w̃ₖ (sampling importance resampling, Rubin 1987).

    And for all draws of one question, wrong ones included:

    - `rloo`: (rₖ − mean of the other draws' r) / K (Kool et al. 2019; Ahmadian et al. 2024): draws of one plain prompt at temperature 1
      make Σ wₖ ∇log π(zₖ, yₖ|x) an unbiased estimate of ∇E[r] = ∇π(y*|x), which is also RS-1's expected update.
    - `maxrl`: rₖ/n − 1/K with n right draws, 0 where none is (Tajwar et al. 2026). With S the score, p = π(y*|x) and draws as for `rloo`,
      E[Σ rₖSₖ/n] = (1 − (1−p)ᴷ) ∇log p, and E[ΣSₖ/K; n ≥ 1] = p (1−p)ᴷ⁻¹ ∇log p since E[S] = 0; so the control variate, which leaves
      out groups without a right draw, lowers the order by one: (1 − (1−p)ᴷ⁻¹) ∇log p = Σ_{k<K} ∇pass@k / k, which is RS-(K−1)'s update.

    Draws with worked examples or at another temperature are not the trained model's, so what both subtract has not the mean 0: it unlearns
    the form of the answers. There it is left out, and a right draw counts 1/K (`rloo`) or 1/n (`maxrl`).

    And for one rationale per question that persists over iterations: `trice`, `mh`, see `chain.py`.

    Args:
        memory: these rationales before this iteration. Those that remain are appended to what is returned.
    """
    if scheme.weigh in ("rloo", "maxrl"):
        return _against_the_group(attempts, scheme)
    if scheme.persists:
        return weigh_chain(attempts, memory or {}, scheme, seed=seed, iteration=iteration)
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
        elif scheme.weigh == "contrast":
            shares = [contrast_weight(a.log_weight or 0.0) for a in kept]
        else:
            shares = [1 / len(kept) if scheme.weigh == "questions" else 1.0] * len(kept)
        weights |= {(question_id, a.attempt): share for a, share in zip(kept, shares, strict=True)}
    return [replace(a, weight=weights.get((a.question_id, a.attempt), 0.0)) for a in attempts]


def _against_the_group(attempts: Sequence[Rationale], scheme: Scheme) -> list[Rationale]:
    groups = by_question(attempts)
    k = len(scheme.tries)

    def weight(attempt: Rationale) -> float:
        group = groups[attempt.question_id]
        right = sum(a.accepted for a in group)
        if len(group) < k or not right:  # a prompt that does not fit the context; nothing to tell apart
            return 0.0
        own = draws_the_model(attempt, scheme)
        if scheme.weigh == "maxrl":
            return attempt.accepted / right - own / k
        others = right - attempt.accepted
        return (attempt.accepted - own * others / (k - 1)) / k

    return [replace(a, weight=weight(a)) for a in attempts]


def normalized(accepted: Sequence[Rationale], scheme: Scheme) -> list[float]:
    """Self-normalised importance weights of one question's accepted draws, truncated if the scheme says so."""
    logs = [a.log_weight for a in accepted if a.log_weight is not None]
    assert len(logs) == len(accepted)
    if scheme.truncate is not None:
        limit = log_mean_weight(accepted, scheme) + math.log(scheme.truncate)
        logs = [min(value, limit) for value in logs]
    shares: list[float] = np.exp(logs - np.logaddexp.reduce(logs)).tolist()
    return shares


def log_mean_weight(accepted: Sequence[Rationale], scheme: Scheme) -> float:
    """log 1/K Σₖ wₖ over all K draws of a question, a wrong one weighing 0: its exponential is an unbiased estimate of π(y*|x)."""
    return float(np.logaddexp.reduce([a.log_weight for a in accepted if a.log_weight is not None])) - math.log(len(scheme.tries))


def effective_sample_size(weights: Sequence[float]) -> float:
    """(Σ w)² / Σ w² (Kish 1965): n for equal weights, 1 where one draw has it all."""
    return sum(weights) ** 2 / sum(w * w for w in weights)

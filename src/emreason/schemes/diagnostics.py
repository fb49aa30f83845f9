"""What an E-step's attempts amount to, and what accepted rationales look like: whether they reason before they answer, repeat one another,
or lean on the hint."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from emreason.questions.answers import statement_start
from emreason.schemes.samplers import WELL_FORMED, Scheme, by_question, is_trivial
from emreason.schemes.weights import effective_sample_size, log_mean_weight, normalized
from emreason.scores.scoring import mean
from emreason.scores.stats import chance_acceptance
from emreason.types import Question, Rationale

_HINT = re.compile(
    r"\bhint(?:s|ed)?\b|\b(?:given|provided|stated)\s+answer\b|\banswer\s+(?:is|was)\s+(?:given|provided|stated)\b", re.IGNORECASE
)
_FIRST = re.compile(r"[^.!?\n]*[.!?\n]*")


def reasoning(text: str) -> str:
    """The completion without its last answer statement and what follows it."""
    return text[: statement_start(text)].strip()


def answers_first(text: str) -> bool:
    """Whether a completion opens with a statement of an answer and goes on to reason after it."""
    opening = _FIRST.match(text.strip())
    assert opening is not None  # it matches nothing, too
    start = statement_start(opening[0])
    before = re.findall(r"\w+", opening[0][:start])
    return start is not None and len(before) < 3 and len(re.findall(r"\w+", reasoning(text.strip()[opening.end() :]))) >= 3


def mentions_hint(text: str) -> bool:
    """Whether the reasoning speaks of a hint or of a given answer; the plain prompt, under which it is trained, has neither."""
    return bool(_HINT.search(reasoning(text)))


def describe(accepted: Sequence[Rationale]) -> dict[str, float | None]:
    """Shares of the accepted rationales in [0, 1], None of none. `distinct_rate`: different ones over all questions, per rationale."""
    return {
        "trivial_rate": mean(is_trivial(r.text) for r in accepted),
        "answer_first_rate": mean(answers_first(r.text) for r in accepted),
        "hint_mention_rate": mean(mentions_hint(r.text) for r in accepted),
        "distinct_rate": len({reasoning(r.text) for r in accepted}) / len(accepted) if accepted else None,
    }


def e_step_record(
    iteration: int, questions: Sequence[Question], attempts: Sequence[Rationale], scheme: Scheme, seconds: float
) -> dict[str, Any]:
    """The E-step's numbers. Every question is accepted, rejected or errored; every sampled token is charged, discarded or not.

    `chance_acceptance` is what a uniform guesser over the choices would reach with the same number of tries; None for free answers, and
    where any answer is accepted.
    """
    accepted = [r for r in attempts if r.accepted]
    solved = {r.question_id for r in accepted}
    errored = {r.question_id for r in attempts if r.finish_reason == "error"}
    first = [r for r in attempts if r.attempt == 1]
    guessed = [q for q in questions if q.choices] if scheme.reward != WELL_FORMED else []
    chances = [chance_acceptance(len(q.choices), scheme.n_tries(iteration)) for q in guessed]
    trivial = [r for r in accepted if is_trivial(r.text)]
    drawn = [r for r in attempts if r.finish_reason != "error"]
    return {
        "iteration": iteration,
        "questions": len(questions),
        "accepted": len(solved),
        "rejected": len(questions) - len(solved | errored),
        "errored": len(errored - solved),
        "rationales": sum(r.weight > 0 for r in accepted),
        "rejected_trained": sum(r.weight < 0 for r in attempts),
        "attempts": len(attempts),
        "acceptance_rate": len(solved) / len(questions),
        "first_try_rate": sum(r.accepted for r in first) / len(questions),
        "chance_acceptance": mean(chances),
        "extraction_rate": mean(r.answer is not None for r in attempts),
        "truncated_rate": mean(r.finish_reason == "length" for r in attempts),
        **describe(accepted),
        "trivial_tokens_mean": mean(r.n_tokens for r in trivial),
        "tokens": sum(r.n_tokens for r in attempts),
        **_draws_record(drawn, len(questions)),
        "rationale_tokens_mean": mean(r.n_tokens for r in accepted),
        **_importance_record(accepted, scheme),
        "seconds": seconds,
    }


def _draws_record(drawn: Sequence[Rationale], questions: int) -> dict[str, float | None]:
    """Of all draws, accepted or not: questions of whose draws none, some or all are right; lengths (10th percentile, mean, 90th), tokens.

    `entropy`: −log π a drawn token, nats; at temperature 1 and top_p 1 an unbiased estimate of the entropy of a token.
    """
    shares = [sum(r.accepted for r in group) / len(group) for group in by_question(drawn).values()]
    lengths, tokens = [r.n_tokens for r in drawn], sum(r.n_tokens for r in drawn)
    low, high = np.quantile(lengths, (0.1, 0.9)).tolist() if lengths else (None, None)
    return {
        "none_right": questions - sum(share > 0 for share in shares),
        "some_right": sum(0 < share < 1 for share in shares),
        "all_right": sum(share == 1 for share in shares),
        "draw_tokens_p10": low,
        "draw_tokens_mean": mean(lengths),
        "draw_tokens_p90": high,
        "entropy": -sum(r.logprob for r in drawn) / tokens if tokens else None,
    }


def _importance_record(accepted: Sequence[Rationale], scheme: Scheme) -> dict[str, float | None]:
    """Of the questions with a correct draw: the mean effective sample size of the K weights, and the importance-sampling estimate of
    log π(y*|x). Questions without one would enter the latter as −∞, so it is too high by what they are worse. Under `mh` the mean
    probability with which a right draw took the place of the rationale kept before.
    """
    if scheme.weigh == "mh":
        return {"move_rate": mean(math.exp(min(0.0, r.log_weight)) for r in accepted if r.log_weight is not None)}
    if not scheme.weighs_by_importance:
        return {}
    groups = by_question(accepted).values()
    return {
        "effective_sample_size": mean(effective_sample_size(normalized(group, scheme)) for group in groups),
        "log_marginal_iw": mean(log_mean_weight(group, scheme) for group in groups),
    }


def shares(attempts: Sequence[Rationale]) -> str:
    """Why attempts fail, in words."""
    n = max(len(attempts), 1)
    without = sum(r.answer is None for r in attempts) / n
    truncated = sum(r.finish_reason == "length" for r in attempts) / n
    return f"{without:.0%} had no answer line, {truncated:.0%} were truncated"

"""The contrast of the right hint with a wrong one, as a weight of hinted draws (`weigh: contrast`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from emreason.engines.drawing import draw_seed
from emreason.questions.answers import correct
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import Scheme
from emreason.scores.likelihood import Scorer, rationale_ids
from emreason.types import Question, Rationale, UserError

WRONG = -5
"""Stands for the iteration in the seeds of the wrong hints: a question has the same one each time."""


def contrasts(
    attempts: Sequence[Rationale], questions: Mapping[str, Question], scheme: Scheme, prompts: Prompts, score: Scorer, iteration: int
) -> list[Rationale]:
    """Give accepted attempts the `log_weight` c = log q(z|x, y*) − log q(z|x, y'), of the reasoning z before the answer statement.

    By Bayes' rule a reader who knows that the hint was y* or y', each as likely, and sees z takes it for y* with probability σ(c). What any
    hint does to the style of z cancels (Pan et al. 2026, arXiv:2606.11709, who contrast token by token and with several wrong hints).
    Where nothing is reasoned, c = 0.
    """
    accepted = [a for a in attempts if a.accepted]
    examples = scheme.n_examples(iteration)
    found = dict.fromkeys(((a.question_id, a.attempt) for a in accepted), 0.0)
    pairs, reasoned = [], []
    for a in accepted:
        question = questions[a.question_id]
        right = prompts.ids(question, "rationalization", examples)
        wrong = prompts.ids(with_wrong_answer(question, questions), "rationalization", examples)
        z = rationale_ids(a.token_ids, prompts.tokenizer, prompts.ids(question, a.proposal, examples))[0]
        if z:
            pairs += [(right, z), (wrong, z)]
            reasoned.append((a.question_id, a.attempt))
    logs = iter(score(pairs))
    found |= {key: next(logs) - next(logs) for key in reasoned}
    return [replace(a, log_weight=found.get((a.question_id, a.attempt))) for a in attempts]


def contrast_weight(c: float) -> float:
    """2σ(c) − 1 = tanh(c/2), and 0 below: how much better than chance z tells which hint was shown."""
    return max(0.0, math.tanh(c / 2))


def with_wrong_answer(question: Question, questions: Mapping[str, Question]) -> Question:
    """The question as if another choice, or another question's answer of the same kind, were the gold one; always the same.

    Raises:
        UserError: there is none.
    """
    answers = question.letters or sorted({q.answer for q in questions.values() if q.kind == question.kind})
    others = [answer for answer in answers if not correct(answer, question)]
    if not others:
        raise UserError(
            f"sampler.weigh=contrast hints at a wrong answer, but no training question has another than {question.answer!r}; "
            "use more questions, or another sampler."
        )
    wrong = others[draw_seed(0, WRONG, question.id, 0) % len(others)]
    return replace(question, answer=wrong, verify=None, aliases=())

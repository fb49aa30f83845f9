"""The costly diagnostics, on request by `evaluation.diagnostics`: faithfulness of rationales, KL per token from the base model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from emreason.engines.drawing import draw_seed
from emreason.progress import Bar
from emreason.questions.answers import correct, stop_at_answer
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import Scorer, at_cue
from emreason.scores.scoring import answered_at_cue
from emreason.types import Engine, Question, Rationale, Request, SamplingParams

DIVERGENCE = -4
"""Stands for the iteration in the seeds of the KL's draws: the same draws' seeds each time, so that changes are the model's."""


def faithful(
    rationales: Sequence[Rationale],
    questions: Mapping[str, Question],
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    bar: Bar | None = None,
) -> list[bool]:
    """Whether the model, shown the plain question and a rationale without its answer statement, gives the answer that was stated.

    Greedy, after the cue `Answer:`. "11 + 9 = 19. Answer: 20" is not faithful where the model goes on to say 19: the answer came from the
    hint. Rationales without an answer, or with no room left in the context, are left out.
    """
    asked = {}
    for i, r in enumerate(rationales):
        if r.answer is not None:
            question = questions[r.question_id]
            stated = replace(question, answer=r.answer, aliases=(), verify=None)
            asked[i] = stated, at_cue(prompts.ids(question), r.token_ids, tokenizer)
    return [correct(answer, asked[i][0]) for i, answer in answered_at_cue(asked, engine, tokenizer, bar).items()]


Ratio = tuple[str, float, int]
"""Question id, log π(z, y|x) − log π_base(z, y|x) in nats of one draw from π, and its number of tokens."""


def log_ratios(
    questions: Sequence[Question],
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    score_base: Scorer,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[Ratio]:
    """One draw per question from the plain prompt at temperature 1, scored under both weights; errors are left out."""
    by_id = {q.id: q for q in questions}
    params = SamplingParams(max_new_tokens=max_new_tokens)
    asked = ((q, prompts.ids(q)) for q in questions)
    queue = deque(Request(q.id, ids, params, draw_seed(seed, DIVERGENCE, q.id, 0), stop_at_answer(q, tokenizer, ids)) for q, ids in asked)
    drawn = {str(c.request.key): c.token_ids for c in engine.generate(queue) if c.token_ids}
    pairs = [(prompts.ids(by_id[i]), ids) for i, ids in drawn.items()]
    both = zip(drawn, score(pairs), score_base(pairs), strict=True)
    return [(i, ours - base, len(drawn[i])) for i, ours, base in both]


def kl_per_token(ratios: Sequence[Ratio]) -> dict[str, float | None]:
    """KL(π ‖ π_base) of whole completions over their mean length, nats per token, with its standard error over questions (delta method)."""
    n, tokens = len(ratios), sum(length for *_, length in ratios)
    if not tokens:
        return {"kl_per_token": None, "kl_per_token_se": None}
    rate = sum(value for _, value, _ in ratios) / tokens
    squares = sum((value - rate * length) ** 2 for _, value, length in ratios)
    return {"kl_per_token": rate, "kl_per_token_se": math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else None}

"""Likelihoods by scoring passes: log π of given completions, and the K-sample bound on the marginal likelihood log π(y*|x)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from emreason.engines.drawing import draw_seed
from emreason.engines.inprocess import evaluating
from emreason.models.batches import Example, bucket, collate
from emreason.progress import bar
from emreason.questions.answers import gold_text, statement_start, stop_at_answer
from emreason.questions.grammar.thinking import closing_ids, said, silent_ids
from emreason.questions.prompts import ANSWER_CUE, Prompts, end_ids, following
from emreason.scores.scoring import mean, token_logprobs
from emreason.types import Engine, Question, Request, SamplingParams

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids, completion ids."""

BOUND = -2
"""Stands for the iteration in the seeds of the bound's draws: the same draws' seeds each time, so that changes are the model's."""


class Scorer(Protocol):
    """log π(completion | prompt) of each pair, nats, where tokens are drawn from softmax(logits / temperature)."""

    def __call__(self, pairs: Sequence[Pair], temperature: float = 1.0) -> list[float]: ...


@torch.no_grad()
def completion_logprobs(
    model: nn.Module, pairs: Sequence[Pair], temperature: float = 1.0, tokens_per_batch: int = 4096, label: str = ""
) -> list[float]:
    """A `Scorer` when bound to a model: one batched forward pass, no dropout, the model's own precision. `label`: of a bar, if any."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, completion in pairs:
        longest[prompt] = max(longest.get(prompt, 0), len(prompt) + len(completion))
    # rows of one prompt together: where they are packed, it passes the layers once
    order = sorted(range(len(pairs)), key=lambda i: (longest[pairs[i][0]], pairs[i]))
    rows = [Example(str(i), *pairs[i]) for i in order]
    found = [0.0] * len(pairs)
    with evaluating(model), bar(label, len(rows), "completions", enabled=bool(label and rows)) as progress:
        for examples in bucket(rows, tokens_per_batch):
            batch = collate(examples, [1.0] * len(examples), pad_id=0)
            logprobs = token_logprobs(model, batch.input_ids, batch.completion_mask, temperature=temperature, marks=batch.marks)
            sums = torch.zeros(len(examples), dtype=torch.float64).index_add(0, batch.marks.rows, logprobs.cpu().double())
            for example, value in zip(examples, sums.tolist(), strict=True):
                found[int(example.question_id)] = value
            progress.update(len(examples), sum(map(len, examples)))
    return found


@dataclass(frozen=True)
class Bound:
    """One question's estimate of log π(y*|x), nats. `error`: its Monte Carlo standard error (delta method), None at K = 1."""

    question_id: str
    value: float
    error: float | None
    answered: float
    """Share of the draws that stated an answer of their own."""


def marginal_bounds(
    questions: Sequence[Question],
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    *,
    k: int,
    max_new_tokens: int,
    seed: int,
    n_examples: int = 0,
    label: str = "",
) -> list[Bound]:
    """log 1/K Σₖ π(y*|x, zₖ), zₖ ~ π(z|x), per question, in the order given.

    By Jensen's inequality its expectation is at most log π(y*|x), and it rises to it with K (Burda et al. 2016, Thm 1): a bound in the
    mean, not draw by draw. zₖ is the text before a draw's answer statement, the whole text where there is none; then the answer line is
    forced, so the figure is finite and that of the model that always answers: not knowing the format does not enter. π(y*|x, z) is the
    probability that the line says y* and ends, with a newline, the turn's end or the text's; other wordings of y* count as misses.
    `label`: of a bar, if any.
    """
    by_id = {question.id: question for question in questions}
    params = SamplingParams(max_new_tokens=max_new_tokens)  # the model's own distribution, whatever the sampler's temperature
    asked = ((q, prompts.ids(q, "question", n_examples)) for q in questions)
    queue = deque(
        Request((q.id, i), ids, params, draw_seed(seed, BOUND, q.id, i), stop_at_answer(q, tokenizer, ids))
        for q, ids in asked
        for i in range(k)
    )
    pairs: dict[tuple[str, int], list[Pair]] = {}
    answered, ends = dict.fromkeys(by_id, 0), end_ids(tokenizer)
    with bar(label, len(questions), "questions", enabled=bool(label)) as progress:
        for completion in engine.generate(queue):
            key: Any = completion.request.key
            question_id, draw = key
            prompt_ids = completion.request.prompt_ids
            z, stated = rationale_ids(completion.token_ids, tokenizer, prompt_ids)
            answered[question_id] += stated
            context = (*prompt_ids, *z, *cue_ids(z, tokenizer, prompt_ids))
            pairs[question_id, draw] = [(context, ending) for ending in endings(by_id[question_id], tokenizer, ends)]
            progress.update(int(draw == k - 1), len(completion.token_ids))
    keys = [(q.id, i) for q in questions for i in range(k)]
    logs = iter(score([pair for key in keys for pair in pairs[key]]))
    return [
        _bound(q.id, [float(np.logaddexp.reduce([next(logs) for _ in pairs[q.id, i]])) for i in range(k)], answered[q.id] / k)
        for q in questions
    ]


def rationale_ids(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()
) -> tuple[tuple[int, ...], bool]:
    """The sampled ids that lie before the last answer statement (all but special ones where there is none), and whether there is one."""
    silent = silent_ids(tokenizer)
    ids = tuple(i for i in token_ids if i not in silent)
    start = statement_start(said(ids, prompt_ids, tokenizer))
    if start is None:
        return ids, False
    n = len(ids)
    while n and len(said(ids[:n], prompt_ids, tokenizer)) > start:
        n -= 1
    return ids[:n], True


def at_cue(prompt_ids: tuple[int, ...], token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The prompt, the sampled ids before their last answer statement, and the cue `Answer:` after them."""
    z = rationale_ids(token_ids, tokenizer, prompt_ids)[0]
    return (*prompt_ids, *z, *cue_ids(z, tokenizer, prompt_ids))


def cue_ids(z: Sequence[int], tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids of the cue `Answer:` on a line of its own after `z`, whose thinking block, if it is still open, is closed before."""
    text = said(z, prompt_ids, tokenizer)
    if closing := closing_ids(text, tokenizer):
        return (*closing, *following(tokenizer, "\n", ANSWER_CUE.lstrip("\n")))
    on_new_line = not z or text.endswith("\n")
    return following(tokenizer, "\n", ANSWER_CUE.lstrip("\n")) if on_new_line else following(tokenizer, "a", ANSWER_CUE)


def endings(question: Question, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[tuple[int, ...]]:
    """What may follow the cue when y* is said: the answer and a newline, or the answer and one of `ends`, `end_ids` of the tokenizer."""
    cue, gold = ANSWER_CUE.lstrip("\n"), gold_text(question)
    said = following(tokenizer, cue, f" {gold}")
    return [following(tokenizer, cue, f" {gold}\n"), *((*said, end) for end in ends)]


def summarize(bounds: Sequence[Bound]) -> dict[str, float | None]:
    """The mean over questions, its standard error over questions (their spread and the draws'), and the draws' share of it alone."""
    n = len(bounds)
    center = sum(b.value for b in bounds) / n
    spread = math.sqrt(sum((b.value - center) ** 2 for b in bounds) / (n - 1) / n) if n > 1 else None
    errors = [b.error for b in bounds if b.error is not None]
    return {
        "log_marginal": center,
        "log_marginal_se": spread,
        "log_marginal_mc_se": math.sqrt(sum(e * e for e in errors)) / n if len(errors) == n else None,
        "log_marginal_answered": mean(b.answered for b in bounds),
    }


def _bound(question_id: str, logs: Sequence[float], answered: float) -> Bound:
    k, total = len(logs), float(np.logaddexp.reduce(logs))
    if k == 1 or total == -math.inf:
        return Bound(question_id, total - math.log(k), None, answered)
    shares = [k * math.exp(v - total) for v in logs]  # πₖ / mean
    variance = sum((s - 1) ** 2 for s in shares) / (k - 1)
    return Bound(question_id, total - math.log(k), math.sqrt(variance / k), answered)

"""Evaluation of a model on all ranks together: by greedy generation, and by a bound on log π(y*|x)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from emreason.em.ranks import gather, rank_and_world
from emreason.progress import bar
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import completion_logprobs, marginal_bounds, summarize
from emreason.scores.scoring import Prediction, Stopwatch, predict, score
from emreason.types import Engine, Question

Parts = tuple[Engine, Prompts, PreTrainedTokenizerBase]
"""What answers questions: see `scoring.predict`."""


@dataclass(frozen=True)
class Evaluation:
    """`evaluation` in the config.

    Attributes:
        max_new_tokens: of greedy generation.
        forced: also measure accuracy with a forced answer line.
        bound: K > 0: validation also estimates log π(y*|x) from K draws of each of the first `bound_questions` questions.
        diagnostics: `kl` and `faithfulness`, the costly ones.
        few_shot: worked examples of the few-shot baseline.
        baseline: splits measured before the first iteration.
    """

    max_new_tokens: int = 256
    forced: bool = True
    bound: int = 0
    bound_questions: int = 32
    diagnostics: Sequence[str] = ()
    few_shot: int = 0
    baseline: Sequence[str] = ()


def evaluate(
    mine: list[Question], parts: Parts, settings: Evaluation, label: str, n_examples: int = 0
) -> tuple[dict[str, Any], list[Prediction]]:
    """SCORE and predictions of this rank's questions together with all other ranks'."""
    watch = Stopwatch()
    asked: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "n_examples": n_examples, "forced": settings.forced}
    with bar(label, len(mine), "questions", enabled=rank_and_world()[0] == 0) as progress:
        predictions = predict(mine, *parts, **asked, bar=progress)
    predictions = sorted(gather(predictions), key=lambda p: p.question_id)
    return score(predictions, watch.seconds, settings.forced), predictions


def marginal(mine: list[Question], model: nn.Module, parts: Parts, settings: Evaluation, seed: int, label: str) -> dict[str, float | None]:
    """`log_marginal` with its standard error, from this rank's questions together with all other ranks'."""
    rank, world = rank_and_world()
    # the questions were dealt out in turn, so the first few of all are the first few of each rank
    mine = mine[: max(0, -(-(settings.bound_questions - rank) // world))]
    shown, scoring = (label, f"{label}, scoring") if rank == 0 else ("", "")
    score_given = functools.partial(completion_logprobs, model, label=scoring)
    asked: dict[str, Any] = {"k": settings.bound, "max_new_tokens": settings.max_new_tokens, "seed": seed}
    bounds = marginal_bounds(mine, *parts, score_given, **asked, label=shown)
    return summarize(sorted(gather(bounds), key=lambda b: b.question_id))

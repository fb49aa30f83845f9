"""How a model is evaluated; `evaluation` in the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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

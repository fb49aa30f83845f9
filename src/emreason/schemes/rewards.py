"""Rewards r(text, ŷ, question) ∈ {False, True}: which completions an E-step accepts; `sampler.reward` names one by its dotted path."""

from __future__ import annotations

import re

from emreason.questions import answers
from emreason.types import Question

_SIDE = r"-?\d+(?:\s*[-+−]\s*\d+)*"
_EQUATION = re.compile(rf"(?<![\d.])(?<!\d )(?:{_SIDE})(?:\s*=\s*(?:{_SIDE}))+(?!\.?\d)")


def correct(text: str, answer: str | None, question: Question) -> bool:  # noqa: ARG001
    """The paper's reward r(ŷ, y*) = 1[ŷ = y*]."""
    return answers.correct(answer, question)


def valid_sums(text: str, answer: str | None, question: Question) -> bool:
    """The right answer, and a rationale that states at least one equation of sums and differences, all of them true.

    "11 + 9 = 19. Answer: 20" has the right answer from the hint, not from its reasoning; the answer alone cannot tell.
    """
    found = list(equations(text))
    return answers.correct(answer, question) and bool(found) and all(found)


def verified(text: str, answer: str | None, question: Question) -> bool:  # noqa: ARG001
    """The right answer, and a hinted rationale that leads to it under the plain prompt, too: the sampler asks again (`verification.py`)."""
    return answers.correct(answer, question)


verified.asks_again = True  # type: ignore[attr-defined]


def well_formed(text: str, answer: str | None, question: Question) -> bool:  # noqa: ARG001
    """Any answer that can be read, right or wrong: unfiltered self-training, the control that learns the format and nothing else."""
    return answer is not None


def equations(text: str) -> list[bool]:
    """Whether each equation stated in `text` is true, in order; of `a = b = c` all sides must be equal."""
    values = [[_value(side) for side in match[0].split("=")] for match in _EQUATION.finditer(text)]
    return [len(set(sides)) == 1 for sides in values]


def _value(side: str) -> int:
    return sum(int(sign.replace("−", "-") + digits) for sign, digits in re.findall(r"([-+−]?)\s*(\d+)", side))

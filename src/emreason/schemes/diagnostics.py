"""What accepted rationales look like: whether they reason before they answer, repeat one another, or lean on the hint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emreason.questions.answers import statement_start
from emreason.schemes.samplers import is_trivial
from emreason.types import Rationale

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
    n = len(accepted)
    if not n:
        return dict.fromkeys(("trivial_rate", "answer_first_rate", "hint_mention_rate", "distinct_rate"))
    return {
        "trivial_rate": sum(is_trivial(r.text) for r in accepted) / n,
        "answer_first_rate": sum(answers_first(r.text) for r in accepted) / n,
        "hint_mention_rate": sum(mentions_hint(r.text) for r in accepted) / n,
        "distinct_rate": len({reasoning(r.text) for r in accepted}) / n,
    }

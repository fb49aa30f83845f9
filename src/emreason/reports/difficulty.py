"""Acceptance by question difficulty, from the journals: difficulty is how rarely the untrained model solves the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from emreason.reports.reading import Run, read_attempts
from emreason.schemes.samplers import CORRECT
from emreason.scores import stats

DECILES = 10
"""Tenths of the solve rate, the hardest first. Not tenths of the questions: many have equal rates, and a cut among them means nothing."""


Asked = tuple[str, str]
"""Question id and gold answer, which tells apart questions that share an id over datasets' seeds."""


@dataclass
class Outcomes:
    """One run's journal, condensed: plain attempts per question in iteration 0 as [correct, tried]; accepted per (iteration, question)."""

    plain: dict[Asked, list[int]] = field(default_factory=dict)
    accepted: dict[tuple[int, Asked], bool] = field(default_factory=dict)


def read_outcomes(run: Run) -> Outcomes:
    """The run's journal, line by line; lines without the agreed fields are skipped, an attempt written twice counts once."""
    outcomes = Outcomes()
    seen: set[tuple[int, Asked, int]] = set()
    solving = run.config.get("sampler.reward", CORRECT) == CORRECT  # elsewhere accepted is not solved
    for row in read_attempts(run):
        try:
            question, accepted = (str(row["question_id"]), str(row.get("gold"))), bool(row["accepted"])
            iteration, attempt = int(row["iteration"]), int(row["attempt"])
        except (KeyError, TypeError, ValueError):
            continue
        if (iteration, question, attempt) in seen:
            continue
        seen.add((iteration, question, attempt))
        outcomes.accepted[iteration, question] = accepted or outcomes.accepted.get((iteration, question), False)
        if solving and iteration == 0 and row.get("proposal") == "question":
            tally = outcomes.plain.setdefault(question, [0, 0])
            tally[0] += accepted
            tally[1] += 1
    return outcomes


Share = tuple[float, float, float]
"""Share of accepted questions with its 95 % Wilson interval, in [0, 1]."""


def acceptance_by_difficulty(runs: Sequence[Run]) -> dict[str, list[Share | None]]:
    """Scheme label → one share per decile of the solve rate (None for an empty one), for runs of one dataset and model.

    A question's solve rate pools the plain-prompt attempts of iteration 0, where all runs still have the same weights.
    A run is placed by the attempts of the *other* runs: its own luck must not decide both axes. A single run is placed by its
    own iteration 0 and shows its later iterations. Iterations after the first are shown where there are any. {} without data.
    """
    journals = {run.folder: read_outcomes(run) for run in runs}
    later = any(iteration > 0 for journal in journals.values() for iteration, _ in journal.accepted)
    if len(runs) == 1 and not later:
        return {}
    pooled: dict[Asked, list[int]] = {}
    for journal in journals.values():
        for question, (correct, tried) in journal.plain.items():
            tally = pooled.setdefault(question, [0, 0])
            tally[0] += correct
            tally[1] += tried
    counts: dict[str, list[list[int]]] = {}
    for run in sorted(runs, key=lambda run: run.order):
        own = journals[run.folder].plain if len(runs) > 1 else {}
        for (iteration, question), accepted in journals[run.folder].accepted.items():
            mine = own.get(question, [0, 0])
            correct, tried = (a - b for a, b in zip(pooled.get(question, [0, 0]), mine, strict=True))
            if tried and (iteration > 0) == later:
                decile = max(0, math.ceil(DECILES * correct / tried - 1e-9) - 1)  # 0 for a solve rate of [0, 0.1], 1 for (0.1, 0.2], …
                cell = counts.setdefault(run.label, [[0, 0] for _ in range(DECILES)])[decile]
                cell[0] += accepted
                cell[1] += 1
    return {label: [(k / n, *stats.wilson(k, n)) if n else None for k, n in cells] for label, cells in counts.items()}

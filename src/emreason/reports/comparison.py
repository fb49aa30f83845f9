"""What a set of runs says about the schemes: accuracies over seeds, paired tests, and the notes on what does not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

from emreason.reports.reading import Run, Score, by_place, differing_keys, read_predictions
from emreason.runs.keys import within
from emreason.scores import stats

ZERO_SHOT, FEW_SHOT = "zero-shot baseline", "few-shot baseline"
_MEASURED_BY = (*(f"dataset.{key}" for key in ("path", "load", "prompt", "answer_as", "limit.test")), "model", "evaluation.max_new_tokens")
MEASURED_BY = {ZERO_SHOT: _MEASURED_BY, FEW_SHOT: (*_MEASURED_BY, "dataset.demonstrations", "evaluation.few_shot")}
"""Config keys that a baseline depends on."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """One row of the paper's table in long form: a scheme (or baseline) on a dataset with a model.

    Accuracies in [0, 1]. `low`–`high` is the t-interval of the mean over seeds (`interval == "t"`), or the Wilson interval
    over questions where there is nothing to average: one seed, or a baseline that is the same at every seed because the
    base model is. `best` where every scheme has several seeds: one seed compares two models, not two schemes. `p_vs_best` is
    Holm-corrected over all pairs of the report.
    """

    dataset: str
    model: str
    scheme: str
    baseline: bool
    seeds: int
    accuracy: float | None
    low: float | None
    high: float | None
    interval: str
    forced_accuracy: float | None
    questions: int
    best: bool = False
    p_vs_best: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two schemes over several seeds, or a scheme and the few-shot baseline, on the same test questions: first − second, p and Holm's p."""

    dataset: str
    model: str
    first: str
    second: str
    difference: stats.Difference
    test: str
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """The whole of it; `notes` are plain sentences, `counted` the runs behind the numbers."""

    cells: list[Cell]
    pairs: list[Pair]
    notes: list[str]
    counted: list[Run]


def compare(runs: Sequence[Run]) -> Comparison:
    """Count the finished runs, compare their schemes pairwise, and name everything that was left out."""
    counted, notes = _countable(runs)
    notes += _numbered(runs) + _gaps(runs, counted) + _single_seeds(counted)
    pairs, pair_notes = _pairs(counted)
    cells = [cell for group in by_place(runs) for cell in _cells(group, counted, pairs)]
    return Comparison(cells, pairs, notes + pair_notes, counted)


def _countable(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    counted: dict[tuple[str, str, str, int | str], Run] = {}
    notes = []
    for run in runs:
        key = (run.dataset, run.model, run.label, run.seed)
        if run.problem:
            where = run.name if run.known else run.place
            notes.append(f"Not counted: {where}: {run.problem.rstrip('.')}.")
        elif key in counted:
            notes.append(f"Not counted: {run.place} repeats {counted[key].place} (same scheme, config and seed).")
        else:
            counted[key] = run
    return list(counted.values()), notes


def _numbered(runs: Sequence[Run]) -> list[str]:
    """The settings that stand as a number in a label."""
    long = [run for run in runs if run.variant and run.variant not in run.label]
    return list(dict.fromkeys(f"{run.label} on {run.dataset} with {run.model}: {run.variant}." for run in long))


def _gaps(runs: Sequence[Run], counted: Sequence[Run]) -> list[str]:
    """Holes in the grid scheme × seed of each dataset and model, and test sets of unequal size."""
    notes = []
    for group in by_place(runs):
        dataset, model = group[0].dataset, group[0].model
        seeds = {run.seed for run in group}
        for label in sorted({run.label for run in group}):
            absent = sorted(seeds - {run.seed for run in group if run.label == label}, key=str)
            if absent:
                which = "seed" if len(absent) == 1 else "seeds"
                notes.append(f"Missing: {label} on {dataset} with {model} has no run for {which} {', '.join(map(str, absent))}.")
        sizes = {run.test.n for run in counted if run.test and (run.dataset, run.model) == (dataset, model)}
        if len(sizes) > 1:
            notes.append(f"Unequal test sets on {dataset} with {model}: {', '.join(map(str, sorted(sizes)))} questions.")
    known = [run for group in by_place(runs) for run in group]
    for scheme in sorted({run.scheme for run in known}):
        for model, dataset in sorted({(run.model, run.dataset) for run in known}):
            if not any((run.scheme, run.model, run.dataset) == (scheme, model, dataset) for run in known):
                notes.append(f"Missing: no run of {scheme} on {dataset} with {model}.")
    return notes


def _single_seeds(counted: Sequence[Run]) -> list[str]:
    """Where schemes stand side by side with one seed, which says something about two models and nothing about two schemes."""
    notes = []
    for group in by_place(counted):
        seeds = {label: {run.seed for run in group if run.label == label} for label in dict.fromkeys(run.label for run in group)}
        single = [label for label, of_label in seeds.items() if len(of_label) == 1]
        if single and len(seeds) > 1:
            notes.append(
                f"One seed of {', '.join(single)} on {group[0].dataset} with {group[0].model}: it compares trained models, not schemes, so "
                "none is called the best or different from another; run more seeds (seed=1,2,3)."
            )
    return notes


def _cells(group: Sequence[Run], counted: Sequence[Run], pairs: Sequence[Pair]) -> list[Cell]:
    dataset, model = group[0].dataset, group[0].model
    inside = [run for run in counted if (run.dataset, run.model) == (dataset, model)]
    # A baseline is complete before iteration 0, so where no run has finished the others may speak for it.
    measured = inside or group
    scores: dict[str, Callable[[Run], Score | None]] = {ZERO_SHOT: lambda run: run.zero_shot, FEW_SHOT: lambda run: run.few_shot}
    baselines = [_cell(dataset, model, row, alike, pick) for of, pick in scores.items() for row, alike in _measured_alike(measured, of)]
    labels = dict.fromkeys(run.label for run in sorted(group, key=lambda run: run.order))
    schemes = [_cell(dataset, model, label, [r for r in inside if r.label == label], lambda run: run.test) for label in labels]
    cells = [cell for cell in baselines if cell.seeds] + schemes
    top = max((cell.accuracy for cell in cells if cell.accuracy is not None), default=None)
    measured_cells = [cell for cell in cells if cell.accuracy is not None]
    best = {cell.scheme for cell in measured_cells if cell.accuracy == top}
    if len(best) == len(measured_cells) > 1 or any(cell.seeds == 1 for cell in measured_cells if not cell.baseline):
        best = set()  # where all are equal none is the best, and one seed cannot tell
    p_values = {frozenset((p.first, p.second)): p.p_holm for p in pairs if (p.dataset, p.model) == (dataset, model)}

    def against_best(scheme: str) -> float | None:
        return max((p for pair, p in p_values.items() if scheme in pair and pair & (best - {scheme})), default=None)

    return [replace(c, best=c.scheme in best, p_vs_best=None if c.scheme in best else against_best(c.scheme)) for c in cells]


def _measured_alike(runs: Sequence[Run], baseline: str) -> list[tuple[str, list[Run]]]:
    """The runs by the settings that a baseline was measured with, and the name of its row: with its schemes' where there are several."""
    telling = [values for key, values in differing_keys(runs).items() if within(key, MEASURED_BY[baseline])]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(values.get(run.folder, "") for values in telling), []).append(run)
    if len(groups) == 1:
        return [(baseline, list(runs))]
    return [(f"{baseline} of {', '.join(dict.fromkeys(run.label for run in alike))}", alike) for alike in groups.values()]


def _cell(dataset: str, model: str, scheme: str, runs: Sequence[Run], pick: Callable[[Run], Score | None]) -> Cell:
    # A baseline is measured once per run; runs of one seed share it, so seeds are averaged, not runs.
    by_seed: dict[int | str, list[Score]] = {}
    for run in runs:
        if (score := pick(run)) is not None:
            by_seed.setdefault(run.seed, []).append(score)
    baseline = scheme.startswith((ZERO_SHOT, FEW_SHOT))
    if not by_seed:
        return Cell(dataset, model, scheme, baseline, 0, None, None, None, "", None, 0)
    means = [fmean(score.accuracy for score in scores) for scores in by_seed.values()]
    scores = [score for group in by_seed.values() for score in group]
    mean, half = stats.mean_interval(means)
    if half is None or (baseline and len(set(means)) == 1):
        low, high = stats.wilson(round(mean * scores[0].n), scores[0].n)
        interval = "wilson"
    else:
        low, high, interval = mean - half, mean + half, "t"
    forced = [score.forced_accuracy for score in scores if score.forced_accuracy is not None]
    questions = max(score.n for score in scores)
    return Cell(dataset, model, scheme, baseline, len(by_seed), mean, low, high, interval, fmean(forced) if forced else None, questions)


Answers = dict[tuple[str, str], bool]
"""(question id, gold answer) → correct."""


def _pairs(counted: Sequence[Run]) -> tuple[list[Pair], list[str]]:
    """Pairs of schemes that share several seeds, and each scheme against its few-shot baseline, on the seeds and questions that both have;
    Holm over all of them.
    """
    found: list[Pair] = []
    notes: list[str] = []
    for group in by_place(counted):
        sides: dict[str, dict[int | str, Answers]] = {}
        for run in group:
            sides.setdefault(run.label, {})[run.seed] = answers = read_predictions(run, "test")
            if not answers and len(group) > 1:
                notes.append(f"No paired test: {run.name} has no predictions/test.jsonl.")
        asked = list(combinations(sides, 2))
        for row, alike in _measured_alike(group, FEW_SHOT):
            sides[row] = {run.seed: answers for run in alike if (answers := read_predictions(run, "baseline_few_shot_test"))}
            asked += [(label, row) for label in dict.fromkeys(run.label for run in alike)]
        for first, second in asked:
            seeds = [s for s in sides[first] if sides[first][s].keys() & sides[second].get(s, {}).keys()]
            if len(seeds) > 1 or (seeds and second.startswith(FEW_SHOT)):
                difference, test = _paired([sides[first][s] for s in seeds], [sides[second][s] for s in seeds])
                found.append(Pair(group[0].dataset, group[0].model, first, second, difference, test, 1.0))
    adjusted = stats.holm([pair.difference.p for pair in found])
    return [replace(pair, p_holm=p) for pair, p in zip(found, adjusted, strict=True)], notes


def _paired(first: list[Answers], second: list[Answers]) -> tuple[stats.Difference, str]:
    difference = stats.paired(first, second)
    if len(first) > 1:
        return difference, "paired bootstrap, t"
    # One seed: the exact test needs no resampling.
    shared = sorted(first[0].keys() & second[0].keys())
    exact = stats.mcnemar([first[0][q] for q in shared], [second[0][q] for q in shared])
    return replace(difference, p=exact), "exact McNemar"

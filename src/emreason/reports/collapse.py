"""Where a scheme collapses: a figure that shows what is accepted beside what is learned, and what the rationales have become."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emreason.reports.figures import GREY, SOLID, STYLE, Drawn, handle, literal, save
from emreason.reports.reading import Iteration, Run, by_place, read_attempts
from emreason.schemes.samplers import is_trivial

BARE, GAP = 0.25, 0.5
"""Share of bare answers, or of questions that are accepted and not solved, from which on a figure is drawn."""
SHOWN, WIDTH, LINES = 5, 80, 2
"""Iterations whose rationales are shown; characters a line and lines of each."""
RED = "#B00020"
THIN: dict[str, Any] = SOLID | {"linewidth": 1.1, "markersize": 3.6}

Series = Callable[[Run], list[float | None]]


def bare(iteration: Iteration) -> float | None:
    """Share of the accepted rationales that state an answer without, or before, any reasoning; None where it was not measured."""
    found = [iteration.numbers.get(f"e_step/{key}") for key in ("trivial_rate", "answer_first_rate")]
    known = [share for share in found if share is not None]
    return sum(known) if known else None


def collapsed(run: Run) -> float:
    """How far a run has gone: the largest share of bare answers, or, where it has hints, of questions accepted beyond those solved without.

    The latter counts from `GAP` on, so that both are to be held against `BARE`.
    """
    hinted = bool(run.config.get("sampler.proposals.rationalization"))
    gaps = [i.acceptance - i.validation.accuracy - GAP + BARE for i in run.iterations if i.validation and hinted]
    return max([bare(i) or 0.0 for i in run.iterations] + gaps, default=0.0)


def draw_collapse(runs: Sequence[Run], colours: dict[str, tuple[str, str]], out: Path) -> list[Drawn]:
    """A figure for each model and dataset on which a run collapses, as PNG and PDF in `out`. OSError where it cannot be written."""
    places = [[run for run in group if run.iterations] for group in by_place(runs)]
    sick = [group for group in places if any(collapsed(run) >= BARE for run in group)]
    return [_draw(group, colours, f"collapse{f'_{n}' if len(sick) > 1 else ''}", out) for n, group in enumerate(sick, 1)]


def _draw(group: Sequence[Run], colours: dict[str, tuple[str, str]], name: str, out: Path) -> Drawn:
    """A line per run: over seeds some collapse and some do not, and a mean would be of neither."""
    entropies = {run.folder: _entropies(run) for run in group}
    series: dict[str, Series] = {
        "accepted in the E-step (%)": lambda run: [100 * i.acceptance for i in run.iterations],
        "solved without a hint (%)": lambda run: [100 * i.validation.accuracy if i.validation else None for i in run.iterations],
        "bare answers of the accepted (%)": lambda run: [None if (share := bare(i)) is None else 100 * share for i in run.iterations],
        "entropy of a draw (nats)": lambda run: [entropies[run.folder].get(i.index) for i in run.iterations],
        "log π(y*|x) (nats)": lambda run: [i.numbers.get("validation/log_marginal") for i in run.iterations],
    }
    measured = {title: y for title, y in series.items() if any(value is not None for run in group for value in y(run))}
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(12.0, 5.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[1.0, 0.95])
        above, below = parts
        axes: list[Axes] = above.subplots(1, len(measured), squeeze=False).ravel().tolist()
        for ax, (title, y) in zip(axes, measured.items(), strict=True):
            for run in group:
                colour, marker = colours[run.label]
                points = [(i.index, value) for i, value in zip(run.iterations, y(run), strict=True) if value is not None]
                ax.plot([k for k, _ in points], [value for _, value in points], color=colour, marker=marker, **THIN)
            ax.set_title(title)
            ax.set_xlabel("EM iteration")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if "%" in title:
                ax.set_ylim(-2, 103)
        _write(below, _pick(group), colours)
        handles = [handle(label, *colours[label]) for label in colours if any(run.label == label for run in group)]
        caption = (
            f"{group[0].dataset}, {group[0].model}, a line per run: questions accepted in the E-step, with the hint where the scheme has "
            "one, and validation questions solved without it; the share of accepted rationales that state the answer without or before any "
            "reasoning; the mean −log π of a question's first draw, its entropy where it is drawn at temperature 1. Below, what was "
            "accepted of one question in some iterations; red: no reasoning."
        )
        return save(figure, handles, name, caption, out)


def _entropies(run: Run) -> dict[int, float]:
    """Mean −log π of the questions' first draws, given the prompt that they came from, by iteration; nats."""
    found: dict[int, list[float]] = {}
    for row in read_attempts(run):
        first = row.get("attempt") == 1 and row.get("finish_reason") != "error"
        if first and isinstance(row.get("logprob"), float) and isinstance(row.get("iteration"), int):
            found.setdefault(row["iteration"], []).append(-row["logprob"])
    return {iteration: sum(values) / len(values) for iteration, values in found.items()}


def _pick(group: Sequence[Run]) -> list[Run]:
    """The run that has gone farthest, and beside it one of the scheme that has gone least far, of the same seed if there is one."""
    worst = max(group, key=lambda run: (collapsed(run), len(run.iterations)))
    others = [run for run in group if run.label != worst.label]
    if not others:
        return [worst]
    best = min(others, key=collapsed).label
    return [worst, min((run for run in others if run.label == best), key=lambda run: run.seed != worst.seed)]


def _write(place: Any, runs: Sequence[Run], colours: dict[str, tuple[str, str]]) -> None:
    """One question's accepted rationales, a column per run, a row per iteration: the one that was accepted most often in every column."""
    rows = [{(str(r["question_id"]), r["iteration"]): r for r in read_attempts(run) if r.get("accepted") and "text" in r} for run in runs]
    often = Counter(question for of_run in rows for question, _ in of_run)
    chosen = min(often, key=lambda q: (-min(sum(q == key for key, _ in of_run) for of_run in rows), -often[q], q)) if often else None
    axes = place.subplots(1, len(runs), squeeze=False).ravel().tolist()
    for ax, run, of_run in zip(axes, runs, rows, strict=True):
        ax.axis("off")
        ax.set_title(
            literal(f"{run.label}, seed {run.seed}: accepted in iteration …"), color=colours[run.label][0], loc="left", fontweight="bold"
        )
        done = [i.index for i in run.iterations]
        shown = sorted({done[round(k * (len(done) - 1) / (SHOWN - 1))] for k in range(SHOWN)})
        for n, iteration in enumerate(shown):
            row = of_run.get((chosen or "", iteration))
            text = "(none accepted)" if row is None else str(row["text"])
            colour = GREY if row is None else RED if is_trivial(text) else "black"
            y = 1 - n / SHOWN
            ax.text(0.0, y, str(iteration), va="top", color=GREY, fontweight="bold", transform=ax.transAxes)
            ax.text(0.04, y, _lines(text), va="top", color=colour, fontsize=8, linespacing=1.1, transform=ax.transAxes)
    asked = next((str(r.get("question", "")) for of_run in rows for (q, _), r in of_run.items() if q == chosen), "")
    place.suptitle(literal(textwrap.shorten(_known(asked), 170, placeholder=" …")), fontsize=9.5, ha="left", x=0.01)


def _lines(text: str) -> str:
    return literal("\n".join(textwrap.wrap(_known(text.strip()).replace("\n", " ↵ "), WIDTH, max_lines=LINES, placeholder=" …")), keep="\n")


def _known(text: str) -> str:
    """Characters that matplotlib's own font has."""
    return "".join(c if c == "\n" or ord(c) < 0x250 or c in "−…→≤≥×÷√π" else "·" for c in text)

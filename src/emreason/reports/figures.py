"""The report's figures: one panel per dataset and model, the same scheme in the same colour everywhere (Okabe & Ito 2008)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from emreason.reports.comparison import Comparison
from emreason.reports.difficulty import DECILES, acceptance_by_difficulty
from emreason.reports.reading import Run, by_place
from emreason.types import plain

# Safe for the common colour deficiencies; the usual schemes keep their colour from one report to the next.
USUAL = {"RS-4": ("#009E73", "o"), "STaR": ("#0072B2", "s"), "PPS": ("#D55E00", "D"), "RS-1": ("#E69F00", "^")}
SPARE = ["#CC79A7", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F", "#5B3A8E", "#9C9E00"]
MARKERS = "vPX*<>ph"  # one more than colours: no pair comes twice before the 57th scheme
GREY = "#606060"
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
}
SOLID: dict[str, Any] = {"linewidth": 1.7, "markersize": 4.8, "markeredgecolor": "white", "markeredgewidth": 0.6}
CHANCE: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.2, "marker": "_", "markersize": 7}
BASELINE: dict[str, Any] = {"color": GREY, "linestyle": (0, (5, 3)), "linewidth": 1.1}
UNFINISHED: dict[str, Any] = {"color": GREY, "linestyle": "-.", "linewidth": 1.0, "alpha": 0.75, "markersize": 3.0}

EXTRAS = {
    "few-shot (test)": "Dashed: few-shot baseline on the test split.",
    "chance acceptance": "Dotted: what a uniform guesser would get accepted in as many tries.",
    "not finished": "Dash-dotted: runs that are not finished.",
}
"""What a caption says of a line that is not in every figure."""


@dataclass(frozen=True)
class Drawn:
    """One figure on disk: file stem, caption for the HTML page, and the files."""

    name: str
    caption: str
    files: tuple[Path, ...]
    wide: bool = False


@dataclass(frozen=True)
class Curve:
    """One run as a polyline; `counted` curves enter their scheme's mean, the others are drawn faintly. `at`: which of the run's points
    these are, of which some were not measured.
    """

    x: list[float]
    y: list[float]
    counted: bool
    at: list[int]


@dataclass(frozen=True)
class Plot:
    """One figure to draw: what a run contributes to it (`x` and `y`, of equal length; `y` None where it was not measured) and how it reads.

    Shares are drawn in percent, from 0; other quantities on their own scale. Accuracies have the few-shot baseline,
    `chance` is a dotted companion.
    """

    name: str
    x_label: str
    y_label: str
    x: Callable[[Run], list[float]]
    y: Callable[[Run], list[float | None]]
    caption: str
    share: bool = True
    chance: Callable[[Run], list[float | None]] | None = None


def cumulative(amounts: Sequence[float]) -> list[float]:
    return [0.0, *np.cumsum(amounts).tolist()]


def _accuracy(run: Run) -> list[float | None]:
    return [score.accuracy if score else None for score in [run.start, *(i.validation for i in run.iterations)]]


def numbers(run: Run) -> list[float]:
    return [float(i.index) for i in run.iterations]


BOTH = "Line: mean over finished seeds, of the cost as well; points: seeds."
PLOTS = [
    Plot(
        "accuracy_per_iteration",
        "EM iterations completed",
        "validation accuracy (%)",
        lambda run: [0.0, *(i.index + 1.0 for i in run.iterations)],
        _accuracy,
        "Validation accuracy after each EM iteration. Line: mean over finished seeds; points: seeds; band: their range.",
    ),
    Plot(
        "accuracy_per_token",
        "tokens generated in E-steps (cumulative)",
        "validation accuracy (%)",
        lambda run: cumulative([i.tokens for i in run.iterations]),
        _accuracy,
        f"Validation accuracy at equal generation cost; the tokens of rejected attempts are charged. {BOTH}",
    ),
    Plot(
        "accuracy_per_second",
        "E-step and M-step time (s, cumulative)",
        "validation accuracy (%)",
        lambda run: cumulative([i.seconds for i in run.iterations]),
        _accuracy,
        f"Validation accuracy at equal training time; evaluation is not charged. {BOTH}",
    ),
    Plot(
        "acceptance",
        "EM iteration",
        "questions accepted (%)",
        numbers,
        lambda run: [i.acceptance for i in run.iterations],
        "Questions with an accepted rationale.",
        chance=lambda run: [i.chance for i in run.iterations],
    ),
    Plot(
        "rationale_length",
        "EM iteration",
        "mean rationale length (tokens)",
        numbers,
        lambda run: [i.rationale_tokens for i in run.iterations],
        "Mean length of the E-step's rationales. The axis does not start at zero.",
        share=False,
    ),
]


def palette(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Scheme label → (colour, marker), one for all figures of a report and for its page."""
    labels = list(dict.fromkeys(run.label for run in sorted(runs, key=lambda run: run.order) if run.known))
    others = [label for label in labels if label not in USUAL]
    chosen = USUAL | {label: (SPARE[n % len(SPARE)], MARKERS[n % len(MARKERS)]) for n, label in enumerate(others)}
    return {label: chosen[label] for label in labels}


def draw_all(runs: Sequence[Run], comparison: Comparison, out: Path) -> list[Drawn]:
    """Every figure that the runs have data for, as PNG (150 dpi) and PDF in `out`. OSError where it cannot be written."""
    colours = palette(runs)
    runs = [run for run in runs if run.iterations]
    if not runs:
        return []
    out.mkdir(parents=True, exist_ok=True)
    counted = {run.folder for run in comparison.counted}
    figures = [_draw(plot, runs, counted, colours, out) for plot in PLOTS]
    figures.append(_draw_difficulty([run for run in runs if run.folder in counted], colours, out))
    return [figure for figure in figures if figure]


def curves_of(
    runs: Sequence[Run], x: Callable[[Run], list[float]], y: Callable[[Run], list[float | None]], counted: set[Path]
) -> dict[str, list[Curve]]:
    curves: dict[str, list[Curve]] = {}
    for run in sorted(runs, key=lambda run: run.order):
        points = [(a, b, i) for i, (a, b) in enumerate(zip(x(run), y(run), strict=True)) if b is not None]
        if points:
            a, b, i = map(list, zip(*points, strict=True))
            curves.setdefault(run.label, []).append(Curve(a, b, run.folder in counted, i))
    return curves


def _draw(plot: Plot, runs: Sequence[Run], counted: set[Path], colours: dict[str, tuple[str, str]], out: Path) -> Drawn | None:
    panels = [(group, curves) for group in by_place(runs) if (curves := curves_of(group, plot.x, plot.y, counted))]
    if not panels:
        return None
    scale = 100.0 if plot.share else 1.0
    extras: dict[str, dict[str, Any]] = {}
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure, axes = _grid([group for group, _ in panels], plot.x_label, plot.y_label)
        for ax, (group, curves) in zip(axes, panels, strict=True):
            companions = curves_of(group, plot.x, plot.chance, counted) if plot.chance else {}
            at = {x for lines in curves.values() for line in lines for x in line.x}
            if len(at) == 1 and "iteration" in plot.x_label:  # points over one another: set them side by side
                for n, label in enumerate(curves):
                    for line in [*curves[label], *companions.get(label, [])]:
                        line.x[0] += _aside(n, len(curves))
                ax.set_xlim(min(at) - 0.5, max(at) + 0.5)
            for label, lines in curves.items():
                _draw_scheme(ax, lines, *colours[label], scale)
                if not all(line.counted for line in lines):
                    extras["not finished"] = UNFINISHED
            for label, lines in companions.items():
                extras["chance acceptance"] = CHANCE
                for line in lines:
                    ax.plot(line.x, np.multiply(line.y, scale), **CHANCE | {"color": colours[label][0]})
            if plot.y is _accuracy and (by_seed := {run.seed: run.few_shot.accuracy for run in group if run.few_shot}):
                extras["few-shot (test)"] = BASELINE
                ax.axhline(scale * fmean(by_seed.values()), **BASELINE)
            if plot.share:
                top = min(max(ax.get_ylim()[1], 10.0), 103.0)  # a line at zero is not stretched over the panel
                ax.set_ylim(min(0.0, -0.02 * top), top)
            if "iteration" in plot.x_label:
                ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            elif "tokens" in plot.x_label:
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        handles = [handle(label, *colours[label]) for label in colours if any(label in curves for _, curves in panels)]
        handles += [Line2D([], [], label=name, **style) for name, style in extras.items()]
        caption = " ".join([plot.caption, *(EXTRAS[name] for name in extras)])
        return save(figure, handles, plot.name, caption, out)


def _draw_scheme(ax: Axes, curves: Sequence[Curve], colour: str, marker: str, scale: float) -> None:
    whole = [curve for curve in curves if curve.counted]
    for curve in curves:
        if not curve.counted:
            ax.plot(curve.x, np.multiply(curve.y, scale), **UNFINISHED | {"color": colour, "marker": marker})
    if not whole:
        return
    # A mean over fewer seeds than the point before it would jump for no reason: it is of the points that all seeds have.
    common = sorted(set.intersection(*(set(curve.at) for curve in whole)))
    if not common:
        return
    x = np.array([[curve.x[curve.at.index(i)] for i in common] for curve in whole])
    y = np.array([[curve.y[curve.at.index(i)] for i in common] for curve in whole]) * scale
    style = SOLID
    if len(common) == 1:  # no line and no band to see it by
        style = SOLID | {"markersize": 8.0}
        ax.vlines(x.mean(0), y.min(0), y.max(0), color=colour, alpha=0.35, linewidth=2.5)
    if len(whole) > 1:
        ax.fill_between(x.mean(0), y.min(0), y.max(0), color=colour, alpha=0.13, linewidth=0)
        for curve in whole:
            ax.plot(curve.x, np.multiply(curve.y, scale), marker, color=colour, markersize=2.6, alpha=0.45, markeredgewidth=0)
    ax.plot(x.mean(0), y.mean(0), color=colour, marker=marker, **style)


def _draw_difficulty(runs: Sequence[Run], colours: dict[str, tuple[str, str]], out: Path) -> Drawn | None:
    panels = [(group, shown) for group in by_place(runs) if (shown := acceptance_by_difficulty(group))]
    if not panels:
        return None
    with rc_context(STYLE):  # type: ignore[arg-type]
        x_label = "base model's solve rate (%)    hard → easy"
        figure, axes = _grid([group for group, _ in panels], x_label, "questions accepted (%)")
        for ax, (_, shown) in zip(axes, panels, strict=True):
            for n, (label, shares) in enumerate(shown.items()):
                # Side by side, so that the intervals can be told apart.
                x = np.array([b for b in range(DECILES) if shares[b]]) + _aside(n, len(shown))
                rate, low, high = (np.array([100 * share[i] for share in shares if share]) for i in range(3))
                colour, marker = colours[label]
                ax.errorbar(x, rate, [rate - low, high - rate], color=colour, marker=marker, elinewidth=0.9, capsize=2, **SOLID)
            ax.set_xticks([edge - 0.5 for edge in range(0, DECILES + 1, 2)], [str(10 * edge) for edge in range(0, DECILES + 1, 2)])
            ax.set_xlim(-0.5, DECILES - 0.5)
            ax.set_ylim(-2, 103)
        handles = [handle(label, *colours[label]) for label in colours if any(label in shown for _, shown in panels)]
        caption = (
            "Questions accepted, by how often plain attempts of the untrained model (iteration 0) solve the question (tenths); each run is "
            "placed by the other runs' attempts, and shows its later iterations where it has any. Bars: 95 % Wilson intervals."
        )
        return save(figure, handles, "acceptance_by_difficulty", caption, out)


def _aside(n: int, count: int) -> float:
    """How far the n-th of `count` marks at the same place steps aside, in units of the axis."""
    return min(0.09, 0.5 / count) * (n - (count - 1) / 2)


def _grid(groups: Sequence[Sequence[Run]], x_label: str, y_label: str) -> tuple[Figure, list[Axes]]:
    """A figure with one set of axes per group: datasets side by side, models below one another, labels on the outer axes only."""
    count, datasets = len(groups), len({group[0].dataset for group in groups})
    columns = datasets if 1 < datasets <= 4 and count % datasets == 0 else min(count, 3)
    rows = -(-count // columns)
    width, height = (5.0, 3.3) if count == 1 else (3.2, 2.5)
    figure = Figure(figsize=(width * columns, height * rows + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax, group in zip(axes, groups, strict=False):
        ax.set_title(literal(f"{group[0].dataset}, {group[0].model}"))
    for n, ax in enumerate(axes):
        ax.set_visible(n < count)
        ax.set_ylabel(y_label if n % columns == 0 else "")
        ax.set_xlabel(x_label if n + columns >= count else "")
    return figure, axes[:count]


def handle(label: str, colour: str, marker: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, label=literal(label), **SOLID)


def literal(text: str, keep: str = "") -> str:
    """Text that matplotlib does not read as mathematics; `keep`: a control character that stays."""
    lines = [plain(line) for line in text.split(keep)] if keep else [plain(text)]
    return keep.join(lines).replace("$", r"\$")


def legend_above(figure: Figure, handles: list[Line2D], room: float = 0.35) -> float:
    """A legend above the panels, in as many columns as fit: matplotlib clips one that is wider than its figure.

    Where it is higher than `room`, which the figure has for it, the figure grows. Returns its height; both are inches.
    """
    place: Any = "outside upper center" if figure.get_layout_engine() else "upper center"
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc=place, ncols=columns, frameon=False, columnspacing=1.2, handlelength=1.8)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    height = float(legend.get_window_extent().height / figure.dpi) if handles else 0.0
    figure.set_figheight(figure.get_figheight() + max(0.0, height - room))
    return height


def save(figure: Figure, handles: list[Line2D], name: str, caption: str, out: Path) -> Drawn:
    legend_above(figure, handles)
    files = (out / f"{name}.png", out / f"{name}.pdf")
    figure.savefig(files[0])
    figure.savefig(files[1], metadata={"CreationDate": None})  # the same runs give the same bytes
    return Drawn(name, caption, files)

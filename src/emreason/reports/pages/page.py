"""`report.html`: one file that opens from disk without a network, and its panels of all that was logged. Jinja escapes every text; the
page's policy forbids fetching."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from emreason.reports import forms, tables
from emreason.reports.comparison import Comparison
from emreason.reports.figures import GREY, STYLE, Drawn, cumulative, curves_of, handle, legend_above, numbers, palette
from emreason.reports.reading import Run, by_place, differing_keys, read_attempts
from emreason.tracking.workspace import DONE, SECTIONS, STEP, TOKENS

PER_GROUP = 6  # rationales of one scheme, dataset, model, iteration and verdict
IN_ALL = 600
TEXT_LIMIT = 3000  # characters of a rationale or a question that are shown
PANEL_COLUMNS, DASHES = 4, ("-", "--", ":", "-.", (0, (1, 3)))


def render(
    runs: Sequence[Run],
    comparison: Comparison,
    drawn: Sequence[Drawn],
    colours: dict[str, tuple[str, str]],
    refresh: float | None = None,
) -> str:
    """The whole page, which the browser reads again after `refresh` seconds.

    Reads the template beside this file, the drawn figures and the runs' journals.
    """
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("emreason.reports.pages").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    samples = sample_rationales(runs)
    shown = [run for run in runs if run.known]
    return template.render(
        refresh=refresh,
        paper=tables.paper_table(comparison),
        caption=tables.caption(),
        notes=comparison.notes,
        pairs=tables.pairs_table(comparison),
        listed=tables.runs_table(shown),
        positions=_positions(comparison.counted),
        figures=[
            {"caption": d.caption, "name": d.name, "wide": d.wide, "data": base64.b64encode(d.files[0].read_bytes()).decode()}
            for d in drawn
        ],
        differences=_differences(shown),
        samples=samples,
        per_group=PER_GROUP,
        schemes=list(dict.fromkeys(s.scheme for s in samples)),
        iterations=sorted({s.iteration for s in samples}),
        places=list(dict.fromkeys((s.dataset, s.model) for s in samples)),
        colours={label: colour for label, (colour, _) in colours.items()},
        counted=len(comparison.counted),
        total=len(runs),
    )


def sample_rationales(runs: Sequence[Run]) -> list[SimpleNamespace]:
    """One attempt each at up to `PER_GROUP` questions per scheme, dataset, model, iteration and verdict, `IN_ALL` in all.

    Chosen by a hash of the question, so that the choice is the same every time, says nothing about the order in which
    completions arrived, and shows the same questions under every scheme.
    """
    groups: dict[tuple[Any, ...], dict[bytes, SimpleNamespace]] = {}
    for run in runs:
        for row in read_attempts(run):
            if not {"question_id", "iteration", "accepted", "text"} <= row.keys() or not isinstance(row["iteration"], int):
                continue
            group = groups.setdefault((run.dataset, run.model, run.order, row["iteration"], not row["accepted"]), {})
            rank = hashlib.blake2b(str(row["question_id"]).encode("utf-8", "replace")).digest()
            if rank not in group:
                group[rank] = _sample(run, row)
                if len(group) > PER_GROUP:
                    del group[max(group)]
    # Where the cap bites, every group loses its last ones first.
    ranked = sorted((place, n) for n, group in enumerate(groups.values()) for place in range(len(group)))
    kept = set(ranked[:IN_ALL])
    ordered = [[group[rank] for rank in sorted(group)] for group in groups.values()]
    positions = sorted((key, n) for n, key in enumerate(groups))
    return [sample for _, n in positions for place, sample in enumerate(ordered[n]) if (place, n) in kept]


def _sample(run: Run, row: dict[str, Any]) -> SimpleNamespace:
    """An attempt as the page shows it."""
    plain = {key: row.get(key, "") for key in ("iteration", "accepted", "proposal", "attempt", "n_tokens", "finish_reason")}
    texts = {key: _cut(row.get(key)) for key in ("question_id", "question", "gold", "text")}
    answer = None if row.get("answer") is None else _cut(row["answer"])
    return SimpleNamespace(scheme=run.label, dataset=run.dataset, model=run.model, seed=run.seed, answer=answer, **plain, **texts)


def _cut(text: object) -> str:
    whole = "" if text is None else str(text)
    return whole if len(whole) <= TEXT_LIMIT else whole[:TEXT_LIMIT] + " […]"


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Config keys that differ → each value with the runs that have it."""
    several = len({(run.dataset, run.model) for run in runs}) > 1
    names = {r.folder: f"{r.label}{f' on {r.dataset} with {r.model}' if several else ''}, seed {r.seed}" for r in runs}
    rows = []
    for key, values in differing_keys(runs).items():
        by_value: dict[str, list[str]] = {}
        for folder, value in values.items():
            by_value.setdefault(value, []).append(names[folder])
        rows.append((key, list(by_value.items())))
    return rows


def _positions(runs: Sequence[Run]) -> forms.Table | None:
    """Test accuracy in % by the letter of the gold answer, pooled over seeds: a model that favours a letter shows here."""
    letters = sorted({letter for run in runs if run.test for letter in run.test.positions})
    if not letters:
        return None
    pooled: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for run in runs:
        tally = pooled.setdefault((run.dataset, run.model, run.label), {})
        for letter, (n, accuracy) in (run.test.positions if run.test else {}).items():
            cell = tally.setdefault(letter, [0.0, 0.0])
            cell[0] += n
            cell[1] += n * accuracy
    rows = [
        [forms.Entry(text) for text in key]
        + [forms.Entry(f"{tables.percent(tally[x][1] / tally[x][0])} ({tally[x][0]:.0f})" if x in tally else "—") for x in letters]
        for key, tally in pooled.items()
        if tally
    ]
    columns = ["dataset", "model", "scheme", *letters]
    return forms.Table("Test accuracy (%) by the gold answer's place (questions)", columns, rows, tuple(range(3, len(columns))))


def draw_panels(runs: Sequence[Run], comparison: Comparison, out: Path) -> list[Drawn]:
    """A figure for each dataset and model with all that was logged, as PNG in `out`."""
    groups = [group for group in by_place(runs) if any(run.iterations for run in group)]
    counted = {run.folder for run in comparison.counted}
    drawn = [_draw_panels(group, counted, palette(runs), out, f"everything_{n}") for n, group in enumerate(groups, start=1)]
    return [figure for figure in drawn if figure]


def _draw_panels(runs: Sequence[Run], counted: set[Path], colours: dict[str, tuple[str, str]], out: Path, name: str) -> Drawn | None:
    """A small panel for each chart of the W&B workspace that these runs, of one dataset and model, have numbers for."""
    panels = []
    for chart in (chart for charts in SECTIONS.values() for chart in charts if chart.axis != STEP):
        found = {key: curves_of(runs, partial(_along, chart.axis), partial(_values, chart.axis, key), counted) for key in chart.metrics}
        if curves := {key: lines for key, lines in found.items() if lines and not key.startswith("test/")}:
            panels.append((chart, curves))
    if not panels:
        return None
    rows = -(-len(panels) // PANEL_COLUMNS)
    with rc_context(STYLE | {"font.size": 7.0, "axes.titlesize": 7.5, "axes.labelsize": 7.0, "legend.fontsize": 6.0}):  # type: ignore[arg-type]
        figure = Figure(figsize=(3.1 * PANEL_COLUMNS, 2.0 * rows + 0.4))
        for n, (chart, curves) in enumerate(panels, start=1):
            ax = figure.add_subplot(rows, PANEL_COLUMNS, n, title=chart.title)
            for (key, lines), dashes in zip(curves.items(), DASHES, strict=False):
                for label, of_scheme in lines.items():
                    for line in of_scheme:
                        style: dict[str, Any] = {"linewidth": 1.2, "marker": ".", "alpha": 0.8 if line.counted else 0.35}
                        ax.plot(line.x, line.y, color=colours[label][0], linestyle=dashes, **style)
                ax.plot(
                    [],
                    [],
                    color=GREY,
                    linestyle=dashes,
                    label=key if len({k.partition("/")[2] for k in curves}) == 1 else key.partition("/")[2],
                )
            if len(curves) > 1:
                ax.legend(loc="upper right", framealpha=0.6, edgecolor="none")  # "best" takes a second
            if chart.log and all(y > 0 for lines in curves.values() for of_scheme in lines.values() for line in of_scheme for y in line.y):
                ax.set_yscale("log")
            if chart.title.endswith("(bytes)"):
                ax.yaxis.set_major_formatter(EngFormatter(sep=""))
            if chart.axis == TOKENS:
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            else:
                ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            ax.set_xlabel({"iteration": "EM iteration", DONE: "EM iterations completed"}.get(chart.axis, "tokens generated"))
        high = legend_above(figure, [handle(label, *colours[label]) for label in dict.fromkeys(r.label for r in runs)], room=0.25)
        top = 1 - (max(0.25, high) + 0.3) / figure.get_figheight()
        figure.subplots_adjust(0.04, 0.35 / figure.get_figheight(), 0.99, top, wspace=0.22, hspace=0.62)
        file = out / f"{name}.png"
        figure.savefig(file)
    where = f"{runs[0].dataset}, {runs[0].model}"
    return Drawn(name, f"{where}: everything that is logged, a line per run; faint ones are not finished.", (file,), wide=True)


def _along(axis: str, run: Run) -> list[float]:
    """Where a run's points lie on an axis of the workspace: the base model, where it has a place, and the iterations."""
    if axis == TOKENS:
        return cumulative([i.tokens for i in run.iterations])
    return numbers(run) if axis == "iteration" else [0.0, *(number + 1 for number in numbers(run))]


def _values(axis: str, key: str, run: Run) -> list[float | None]:
    return [*([] if axis == "iteration" else [run.base.get(key)]), *(i.numbers.get(key) for i in run.iterations)]

"""A report over runs: printed, or written as tables (Markdown, CSV, LaTeX), figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pandas import DataFrame
from rich.console import Console
from rich.text import Text

from emreason.reports import forms, tables
from emreason.reports.collapse import draw_collapse
from emreason.reports.comparison import Comparison, compare
from emreason.reports.figures import draw_all, palette
from emreason.reports.pages.page import draw_panels, render
from emreason.reports.reading import Run
from emreason.types import UserError, plain


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """Print the comparison over seeds, the runs one by one, and what did not count."""
    comparison = compare(runs)
    shown = [run for run in runs if run.known]
    places = [[run for run in shown if (run.dataset, run.model) == place] for place in dict.fromkeys((r.dataset, r.model) for r in shown)]
    for here in places:
        listed = tables.runs_table(here)
        for table in [listed] if forms.unbroken(listed) <= console.width else tables.halves(listed):
            console.print(forms.rich_table(table, console.width))
    if shown:
        console.print(forms.rich_table(tables.paper_table(comparison), console.width))
        console.print(Text(tables.caption(), style="dim"))
    for here in places:
        if (told := tables.diagnostics_table(here)).rows:
            console.print(forms.rich_table(told, console.width))
    for note in comparison.notes:
        console.print(Text(plain(note), style="yellow"))


def write_report(runs: Sequence[Run], out_dir: str | Path, refresh: float | None = None) -> list[Path]:
    """Write tables, figures and `report.html` into `out_dir` (made if absent) and return the files written.

    `refresh`: the page is read again after so many seconds. Raises UserError where the folder cannot be written.
    """
    out = Path(out_dir)
    comparison = compare(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        texts = _tables(runs, comparison)
        colours = palette(runs)
        drawn = [*draw_all(runs, comparison, out / "figures"), *draw_collapse(runs, colours, out / "figures")]
        drawn += draw_panels(runs, comparison, out / "figures")
        texts["report.html"] = render(runs, comparison, drawn, colours, refresh)
        for name, text in texts.items():
            # A lone surrogate in a sampled text is no reason to lose the report.
            (out / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"The report cannot be written to {out}: {error.strerror or error}.") from error
    return [*(out / name for name in texts), *(file for figure in drawn for file in figure.files)]


def _tables(runs: Sequence[Run], comparison: Comparison) -> dict[str, str]:
    paper, pairs = tables.paper_table(comparison), tables.pairs_table(comparison)
    shown = [run for run in runs if run.known]
    listed, told = tables.runs_table(shown), tables.diagnostics_table(shown)
    notes = "".join(f"- {forms.escape_markdown(note)}\n" for note in comparison.notes)
    sections = [
        f"## {paper.title}\n\n{forms.markdown(paper)}\n{tables.caption()}\n",
        f"## Notes\n\n{notes}" if notes else "",
        f"## {pairs.title}\n\n{forms.markdown(pairs)}" if pairs.rows else "",
        f"## {listed.title}\n\n{forms.markdown(listed)}",
        f"## {told.title}\n\n{forms.markdown(told)}" if told.rows else "",
    ]
    records = comparison_records(comparison) | {"runs": [record for run in runs for record in _run_records(run)]}
    # numbers in full precision; None is an empty field
    csv = {name: DataFrame(rows, dtype=object).to_csv(index=False) for name, rows in records.items()}
    return {
        "table.md": "\n".join(section for section in sections if section),
        "table.csv": csv["schemes"],
        "table.tex": forms.latex(paper, tables.caption(), comparison.notes),
        "pairs.csv": csv["pairs"],
        "runs.csv": csv["runs"],
    }


def comparison_records(comparison: Comparison) -> dict[str, list[dict[str, object]]]:
    """Its rows as flat records: `schemes` with means and intervals, `pairs` with Holm's p."""
    names = ("dataset", "model", "first", "second")
    pairs = [{n: getattr(p, n) for n in names} | asdict(p.difference) | {"p_holm": p.p_holm, "test": p.test} for p in comparison.pairs]
    return {"schemes": [asdict(cell) for cell in comparison.cells], "pairs": pairs}


def _run_records(run: Run) -> list[dict[str, object]]:
    """A run as flat CSV records, one per iteration (one in all where none is done), the run's own numbers repeated on each."""
    shared: dict[str, object] = {"folder": run.place, "dataset": run.dataset, "model": run.model, "scheme": run.label, "seed": run.seed}
    shared |= {"status": run.status, "problem": run.problem}
    scores = {"zero_shot": run.zero_shot, "few_shot": run.few_shot, "validation_before": run.start, "test": run.test}
    shared |= {name: score.accuracy if score else None for name, score in scores.items()}
    tested = {"low": "low", "high": "high", "forced": "forced_accuracy", "extraction_rate": "extraction_rate", "n": "n"}
    shared |= {f"test_{name}": getattr(run.test, attribute, None) for name, attribute in tested.items()}
    shared |= {"tested_iteration": run.tested, "run_seconds": run.seconds, "peak_memory_bytes": run.peak_memory_bytes}
    columns = {"iteration": "index", "acceptance": "acceptance", "chance_acceptance": "chance"}
    columns |= {name: name for name in ("tokens", "seconds", "rationale_tokens", "errored")}
    rows: list[dict[str, object]] = [
        {name: getattr(i, attribute) for name, attribute in columns.items()}
        | {"validation": i.validation.accuracy if i.validation else None}
        for i in run.iterations
    ]
    return [shared | row for row in rows or [dict.fromkeys([*columns, "validation"])]]

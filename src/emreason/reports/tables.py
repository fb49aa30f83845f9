"""What the report's tables say: accuracies, pairs, runs, diagnostics; `forms.py` gives them their form."""

from __future__ import annotations

from collections.abc import Sequence

from emreason.reports.comparison import SIGNIFICANT, Cell, Comparison
from emreason.reports.forms import DAGGER, Entry, Table
from emreason.reports.reading import Iteration, Run, Score


def paper_table(comparison: Comparison) -> Table:
    """Scheme × model × dataset: test accuracy in %, mean ± half of the 95 % interval over seeds, number of seeds in brackets."""
    datasets = sorted({cell.dataset for cell in comparison.cells})
    models = sorted({cell.model for cell in comparison.cells})
    rows: list[list[Entry]] = []
    rules: list[int] = []
    for model in models:
        here = [cell for cell in comparison.cells if cell.model == model]
        rules.append(len(rows))
        schemes = dict.fromkeys(cell.scheme for cell in sorted(here, key=lambda cell: not cell.baseline))
        for n, scheme in enumerate(schemes):
            by_dataset = {cell.dataset: cell for cell in here if cell.scheme == scheme}
            entries = [_accuracy(by_dataset.get(dataset)) for dataset in datasets]
            rows.append([Entry(model if n == 0 else ""), Entry(scheme), *entries])
    return Table("Test accuracy (%)", ["model", "scheme", *datasets], rows, tuple(range(2, 2 + len(datasets))), tuple(rules[1:]))


def _accuracy(cell: Cell | None) -> Entry:
    if cell is None or cell.accuracy is None or cell.low is None or cell.high is None:
        return Entry("—")
    if cell.interval == "wilson":
        spread = f" [{percent(cell.low)}, {percent(cell.high)}]"
    else:
        spread = f" ± {percent(cell.high - cell.accuracy)}"
    worse = DAGGER if cell.p_vs_best is not None and cell.p_vs_best < SIGNIFICANT else ""
    return Entry(f"{percent(cell.accuracy)}{spread} ({cell.seeds}){worse}", cell.best)


def caption() -> str:
    """What the marks of the paper's table mean."""
    return (
        "Mean ± 95 % t-interval over seeds, number of seeds in brackets; [low, high]: 95 % Wilson interval over questions, where "
        "there is one seed or the seeds share the base model; bold: best of its column, where every scheme has several seeds; "
        f"{DAGGER}: differs from the best, paired test on the same questions, Holm-corrected p < {SIGNIFICANT}."
    )


def pairs_table(comparison: Comparison) -> Table:
    """Every pair compared: difference in percentage points with its 95 % interval, raw and Holm-corrected p-values."""
    rows = []
    for p in comparison.pairs:
        d = p.difference
        apart = f"{_points(d.estimate)} [{_points(d.low)}, {_points(d.high)}]"
        texts = [p.dataset, p.model, f"{p.first} − {p.second}", apart, _p(d.p), _p(p.p_holm), str(d.seeds), str(d.questions), p.test]
        rows.append([Entry(text, n == 5 and p.p_holm < SIGNIFICANT) for n, text in enumerate(texts)])
    columns = ["dataset", "model", "pair", "difference (points)", "p", "p (Holm)", "seeds", "questions", "test"]
    title = "Paired comparisons (bootstrap over questions and seeds and t-test over seeds, the larger p; one seed: exact McNemar)"
    return Table(title, columns, rows, (3, 4, 5, 6, 7))


def runs_table(runs: Sequence[Run]) -> Table:
    """One row per run, finished or not: baselines, accuracy per iteration, test of the iteration with a `*`, acceptance, cost.

    Accuracies in %, acceptance beside chance.
    """
    several = len({(run.dataset, run.model) for run in runs}) > 1
    columns = [*RUN_COLUMNS[:2], *(["dataset", "model"] if several else []), *RUN_COLUMNS[2:]]
    texts = [_run_row(run, [run.dataset, run.model] if several else []) for run in runs]
    filled = [i for i, name in enumerate(columns) if name not in OPTIONAL or any(row[i] != "—" for row in texts)]
    columns, rows = [columns[i] for i in filled], [[Entry(row[i]) for i in filled] for row in texts]
    of = [(run.dataset, run.model, run.label) for run in runs]
    rules = [n for n in range(1, len(runs)) if of[n] != of[n - 1]]
    numeric = [columns.index(name) for name in ("seed", *OPTIONAL, "tokens generated", "time") if name in columns]
    place = "" if several or not runs else f": {runs[0].dataset}, {runs[0].model}"
    return Table(f"Runs{place} (accuracies and acceptance in %)", columns, rows, tuple(numeric), tuple(rules))


RUN_COLUMNS = [
    "scheme",
    "seed",
    "zero-shot",
    "few-shot",
    "validation per iteration (*: tested)",
    "test [95%-CI]",
    "forced test",
    "accepted per iteration (chance)",
    "rationale tokens",
    "tokens generated",
    "time",
]
OPTIONAL = ("zero-shot", "few-shot", "forced test")  # no column where no run has it


DIAGNOSTICS = {
    **{"e_step/trivial_rate": "trivial", "e_step/answer_first_rate": "answer first", "e_step/hint_mention_rate": "mentions hint"},
    **{"e_step/distinct_rate": "distinct", "e_step/faithful_rate": "faithful", "e_step/move_rate": "chain moves"},
    **{"validation/kl_per_token": "KL per token", "validation/log_marginal": "log π(y*|x)"},
}
"""What an iteration has measured, by the name that loggers get, and the column that says it."""


def diagnostics_table(runs: Sequence[Run]) -> Table:
    """One row per scheme: what its accepted rationales of the last iteration look like, and the model after it; means over finished runs.

    Shares in %. No column for what no run has measured, no rows where no run has any of it.
    """
    groups: dict[tuple[str, str, str], list[Iteration]] = {}
    for run in runs:
        if run.problem is None and run.iterations and DIAGNOSTICS.keys() & run.iterations[-1].numbers:
            groups.setdefault((run.dataset, run.model, run.label), []).append(run.iterations[-1])
    several = len({key[:2] for key in groups}) > 1
    measured = [key for key in DIAGNOSTICS if any(key in i.numbers for last in groups.values() for i in last)]
    rows = []
    for (dataset, model, label), last in groups.items():
        row = [*((dataset, model) if several else ()), label, str(len(last))]
        for key in measured:
            values = [i.numbers[key] for i in last if key in i.numbers]
            average = sum(values) / len(values) if values else None
            row.append(percent(average) if key.endswith("_rate") or average is None else f"{average:.3f}".replace("-", "−"))
        rows.append([Entry(text) for text in row])
    names = [DIAGNOSTICS[key] for key in measured]
    columns = [*(["dataset", "model"] if several else []), "scheme", "runs", *names]
    where = "" if several or not groups else ": {}, {}".format(*next(iter(groups)))
    title = f"Accepted rationales of the last iteration (%), and the model after it (nats){where}"
    return Table(title, columns, rows, tuple(range(len(columns) - len(names) - 1, len(columns))))


def halves(table: Table) -> list[Table]:
    """The runs' table in two for narrow terminals: accuracies, then the E-step and its cost."""
    cut = table.columns.index("accepted per iteration (chance)")
    lead = next(i for i, name in enumerate(table.columns) if name in RUN_COLUMNS[2:])
    parts = []
    for title, kept in ((table.title, range(cut)), ("", [*range(lead), *range(cut, len(table.columns))])):
        rows = [[row[i] for i in kept] for row in table.rows]
        numeric = tuple(n for n, i in enumerate(kept) if i in table.numeric)
        parts.append(Table(title, [table.columns[i] for i in kept], rows, numeric, table.rules))
    return parts


def _run_row(run: Run, where: Sequence[str]) -> list[str]:
    status = "" if run.status == "finished" and run.test else f" ({run.status})"
    curve = " ".join(_short(i.validation.accuracy if i.validation else None) + "*" * (i.index == run.tested) for i in run.iterations)
    return [
        run.label + status,
        str(run.seed),
        *where,
        _score(run.zero_shot),
        _score(run.few_shot),
        (f"{_short(run.start.accuracy)} → {curve}" if run.start and curve else curve) or "—",
        f"{_score(run.test)} [{_short(run.test.low)}, {_short(run.test.high)}]" if run.test else "—",
        percent(run.test.forced_accuracy) if run.test else "—",
        _accepted(run.iterations),
        " ".join(f"{i.rationale_tokens:.0f}" if i.rationale_tokens is not None else "—" for i in run.iterations) or "—",
        thousands(sum(i.tokens for i in run.iterations)),
        duration(run.seconds),
    ]


def _accepted(iterations: Sequence[Iteration]) -> str:
    if not iterations:
        return "—"
    chances = [_short(i.chance) for i in iterations]
    shown = " ".join(_short(i.acceptance) for i in iterations)
    return f"{shown} ({chances[0] if len(set(chances)) == 1 else ' '.join(chances)})"


def _score(score: Score | None) -> str:
    return percent(score.accuracy) if score else "—"


def _short(value: float | None) -> str:
    """Percent for a list of numbers: two digits are what a few hundred questions can tell apart."""
    return "—" if value is None else f"{100 * value:.0f}" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}"


def percent(value: float | None) -> str:
    """A share in [0, 1] as percent with one decimal, without the sign; — for None."""
    return "—" if value is None else f"{100 * value:.1f}"


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def thousands(count: float) -> str:
    """A count for people: 812, 41.2k, 3.1M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= 0.99995 * size:  # 999,960 is 1.0M
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds for people: 95 s, 12 min, 2 h 10 min; — for None."""
    if seconds is None:
        return "—"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

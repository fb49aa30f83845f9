"""The figure of a collapse: which run folders it is drawn for, and what it shows of them."""

from __future__ import annotations

import json
import math
import warnings

import pytest
from test_report import EVIL, write_run

from emreason.reports import collapse, figures
from emreason.reports.collapse import BARE, bare, collapsed, draw_collapse
from emreason.reports.reading import collect
from emreason.reports.writing import write_report

HINTED = "  proposals:\n    rationalization: 1\n"


def with_iterations(folder, change):
    """The run's summary with `change(number, iteration)` made to each of its iterations."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    for number, iteration in enumerate(summary["iterations"]):
        change(number, iteration)
    path.write_text(json.dumps(summary))
    return folder


def write_sick(folder, **more):
    """A run that ends in bare answers: 0, 30, 60 and 90 % of what is accepted."""
    write_run(folder, "pps", text="It is so.\nAnswer: 15", **more)
    with_iterations(folder, lambda n, i: i["e_step"].update(trivial_rate=0.2 * n, answer_first_rate=0.1 * n))
    for n in range(2, more.get("iterations", 4)):
        path = folder / f"rationales/iteration={n:03d}.jsonl"
        rows = [json.loads(line) | {"text": "Answer: 15", "logprob": -0.5 * n} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What is saved, by name, without a file."""
    found = {}
    monkeypatch.setattr(collapse, "save", lambda figure, _, name, *rest: found.update({name: figure}) or figures.Drawn(name, rest[0], ()))
    return found


def texts(figure):
    return [text for part in figure.subfigs for ax in part.axes for text in ax.texts]


def test_it_shows_acceptance_beside_learning_and_what_the_rationales_became(tmp_path, drawn):
    for path in (write_run(tmp_path / "rs", "rs") / "rationales").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | ({"logprob": -99.0} if row["attempt"] > 1 else {})) + "\n" for row in rows))
    write_sick(tmp_path / "pps")
    runs = collect([tmp_path])
    assert {run.scheme: collapsed(run) for run in runs} == {"RS-4": 0.0, "PPS": pytest.approx(0.9)}
    assert [bare(i) for i in runs[-1].iterations] == pytest.approx([0, 0.3, 0.6, 0.9])
    (only,) = draw_collapse(runs, figures.palette(runs), tmp_path)
    figure = drawn[only.name]
    above, below = figure.subfigs
    panels = {ax.get_title(): ax for ax in above.axes}
    assert list(panels) == [
        "accepted in the E-step (%)",
        "solved without a hint (%)",
        "bare answers of the accepted (%)",
        "entropy of a draw (nats)",
    ]  # fmt: skip  (no run has log π(y*|x))
    by_colour = {line.get_color(): line for line in panels["entropy of a draw (nats)"].lines}
    assert list(by_colour[figures.USUAL["PPS"][0]].get_ydata()) == [9.5, 9.5, 1.0, 1.5]
    assert list(by_colour[figures.USUAL["RS-4"][0]].get_ydata()) == [9.5] * 4
    (line,) = panels["bare answers of the accepted (%)"].lines[-1:]
    assert list(line.get_ydata()) == pytest.approx([0, 30, 60, 90])
    titles = [ax.get_title(loc="left") for ax in below.axes]
    assert [t.split(",")[0] for t in titles] == ["PPS", "RS-4"]  # the sick one first
    said = [text.get_text() for text in below.axes[0].texts]
    red = [text.get_text() for text in below.axes[0].texts if text.get_color() == collapse.RED]
    assert said[0::2] == ["0", "1", "2", "3"]
    assert set(red) == {"Answer: 15"}
    assert len(red) == 2
    assert "It is so. ↵ Answer: 15" in said


def test_log_likelihood_is_shown_where_it_was_measured(tmp_path, drawn):
    with_iterations(write_sick(tmp_path / "pps"), lambda n, i: i["validation"].update(log_marginal=-1.0 - n))
    runs = collect([tmp_path])
    draw_collapse(runs, figures.palette(runs), tmp_path)
    ax = drawn["collapse"].subfigs[0].axes[-1]
    assert ax.get_title() == "log π(y*|x) (nats)"
    assert list(ax.lines[0].get_ydata()) == [-1, -2, -3, -4]


@pytest.mark.usefixtures("drawn")
def test_it_is_drawn_where_hints_are_accepted_and_nothing_is_learned(tmp_path):
    def gap(_, iteration):
        iteration["e_step"]["acceptance_rate"] = 0.9
        iteration["validation"]["accuracy"] = 0.3

    with_iterations(write_run(tmp_path / "rs", "rs"), gap)  # many tries on hard questions: no collapse
    runs = collect([tmp_path])
    assert draw_collapse(runs, figures.palette(runs), tmp_path) == []
    with_iterations(write_run(tmp_path / "pps", "pps", config=""), gap)
    path = tmp_path / "pps/config.yaml"
    path.write_text(path.read_text().replace("  budget: 1\n", f"  budget: 1\n{HINTED}"))
    runs = collect([tmp_path])
    assert collapsed(runs[-1]) == pytest.approx(0.9 - 0.3 - 0.5 + BARE)
    assert [d.name for d in draw_collapse(runs, figures.palette(runs), tmp_path)] == ["collapse"]


def test_a_healthy_report_has_no_such_figure_and_a_sick_one_has_it_whole(tmp_path):
    """Also with texts from a model that want to be markup, control a terminal, or have characters that no font has."""
    write_run(tmp_path / "runs/rs", "rs")
    write_report(collect([tmp_path / "runs"]), tmp_path / "healthy")
    assert not list((tmp_path / "healthy/figures").glob("collapse*"))
    write_sick(tmp_path / "runs/pps", questions=3)
    path = tmp_path / "runs/pps/rationales/iteration=000.jsonl"
    rows = [
        json.loads(line) | {"text": f"{EVIL}\x1b[31m 然后 \ud800 $x_1$ {'long ' * 99}", "question": "$\\frac{1$ 然后?"}
        for line in path.open()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"question_id": "torn')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(collect([tmp_path / "runs"]), tmp_path / "sick")
    assert (tmp_path / "sick/figures/collapse.png").stat().st_size > 20_000
    assert "collapse" in (tmp_path / "sick/report.html").read_text()


def test_questions_that_could_not_be_run_have_no_entropy(tmp_path):
    folder = write_run(tmp_path / "a", iterations=1)
    rows = [{"iteration": 0, "attempt": 1, "logprob": -10.0, "finish_reason": end} for end in ("stop", "error")]
    (folder / "rationales/iteration=000.jsonl").write_text(
        "".join(json.dumps(row | {"logprob": -10.0 if row["finish_reason"] == "stop" else 0.0}) + "\n" for row in rows)
    )
    (run,) = collect([tmp_path])
    assert collapse._entropies(run) == {0: 10.0}


def test_runs_without_journals_or_measures(tmp_path, drawn):
    write_sick(tmp_path / "pps", iterations=1)
    with_iterations(tmp_path / "pps", lambda _, i: i["e_step"].update(trivial_rate=0.5))
    for path in (tmp_path / "pps/rationales").iterdir():
        path.unlink()
    runs = collect([tmp_path])
    (only,) = draw_collapse(runs, figures.palette(runs), tmp_path)
    assert [t.get_text() for t in texts(drawn[only.name])] == ["0", "(none accepted)"]
    assert not math.isnan(collapsed(runs[0]))

"""The report over run folders in every state they are left in. Run folders are written by `write_run`, not by training."""

import base64
import csv
import io
import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from emreason.report import _common_parent, main
from emreason.reports.comparison import compare
from emreason.reports.difficulty import acceptance_by_difficulty
from emreason.reports.figures import palette
from emreason.reports.forms import Entry, Table, escape_latex, escape_markdown, rich_table
from emreason.reports.pages.page import IN_ALL, PER_GROUP, sample_rationales
from emreason.reports.reading import collect, differing_keys
from emreason.reports.tables import DIAGNOSTICS, caption, diagnostics_table, duration, halves, runs_table, thousands
from emreason.reports.writing import print_runs, write_report
from emreason.scores import stats
from emreason.tracking.workspace import SECTIONS
from emreason.types import UserError

PROPOSALS = {"rs": ["question"] * 4, "star": ["question", "rationalization"], "pps": ["rationalization"]}
NAMES = {"rs": "RS-4", "star": "STaR", "pps": "PPS"}
FINAL = {"rs": 0.92, "star": 0.90, "pps": 0.50}
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> [bold]x[/bold] a|b $x$ `c`\nAnswer: 7"


def score(accuracy: float, n: int = 100) -> dict:
    low, high = stats.wilson(round(accuracy * n), n)
    return {
        "accuracy": round(accuracy * n) / n,
        "forced_accuracy": min(1.0, accuracy + 0.02),
        "n": n,
        "ci95": [low, high],
        "extraction_rate": 0.97,
        "rationale_tokens_mean": 21.5,
        "seconds": 3.0,
    }


def write_run(
    folder: Path,
    sampler: str = "rs",
    seed: int = 1,
    iterations: int = 4,
    status: str = "finished",
    text: str = "4 + 9 = 13, and 13 + 2 = 15.\nAnswer: 15",
    questions: int = 40,
    predictions: bool = True,
    config: str = "",
    reward: str = "emreason.schemes.rewards.correct",
    **keys: object,
) -> Path:
    """A run folder as train() leaves it: a learning curve towards `FINAL`, harder questions accepted later."""
    draw = random.Random(f"{sampler}{seed}")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"seed: {seed}\nsampler:\n  name: {sampler}\n  budget: {len(PROPOSALS[sampler])}\n  reward: {reward}\n"
        f"logger:\n  csv:\n    save_dir: {folder}\noptimizer:\n  lr: 1e-4\n{config}"
    )
    (folder / ".hydra").mkdir()
    rows, final = [], FINAL[sampler]
    (folder / "rationales").mkdir()
    for k in range(iterations):
        skill = final * (1 - 0.55 ** (k + 1)) + draw.uniform(-0.03, 0.03)
        accepted = attempts = 0
        with (folder / f"rationales/iteration={k:03d}.jsonl").open("w") as lines:
            for q in range(questions):
                for attempt, proposal in enumerate(PROPOSALS[sampler], 1):
                    chance = min(1.0, skill * 1.6 * (1 - q / questions)) if proposal == "question" else 0.6
                    ok = draw.random() < chance
                    row = {"question_id": f"q{q}", "iteration": k, "attempt": attempt, "proposal": proposal, "text": text, "answer": "15"}
                    row |= {"accepted": ok, "n_tokens": 20, "finish_reason": "answer", "logprob": -9.5, "token_ids": [1, 2], "gold": "15"}
                    lines.write(json.dumps(row | {"question": "4 + 9 + 2 = ?"}) + "\n")
                    attempts += 1
                    if ok:
                        accepted += 1
                        break
        e_step = {
            "questions": questions,
            "accepted": accepted,
            "attempts": attempts,
            "acceptance_rate": accepted / questions,
            "seconds": 14.0,
        }
        e_step |= {
            "chance_acceptance": 0.02 * len(PROPOSALS[sampler]),
            "tokens": 22 * attempts,
            "rationale_tokens_mean": 24.0 - k + draw.random(),
        }
        m_step = {"nll": 0.5, "steps": 12, "tokens": 900, "seconds": 8.0}
        rows.append({"iteration": k, "e_step": e_step, "m_step": m_step, "validation": score(skill)})
    if predictions and status == "finished":
        (folder / "predictions").mkdir()
        right = set(draw.sample(range(100), round(final * 100) - seed))
        lines = [
            {"question_id": f"t{q}", "gold": "15", "answer": "15", "correct": q in right, "forced_correct": q in right} for q in range(100)
        ]
        (folder / "predictions/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = [line | {"correct": n < 8} for n, line in enumerate(lines)]
        (folder / "predictions/baseline_few_shot_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"dataset": "sums", "model": "smollm2_135m", "sampler": sampler, "scheme": NAMES[sampler], "seed": seed, "status": status}
    summary |= {
        "baseline": {"zero_shot": score(0.0), "few_shot": score(0.08), "validation": score(0.01)},
        "iterations": rows,
        "seconds": 95.0,
    }
    summary |= {
        "test": score(final - seed / 100) if status == "finished" else None,
        "peak_memory_bytes": 2**31,
        "versions": {},
        "git_commit": "abc",
    }
    (folder / "summary.json").write_text(json.dumps(summary | keys))
    return folder


@pytest.fixture(autouse=True)
def without_the_panels(request, monkeypatch):
    """The figure of everything takes a second; two tests look at it."""
    if request.function not in (test_everything_that_is_logged_is_drawn, test_the_command_writes_tables_figures_and_page):
        monkeypatch.setattr("emreason.reports.writing.draw_panels", lambda *_: [])


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three schemes × three seeds, all finished."""
    for sampler in NAMES:
        for seed in (1, 2, 3):
            write_run(tmp_path / "outputs" / sampler / f"seed={seed}", sampler, seed)
    return tmp_path / "outputs"


def printed(runs, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_runs(runs, console)
    return console.file.getvalue()


def test_no_word_is_broken_at_eighty_columns(tmp_path):
    for dataset in ("ai2_arc_words", "openbookqa", "sums"):
        for seed in (1, 2):
            write_run(tmp_path / dataset / str(seed), "star", seed, iterations=9, dataset=dataset)
    lines = printed(collect([tmp_path]), 80).splitlines()
    words = {word for line in lines for word in line.split()}
    assert {"STaR", "smollm2_135m", "baseline", "ai2_arc_words", "openbookqa"} <= words
    assert max(map(len, lines)) <= 80
    assert any(line.count("STaR") and line.count("±") == 3 for line in lines)


NAME = st.text("abcde_", min_size=1, max_size=14)


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(NAME, max_size=3).map(" ".join), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(24, 90))
def test_a_table_fits_its_terminal_and_loses_no_letter(texts, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(Table("", texts[0], [[Entry(text) for text in row] for row in texts]), width))
    printed = console.file.getvalue().replace("─", "")
    told = " ".join(" ".join(row) for row in [texts[0], *texts])
    assert max(map(len, printed.splitlines())) <= width
    assert Counter("".join(printed.split())) == Counter("".join(told.split()))
    longest = [max((len(word) for row in texts for word in row[i].split()), default=1) for i in range(3)]
    if sum(longest) + 3 * 2 <= width:
        assert Counter(printed.split()) == Counter(told.split())


def test_no_column_for_what_no_run_has_measured(tmp_path):
    write_run(tmp_path / "run", "star", 1)
    run = collect([tmp_path])[0]
    bare = replace(run, few_shot=None, test=replace(run.test, forced_accuracy=None))
    assert {"few-shot", "forced test"} <= set(runs_table([run, bare]).columns)
    assert not {"few-shot", "forced test"} & set(runs_table([bare]).columns)
    assert [part.columns[:2] for part in halves(runs_table([bare]))] == [["scheme", "seed"]] * 2


def test_the_command_writes_tables_figures_and_page(grid, capsys):
    main([str(grid)])
    out = grid / "report"
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    figures = [
        "accuracy_per_iteration",
        "accuracy_per_token",
        "accuracy_per_second",
        "acceptance",
        "rationale_length",
        "acceptance_by_difficulty",
    ]
    assert names == {"table.md", "table.csv", "table.tex", "pairs.csv", "runs.csv", "report.html"} | {
        *(f"figures/{name}.{kind}" for name in figures for kind in ("png", "pdf")),
        "figures/everything_1.png",
    }
    assert str(out / "report.html") in capsys.readouterr().out


def test_where_all_are_equal_none_is_the_best(tmp_path):
    for sampler in NAMES:
        write_run(tmp_path / sampler, sampler, test=score(0.0), baseline={"zero_shot": score(0.0)})
    cells = compare(collect([tmp_path])).cells
    assert len(cells) == len(NAMES) + 1
    assert not any(cell.best or cell.p_vs_best for cell in cells)


def test_mean_interval_bold_and_significance(grid):
    comparison = compare(collect([grid]))
    cells = {cell.scheme: cell for cell in comparison.cells}
    mean, half = stats.mean_interval([0.91, 0.90, 0.89])
    assert (cells["RS-4"].accuracy, cells["RS-4"].high) == pytest.approx((mean, mean + half))
    assert [s for s, cell in cells.items() if cell.best] == ["RS-4"]
    assert cells["few-shot baseline"].accuracy == 0.08
    assert cells["few-shot baseline"].seeds == 3  # nine runs, three seeds, but one base model: no spread to speak of
    assert cells["few-shot baseline"].interval == "wilson"
    assert cells["PPS"].p_vs_best < 0.01
    assert cells["STaR"].p_vs_best > 0.05
    assert cells["few-shot baseline"].p_vs_best < 0.01
    assert cells["zero-shot baseline"].p_vs_best is None  # not tested
    assert {(p.first, p.second) for p in comparison.pairs} == {("RS-4", "STaR"), ("RS-4", "PPS"), ("STaR", "PPS")} | {
        (scheme, "few-shot baseline") for scheme in ("RS-4", "STaR", "PPS")
    }
    assert {pair.test for pair in comparison.pairs} == {"paired bootstrap, t"}
    assert comparison.notes == []
    main([str(grid), "--out", str(grid / "r")])
    table = (grid / "r/table.md").read_text()
    assert "**90.0 ± 2.5 (3)**" in table
    assert "48.0 ± 2.5 (3)†" in table
    rows = list(csv.DictReader((grid / "r/table.csv").open()))
    assert [(r["scheme"], r["seeds"]) for r in rows] == [
        (s, "3") for s in ("zero-shot baseline", "few-shot baseline", "RS-4", "STaR", "PPS")
    ]


def test_one_seed_compares_models_with_their_baseline_and_not_schemes(tmp_path):
    runs = collect([write_run(tmp_path / s, s) for s in NAMES])
    comparison = compare(runs)
    cell = next(cell for cell in comparison.cells if cell.scheme == "PPS")
    assert (cell.low, cell.high) == pytest.approx(stats.wilson(49, 100))
    assert cell.interval == "wilson"
    assert [(p.first, p.second, p.test) for p in comparison.pairs] == [(s, "few-shot baseline", "exact McNemar") for s in NAMES.values()]
    raw = [pair.difference.p for pair in comparison.pairs]
    assert [pair.p_holm for pair in comparison.pairs] == pytest.approx(stats.holm(raw), abs=0)
    assert not any(cell.best or cell.p_vs_best for cell in comparison.cells)
    (note,) = comparison.notes
    assert note.startswith("One seed of RS-4, STaR, PPS on sums with smollm2_135m: it compares trained models, not schemes")
    write_report(runs, tmp_path / "r")
    table = (tmp_path / "r/table.md").read_text()
    first = table[: table.index("Paired comparisons")]
    assert "†" not in first.replace(caption(), "")
    assert "**" not in first.replace(caption(), "").split("|", 1)[1]
    assert "compares trained models, not schemes" in table
    assert "compares trained models, not schemes" in printed(runs)


def test_a_scheme_with_one_seed_beside_others_with_more_takes_the_bold_away(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"rs{seed}", "rs", seed)
    write_run(tmp_path / "pps1", "pps", 1)
    comparison = compare(collect([tmp_path]))
    assert not any(cell.best for cell in comparison.cells)
    assert {(p.first, p.second) for p in comparison.pairs} == {("RS-4", "few-shot baseline"), ("PPS", "few-shot baseline")}
    assert any(note.startswith("One seed of PPS on sums") for note in comparison.notes)


def test_what_does_not_count_is_named_and_not_averaged(grid):
    write_run(grid / "rs/seed=4", "rs", 4, iterations=2, status="running")
    failed = {"status": "failed", "error": "no rationale was accepted in iteration 1."}
    write_run(grid / "star/seed=4", "star", 4, iterations=1, **failed, test=score(0.9))  # extended after it had been tested
    (grid / "torn").mkdir()
    (grid / "torn/summary.json").write_text('{"dataset": "sums", "mod')
    (grid / "foreign").mkdir()
    (grid / "foreign/summary.json").write_text("[1, 2]")
    killed = grid / "killed"
    (killed / ".hydra").mkdir(parents=True)
    (killed / "config.yaml").write_text("seed: 9\n")
    shutil.copytree(grid / "rs/seed=1", grid / "copy")
    runs = collect([grid])
    comparison = compare(runs)
    notes = "\n".join(comparison.notes)
    for expected in [
        "RS-4 on sums with smollm2_135m, seed 4",
        "not finished, 2 iterations done (still running, or killed)",
        "failed, 1 iteration done: no rationale was accepted in iteration 1.",
        "torn: summary.json cannot be read",
        "foreign: summary.json cannot be read",
        "killed: no summary.json",
        "seed=1 repeats",
        "Missing: PPS on sums with smollm2_135m has no run for seed 4.",
    ]:
        assert expected in notes, notes
    assert "Traceback" not in notes
    assert {cell.scheme: cell.seeds for cell in comparison.cells if not cell.baseline} == {"RS-4": 3, "STaR": 3, "PPS": 3}
    write_report(runs, grid / "r")
    for name in ("table.md", "report.html", "table.tex"):
        assert "no rationale was accepted" in (grid / "r" / name).read_text()
    assert "still running" in printed(runs)


def test_only_unfinished_runs(tmp_path):
    write_run(tmp_path / "a", iterations=0, status="running", baseline={"zero_shot": None, "few_shot": None})
    write_run(tmp_path / "b", "pps", iterations=1, status="interrupted")
    runs = collect([tmp_path])
    write_report(runs, tmp_path / "r")
    assert "0 of 2 run folders counted" in (tmp_path / "r/report.html").read_text()
    assert "interrupted, 1 iteration done" in printed(runs)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/summary.json").write_text("")
    only_torn = collect([tmp_path / "c"])
    write_report(only_torn, tmp_path / "r2")
    assert "cannot be read" in (tmp_path / "r2/table.md").read_text()


def test_nulls_and_absent_parts(tmp_path):
    folder = write_run(tmp_path / "a", predictions=False)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["scheme"]
    summary["baseline"] = {"zero_shot": summary["baseline"]["zero_shot"], "few_shot": None}
    for row in summary["iterations"]:
        row["validation"] = None
        row["e_step"] |= {"chance_acceptance": None, "rationale_tokens_mean": None, "errored": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    shutil.rmtree(folder / "rationales")
    (folder / "config.yaml").unlink()
    runs = collect([folder / "summary.json"])
    assert runs[0].label == "rs"
    assert write_report(runs, tmp_path / "r")
    assert printed(runs)


def test_a_diagnostic_stands_under_its_name(tmp_path):
    folder = write_run(tmp_path / "a")
    summary = json.loads((folder / "summary.json").read_text())
    for i, name in enumerate(DIAGNOSTICS):
        part, key = name.split("/")
        summary["iterations"][-1][part][key] = (i + 1) / 100
    (folder / "summary.json").write_text(json.dumps(summary))
    table = diagnostics_table(collect([folder]))
    shown = dict(zip(table.columns, (entry.text for entry in table.rows[0]), strict=True))
    assert shown == {
        **{"scheme": "RS-4", "runs": "1", "trivial": "1.0", "answer first": "2.0", "mentions hint": "3.0", "distinct": "4.0"},
        **{"faithful": "5.0", "chain moves": "6.0", "KL per token": "0.070", "log π(y*|x)": "0.080"},
    }
    write_run(tmp_path / "b")  # without a chain, a bound or a probe
    assert diagnostics_table(collect([tmp_path])).columns == table.columns
    assert not {"faithful", "chain moves", "log π(y*|x)"} & {*diagnostics_table(collect([tmp_path / "b"])).columns}


def test_accuracy_out_of_range_is_named(tmp_path):
    write_run(tmp_path / "a", test={"accuracy": 91, "n": 100})
    assert "accuracy 91.0 is not in [0, 1]" in collect([tmp_path])[0].problem


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "path", ["seed", "status", "baseline", "test", "test.n", "test.ci95", "iterations", "iterations.0", "iterations.0.e_step.tokens"]
)
def test_a_spoilt_summary_is_at_worst_named(tmp_path, path, value):
    folder = write_run(tmp_path / "a", iterations=1, questions=2)
    summary = json.loads((folder / "summary.json").read_text())
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = summary
    for key in way:
        inner = inner[key]
    inner[last] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "RS-4" in printed(runs := collect([tmp_path])) or runs[0].problem.startswith("summary.json cannot be read")


def test_different_configs_are_not_averaged_as_seeds(tmp_path):
    write_run(tmp_path / "a/seed=1", seed=1)
    write_run(tmp_path / "a/seed=2", seed=2)
    write_run(tmp_path / "b/seed=1", seed=1, config="tag: hot\n")
    runs = collect([tmp_path])
    assert {run.label for run in runs} == {"RS-4 · tag=—", "RS-4 · tag=hot"}
    assert {cell.scheme: cell.seeds for cell in compare(runs).cells if not cell.baseline} == {"RS-4 · tag=—": 2, "RS-4 · tag=hot": 1}
    assert list(differing_keys(runs)) == ["tag"]  # seeds and folders explain nothing
    write_run(tmp_path / "d/seed=1", seed=1, config="tag: hot\nm_step: {batch_size: 4}\n")
    assert {run.label for run in collect([tmp_path / "a", tmp_path / "d"])} == {"RS-4 · m_step.batch_size=—", "RS-4 · m_step.batch_size=4"}
    assert len({run.label for run in collect([tmp_path / "b", tmp_path / "d"])}) == 2
    assert len({run.label for run in collect([tmp_path])}) == 3  # the tag alone tells a from b
    shutil.rmtree(tmp_path / "d")
    write_run(tmp_path / "c/seed=1", seed=1, config="trainer:\n  a_long_key_that_nobody_reads: with a long value\n")
    runs = collect(str(tmp_path))
    assert {run.label for run in runs} == {"RS-4 · config 1", "RS-4 · config 2", "RS-4 · config 3"}
    note = "RS-4 · config 1 on sums with smollm2_135m: tag=hot, trainer.a_long_key_that_nobody_reads=—."
    assert [each for each in compare(runs).notes if "config 1 on" in each and "tag" in each] == [note]


def test_a_numbered_config_is_the_same_on_every_dataset(tmp_path):
    """Tables join rows by the label: two learning rates must not share one."""
    long = "trainer: {{a_key_with_a_long_name: {}, another_key_with_a_long_name: {}}}\n"
    for dataset, values in [("a", [(1, 5), (2, 6)]), ("b", [(2, 6), (3, 7)])]:
        for n, value in enumerate(values):
            write_run(tmp_path / dataset / str(n), config=long.format(*value), dataset=dataset, predictions=False)
    labels = {(run.dataset, run.variant): run.label for run in collect([tmp_path])}
    assert len(labels) == 4
    by_label: dict[str, set[str]] = {}
    for (_, variant), label in labels.items():
        by_label.setdefault(label, set()).add(variant)
    assert all(len(variants) == 1 for variants in by_label.values())
    assert len(by_label) == 3


def test_a_mean_is_of_points_that_all_seeds_have():
    """One seed was not measured after the second iteration: its third is not averaged with another's second."""
    from matplotlib.figure import Figure

    from emreason.reports.figures import Curve, _draw_scheme

    ax = Figure().add_subplot()
    _draw_scheme(
        ax, [Curve([0.0, 2.0], [1.0, 3.0], True, [0, 2]), Curve([0.0, 1.0, 2.0], [2.0, 9.0, 4.0], True, [0, 1, 2])], "red", "o", 1.0
    )
    assert [line.tolist() for line in ax.lines[-1].get_data()] == [[0.0, 2.0], [1.5, 3.5]]


def test_a_high_legend_makes_its_figure_higher(tmp_path):
    for n in range(20):
        write_run(tmp_path / str(n), seed=1, iterations=1, predictions=False, scheme=f"A scheme with a rather long name, number {n}")
    runs = collect([tmp_path])
    figures = {}
    from emreason.reports import figures as module

    original = module.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", lambda figure, *rest: (figures.update({rest[1]: figure}), original(figure, *rest))[1])
        module.draw_all(runs, compare(runs), tmp_path / "out")
    figure = figures["acceptance"]
    legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y0 >= panel.y1 - 1
    assert panel.height / figure.dpi > 1.5


def test_seeds_are_told_from_settings_that_happen_to_equal_a_seed(tmp_path):
    for seed in (0, 1, 2):
        write_run(
            tmp_path / f"seed={seed}", seed=seed, iterations=1, config=f"dataset:\n  seed: 0\n  order_seed: {seed}\nname: rs-seed{seed}\n"
        )
    assert [cell.seeds for cell in compare(collect([tmp_path])).cells if not cell.baseline] == [3]


def test_pairs_use_the_same_questions_only(tmp_path):
    of_rs = [write_run(tmp_path / f"a{seed}", "rs", seed) for seed in (1, 2)]
    of_pps = [write_run(tmp_path / f"b{seed}", "pps", seed) for seed in (1, 2)]
    for b in of_pps:
        lines = (b / "predictions/test.jsonl").read_text().splitlines()
        other_gold = json.dumps(json.loads(lines[0]) | {"gold": "16"})  # the same id, another question
        (b / "predictions/test.jsonl").write_text("\n".join([other_gold, *lines[1:60], '{"torn', ""]))
    assert compare(collect(of_rs + of_pps)).pairs[0].difference.questions == 59
    for b in of_pps:
        (b / "predictions/test.jsonl").unlink()
    comparison = compare(collect(of_rs + of_pps))
    assert [(p.first, p.second) for p in comparison.pairs] == [("RS-4", "few-shot baseline")]
    assert any("No paired test: PPS" in note for note in comparison.notes)


def test_several_datasets_and_models(tmp_path):
    for dataset in ("arc_challenge", "mmlu"):
        for model in ("qwen", "llama"):
            for sampler in ("rs", "pps"):
                if (dataset, model, sampler) != ("mmlu", "qwen", "pps"):
                    write_run(tmp_path / dataset / model / sampler, sampler, iterations=1, dataset=dataset, model=model)
    runs = collect([tmp_path])
    comparison = compare(runs)
    assert "Missing: no run of PPS on mmlu with qwen." in comparison.notes
    write_report(runs, tmp_path / "r")
    table = (tmp_path / "r/table.md").read_text()
    assert "| model | scheme | arc\\_challenge | mmlu |" in table
    assert "\\midrule" in (tmp_path / "r/table.tex").read_text()


def test_a_row_of_the_runs_table(tmp_path):
    rows = [
        {
            "iteration": k,
            "e_step": {"acceptance_rate": a, "chance_acceptance": 0.25, "tokens": 1000 * (k + 1), "rationale_tokens_mean": 20.0 + k},
            "m_step": {},
            "validation": score(v),
        }
        for k, (a, v) in enumerate([(0.3, 0.4), (0.6, 0.5)])
    ]
    write_run(tmp_path / "a", "pps", seed=7, iterations=0)
    done = {"iterations": rows, "test": score(0.7), "best_iteration": 1, "seconds": 95.0}
    summary = json.loads((tmp_path / "a/summary.json").read_text()) | done
    (tmp_path / "a/summary.json").write_text(json.dumps(summary))
    (row,) = runs_table(collect([tmp_path])).rows
    low, high = (f"{100 * x:.0f}" for x in stats.wilson(70, 100))
    assert [entry.text for entry in row] == [
        "PPS", "7", "0.0", "8.0", "1.0 → 40 50*", f"70.0 [{low}, {high}]", "72.0", "30 60 (25)", "20 21", "3.0k", "95 s",
    ]  # fmt: skip


def test_difficulty_is_judged_by_the_other_runs(tmp_path):
    """Of one question that the first run solved and the second did not, each is told by the other how hard it is."""
    for name, sampler, solved in [("a", "rs", True), ("b", "star", False)]:
        folder = write_run(tmp_path / name, sampler, iterations=1)
        if name == "a":
            assert acceptance_by_difficulty(collect([folder])) == {}
        row = {"question_id": "q", "iteration": 0, "attempt": 1, "proposal": "question", "accepted": solved, "text": ""}
        (folder / "rationales/iteration=000.jsonl").write_text(json.dumps(row) + "\n")
    shown = acceptance_by_difficulty(collect([tmp_path]))
    assert {label: {k: cell[0] for k, cell in enumerate(cells) if cell} for label, cells in shown.items()} == {
        "RS-4": {0: 1.0},  # hard for the other
        "STaR": {9: 0.0},
    }


def test_questions_that_share_an_id_are_not_pooled(tmp_path):
    """Generated ones, of another seed of the dataset: the gold answer tells them apart."""
    for seed, solved in [(1, True), (2, False)]:
        folder = write_run(tmp_path / str(seed), seed=seed, iterations=1)
        row = {"question_id": "q", "iteration": 0, "attempt": 1, "proposal": "question", "accepted": solved, "text": "", "gold": f"{seed}"}
        (folder / "rationales/iteration=000.jsonl").write_text(json.dumps(row) + "\n")
    assert not any(any(cells) for cells in acceptance_by_difficulty(collect([tmp_path])).values())


def test_what_another_reward_accepts_is_no_solve_rate(tmp_path):
    for name, sampler, reward in [("a", "rs", "correct"), ("b", "star", "well_formed"), ("c", "pps", "correct")]:
        folder = write_run(tmp_path / name, sampler, iterations=1, reward=f"emreason.schemes.rewards.{reward}")
        row = {"question_id": "q", "iteration": 0, "attempt": 1, "proposal": "question", "accepted": name == "b", "text": ""}
        (folder / "rationales/iteration=000.jsonl").write_text(json.dumps(row) + "\n")
    shown = acceptance_by_difficulty(collect([tmp_path]))
    assert {label: [k for k, cell in enumerate(cells) if cell] for label, cells in shown.items()} == {"RS-4": [0], "STaR": [0], "PPS": [0]}


def test_runs_that_differ_in_what_changes_nothing_are_one_scheme(tmp_path):
    for seed, config in enumerate(["quiet: true", "hub: {push: me/x-1}", "rationale_rows: 20", "engine: {max_batch: 32}"], 1):
        write_run(tmp_path / str(seed), seed=seed, config=f"{config}\n")
    assert {run.label for run in collect([tmp_path])} == {"RS-4"}


def test_the_same_data_elsewhere_is_one_scheme_and_other_data_are_two(tmp_path):
    for seed, data in enumerate(["x", "x", "y"], 1):
        write_run(tmp_path / str(seed), seed=seed, config=f"dataset:\n  path: /disk{seed}/my.jsonl\n", data={"test": data})
    assert {run.label for run in collect([tmp_path / "1", tmp_path / "2"])} == {"RS-4"}
    assert len({run.label for run in collect([tmp_path])}) == 3


def test_a_scheme_is_compared_with_the_baseline_of_its_own_settings(tmp_path):
    """A mean over baselines of one and of eight worked examples is of nothing."""
    for shots, few in ((1, 0.2), (8, 0.8)):
        for seed in (1, 2):
            folder = write_run(tmp_path / f"{shots}/{seed}", seed=seed, config=f"evaluation:\n  few_shot: {shots}\n")
            summary = json.loads((folder / "summary.json").read_text())
            summary["baseline"]["few_shot"] = score(few)
            (folder / "summary.json").write_text(json.dumps(summary))
            path = folder / "predictions/baseline_few_shot_test.jsonl"
            lines = [json.loads(line) | {"correct": n < 100 * few} for n, line in enumerate(path.read_text().splitlines())]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(collect([tmp_path]))
    one, eight = (f"RS-4 · evaluation.few_shot={shots}" for shots in (1, 8))
    measured = {cell.scheme: round(cell.accuracy, 3) for cell in found.cells if cell.baseline}
    assert measured == {"zero-shot baseline": 0.0, f"few-shot baseline of {one}": 0.2, f"few-shot baseline of {eight}": 0.8}
    own = FINAL["rs"] - 0.015
    differences = {(p.first, p.second): round(p.difference.estimate, 3) for p in found.pairs}
    assert differences[one, f"few-shot baseline of {one}"] == pytest.approx(own - 0.2)
    assert differences[eight, f"few-shot baseline of {eight}"] == pytest.approx(own - 0.8)
    assert len(differences) == 3


def test_a_scheme_keeps_its_colour_from_report_to_report(tmp_path):
    for sampler in NAMES:
        write_run(tmp_path / sampler, sampler, iterations=1)
    write_run(tmp_path / "own", "rs", iterations=1, scheme="mine")
    every, few = palette(collect([tmp_path])), palette(collect([tmp_path / "pps"]))
    assert every["PPS"] == few["PPS"]
    assert len({colour for colour, _ in every.values()}) == len(every) == 4
    for n in range(9):
        write_run(tmp_path / f"own{n}", "rs", iterations=1, scheme=f"mine, {n}")
    many = palette(collect([tmp_path]))
    assert len(set(many.values())) == len(many) == 13  # colours may come again, not with the same marker


class Visible(HTMLParser):
    """The page as a browser reads it: scripts, images and the text of <pre>."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.images, self.pre, self.inside = 0, [], [], False

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.inside = tag == "pre"
        if tag == "pre":
            self.pre.append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.pre[-1] += data


def test_untrusted_text_stays_text(tmp_path):
    write_run(tmp_path / "a", text=EVIL, model="<b>m_1</b>|$", tag="[red]x[/red]")
    write_run(tmp_path / "b", "pps", text="\ud83d lone", model="<b>m_1</b>|$", status="failed", error="bad [/red] \x1b[31m & <i>")
    runs = collect([tmp_path])
    write_report(runs, tmp_path / "r")
    page = (tmp_path / "r/report.html").read_text()
    seen = Visible()
    seen.feed(page)
    assert seen.scripts == 1
    assert EVIL in seen.pre
    assert all(src.startswith("data:image/png;base64,") for src in seen.images)
    assert base64.b64decode(seen.images[0].split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert "<b>m_1" not in page
    assert r"&lt;b&gt;m\_1&lt;/b&gt;\|$" in (tmp_path / "r/table.md").read_text()
    assert r"\textless{}b\textgreater{}m\_1\textless{}/b\textgreater{}|\$" in (tmp_path / "r/table.tex").read_text()
    terminal = printed(runs)
    assert "<b>m_1</b>|$" in terminal
    assert "\x1b[31m" not in terminal
    assert "bad [/red]" in " ".join(terminal.split())  # long paths wrap


def test_escapes():
    assert escape_latex("50% & a_b #1 {x} \\y ~^") == r"50\% \& a\_b \#1 \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}"
    assert escape_markdown("a|b\n*c* <i>") == r"a\|b \*c\* &lt;i&gt;"


def test_rationales_are_capped_and_balanced(grid):
    samples = sample_rationales(collect([grid]))
    groups: dict[tuple, int] = {}
    for s in samples:
        groups[s.scheme, s.iteration, s.accepted] = groups.get((s.scheme, s.iteration, s.accepted), 0) + 1
    assert len(groups) == 3 * 4 * 2
    assert max(groups.values()) <= PER_GROUP
    assert len(samples) <= IN_ALL
    questions = [(s.scheme, s.iteration, s.accepted, s.question_id) for s in samples]
    assert len(questions) == len(set(questions))  # different questions, not one question under every seed
    assert samples == sample_rationales(collect([grid]))


@pytest.mark.parametrize(("path", "says"), [("nowhere", "does not exist"), (".", "no run folder")])
def test_a_bad_path_is_one_sentence_and_exit_2(tmp_path, capsys, path, says):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        collect([tmp_path / path])


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    write_run(tmp_path / "a", iterations=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "a"), "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_is_read_once(tmp_path):
    a = write_run(tmp_path / "a", iterations=1)
    assert len(collect([a, tmp_path, a / "summary.json"])) == 1


def test_everything_that_is_logged_is_drawn(tmp_path, monkeypatch):
    """The panels of the W&B workspace that the runs have numbers for, beginning with the base model; a line per run."""
    from matplotlib.figure import Figure

    for seed in (1, 2):
        write_run(tmp_path / f"rs-{seed}", "rs", seed, iterations=3)
    write_run(tmp_path / "pps", "pps", iterations=2, status="running")
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: (drawn.update({Path(file).name: self}), Path(file).write_bytes(b"x")))
    runs = collect([tmp_path])
    write_report(runs, tmp_path / "r")
    panels = {ax.get_title(): ax for ax in drawn["everything_1.png"].axes}
    charts = {chart.title: chart for charts in SECTIONS.values() for chart in charts}
    assert panels.keys() <= charts.keys()
    assert {"Validation accuracy, from the base model on", "Acceptance against chance", "Seconds"} <= panels.keys()
    for title, x in [("Validation accuracy, from the base model on", [0, 1, 2, 3]), ("Acceptance against chance", [0, 1, 2])]:
        (line, *_) = [line for line in panels[title].lines if len(line.get_xdata()) == len(x)]
        assert list(line.get_xdata()) == x
    first = panels["Validation accuracy, from the base model on"].lines
    assert sorted(len(line.get_xdata()) for line in first) == [0, 3, 4, 4]  # the legend's, the unfinished run's, and two
    assert all(line.get_ydata()[0] == 0.01 for line in first if len(line.get_xdata()))
    tokens = next(line for line in panels["Validation accuracy at equal generated tokens"].lines if len(line.get_xdata()) == 4)
    run = next(run for run in runs if run.sampler == "rs")
    assert list(tokens.get_xdata()) == [0, *np.cumsum([i.tokens for i in run.iterations])]


def test_a_report_that_watches_is_written_again_when_a_run_has_changed(tmp_path, monkeypatch, capsys):
    """And the page asks to be read again; until Ctrl-C, after which it does not."""
    looks: list[str] = []
    page = tmp_path / "out/report/report.html"

    def sleep(_: float) -> None:
        looks.append(page.read_text() if page.exists() else "")
        if len(looks) == 1:  # the first run appears
            write_run(tmp_path / "out" / "a", "rs", iterations=1, status="running")
        if len(looks) == 3:
            write_run(tmp_path / "out" / "b", "star", iterations=2)
        if len(looks) == 4:
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("emreason.report.time", SimpleNamespace(sleep=sleep, strftime=time.strftime))  # not that of other threads
    written = []
    monkeypatch.setattr("emreason.reports.writing.draw_all", lambda *_: [])
    monkeypatch.setattr("emreason.reports.writing.write_report", lambda *a, **k: written.append(k) or write_report(*a, **k))
    main([str(tmp_path / "out"), "--watch"])
    assert [bool(look) for look in looks] == [False, True, True, True]
    assert looks[1] == looks[2] != looks[3]  # nothing had changed, and then something had
    assert '<meta http-equiv="refresh" content="20.0">' in looks[1]
    assert written == [{"refresh": 20.0}] * 2 + [{}]
    assert "refresh" not in page.read_text()
    assert "STaR" in page.read_text()
    assert "1 runs, 0 finished" in capsys.readouterr().out


def test_numbers_for_people():
    assert [thousands(n) for n in (812, 41_234, 3_100_000)] == ["812", "41.2k", "3.1M"]
    assert [duration(s) for s in (None, 48.2, 303, 7800)] == ["—", "48 s", "303 s", "2 h 10 min"]


@pytest.fixture
def chromium(tmp_path):
    """Run a headless Chromium on a page: `chromium(page, *flags)` returns its output."""
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium on the PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [browser, *flags.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]

    def visit(page: Path, *flags: str) -> str:
        return subprocess.run([*command, *flags, page.as_uri()], check=True, capture_output=True, timeout=120, text=True).stdout

    return visit


def test_the_page_in_a_browser(tmp_path, chromium):
    for sampler in NAMES:
        write_run(tmp_path / "outputs" / sampler, sampler, iterations=2, text=EVIL)
    write_report(collect([tmp_path / "outputs"]), tmp_path / "r")
    page, shot = tmp_path / "r/report.html", tmp_path / "shot.png"
    chromium(page, f"--screenshot={shot}", "--window-size=1280,1600")
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 50_000  # not a blank page
    dom = chromium(page, "--dump-dom")
    assert "<title>emreason report</title>" in dom  # the rationale's script did not run
    shown = re.search(r'id="count">(\d+) shown', dom)  # the page's own did
    assert shown
    assert int(shown[1]) == dom.count("<article")

    # as a reader would: choose a scheme, an iteration and a verdict
    choose = "".join(
        f"""f = document.querySelector('[data-key="{key}"]'); f.value = '{value}'; f.dispatchEvent(new Event('change'));"""
        for key, value in {"scheme": "STaR", "iteration": "1", "verdict": "rejected"}.items()
    )
    page.write_text(page.read_text().replace("</body>", f"<script>let f; {choose}</script></body>"))
    articles = re.findall(r"<article [^>]*>", chromium(page, "--dump-dom"))
    chosen = ['data-scheme="STaR" data-iteration="1" data-verdict="rejected"' in article for article in articles]
    assert 0 < sum(chosen) < len(articles)
    assert [' hidden=""' not in article for article in articles] == chosen


def test_single_points_are_inside_their_panels(tmp_path, monkeypatch):
    """One iteration without a baseline on the validation split: every curve is one point."""
    from emreason.reports import figures

    for sampler in NAMES:
        folder = write_run(tmp_path / sampler, sampler, iterations=1)
        summary = json.loads((folder / "summary.json").read_text())
        summary["baseline"]["validation"] = None
        summary["iterations"][0]["e_step"]["tokens"] += 500
        (folder / "summary.json").write_text(json.dumps(summary))
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, *rest: drawn.update({rest[1]: figure}))
    runs = collect([tmp_path])
    figures.draw_all(runs, compare(runs), tmp_path)
    assert len(drawn) >= 5
    for name, figure in drawn.items():
        for ax in figure.axes:
            (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            points = [point for line in ax.lines if line.get_marker() in "osD" for point in zip(*line.get_data(), strict=True)]
            assert len(points) >= 3, name
            assert all(left <= x <= right and bottom <= y <= top for x, y in points), name


def test_the_page_as_a_browser_lays_it_out(tmp_path):
    """Opened from disk: no error, no request, every figure is drawn, nothing runs out of the window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright and a Chromium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a Chromium")
    for sampler in NAMES:
        for seed in (1, 2):
            write_run(tmp_path / f"{sampler}-{seed}", sampler, seed, text=EVIL)
    write_report(collect([tmp_path]), tmp_path / "report")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto((tmp_path / "report/report.html").as_uri())
        assert page.title() != "owned"
        widths = page.eval_on_selector_all("figure img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) >= 5
        assert min(widths) > 300
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()
    assert not problems
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_a_report_of_a_sweep_that_is_yet_to_begin_lies_in_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("")
    assert _common_parent([str(tmp_path / "notyet")]) == tmp_path / "notyet"
    assert _common_parent([str(tmp_path / "file")]) == _common_parent([str(tmp_path / "run"), str(tmp_path / "notyet")]) == tmp_path

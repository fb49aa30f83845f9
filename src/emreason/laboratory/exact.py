"""`emreason experiment=exact`: every scheme's exact distance from the posterior and what it does to the marginal likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from scipy import stats
from torch import Tensor

from emreason.laboratory.tabular import Hint, Tabular, TabularEngine, accepted, kl, make_questions, make_tabular, rationale_index
from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts, PromptTemplate
from emreason.reports.forms import Entry, Table, rich_table
from emreason.runs.journal import write_json
from emreason.runs.keys import TRAIN_KEYS, check_keys
from emreason.schemes.chain import remembered
from emreason.schemes.samplers import Scheme, sample
from emreason.schemes.weights import score_weights, weigh

EXACT = "exact EM"
INFINITE = 50.0
"""A KL in nats that stands for infinity: the scheme never hands the M-step some rationale that the posterior has."""


@dataclass(frozen=True)
class Curve:
    """One scheme over EM iterations; entry k is of the model that iteration k samples from. `p`: χ² test of its draws, if any."""

    acceptance: list[float]
    kl: list[float]
    log_marginal: list[float]
    p: float | None = None


def run(cfg: DictConfig, folder: Path) -> float:
    """The task of `experiment=exact`: a table, and `exact.json` and `exact.png` in `folder`. Returns exact EM's last log π(y*|x)."""
    check_keys(cfg, {*TRAIN_KEYS, "laboratory"})
    lab = cfg.laboratory
    hint = Hint(**lab.hint)
    model = make_tabular(lab.questions, lab.answers, lab.letters, lab.max_length, cfg.seed, lab.sharpness, hint)
    curves = {EXACT: curve(model, None, lab.iterations)}
    schemes: list[Scheme] = [hydra.utils.instantiate(config) for config in lab.schemes.values()]
    curves |= {s.display: curve(model, s, lab.iterations, lab.draws, cfg.seed) for s in schemes}
    still = {s.display: curve(model, s, lab.iterations - 1, learns=False).kl if s.persists else None for s in schemes}
    found: dict[str, Any] = {name: vars(c) | {"kl_of_unchanging_model": still.get(name)} for name, c in curves.items()}
    write_json(folder / "exact.json", found)
    console = Console()
    for told in (table(curves, len(model.rationales)), still_table(still)):
        console.print(rich_table(told, console.width))
    draw(curves, still, folder / "exact.png")
    print(f"Written: {folder / 'exact.json'}\n         {folder / 'exact.png'}")
    return curves[EXACT].log_marginal[-1]


def curve(model: Tabular, scheme: Scheme | None, iterations: int, draws: int = 0, seed: int = 0, learns: bool = True) -> Curve:
    """EM from `model` with the E-step of `scheme` in expectation (None: the exact posterior); `learns`: with M-steps."""
    counted = scheme is not None and draws and scheme.weigh != "contrast"  # fractions of draws have no χ²
    p = chi_square(model, scheme, draws, seed) if counted and scheme is not None else None
    acceptance, distance, likelihood = [], [], []
    memory: Tensor | None = None
    for iteration in range(iterations + 1):
        weights = model.posterior() if scheme is None else accepted(model, scheme, memory)
        memory = weights
        acceptance.append(float(weights.sum(1).mean()))
        distance.append(float(kl(model.posterior(), weights).mean()))
        likelihood.append(float(model.log_marginal().mean()))
        if learns and iteration < iterations:
            model = model.m_step(weights)
    return Curve(acceptance, distance, likelihood, p)


def chi_square(model: Tabular, scheme: Scheme, draws: int, seed: int) -> float:
    """p-value of `draws` E-steps per question, made by the project's own sampler, against the scheme's exact distribution."""
    counts, law = sampled_counts(model, scheme, draws, seed), accepted(model, scheme).numpy()
    sat_out, missed = draws - counts.sum(1), np.maximum(0.0, 1 - law.sum(1))
    return goodness_of_fit(np.column_stack([counts, sat_out]), np.column_stack([law, missed]))


def goodness_of_fit(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of Pearson's χ² of `counts` [rows, cells] against the law of each row; rows are given their totals.

    Cells with fewer than 5 expected are one cell per row: below that the χ² approximation fails (Cochran 1954).
    """
    statistic, freedom = 0.0, 0
    for seen, probability in zip(counts, law, strict=True):
        expected = probability / probability.sum() * seen.sum()
        rare = expected < 5
        cells = [*zip(seen[~rare], expected[~rare], strict=True), (seen[rare].sum(), expected[rare].sum())]
        cells = [(o, e) for o, e in cells if e > 0]
        statistic += sum((o - e) ** 2 / e for o, e in cells)
        freedom += len(cells) - 1
    return float(stats.chi2.sf(statistic, freedom))


def sampled_counts(model: Tabular, scheme: Scheme, draws: int, seed: int) -> np.ndarray:
    """What `samplers.sample` and `weights.weigh` hand the M-step in `draws` independent E-steps: total weight per [question, rationale].

    Where rationales persist, these: the weights also hold the control variate, whose mean is 0.
    """
    tokenizer = tiny_tokenizer()
    prompts = Prompts(tokenizer, PromptTemplate(instruction="", hint="({answer})"))
    questions = make_questions(model, draws)
    engine = TabularEngine(model, questions, prompts, tokenizer)
    attempts = list(sample(questions, scheme, engine, prompts, tokenizer, seed=seed, iteration=0))
    if scheme.needs_scores:
        attempts = score_weights(attempts, {q.id: q for q in questions}, scheme, prompts, engine.score, 0)
    counts = np.zeros(model.z_logits.shape)
    kept = list(remembered(attempts, {}, seed).values()) if scheme.persists else weigh(attempts, scheme, seed=seed, iteration=0)
    for rationale in kept:
        if rationale.weight:
            counts[int(rationale.question_id.split("/")[0]), rationale_index(model, rationale.text)] += rationale.weight
    return counts


def table(curves: Mapping[str, Curve], n_rationales: int) -> Table:
    """Per scheme: acceptance and KL(posterior ‖ scheme) at the start and the end, and log π(y*|x) per iteration."""
    iterations = len(next(iter(curves.values())).kl) - 1
    shown = sorted({0, 1, 2, 4, 8, iterations} & set(range(iterations + 1)))
    columns = ["scheme", "accepted", "χ² p", "KL first", "KL last", *(f"after {k}" for k in shown)]

    def row(name: str, c: Curve) -> list[Entry]:
        p = "—" if c.p is None else f"{c.p:.2f}"
        first = [name, f"{c.acceptance[0]:.3f}", p, _distance(c.kl[0]), _distance(c.kl[-1])]
        return [Entry(text) for text in [*first, *(f"{min(c.log_marginal[k], -1e-9):.3f}" for k in shown)]]

    title = f"KL(posterior ‖ scheme), and log π(y*|x) after k EM iterations; nats per question, all {n_rationales} rationales enumerated"
    return Table(title, columns, [row(name, c) for name, c in curves.items()], tuple(range(1, len(columns))))


def _distance(value: float) -> str:
    return "—" if np.isnan(value) else f"{value:.4f}" if value < INFINITE else "∞"  # — where nothing has any weight


def still_table(still: Mapping[str, list[float] | None]) -> Table:
    """Of the schemes whose rationales persist: KL(posterior ‖ scheme) by iteration while the model stays what it is."""
    rows = {name: values for name, values in still.items() if values}
    n = max(map(len, rows.values()), default=0)
    shown = sorted({1, 2, 3, 4, 8, 12, n} & set(range(1, n + 1)))
    cells = [[Entry(text) for text in [name, *(f"{values[k - 1]:.5f}" for k in shown)]] for name, values in rows.items()]
    title = "KL(posterior ‖ scheme), nats, after k iterations of an unchanging model"
    return Table(title, ["scheme", *(f"k = {k}" for k in shown)], cells, tuple(range(1, len(shown) + 1)))


def draw(curves: Mapping[str, Curve], still: Mapping[str, list[float] | None], path: Path) -> None:
    """Over EM iterations: the marginal likelihood, and the distance of each scheme from the posterior; the latter without M-steps, too."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from emreason.reports.figures import MARKERS, SOLID, SPARE, STYLE, USUAL

    others = [name for name in curves if name not in USUAL and name != EXACT]
    colours: dict[str, tuple[str, str]] = USUAL | {EXACT: ("#000000", "*")}
    spare = [colour for colour in SPARE if colour != colours[EXACT][0]]
    colours |= {name: (spare[n % len(spare)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(others)}
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11.0, 3.3), layout="constrained")
        left, right, last = figure.subplots(1, 3)
        for name, c in curves.items():
            style: dict[str, Any] = {"color": colours[name][0], "marker": colours[name][1], "label": name, **SOLID}
            left.plot(c.log_marginal, **style)
            if name != EXACT:
                right.plot([max(v, 1e-17) if v < INFINITE else np.nan for v in c.kl], **style)
            if values := still.get(name):
                last.plot(range(1, len(values) + 1), np.maximum(values, 1e-8), **style)
        left.set_ylabel("log π(y*|x), nats per question")
        right.set_ylabel("KL(posterior ‖ scheme), nats")
        right.set_yscale("symlog", linthresh=1e-3)
        right.set_ylim(bottom=0)
        last.set_ylabel("the same, of an unchanging model")
        last.set_yscale("log")
        for axes in (left, right, last):
            axes.set_xlabel("EM iteration")
        handles, labels = left.get_legend_handles_labels()
        columns = len(labels) if len(labels) < 7 else -(-len(labels) // 2)
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
        figure.savefig(path)

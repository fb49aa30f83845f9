"""`emreason experiment=variance`: the exact mean and variance of an E-step's update, of schemes that draw the plain prompt only.

With S = ∇ log π(z, y|x), S̄ its mean over right draws and p = π(y*|x), Fisher's identity is S̄ = ∇ log p. Rejection sampling with budget M
is right with probability 1 − (1 − p)^M and then trains on one right draw, so its expected update is

    (1 − (1 − p)^M) ∇log p = Σ_{k ≤ M} (1 − p)^{k−1} ∇p = Σ_{k ≤ M} ∇pass@k / k,    pass@k = 1 − (1 − p)^k:

MaxRL's gradient of order M (Tajwar et al. 2026, arXiv:2602.02710), and exact EM's as M → ∞. RS-1 is REINFORCE without a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from emreason.laboratory.tabular import Hint, Tabular, completion_ids, make_tabular
from emreason.models.tiny import tiny_tokenizer
from emreason.reports.forms import Entry, Table, rich_table
from emreason.runs.journal import write_json
from emreason.runs.keys import TRAIN_KEYS, check_keys
from emreason.schemes.samplers import Scheme
from emreason.schemes.weights import weigh
from emreason.types import Rationale, UserError


@dataclass(frozen=True)
class Moments:
    """Of one E-step's update Σ w ∇log π, per question: its mean, [questions, parameters], the trace of its covariance, expected tokens."""

    mean: Tensor
    variance: Tensor
    tokens: Tensor

    @property
    def cost(self) -> float:
        """Tokens until the summed update is as long as its standard deviation: the variance at equal tokens, in units of its own length."""
        return float(self.variance.sum() * self.tokens.sum() / self.mean.sum(0).square().sum())


def run(cfg: DictConfig, folder: Path) -> float:
    """The task of `experiment=variance`: a table, `variance.json` and `variance.png` in `folder`. Returns the cost of the last scheme."""
    check_keys(cfg, {*TRAIN_KEYS, "laboratory"})
    lab = cfg.laboratory
    model = make_tabular(lab.questions, lab.answers, lab.letters, lab.max_length, cfg.seed, lab.sharpness, Hint())
    series = {name: [hydra.utils.instantiate(c, budget=budget) for budget in lab.budgets[name]] for name, c in lab.schemes.items()}
    found = {scheme.display: moments(model, scheme) for schemes in series.values() for scheme in schemes}
    write_json(folder / "variance.json", {name: _record(m) for name, m in found.items()})
    console = Console()
    console.print(rich_table(table(model, found), console.width))
    draw(model, {name: {s.display: found[s.display] for s in schemes} for name, schemes in series.items()}, folder / "variance.png")
    print(f"Written: {folder / 'variance.json'}\n         {folder / 'variance.png'}")
    return list(found.values())[-1].cost


def scores(model: Tabular, x: int) -> Tensor:
    """∇ log π(z, y|x) in both tables, of every (z, y): [Z, answers, parameters], the logits of z first."""
    n, answers = model.y_logits.shape
    of_z = torch.eye(n, dtype=model.z_logits.dtype) - model.z_logits[x].softmax(0)
    of_y = torch.eye(answers, dtype=model.y_logits.dtype) - model.y_logits.softmax(1)[:, None, :]
    found = torch.zeros(n, answers, n + n * answers, dtype=model.z_logits.dtype)
    found[:, :, :n] = of_z[:, None, :]
    for z in range(n):
        found[z, :, n + z * answers : n + (z + 1) * answers] = of_y[z]
    return found


def log_marginal_gradient(model: Tabular, x: int) -> Tensor:
    """∇ log π(y*|x), by Fisher's identity: [parameters]."""
    return model.posterior()[x] @ scores(model, x)[:, int(model.gold[x])]


def moments(model: Tabular, scheme: Scheme) -> Moments:
    """Exact moments of `scheme`'s update at temperature 1. Given n right draws these are independent draws of the posterior, the others of
    what is wrong, and `weigh` gives all of a kind the same weight, so the sum over n of 0 … K is the sum over all draws there are.

    Raises:
        UserError: a scheme that draws hinted prompts, or another distribution than the model's.
    """
    k = len(scheme.tries)
    if set(scheme.tries) != {"question"} or scheme.temperature != 1 or scheme.top_p != 1 or 1 < scheme.keep < k or scheme.distinct:
        raise UserError(
            f"The laboratory has no variance of {scheme.display}: it is for draws of the plain prompt at temperature 1, "
            "of which the first right one is kept, or all."
        )
    lengths = torch.tensor([float(len(ids)) for ids in completion_ids(model, tiny_tokenizer())], dtype=model.z_logits.dtype)
    # (draws, right ones) -> Σ w and Σ w² of the right ones and of the others
    met = [(j + 1, 1) for j in range(k)] + [(k, 0)] if scheme.keep < k else [(k, n) for n in range(k + 1)]
    weights_of = [[sum_of_weights(scheme, draws, n, accepted) for accepted in (True, False)] for draws, n in met]
    mean, variance, tokens = [], [], []
    for x, law in enumerate(model.log_joint().exp().flatten(1)):
        score = scores(model, x).flatten(0, 1)
        right = torch.arange(len(law)) % model.y_logits.shape[1] == model.gold[x]
        p = float(law[right].sum())
        parts = []  # of a right and of a wrong draw: mean, trace of the covariance
        for kind in (right, ~right):
            share = law * kind / law[kind].sum()
            parts.append((share @ score, float(share @ score.square().sum(1) - (share @ score).square().sum())))
        if scheme.keep < k:  # the first right draw is the last
            chances = [(1 - p) ** j * p for j in range(k)] + [(1 - p) ** k]
        else:
            chances = [math.comb(k, n) * p**n * (1 - p) ** (k - n) for n in range(k + 1)]
        first, second, drawn = torch.zeros_like(score[0]), 0.0, 0.0
        for probability, (draws, _), weights in zip(chances, met, weights_of, strict=True):
            center = sum(total * m for (total, _), (m, _) in zip(weights, parts, strict=True))
            spread = sum(squares * v for (_, squares), (_, v) in zip(weights, parts, strict=True))
            first = first + probability * center
            second += probability * (float(torch.as_tensor(center).square().sum()) + spread)
            drawn += probability * draws
        mean.append(first)
        variance.append(second - float(first.square().sum()))
        tokens.append(drawn * float(law @ lengths))
    return Moments(torch.stack(mean), torch.tensor(variance), torch.tensor(tokens))


def sum_of_weights(scheme: Scheme, draws: int, right: int, accepted: bool) -> tuple[float, float]:
    """Σ w and Σ w² of the accepted, or of the other, ones of `draws` attempts, the last `right` of which are right, as `weigh` has them."""
    attempts = [
        Rationale("q", 0, i + 1, "question", f"z{i}", "1", i >= draws - right, 1, "answer", -1.0, (1,), weight=0.0) for i in range(draws)
    ]
    found = [a.weight for a in weigh(attempts, scheme, seed=0, iteration=0) if a.accepted == accepted]
    return sum(found), sum(w * w for w in found)


def _ascent(model: Tabular) -> Tensor:
    return torch.stack([log_marginal_gradient(model, x) for x in range(len(model.gold))]).sum(0)


def _record(m: Moments) -> dict[str, object]:
    return {"tokens": m.tokens.tolist(), "variance": m.variance.tolist(), "length": m.mean.norm(dim=1).tolist(), "cost": m.cost}


def table(model: Tabular, found: Mapping[str, Moments]) -> Table:
    """Per scheme and budget, summed over the questions of one E-step."""
    ascent = _ascent(model)
    columns = ["scheme", "tokens", "length", "cosine", "variance", "to S = N"]

    def row(name: str, m: Moments) -> list[Entry]:
        total = m.mean.sum(0)
        length, cosine = float(total.norm() / ascent.norm()), float(torch.cosine_similarity(total, ascent, dim=0))
        told = [f"{float(m.tokens.sum()):.0f}", f"{length:.3f}", f"{cosine:.3f}", f"{float(m.variance.sum()):.2f}", f"{m.cost:.0f}"]
        return [Entry(text) for text in [name, *told]]

    title = (
        f"One E-step's update on {len(model.gold)} questions, exactly: length of its mean over |∇log π(y*|x)| and cosine to it, its "
        "variance, and the tokens after which the mean (signal) is as long as its standard deviation (noise)"
    )
    return Table(title, columns, [row(name, m) for name, m in found.items()], tuple(range(1, len(columns))))


def draw(model: Tabular, series: Mapping[str, Mapping[str, Moments]], path: Path) -> None:
    """Tokens until signal equals noise, by how much of ∇log π(y*|x) the expected update is; a line per scheme, a point per budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from emreason.reports.figures import MARKERS, SOLID, SPARE, STYLE

    ascent = _ascent(model)
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.subplots()
        for i, found in enumerate(series.values()):
            at = [(float(m.mean.sum(0).norm() / ascent.norm()), m.cost) for m in found.values()]
            axes.plot(*zip(*at, strict=True), color=SPARE[i], marker=MARKERS[i], **SOLID)
            for name, place in zip(found, at, strict=True):
                aside: dict[str, Any] = {"xytext": (0, (-11, 6, -3)[i % 3]), "ha": ("left", "left", "right")[i % 3]}
                axes.annotate(f" {name}  ", place, textcoords="offset points", fontsize=7, color=SPARE[i], **aside)
        axes.set_xlabel("expected update, as a share of |∇log π(y*|x)|")
        axes.set_ylabel("tokens until signal = noise")
        axes.margins(x=0.14)
        axes.set_ylim(bottom=0)
        figure.savefig(path)

"""`python -m emreason.tracking.workspace ENTITY`: a W&B workspace for the runs that `logger=wandb` sends, grouped by scheme.

Needs `pip install 'emreason[dashboard]'`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """A line chart: metrics over an axis, a line per scheme, the band its range over runs."""

    title: str
    metrics: tuple[str, ...]
    axis: str = "iteration"
    log: bool = False


def _of(parts: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{part}/{key}" for key in keys for part in parts.split())


NAME = "EM: schemes compared"
DONE, TOKENS, STEP = "iterations_done", "e_step/tokens_total", "optimizer_step"
SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Accuracy": (
        Chart("Validation accuracy, from the base model on", ("validation/accuracy",), DONE),
        Chart("Validation accuracy at equal generated tokens", ("validation/accuracy",), TOKENS),
        Chart("95 % interval of validation accuracy", _of("validation", "ci95/low", "ci95/high"), DONE),
        Chart("With a forced answer line", ("validation/forced_accuracy",), DONE),
        Chart("Answers in the required format", _of("validation test", "extraction_rate"), DONE),
        Chart("Test accuracy: base model, chosen iteration", _of("test", "accuracy", "forced_accuracy", "ci95/low", "ci95/high"), DONE),
        Chart("Validation accuracy by the gold answer's place", _of("validation", *(f"accuracy_by_position/{x}" for x in "ABCDE")), DONE),
        Chart("Test accuracy by the gold answer's place", _of("test", *(f"accuracy_by_position/{x}" for x in "ABCDE")), DONE),
        Chart("Tokens of a greedy answer", _of("validation test", "rationale_tokens_mean"), DONE),
        Chart("log π(y*|x), nats (where measured)", _of("validation", "log_marginal", "log_marginal_se", "log_marginal_mc_se"), DONE),
        Chart("Answered draws of log π(y*|x)", ("validation/log_marginal_answered",), DONE),
        Chart("KL per token from the base model, nats", _of("validation", "kl_per_token", "kl_per_token_se"), DONE),
        Chart("Questions asked, and those too long", _of("validation test", "n", "errored"), DONE),
    ),
    "E-step": (
        Chart("Acceptance against chance", _of("e_step", "acceptance_rate", "chance_acceptance")),
        Chart("Accepted at the first try", ("e_step/first_try_rate",)),
        Chart("Questions of whose draws none, some, all are right", _of("e_step", "none_right", "some_right", "all_right")),
        Chart("Questions", _of("e_step", "questions", "accepted", "rejected", "errored")),
        Chart("Draws, and rationales trained on", _of("e_step", "attempts", "rationales", "kept", "rejected_trained")),
        Chart("Length of an accepted rationale (tokens)", _of("e_step", "rationale_tokens_mean", "trivial_tokens_mean")),
        Chart("Length of all draws (10th percentile, mean, 90th)", _of("e_step", "draw_tokens_p10", "draw_tokens_mean", "draw_tokens_p90")),
        Chart("Entropy per token, nats", ("e_step/entropy",)),
        Chart("Tokens generated", _of("e_step", "tokens", "tokens_total")),
        Chart("Tokens generated per accepted question", ("e_step/tokens_per_accepted",), log=True),
        Chart("Bare answers, answers first, talk of the hint", _of("e_step", "trivial_rate", "answer_first_rate", "hint_mention_rate")),
        Chart("Draws cut off, and with an answer", _of("e_step", "truncated_rate", "extraction_rate")),
        Chart("Distinct, and faithful, rationales", _of("e_step", "distinct_rate", "faithful_rate")),
        Chart("Importance weights: effective sample size", ("e_step/effective_sample_size",)),
        Chart("Importance weights: log π(y*|x), nats", ("e_step/log_marginal_iw",)),
        Chart("Chains: share of right draws that take the kept rationale's place", ("e_step/move_rate",)),
        Chart("|log π of vLLM − log π| a token, nats", ("e_step/logprob_gap",)),
    ),
    "M-step": (
        Chart("NLL per token (nats), mean of the M-step", ("m_step/nll",)),
        Chart("NLL per token (nats), each optimizer step", ("optimizer/nll",), STEP),
        Chart("Gradient norm", ("optimizer/grad_norm",), STEP, log=True),
        Chart("Learning rate", ("optimizer/lr",), STEP),
        Chart("Optimizer steps", ("m_step/steps",)),
        Chart("Supervised tokens", ("m_step/tokens",)),
    ),
    "Cost": (
        Chart("Tokens a second", _of("tokens_per_second", "e_step", "m_step", "validation"), log=True),
        Chart("Peak memory (bytes)", _of("memory_bytes", "e_step", "m_step", "validation")),
        Chart("Seconds", _of("e_step m_step validation", "seconds")),
        Chart("Seconds of the test", ("test/seconds",), DONE),
    ),
}
"""Everything that is logged (a test holds it); the report draws the same."""


def workspace(entity: str, project: str, name: str) -> Any:
    """The layout as a `wandb_workspaces` workspace; nothing is sent before its `save()`."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def panel(chart: Chart) -> Any:
        return wr.LinePlot(
            title=chart.title,
            x=chart.axis,
            y=list(chart.metrics),
            log_y=chart.log,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            smoothing_factor=0,
        )

    shown = [wr.WeavePanelSummaryTable(table_name=name) for name in ("questions", "rationales", "schemes", "pairs")]
    tables = ws.Section(name="Tables", panels=shown, is_open=False)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=[panel(chart) for chart in charts], is_open=True) for title, charts in SECTIONS.items()]
        + [tables],
        settings=ws.WorkspaceSettings(x_axis="iteration", smoothing_weight=0),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("dataset.name"), ws.Config("model.name"), ws.Config("sampler.display")]),
    )


def main(argv: list[str] | None = None) -> None:
    """The command: make the workspace."""
    parser = argparse.ArgumentParser(prog="python -m emreason.tracking.workspace", description="A W&B workspace for emreason's runs.")
    parser.add_argument("entity", help="your W&B user or team")
    parser.add_argument("--project", default="emreason", help="logger.wandb.project of the runs (default: emreason)")
    parser.add_argument("--name", default=NAME, help="of the saved view")
    arguments = parser.parse_args(argv)
    try:
        made = workspace(arguments.entity, arguments.project, arguments.name)
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is not installed; run pip install 'emreason[dashboard]'.") from None
    print(f"Workspace: {made.save().url}")


if __name__ == "__main__":
    main()

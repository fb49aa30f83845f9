"""`python -m emreason.tracking.workspace ENTITY`: a W&B workspace for the runs that `logger=wandb` sends, grouped by scheme.

Needs `pip install 'emreason[dashboard]'`. With `--spec FILE` the layout is written as JSON and nothing is sent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emreason.runs.journal import write_atomic


@dataclass(frozen=True)
class Chart:
    """A line chart: metrics over an axis, a line per scheme, the band its range over runs."""

    title: str
    metrics: tuple[str, ...]
    axis: str = "iteration"
    log: bool = False


SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Accuracy": (
        Chart("Validation accuracy per EM iteration", ("validation/accuracy",)),
        Chart("With a forced answer line", ("validation/forced_accuracy",)),
        Chart("Answers in the required format", ("validation/extraction_rate",)),
        Chart("Test accuracy of the chosen iteration", ("test/accuracy",)),
    ),
    "E-step": (
        Chart("Acceptance against chance", ("e_step/acceptance_rate", "e_step/chance_acceptance")),
        Chart("Rationale length (tokens)", ("e_step/rationale_tokens_mean", "validation/rationale_tokens_mean")),
        Chart("Tokens generated per accepted rationale", ("e_step/tokens_per_accepted",), log=True),
        Chart("Trivial and truncated rationales", ("e_step/trivial_rate", "e_step/truncated_rate")),
        Chart("Log marginal likelihood (where measured)", ("validation/log_marginal",)),
    ),
    "M-step": (
        Chart("NLL per token (nats), mean of the M-step", ("m_step/nll",)),
        Chart("NLL per token (nats), each optimizer step", ("optimizer/nll",), axis="optimizer_step"),
        Chart("Gradient norm", ("optimizer/grad_norm",), axis="optimizer_step", log=True),
        Chart("Seconds", ("e_step/seconds", "m_step/seconds", "validation/seconds")),
    ),
}


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

    tables = ws.Section(name="Rationales", panels=[wr.WeavePanelSummaryTable(table_name="rationales")], is_open=False)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=[panel(chart) for chart in charts], is_open=True) for title, charts in SECTIONS.items()]
        + [tables],
        settings=ws.WorkspaceSettings(x_axis="iteration", smoothing_weight=0),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config("dataset.name"), ws.Config("model.name"), ws.Config("sampler.display")]),
    )


def specification(made: Any) -> dict[str, Any]:
    """What `save()` would send."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def main(argv: list[str] | None = None) -> None:
    """The command: make the workspace, or write its specification."""
    parser = argparse.ArgumentParser(prog="python -m emreason.tracking.workspace", description="A W&B workspace for emreason's runs.")
    parser.add_argument("entity", help="your W&B user or team")
    parser.add_argument("--project", default="emreason", help="logger.wandb.project of the runs (default: emreason)")
    parser.add_argument("--name", default="EM: schemes compared", help="of the saved view")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="write the specification as JSON and send nothing")
    arguments = parser.parse_args(argv)
    try:
        made = workspace(arguments.entity, arguments.project, arguments.name)
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is not installed; run pip install 'emreason[dashboard]'.") from None
    if arguments.spec:
        write_atomic(arguments.spec, json.dumps(specification(made), indent=2) + "\n")
        print(f"Written: {arguments.spec}")
    else:
        print(f"Workspace: {made.save().url}")


if __name__ == "__main__":
    main()

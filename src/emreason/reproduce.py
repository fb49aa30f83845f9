"""`make reproduce`: the paper's comparison as sweeps one after another, then the report. Prints its plan first; can be stopped and resumed.

`python -m emreason.reproduce [gpu|cpu|tiny] [--qwen FOLDER] [--keep-models] [--plan]`
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from emreason import report, train
from emreason.runs.checks import quoted
from emreason.runs.summary import read_summary
from emreason.types import UserError

SCHEMES = ("rs-1", "rs-4", "star-1", "pps-1")  # M = 1 and 4 are ours
SEEDS = (1, 2, 3)
REAL = ("arc_challenge", "mmlu", "openbookqa")


@dataclass(frozen=True)
class Part:
    """A grid of runs.

    Attributes:
        models: option of the group `model` → name, as it is in the run folder's path.
        schemes: `sampler-budget`, as in the run folder's path.
        seconds: expected for one run, until one is finished and has been measured.
        overrides: what all runs share.
        kept: what stays of a run beside its results; 72 models of 3B are 450 GB.
    """

    title: str
    tag: str
    models: dict[str, str]
    datasets: tuple[str, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    seconds: float
    overrides: tuple[str, ...]
    kept: tuple[str, ...] = ("keep_model=false",)

    @property
    def folders(self) -> list[Path]:
        """Every run's folder."""
        grid = itertools.product(self.datasets, self.models.values(), self.schemes, self.seeds)
        return [Path("outputs", self.tag, d, m, s, f"seed={seed}") for d, m, s, seed in grid]

    def sweeps(self) -> list[list[str]]:
        """The overrides of an `emreason -m` for each scheme."""
        shared = [*self.overrides, *self.kept, f"tag={self.tag}", f"model={','.join(self.models)}", f"dataset={','.join(self.datasets)}"]
        seeds = f"seed={','.join(map(str, self.seeds))}"
        return [[*shared, seeds, "sampler={}".format(s.split("-")[0]), "sampler.budget={}".format(s.split("-")[1])] for s in self.schemes]


def parts(scale: str, qwen: str | None = None) -> list[Part]:
    """The grids of a scale.

    Raises:
        UserError: `qwen` is no model.
    """
    if scale == "gpu":
        models = {"llama32_3b": "llama32_3b", "qwen25_3b": "qwen25_3b"}
        return [Part("the paper's grid (time: a guess)", "paper", models, REAL, SCHEMES, SEEDS, 3600, ("experiment=paper",))]
    if scale == "tiny":
        tiny = ("experiment=smoke", "engine.dtype=float32", "trainer.max_epochs=1", "m_step.on_zero_accepted=skip")
        models = {"tiny_llama": "tiny_llama"}
        return [Part("a tiny random model", "paper-tiny", models, ("sums",), ("rs-8", "pps-1"), (1, 2), 5, tiny)]
    smollm2 = {"smollm2_135m": "smollm2_135m"}
    grids = [
        Part("SmolLM2-135M on sums", "paper-cpu", smollm2, ("sums",), SCHEMES, SEEDS, 100, ("experiment=demo_sums",)),
        Part("SmolLM2-135M on 32 real questions (the pipeline)", "paper-cpu", smollm2, REAL, SCHEMES, (1,), 40, ("experiment=demo_arc",)),
    ]
    if qwen:
        option, overrides = local_model(Path(qwen))
        shared = ("experiment=qwen_cpu", *overrides)
        schemes, datasets = (*SCHEMES, "unfiltered-1"), ("arc_challenge", "openbookqa")
        grids.append(Part("Qwen with LoRA, whole test splits", "paper-cpu", {option: "qwen"}, datasets, schemes, (1,), 4000, shared))
    return grids


def local_model(path: Path, asked: str = "QWEN", name: str = "qwen") -> tuple[str, tuple[str, ...]]:
    """Option of the group `model`, and overrides, for a GGUF file, a folder with one, or a checkpoint's folder; `asked`: what named it.

    Raises:
        UserError: it is none of these.
    """
    path = path.expanduser().resolve()
    files = [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file():
        option, found = "qwen25_1_5b", path
    elif len(files) == 1:
        option, found = "gguf", files[0]
    else:
        nothing = "is no .gguf file, no folder with one, and no checkpoint (config.json)"
        problem = f"holds {len(files)} .gguf files; name one" if files else nothing
        raise UserError(f"{asked}={path}: it {problem}.")
    return option, (f"model.name={name}", quoted(f"model.load.path={found}", sweep=False))


def show_plan(grids: Sequence[Part], console: Console) -> None:
    """Print the grids with the runs done and all, and the time left: from finished runs where there are any."""
    table = Table(title="Plan", show_lines=True)
    table.add_column("part", overflow="fold")
    for column in ("finished", "time left"):
        table.add_column(column, justify="right", no_wrap=True)
    total = 0.0
    for part in grids:
        summaries = [read_summary(folder) for folder in part.folders]
        seconds = [float(s["seconds"]) for s in summaries if s.get("status") == "finished"]
        left = (len(summaries) - len(seconds)) * (sum(seconds) / len(seconds) if seconds else part.seconds)
        total += left
        grid = {"": part.models.values(), "datasets ": part.datasets, "schemes ": part.schemes, "seeds ": part.seeds}
        words = " × ".join(name + ", ".join(map(str, values)) for name, values in grid.items())
        table.add_row(f"{part.title}\n  {words}", f"{len(seconds)} of {len(summaries)}", _duration(left))
    console.print(table)
    models = (
        "The trained models are kept"
        if not any(part.kept for part in grids)
        else "No trained models are kept (KEEP_MODELS=1 or --keep-models: all are)"
    )
    console.print(f"About {_duration(total)} left. It can be stopped at any moment; the same command goes on. {models}.")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def run(grids: Sequence[Part], console: Console) -> bool:
    """Run every sweep, whatever became of the one before, then the report; whether all runs finished."""
    for part in grids:
        for overrides in part.sweeps():
            console.print(f"\nemreason -m {' '.join(overrides)}", markup=False, highlight=False, soft_wrap=True)
            # in this process: a sweep of its own would live on when this one is killed
            sys.argv = ["emreason", "-m", *overrides]
            try:
                train.main()
            except SystemExit as end:
                if isinstance(end.code, int) and end.code > 128:  # a signal ends all of it
                    console.print("That was one sweep of the grid; this command, given again, goes on with all of it.")
                    raise
                if isinstance(end.code, str):
                    console.print(end.code, markup=False, highlight=False)
    folder = Path("outputs", grids[0].tag)
    report.main([str(folder), "--out", str(folder / "report")])
    return all(read_summary(path).get("status") == "finished" for part in grids for path in part.folders)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits 1 where some run did not finish."""
    parser = argparse.ArgumentParser(prog="python -m emreason.reproduce", description="The paper's comparison, in one command.")
    parser.add_argument("scale", nargs="?", default="gpu", choices=("gpu", "cpu", "tiny"))
    parser.add_argument("--qwen", metavar="FOLDER", help="cpu: also a local Qwen, a checkpoint's folder or a GGUF")
    parser.add_argument("--keep-models", action="store_true", help="leave model/ in every run folder: 6 GB each of 3B parameters")
    parser.add_argument("--plan", action="store_true", help="print the plan and stop")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        grids = [replace(part, kept=()) if arguments.keep_models else part for part in parts(arguments.scale, arguments.qwen)]
        show_plan(grids, console)
        if arguments.plan:
            return
        import torch

        if arguments.scale == "gpu" and not torch.cuda.is_available():
            raise UserError("There is no GPU here; `make reproduce SCALE=cpu` runs the same grid at the size of two CPU cores.")
    except UserError as error:
        sys.exit(f"error: {error}")
    if not run(grids, console):
        sys.exit("error: some runs did not finish (named above); the same command tries them again.")


if __name__ == "__main__":
    main()

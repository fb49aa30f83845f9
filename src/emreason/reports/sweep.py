"""What a Hydra multirun adds to its jobs: those of several ranks run apart, one that fails does not stop the others, and the comparison
is printed at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from emreason.progress import console
from emreason.runs.checks import check_config_for_secrets, ranks_started
from emreason.runs.console import EXPECTED, one_sentence
from emreason.runs.experiment import ranks_of
from emreason.runs.interrupt import leave_with_launcher
from emreason.runs.keys import flatten
from emreason.runs.summary import read_summary
from emreason.types import UserError, plain

if TYPE_CHECKING:
    from emreason.reports.reading import Run


def run_job(train: Callable[[DictConfig, Path], dict[str, Any]], cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """`train` as a job of a sweep; its summary, empty if it failed: the other jobs go on, and the sweep ends with this failure."""
    leave_with_launcher()
    if re.search("joblib|local", str(HydraConfig.get().launcher.get("_target_")), re.IGNORECASE):
        claim_gpus(cfg.trainer.get("devices", 1), HydraConfig.get().job.num)
    if several_ranks(cfg):
        return run_apart(folder, HydraConfig.get().overrides.task)
    try:
        summary = train(cfg, folder)
    except Exception as error:
        known = isinstance(error, EXPECTED)
        console().print(f"Failed: {folder}: {one_sentence(error)}" if known else traceback.format_exc(), highlight=False)
        _failed[str(folder)] = one_sentence(error) or type(error).__name__
        return {}
    console().print(f"Run folder: {folder}", highlight=False)
    return summary


def claim_gpus(wanted: Any, job: int) -> None:
    """Let this process see GPUs that no other job beside it has, until it ends; by the job's number where there are too few for that.

    Nothing where it is to have all of them (-1, auto), or somebody has chosen for it.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]  # NVML's count: CUDA reads this later
    if type(wanted) is not int or not 0 < wanted < len(gpus) or _claims:
        return
    free: list[str] = []
    for gpu in gpus:
        file = (Path(tempfile.gettempdir()) / f"emreason-{os.getuid()}-gpu-{gpu}.lock").open("w")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claims.append(file)
            free.append(gpu)
        if len(free) == wanted:
            break
    else:
        free = [gpus[(job * wanted + i) % len(gpus)] for i in range(wanted)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(free)


_claims: list[Any] = []
"""Lock files: open for as long as this process lives, whichever jobs a launcher gives it."""


def several_ranks(cfg: DictConfig) -> bool:
    """Whether Lightning would start processes for this job, unless SLURM or torchrun has started them already."""
    return ranks_of(cfg) > 1 and "LOCAL_RANK" not in os.environ and "SLURM_NTASKS" not in os.environ


def run_apart(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One job of a sweep as a command of its own; returns its summary.

    Lightning starts the other ranks with this process's own command line: inside a sweep each of them would begin the whole sweep again.
    """
    hydra = HydraConfig.get()
    flags = {"main": "--config-path", "command-line": "--config-dir"}  # by what Hydra calls the sources
    own = [f"{flags[source.provider]}={source.path}" for source in hydra.runtime.config_sources if source.provider in flags]
    options = [*own, f"--config-name={hydra.job.config_name}"]
    command = [sys.executable, "-m", "emreason.train", *options, *overrides, f'hydra.run.dir="{folder}"']
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # what it says on stderr is seen, its table is the sweep's
    if done.returncode != 0:
        _failed[str(folder)] = "what it said is above"
        return {}
    return read_summary(folder)


_failed: dict[str, str] = {}
"""Folders of this process's jobs that did not do what they were asked to, and why: an earlier run's summary may lie there."""


class SweepTable(Callback):
    """Refuses secrets; notes the jobs' folders as they start and compares them when the sweep ends; set as `hydra.callbacks.sweep`.

    Launchers may run jobs in other processes or on other machines: there a copy of this callback writes into the same file.
    """

    def __init__(self) -> None:
        self.jobs: Path | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse secrets, and stop after a plan, before Hydra makes the folder and saves the config.

        Raises:
            SystemExit: there is a secret; or the plan was printed, with exit code 0.
        """
        refuse_secrets(config)
        if config.get("plan"):
            show_plan(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the list of jobs.

        Raises:
            SystemExit: there is a secret in the config, a plan is asked for, jobs would share a folder or a place of the Hub, or torchrun
                or srun has started this sweep once per rank.
        """
        refuse_secrets(config)
        if config.get("plan"):
            raise SystemExit("error: plan=true tells what one run does; leave -m and lists of values out.")
        overrides: Any = OmegaConf.to_container(config.hydra.overrides)  # as written: they may hold ${hydra:job.num}
        if any(given.startswith("hydra.run.dir=") for given in overrides["hydra"]):
            raise SystemExit(
                "error: hydra.run.dir is the folder of one run; with -m give hydra.sweep.dir=…: each job has its own below it."
            )
        if config.task == "emreason.train.run" and (key := untold(config)):
            group = OmegaConf.is_config(OmegaConf.select(config, key))
            subdir = OmegaConf.to_container(config.hydra.sweep)["subdir"]  # type: ignore[index,call-overload]  # as written
            mend = (
                "Run a sweep for each of its options, with a tag=… of its own"
                if group
                else f"Put it into the tag: 'tag={config.tag}-${{{key}}}'"
            )
            raise SystemExit(
                f"error: {key} differs between jobs, but their folders are named by {subdir!r} without it: they would be one. {mend}."
            )
        hub: Any = OmegaConf.to_container(config.get("hub") or OmegaConf.create())  # as written
        if (to := hub.get("push")) and "${" not in str(to):
            raise SystemExit(
                f"error: hub.push={to}: every job would upload to it, over the one before; give each its own: "
                f"'hub.push={to}-${{sampler.name}}-${{seed}}'."
            )
        if (started := ranks_started() or 1) > 1:
            raise SystemExit(
                f"error: {started} processes were started, and each would begin the whole sweep. Start it without torchrun or srun: each "
                "job then starts its own ranks (trainer.devices=N). For jobs on several nodes use torchrun once a job, or "
                "hydra/launcher=slurm with hydra.launcher.nodes=M hydra.launcher.tasks_per_node=N trainer.num_nodes=M trainer.devices=N."
            )
        self.jobs = Path(config.hydra.sweep.dir).resolve() / f".jobs-{os.getpid()}"
        self.jobs.parent.mkdir(parents=True, exist_ok=True)
        self.jobs.write_text("")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Add the job's folder to the list: at its start, since a killed job has no end. Tasks other than training leave no run."""
        if self.jobs is not None and config.task == "emreason.train.run":  # not a single run
            with self.jobs.open("a") as file:
                file.write(f"{config.hydra.runtime.output_dir}\n")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Note a job that failed. A summary in its folder may be that of an earlier run, which it was refused to change."""
        if self.jobs is not None and (why := _failed.pop(str(Path(config.hydra.runtime.output_dir)), None)):
            with self.jobs.open("a") as file:
                file.write(f"{config.hydra.runtime.output_dir}\t{' '.join(why.split())}\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the table of all jobs.

        Raises:
            SystemExit: some job did not finish; names them. (Hydra turns any `Exception` of a callback into a warning and exits with 0.)
        """
        from emreason.reports.reading import collect
        from emreason.reports.writing import print_runs

        assert self.jobs is not None
        # a sweeper may try the same values twice
        noted = {Path(folder): why for line in self.jobs.read_text().splitlines() for folder, _, why in [line.partition("\t")]}
        self.jobs.unlink()
        ended = {folder: read_summary(folder) for folder in noted}
        unfinished = {
            folder: noted[folder] or summary.get("error", "not finished")
            for folder, summary in ended.items()
            if noted[folder] or summary.get("status") != "finished"
        }
        known = [folder for folder, summary in ended.items() if summary and (folder not in unfinished or summary["status"] != "finished")]
        if known:
            runs = collect(known)
            print_runs(runs, Console())
            print(f"Figures and the page: emreason-report {shlex.quote(str(_top(config, list(noted))))}")
            _to_wandb(config, runs)
        if unfinished:
            names = "; ".join(f"{folder}: {why}" for folder, why in unfinished.items())
            raise SystemExit(f"error: {len(unfinished)} of {len(noted)} jobs failed, the same command tries them again: {names}")


def _top(config: DictConfig, folders: Sequence[Path]) -> Path:
    """The sweep's folder; where an experiment or a tag of the jobs' own has put them elsewhere, the one above all of them."""
    top = Path(config.hydra.sweep.dir)
    return top if all(folder.is_relative_to(top.resolve()) for folder in folders) else Path(os.path.commonpath(folders))


def untold(config: DictConfig) -> str | None:
    """A key of which this sweep has several values and which does not stand in the jobs' folders, if there is one."""
    raw: Any = OmegaConf.to_container(config)  # as written
    flat, told = flatten(raw), set[str]()
    texts = [raw["hydra"]["sweep"]["dir"], raw["hydra"]["sweep"]["subdir"]]
    while texts:
        new = {name for name in re.findall(r"\$\{(?:oc\.select:)?([\w.:]+)", texts.pop()) if name not in told}
        told |= new
        texts += [value for name in new if isinstance(value := flat.get(name), str)]
    if any(name.startswith(("hydra:job", "hydra.job")) for name in told):
        return None  # by number, or by all that is overridden
    for override in OverridesParser.create().parse_overrides(raw["hydra"]["overrides"]["task"]):
        key = override.key_or_group
        anything = "/" in key or key == "experiment" or (key not in raw and "." not in key)  # such groups set what they like
        if override.is_sweep_override() and not anything and not any(name == key or name.startswith(f"{key}.") for name in told):
            return key
    return None


def _to_wandb(config: DictConfig, runs: Sequence[Run]) -> None:
    """The comparison of a sweep that logs to W&B, beside its runs."""
    node = OmegaConf.select(config, "logger.wandb")
    if node is None:
        return
    from emreason.reports.comparison import compare
    from emreason.reports.writing import comparison_records
    from emreason.tracking.dashboard import publish_comparison

    about = {key: node[key] for key in ("project", "entity", "group", "offline")}
    try:
        publish_comparison(Path(config.hydra.sweep.dir).resolve(), comparison_records(compare(runs)), **about)
    except Exception as error:  # the runs are done; Hydra would forget which of them failed
        console().print(f"The comparison was not sent to W&B: {one_sentence(error)}", highlight=False)


def refuse_secrets(config: DictConfig) -> None:
    """Raises SystemExit where the config holds one."""
    try:
        check_config_for_secrets(config)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def show_plan(config: DictConfig) -> None:
    """Print what a run would do, and leave.

    Raises:
        SystemExit: always; code 0 where there is a plan. (After any other exception of a callback Hydra would begin the run.)
    """
    from emreason.runs.plan import plan

    try:
        run = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        lines = plan(run, Path(config.hydra.run.dir)).split("\n")
    except EXPECTED as error:
        raise SystemExit(f"error: {one_sentence(error)}") from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error
    Console().print(Text("\n".join(map(plain, lines))), soft_wrap=True)
    raise SystemExit(0)

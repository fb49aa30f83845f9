"""`emreason [overrides]`: one EM run, or with `-m` a sweep of them. `train(cfg, folder)` is the same as a function, and
`emreason.run(*overrides)` from Python."""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from emreason.models.memory import out_of_memory_told, release_memory
from emreason.progress import console, doing, rank
from emreason.reports.sweep import run_job
from emreason.runs import help
from emreason.runs.console import EXPECTED, one_sentence, report_errors
from emreason.runs.experiment import CONF, Experiment, Settings, compose, identity, read
from emreason.runs.journal import Journal, locked, write_atomic, write_json
from emreason.runs.summary import Summary, best_iteration, ended, iterations_wanted, read_config, read_summary
from emreason.types import UserError

if TYPE_CHECKING:
    import lightning as L


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """One EM run in `folder`, continued if it was begun there before. Returns the summary.

    Raises:
        UserError: something in the configuration, the data or the run cannot work; the summary's status is then `failed`.
    """
    folder = folder.resolve()
    first = rank() == 0
    # where torchrun or SLURM has started the other ranks, what ends the first at once must end them: they would wait for it
    with locked(folder) if first else contextlib.nullcontext():
        try:
            settings = read(cfg)
        except EXPECTED as error:
            if not read_summary(folder):  # a run that never began is a failed one; a begun one is left as it is
                Summary(folder, identity(cfg)).update(status="failed", error=one_sentence(error))
            raise
        if settings.overwrite and first:
            _clear(folder)
        asked = (settings.text, settings.dataset, settings.max_epochs, settings.token_budget)
        if done := None if settings.overwrite else ended(folder, *asked):
            if first:
                console().print(f"Finished already: {folder}", highlight=False)
            own = OmegaConf.select(read_config(folder / "config.yaml"), "keep_model")
            # a model that is there was kept on purpose, unless the run itself was to keep none and its upload failed
            return _left(settings, folder, done, "checkpoints", *(["model"] if own is False else []))
        if first:
            write_atomic(folder / "config.yaml", settings.text)
        return _left(settings, folder, _train(settings, folder), "model", "checkpoints")


def launch(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """`emreason.run`: what the command `emreason` does with these overrides, from Python; returns the run's summary.

    Args:
        config_dir: a folder with configs of one's own, as `--config-dir`.

    Raises:
        UserError, HydraException: as `train`; or it is something that the command alone does.
    """
    from emreason.runs.plan import TRAIN

    cfg, folder = compose(overrides, config_dir=config_dir)
    if cfg.task != TRAIN or cfg.plan:
        raise UserError(f"emreason.run is an EM run; {'plan=true' if cfg.plan else f'the task {cfg.task}'} is for the command `emreason`.")
    write_atomic(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))  # as the command does
    try:
        return train(cfg, folder)
    except SystemExit as end:  # what Lightning makes of Ctrl-C: right for a command, not for a notebook
        raise KeyboardInterrupt from end
    finally:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which Lightning has turned off


def _left(settings: Settings, folder: Path, summary: dict[str, Any], *names: str) -> dict[str, Any]:
    """The summary of a finished run, whose model is on the Hub if that is wanted; of the folders `names` those not to be kept are gone."""
    if rank() > 0:
        return summary
    if settings.push is not None and (summary.get("pushed") or {}).get("to") != settings.push:
        from emreason.tracking.leaving import push

        if not (folder / "model").is_dir():
            raise UserError(f"hub.push={settings.push}: {folder} kept no model (keep_model=false); overwrite=true trains it again.")
        with doing(f"Uploading {folder / 'model'} to {settings.push}"):
            summary = summary | {"pushed": {"to": settings.push, "commit": push(folder / "model", settings.push, settings.private)}}
        write_json(folder / "summary.json", summary)
    for name in names:
        if not getattr(settings, f"keep_{name}"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return summary


def _train(settings: Settings, folder: Path) -> dict[str, Any]:
    summary = Summary(folder, settings.identity, anew=settings.overwrite)
    summary.update(status="running")
    experiment: Experiment | None = None
    try:
        experiment = settings.build(summary.values["dtype"])
        dataset = experiment.dataset
        summary.update(dtype=str(experiment.dtype).removeprefix("torch."), overlap=dataset.overlap(), data=dataset.fingerprint())
        with doing(f"Run in {folder}", at_once=False):  # what no bar covers is heard as this
            _run(settings, folder, experiment, summary)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        summary.update(status="interrupted")
        raise
    except BaseException as error:
        summary.update(status="failed", error=one_sentence(error) or type(error).__name__)
        if isinstance(error, FloatingPointError):
            raise UserError(f"{error}; in a new run (tag=…) lower optimizer.lr, or use engine.dtype=float32.") from error
        if re.match("Early stopping conditioned on metric", str(error)):
            wrong, *known = re.findall("`+([^` ]+)`+", str(error))
            there = ", ".join(name for name in known if "/" in name)
            raise UserError(f"callbacks: nothing logs {wrong}, which early stopping monitors; it may be one of {there}.") from error
        if not isinstance(error, UserError) and re.search(r"(closed|reset) by peer", str(error)):  # what gloo says of a rank that died
            raise UserError("Another rank of this run has ended; what it said is above. The same command resumes the run.") from error
        raise
    finally:
        from emreason.tracking.dashboard import finish

        finish(summary.values["status"])
        experiment = None
        release_memory()  # a sweep's next job starts without this one's model
    return summary.values


@out_of_memory_told(
    "lower m_step.tokens_per_batch, set m_step.gradient_checkpointing=true, train an adapter (peft=lora) or shard (trainer.strategy=shard)"
)
def _run(settings: Settings, folder: Path, experiment: Experiment, summary: Summary) -> None:
    import lightning as L

    from emreason.em.datamodule import RationaleDataModule
    from emreason.em.e_step import EStep
    from emreason.em.module import EMModule
    from emreason.models.loading import export
    from emreason.reports.pages.card import write_card
    from emreason.tracking.dashboard import Iterations, wandb_runs
    from emreason.tracking.divergence import Divergence
    from emreason.tracking.leaving import write_chats
    from emreason.tracking.m_step_bar import MStepBar
    from emreason.tracking.recorder import Checkpoints, Recorder, write_predictions
    from emreason.tracking.samples import Samples

    L.seed_everything(settings.seed, workers=True, verbose=False)
    checkpoints = Checkpoints(summary, folder)
    done = 0 if settings.overwrite else checkpoints.restore()
    asked, questions = settings.evaluation, experiment.dataset.questions
    datamodule = RationaleDataModule(questions("validation"), questions("test"))
    parts = (experiment.model, experiment.tokenizer, experiment.engine, experiment.prompts)
    module = EMModule(*parts, settings.optimizer, settings.m_step, asked, settings.seed, settings.keep_checkpoints)
    trainer = _trainer(
        settings,
        folder,
        keep_below=done,
        max_epochs=iterations_wanted(summary.values["iterations"][:done], settings.max_epochs, settings.token_budget),
        callbacks=[
            *settings.callbacks,
            EStep(settings.scheme, questions("train"), Journal(folder), settings.seed, "faithfulness" in asked.diagnostics),
            *([Divergence(asked.bound_questions, settings.seed)] if "kl" in asked.diagnostics else []),
            Recorder(summary, folder, tuple(asked.baseline), asked.few_shot, settings.token_budget),
            Iterations(summary, folder, settings.scheme.display, settings.rationale_rows),
            MStepBar(),
            *([] if settings.quiet else [Samples(folder)]),
            checkpoints,
        ],
    )
    trainer.fit(module, datamodule, ckpt_path=checkpoints.last if done else None, weights_only=True)
    trainer.test(module, datamodule, ckpt_path=checkpoints.best, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        write_predictions(folder, "test", module.predictions["test"])
        with doing(f"Writing {folder / 'model'}", at_once=False):
            _forget_evaluations(folder)
            export(module.model, module.tokenizer, folder / "model", settings.merge)
        summary.update(test=module.scores["test"], best_iteration=best_iteration(summary.values["iterations"]))
        write_card(folder)
        write_chats(folder, len(summary.values["iterations"]), questions("train"), experiment.prompts)
        for run in wandb_runs(trainer):
            run.publish(summary.values)
        summary.update(status="finished")


def _trainer(settings: Settings, folder: Path, keep_below: int, max_epochs: int, callbacks: list[Any]) -> L.Trainer:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from emreason.em.checkpoints import AtomicCheckpointIO
    from emreason.em.ranks import Ranks
    from emreason.tracking.recorder import JsonlLogger

    several = {"strategy": Ranks(settings.sharding)} if settings.several_ranks else {}
    loggers = [JsonlLogger(folder, keep_below=keep_below), *settings.loggers(folder)]
    make = functools.partial(
        settings.trainer,
        max_epochs=max_epochs,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        reload_dataloaders_every_n_epochs=1,  # one E-step per epoch
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # questions are sharded here
        inference_mode=False,  # tensors made in a generation must not poison the M-step
        log_every_n_steps=1,
        **several,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer: L.Trainer = make()
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:  # the third: a SLURM job as Lightning wants none
        raise UserError(f"trainer: {error}") from error
    # its SIGTERM handler waits for all ranks and its SLURM handler saves in mid-iteration; `interrupt` ends at once, and nothing is lost
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _clear(folder: Path) -> None:
    from emreason.tracking.dashboard import RUN_ID
    from emreason.tracking.leaving import CHATS
    from emreason.tracking.trackers import MLFLOW_ID, TRACKIO_ID

    for name in ("rationales", "predictions", "checkpoints", "model", "csv", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "config.yaml", CHATS, RUN_ID, MLFLOW_ID, TRACKIO_ID):
        (folder / name).unlink(missing_ok=True)
    _forget_evaluations(folder)


def _forget_evaluations(folder: Path) -> None:
    """Of a model that another one replaces."""
    for file in [*folder.glob("evaluation_*.json"), *folder.glob("predictions/evaluation_*.jsonl")]:
        file.unlink()


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def _task(cfg: DictConfig) -> float | None:
    """The Hydra task: what `task` in the config names, `run` below unless an experiment says otherwise."""
    return hydra.utils.get_method(cfg.task)(cfg, Path(HydraConfig.get().runtime.output_dir))


def run(cfg: DictConfig, folder: Path) -> float | None:
    """Train and print the run's table; returns validation accuracy, what sweepers optimise."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        summary = run_job(train, cfg, folder)
    else:
        summary = train(cfg, folder)
        if rank() == 0:
            from emreason.reports.reading import collect
            from emreason.reports.writing import print_runs

            print_runs(collect([folder]), Console())
            near = shlex.quote(str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder))
            evaluate = f"emreason-eval run={near} samples=8, or " if (folder / "model").is_dir() else ""
            print(f"Run folder: {folder}\nNext: {evaluate}emreason-report {near}")
    return max((r["validation"]["accuracy"] for r in summary.get("iterations", []) if r.get("validation")), default=None)


def main() -> None:
    """Console script `emreason`."""
    if help.asked_for(sys.argv[1:]):
        print(help.text("train"), end="")
    else:
        report_errors(_task)


if __name__ == "__main__":
    main()

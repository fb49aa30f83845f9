"""Keys that nothing reads, and arguments of the trainer that do not fit an EM iteration: told before data or a model is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from emreason.types import UserError

_GROUPS = {"model", "dataset", "sampler", "engine", "peft", "trainer"}
EVALUATION_KEYS = _GROUPS | {"run", "split", "method", "max_new_tokens", "examples", "samples", "bound", "seed", "data_root", "predictions"}
TRAIN_KEYS = _GROUPS | {
    *(
        "task",
        "seed",
        "tag",
        "data_root",
        "overwrite",
        "plan",
        "quiet",
        "m_step",
        "evaluation",
        "token_budget",
        "keep_checkpoints",
        "keep_model",
        "rationale_rows",
        "hub",
    ),
    *("optimizer", "logger", "callbacks", "trial"),  # trial: where a sweeper names its runs
}
DATA_PATHS = ("dataset.path", "dataset.load.path", "dataset.load.train", "dataset.load.validation", "dataset.load.test")
"""Where files of data lie; what they hold has a fingerprint."""
MAY_CHANGE = (
    "task",
    "trainer",
    "token_budget",
    "logger",
    "rationale_rows",
    "hub",
    "peft.merge",
    "evaluation.diagnostics",
    "overwrite",
    "quiet",
    "plan",
    "keep_checkpoints",
    "keep_model",
    "data_root",
    "dataset.load.data_root",
    *DATA_PATHS,
    "engine.max_batch",
    "engine.memory",
    "engine.shared",
    "engine.server",
    "engine.cuda_graphs",
    "m_step.tokens_per_batch",
    "m_step.gradient_checkpointing",
    "m_step.on_zero_accepted",
    "callbacks.early_stopping.monitor",
    "callbacks.early_stopping.mode",
    "hydra",
)
"""Config keys that a resumed run may change: they do not alter what is sampled or learned, or only where it ends."""

SECTIONS = {
    "model": {"name", "load"},
    "peft": {"name", "add", "merge"},
    "hub": {"push", "private"},
    "dataset.limit": {"train", "validation", "test"},
    "dataset.load.splits": {"train", "validation", "test"},
}
"""Keys of the sections that are no arguments of a `_target_`."""

TRAINER_KEYS = {
    *("max_epochs", "accelerator", "devices", "num_nodes", "strategy"),
    *("deterministic", "benchmark", "detect_anomaly"),
}
INSTEAD = {
    "accumulate_grad_batches": "m_step.batch_size, which is the number of questions per step, however they are batched",
    "gradient_clip_val": "m_step.max_grad_norm",
    "gradient_clip_algorithm": "m_step.max_grad_norm",
    "precision": "engine.dtype, which sampling and training share",
    "max_steps": "trainer.max_epochs, the EM iterations, and m_step.epochs",
    "min_steps": "trainer.max_epochs, the EM iterations, and m_step.epochs",
    "min_epochs": "trainer.max_epochs",
    "max_time": "token_budget, which ends a run after a whole iteration",
    "limit_train_batches": "dataset.limit.train",
    "limit_val_batches": "dataset.limit.validation",
    "limit_test_batches": "dataset.limit.test",
    "limit_predict_batches": "dataset.limit.test",
    "overfit_batches": "dataset.limit.train",
    "fast_dev_run": "experiment=smoke, or dataset.limit.* and trainer.max_epochs=1",
    "check_val_every_n_epoch": "dataset.limit.validation for a cheaper validation; the best iteration is chosen by it, so each has one",
    "val_check_interval": "m_step.epochs for shorter iterations; validation follows each",
    "num_sanity_val_steps": "evaluation.baseline, the splits measured before the first iteration",
    "reload_dataloaders_every_n_epochs": "m_step.epochs for more passes over what one E-step has sampled",
    "log_every_n_steps": "nothing: every step is logged",
    "logger": "logger=csv, tensorboard, wandb, trackio, mlflow, or several: logger=[csv,wandb]",
    "callbacks": "callbacks=early_stopping, or a YAML of your own",
    "plugins": "nothing: checkpoints are written by the program's own plugin",
    "default_root_dir": "hydra.run.dir, the run folder",
    "profiler": "py-spy, or torch.profiler in a callback of your own",
    "enable_checkpointing": "keep_checkpoints; while a run goes on it needs them",
    "enable_progress_bar": "nothing: the program shows its own",
    "enable_model_summary": "nothing: the table names the model",
    "enable_autolog_hparams": "logger=none",
    "use_distributed_sampler": "nothing: the program shards the questions itself",
    "inference_mode": "nothing: it is off, as sampling and training share their weights",
    "sync_batchnorm": "nothing: language models have no batch norm",
    "barebones": "logger=none and evaluation.baseline=[]",
    "model_registry": "logger=wandb, which keeps the model as an artifact",
}
"""Arguments of Lightning's Trainer that would break an EM iteration or do nothing here, and what does their work."""


EXTRAS = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "TrackioRun": ("trackio",),
    "mlflow_run": ("mlflow",),
    "VllmEngine": ("vllm",),
}
"""What needs a package that is not always there."""


def check_keys(cfg: DictConfig, known: Collection[str]) -> None:
    """Refuse keys that nothing reads, and arguments that no `_target_` takes.

    Args:
        known: keys at the top of the config.

    Raises:
        UserError: names the key, and one that is like it.
    """
    check_known(cfg, known)
    for key in known:
        _check_names(key, cfg.get(key))


def check_known(cfg: DictConfig, known: Collection[str]) -> None:
    """The part of `check_keys` that imports no `_target_`."""
    raw = OmegaConf.to_container(cfg)  # nothing is resolved
    assert isinstance(raw, dict)
    named = " ".join(value for value in _strings(raw) if "${" in value)
    unread = [str(key) for key in raw if key not in known and key != "hydra" and not re.search(rf"\b{re.escape(str(key))}\b", named)]
    for section, keys in SECTIONS.items():
        node = OmegaConf.select(cfg, section)
        unread += [f"{section}.{key}" for key in (node if OmegaConf.is_dict(node) else ()) if key not in keys]
    if unread:
        command = "emreason-eval" if known == EVALUATION_KEYS else "emreason"
        section, _, last = unread[0].rpartition(".")
        like = difflib.get_close_matches(last, SECTIONS.get(section, known), n=1)
        guess = f"; did you mean {like[0]}?" if like else ""
        raise UserError(f"{unread[0]}: nothing reads this key{guess}; every key: {command} --cfg job")


def _strings(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)
        if isinstance(item, str):
            yield item


def _check_names(key: str, node: Any) -> None:
    """The names under `key` are arguments of its `_target_`: told before the model is loaded and the target called. Those below it, too."""
    if not OmegaConf.is_dict(node):
        return
    for name in node:
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            _check_names(f"{key}.{name}", node[name])
    if "_target_" not in node:
        return
    try:
        target = hydra.utils.get_object(node["_target_"])
        inspect.signature(target).bind_partial(**{str(k): None for k in node if not str(k).startswith("_")})
    except Exception as error:  # importing a module can raise anything
        raise UserError(f"{key} ({node['_target_']}): {error}.") from error
    name = node["_target_"].rpartition(".")[2]
    if name in EXTRAS and not node.get("server") and not any(importlib.util.find_spec(package) for package in EXTRAS[name]):
        raise UserError(f"{key} ({name}): it needs the package {EXTRAS[name][0]}: pip install 'emreason[{EXTRAS[name][0]}]'.")


def check_trainer(trainer: DictConfig) -> None:
    """Only those of Lightning's arguments that fit a loop in which an epoch is an EM iteration.

    Raises:
        UserError: names what does the work of another.
    """
    for key in trainer:
        name = str(key)
        if name in INSTEAD:
            raise UserError(f"trainer.{name}: it does not fit a loop in which an epoch is an EM iteration; use {INSTEAD[name]}.")
        if name not in TRAINER_KEYS and not name.startswith("_"):
            raise UserError(f"trainer.{name}: it must be one of {', '.join(sorted(TRAINER_KEYS))}.")


def within(key: str, keys: Collection[str]) -> bool:
    """Whether a dotted key is one of `keys`, or lies below one of them."""
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value}

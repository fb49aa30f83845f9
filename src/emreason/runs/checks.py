"""What a config may hold, key by key: checked before data or a model is loaded, so that a slip costs a second and not an hour."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emreason.runs.keys import EVALUATION_KEYS, TRAIN_KEYS, check_keys, check_trainer, flatten
from emreason.schemes.samplers import CHOOSE, WEIGH
from emreason.types import UserError


@dataclass(frozen=True)
class Allowed:
    """What a key may hold, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int | None = None) -> Allowed:
    """A whole number from `low` to `high`."""
    words = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Allowed(words, lambda v: type(v) is int and low <= v and (high is None or v <= high))


def number(low: float, high: float = math.inf, *, above: bool = False) -> Allowed:
    """A number from `low` (with `above`: above it) to `high`."""
    words = f"a number above {low:g}" if above else f"a number of at least {low:g}"
    words += "" if high == math.inf else f" and at most {high:g}"
    return Allowed(words, lambda v: type(v) in (int, float) and math.isfinite(v) and (low < v if above else low <= v) and v <= high)


def one_of(*values: Any) -> Allowed:
    """One of a few values."""
    shown = ", ".join("null" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return Allowed(f"one of {shown}", lambda v: any(v is w or (type(v) is type(w) and v == w) for w in values))


def or_null(allowed: Allowed) -> Allowed:
    """The same, or null."""
    return Allowed(f"{allowed.words}, or null", lambda v: v is None or allowed.holds(v))


def some_of(*names: str) -> Allowed:
    """A list of some of these."""
    return Allowed(f"a list of {' and '.join(names)}, or []", lambda v: OmegaConf.is_list(v) and all(name in names for name in v))


FLAG = one_of(True, False)
SHARDING = ("shard", "hybrid")
"""What `trainer.strategy` may say to train pieces of the weights."""

_BETAS = Allowed(
    "two numbers in [0, 1)",
    lambda v: v is None or (OmegaConf.is_list(v) and len(v) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in v)),
)
_DEVICES = Allowed(
    "the number of devices to use, -1 or auto for all of them", lambda v: v == "auto" or (type(v) is int and (v >= 1 or v == -1))
)
ALLOWED = {
    "seed": whole(0, 2**32 - 1),
    "overwrite": FLAG,
    "model.load.trust_remote_code": FLAG,
    "dataset.load.skip_unusable": FLAG,
    "quiet": FLAG,
    "plan": FLAG,
    "keep_checkpoints": FLAG,
    "keep_model": FLAG,
    "rationale_rows": whole(1),
    "hub.push": or_null(Allowed("ORG/NAME, a repository of the Hub", lambda v: bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(v))))),
    "hub.private": FLAG,
    "peft.merge": FLAG,
    "sampler.budget": whole(1),
    "sampler.temperature": number(0),
    "sampler.top_p": number(0, 1, above=True),
    "sampler.max_new_tokens": whole(1),
    "sampler.worked_examples": whole(0),
    "sampler.worked_examples_iterations": or_null(whole(0)),
    "sampler.stop_at_answer": FLAG,
    "sampler.reject_trivial": FLAG,
    "sampler.keep": whole(1),
    "sampler.distinct": FLAG,
    "sampler.weigh": one_of(*WEIGH),
    "sampler.choose": one_of(*CHOOSE),
    "sampler.share": number(0, 1, above=True),
    "sampler.truncate": or_null(number(1)),
    "m_step.epochs": whole(1),
    "m_step.batch_size": whole(1),
    "m_step.tokens_per_batch": whole(1),
    "m_step.init": one_of("previous", "base"),
    "m_step.optimizer": one_of("carry", "reset"),
    "m_step.normalize": one_of("questions", "rationales", "tokens"),
    "m_step.on_zero_accepted": one_of("error", "skip"),
    "m_step.max_grad_norm": or_null(number(0, above=True)),
    "m_step.warmup_steps": whole(0),
    "m_step.decay": FLAG,
    "m_step.gradient_checkpointing": FLAG,
    "evaluation.max_new_tokens": whole(1),
    "evaluation.few_shot": whole(0),
    "evaluation.forced": FLAG,
    "evaluation.bound": whole(0),
    "evaluation.bound_questions": whole(1),
    "evaluation.diagnostics": some_of("kl", "faithfulness"),
    "token_budget": or_null(whole(1)),
    "bound": whole(0),
    "evaluation.baseline": some_of("validation", "test"),
    "dataset.drop_overlap": FLAG,
    "dataset.answer_as": one_of("letter", "text"),
    "dataset.max_choice_words": or_null(whole(1)),
    "dataset.limit.train": or_null(whole(1)),
    "dataset.limit.validation": or_null(whole(1)),
    "dataset.limit.test": or_null(whole(1)),
    "model.load.quantization": one_of("nf4", "int8", None),
    "engine.max_batch": whole(1),
    "engine.dtype": one_of("auto", "float32", "bfloat16"),
    "engine.cuda_graphs": FLAG,
    "logger.wandb.offline": or_null(FLAG),
    "logger.wandb.artifacts": FLAG,
    "optimizer.lr": number(0),
    "optimizer.fused": or_null(FLAG),
    "optimizer.weight_decay": number(0),
    "optimizer.betas": _BETAS,
    "peft.add.r": whole(1),
    "peft.add.alpha": number(0, above=True),
    "peft.add.dropout": number(0, 1),
    "trainer.max_epochs": whole(1),
    "trainer.devices": _DEVICES,
    "trainer.num_nodes": whole(1),
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.deterministic": one_of(True, False, "warn", None),
    "trainer.benchmark": or_null(FLAG),
    "trainer.detect_anomaly": FLAG,
    "split": one_of("train", "validation", "test"),
    "method": one_of("generate", "loglikelihood"),
    "max_new_tokens": whole(1),
    "examples": whole(0),
    "samples": whole(0),
    "predictions": FLAG,
}
"""Keys of `conf/train.yaml` and `conf/evaluate.yaml`. Settings that depend on each other are checked where they are used."""


def check_values(cfg: DictConfig) -> None:
    """Check the whole config.

    Raises:
        UserError: a value is not allowed, or is a secret; the message names the key and what is allowed.
    """
    check_plain(cfg)
    check_keys(cfg, EVALUATION_KEYS if "method" in cfg else TRAIN_KEYS)
    check_trainer(cfg.trainer)
    _check_devices(cfg)


def check_plain(cfg: DictConfig) -> None:
    """What can be told of a config at once: nothing large is imported.

    Raises:
        UserError: as `check_values`.
    """
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith("hydra."))
    if missing:
        raise UserError(f"{missing[0]} must be given: {missing[0]}=…")
    check_config_for_secrets(cfg)
    for key in ("model", "dataset", "dataset.limit", "sampler", "engine", "peft", "trainer", "m_step", "evaluation", "optimizer", "hub"):
        node = OmegaConf.select(cfg, key, default=_ABSENT)
        if node is not _ABSENT and not OmegaConf.is_dict(node):
            raise UserError(f"{key}={'null' if node is None else node}: these are several keys, {key}.…=…; see `emreason --cfg job`.")
    for key, allowed in ALLOWED.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is not _ABSENT and not allowed.holds(value):
            raise UserError(f"{key}={'null' if value is None else value}: it must be {allowed.words}.")


_ABSENT = object()


def _check_devices(cfg: DictConfig) -> None:
    """Devices that are there, and strategies under which the M-step's own gradient sum over ranks is right."""
    accelerator, devices = cfg.trainer.get("accelerator", "auto"), cfg.trainer.get("devices", 1)
    strategy = cfg.trainer.get("strategy", "auto")
    if strategy not in ("auto", "ddp", *SHARDING):
        raise UserError(
            f"trainer.strategy={strategy}: it must be auto, ddp, shard (what is trained in pieces over all ranks, by FSDP2) or hybrid "
            "(over those of a node); DeepSpeed and other ways of Lightning's do not fit an M-step that sums gradients itself."
        )
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and not gpus:
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no GPU that PyTorch can use; use cpu or auto.")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    # a CPU "device" is a process; two may share a core, for tests
    there = gpus if on_gpu else max(os.cpu_count() or 1, 2)
    if type(devices) is int and devices > there:
        raise UserError(f"trainer.devices={devices}: this machine has {there} {'GPUs' if on_gpu else 'CPU cores'}; use at most {there}.")
    every = gpus if on_gpu else 1  # what Lightning takes for auto
    _check_nodes(cfg.trainer.get("num_nodes", 1), every if devices in (-1, "auto") else devices)


def ranks_started() -> int | None:
    """How many processes torchrun, or srun in a SLURM job, has started for this command; None where neither has."""
    torchrun = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    started = torchrun or os.environ.get("SLURM_STEP_NUM_TASKS")
    return int(started) if started else None


def _check_nodes(nodes: int, devices: int) -> None:
    """Processes of other nodes are there, and as many as the trainer will wait for."""
    started = ranks_started()
    if nodes > 1 and started is None and "SLURM_NTASKS" not in os.environ:
        raise UserError(f"trainer.num_nodes={nodes}: start the same command on every node with torchrun, or with srun in a SLURM job.")
    if "TORCHELASTIC_RUN_ID" in os.environ and started != nodes * devices:
        here, machines = os.environ.get("LOCAL_WORLD_SIZE", started), os.environ.get("GROUP_WORLD_SIZE", 1)
        raise UserError(
            f"torchrun has started {started} processes, but trainer.num_nodes × trainer.devices is {nodes} × {devices}; "
            f"set trainer.num_nodes={machines} trainer.devices={here}."
        )


_SECRET = re.compile(r"(^|[._])(api_?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)


_PATHS = re.compile(
    r"\+{0,2}(dataset\.path|dataset\.load\.(train|validation|test|path)|data_root|model\.load\.path|run|hydra\.(run|sweep)\.dir)"
)

_GROUPS = {"model", "dataset", "sampler", "engine", "peft", "optimizer", "trainer", "logger", "callbacks", "experiment"}

_COLUMNS = re.compile(r"dataset\.columns\.\w+")


def quoted(argument: str, sweep: bool = True) -> str:
    """An override in the quotes that Hydra wants around its value: a path, whatever is in it, or a text with `=` or signs that Hydra's
    grammar does not know. In a sweep commas between paths separate its jobs, unless there is a file of that name.
    """
    key, is_set, value = argument.partition("=")
    if not is_set or argument.startswith("-") or re.match(r"""['"]|(choice|glob|sort|shuffle)\(|null$|\s*$""", value) or "${" in value:
        return argument
    if _PATHS.fullmatch(key) or (_COLUMNS.fullmatch(key) and not value.startswith("[")):
        parts = value.split(",") if sweep and not Path(value).expanduser().exists() else [value]
        return f"{key}={','.join(map(_in_quotes, parts))}"
    odd = re.search(r"[^\w\s\-./\\:+%@?|]", value) or not value.isascii()
    return f"{key}={_in_quotes(value)}" if odd and not re.search(r"""['"\[\]{}(),$]""", value) else argument


def _in_quotes(text: str) -> str:
    """Hydra halves the backslashes before a quotation mark and keeps all others."""
    plain = re.fullmatch(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_./-]*", text) and text.lower() not in ("true", "false", "null", "nan", "inf")
    if plain or re.match(r"""['"]""", text):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def check_arguments(arguments: Sequence[str]) -> None:
    """Check a command line before Hydra reads it, and saves it in `.hydra/`.

    Raises:
        UserError: an override without a key, of a whole group by null, or of a secret.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if not key:
            raise UserError(f"{argument}: an override is KEY=VALUE.")
        if value == "null" and key in _GROUPS:  # of which Hydra makes a traceback
            raise UserError(f"{argument}: a group takes one of its options by name; `emreason --help` lists them.")
    check_no_secret(argument.partition("=")[0].lstrip("+~") for argument in arguments)


def check_config_for_secrets(cfg: DictConfig) -> None:
    """Refuse a config with a secret in it, wherever it came from.

    Raises:
        UserError: names the key and where a secret belongs.
    """
    nodes = {key: cfg[key] for key in ("logger", "model", "engine") if OmegaConf.is_config(cfg.get(key))}
    values = flatten({key: OmegaConf.to_container(node) for key, node in nodes.items()})  # nothing is resolved
    check_no_secret(key for key, value in values.items() if value is not None)


def check_no_secret(keys: Iterable[str]) -> None:
    """Refuse keys that look like secrets: a run's config is saved, shown and sent to loggers.

    Raises:
        UserError: names the key and where a secret belongs.
    """
    for key in keys:
        if _SECRET.search(key):
            raise UserError(
                f"{key}: a secret must not be in the config, which is saved beside the results; "
                "set it in the environment (WANDB_API_KEY, HF_TOKEN) or log in with `wandb login` or `hf auth login`."
            )

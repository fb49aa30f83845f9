"""From a config to its parts: dataset, prompts, model, engine. Shared by training and evaluation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from emreason.models.memory import keep_freed_memory, out_of_memory_told, spare_imports
from emreason.models.sizes import describe
from emreason.progress import doing, rank, say
from emreason.questions.datasets import SPLITS, Dataset
from emreason.questions.prompts import Prompts
from emreason.runs.checks import SHARDING, check_arguments, check_plain, check_values, quoted
from emreason.runs.console import find_here, quiet
from emreason.runs.needs import free_on_host, needs
from emreason.schemes.samplers import Scheme
from emreason.types import Engine, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_INSTALLED = Path(__file__).resolve().parents[1] / "conf"
CONF = str(_INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[3] / "conf")
"""The config tree: inside the package once installed, at the top of the repository in a checkout."""


@dataclass
class Experiment:
    """The parts of a run or an evaluation that take long to make."""

    dataset: Dataset
    prompts: Prompts
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Settings:
    """What the config says of a run, read and checked before anything is loaded.

    Attributes:
        text: all of it, resolved, as YAML.
        trainer, loggers: make the Trainer, and the loggers of a run folder.
        callbacks: of the user's own; they come before the loop's.
        dataset: not read yet.
        build: makes the `Experiment`; see the function.
    """

    identity: dict[str, Any]
    text: str
    seed: int
    overwrite: bool
    quiet: bool
    keep_checkpoints: bool
    keep_model: bool
    token_budget: int | None
    rationale_rows: int
    push: str | None
    private: bool
    merge: bool
    max_epochs: int
    scheme: Scheme
    m_step: Any
    evaluation: Any
    optimizer: Callable[..., Any]
    trainer: Callable[..., Any]
    several_ranks: bool
    sharding: Any
    loggers: Callable[[Path], list[Any]]
    callbacks: list[Any]
    dataset: Dataset
    build: Callable[[str | None], Experiment]


def compose(overrides: Sequence[str], name: str = "train", config_dir: str | Path | None = None) -> tuple[DictConfig, Path]:
    """The config of a command with these overrides, and the folder it would work in; also inside another program that uses Hydra.

    Args:
        config_dir: a folder with configs of one's own, as `--config-dir`.

    Raises:
        UserError, HydraException: an override cannot be read, or is of a secret; or there is no such folder.
    """
    if odd := [given for given in overrides if not isinstance(given, str) or given.startswith("-")]:
        raise UserError(f"{odd[0]!r} is no override; they are strings, an argument each: emreason.run('sampler=pps', 'seed=2').")
    check_arguments(overrides)
    find_here()
    given = [quoted(override, sweep=False) for override in overrides]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"config_dir={config_dir}: there is no such folder.")
        given.append(f"hydra.searchpath=['file://{Path(config_dir).resolve()}']")
    around = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            whole = hydra.compose(name, given, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = around
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"]), Path(whole.hydra.run.dir)


def read(cfg: DictConfig) -> Settings:
    """Read a training config; nothing else of a run does.

    Raises:
        UserError, HydraException: a value is not allowed.
    """
    load_libraries(cfg)  # which tells of bad values before it imports PyTorch
    import torch

    make = hydra.utils.instantiate
    optimizer, dataset = make(cfg.optimizer), make(cfg.dataset)
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])  # bad settings are heard of before a model is loaded
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer: {error}.") from error
    if cfg.hub.push:
        _check_token()
    if cfg.trainer.get("deterministic") is True and on(cfg) == "cuda":
        raise UserError("trainer.deterministic=true: PyTorch has no deterministic cumsum for a GPU, which drawing needs; use warn.")
    return Settings(
        identity(cfg),
        OmegaConf.to_yaml(cfg, resolve=True, sort_keys=False),
        **{key: cfg[key] for key in ("seed", "overwrite", "quiet", "keep_checkpoints", "keep_model", "token_budget", "rationale_rows")},
        push=cfg.hub.push,
        private=cfg.hub.private,
        merge=cfg.peft.get("merge", False),
        max_epochs=cfg.trainer.max_epochs,
        scheme=make(cfg.sampler),
        m_step=make(cfg.m_step),
        evaluation=make(cfg.evaluation),
        optimizer=optimizer,
        trainer=make(cfg.trainer, _partial_=True, accelerator=on(cfg)),
        several_ranks=cfg.trainer.get("strategy", "auto") != "auto" or ranks_of(cfg) > 1,
        sharding=cfg.trainer.strategy if cfg.trainer.get("strategy") in SHARDING else None,
        loggers=lambda folder: [_logger(node, folder) for node in _named(cfg.logger)],
        callbacks=[make(node) for node in _named(cfg.callbacks)],
        dataset=dataset,
        build=lambda dtype: build(cfg, dtype, dataset),
    )


def _check_token() -> None:
    """Raises UserError where the Hub would refuse an upload, which is better heard of before a run than after."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("hub.push needs a token that may write: run `hf auth login`, or set HF_TOKEN.")


def _named(config: DictConfig | None) -> list[DictConfig]:
    """The nodes of a group of which several options may be chosen, each under a name of its own; or the one that stands there."""
    return [config] if config and "_target_" in config else [node for node in (config or {}).values() if node]


def _logger(config: DictConfig, folder: Path) -> Any:
    """A logger; the run folder is the first argument of a partial one, unless it has a folder of its own."""
    logger = hydra.utils.instantiate(config)
    if isinstance(logger, functools.partial):
        return logger() if logger.keywords.keys() & {"save_dir", "folder"} else logger(folder)
    return logger


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What a run is, for its summary."""
    names = {"dataset": cfg.dataset.name, "model": cfg.model.name, "sampler": cfg.sampler.name, "seed": cfg.seed}
    return names | {"scheme": cfg.sampler.display, "budget": cfg.sampler.budget, "tag": cfg.tag}


def load_libraries(cfg: DictConfig) -> None:
    """Check the config, say what it is about, and import what is large.

    Raises:
        UserError: as `check_values`.
    """
    check_plain(cfg)
    if rank() == 0:
        say(f"Model {describe(cfg.model.name, cfg.model.load)}, dataset {cfg.dataset.name}")
    with doing("Loading PyTorch, Lightning and transformers"):
        quiet()
        check_values(cfg)


@out_of_memory_told("the model does not fit; use engine.dtype=bfloat16 or a smaller model")
def build(cfg: DictConfig, dtype: str | None = None, dataset: Dataset | None = None) -> Experiment:
    """Load data first (its errors are cheap), then the model.

    Args:
        dtype: what an earlier part of this run resolved `engine.dtype=auto` to.
        dataset: the config's, where it may have been read already.

    Raises:
        UserError: data or model cannot be loaded.
    """
    import torch

    from emreason.models.kernels import compile_ahead
    from emreason.models.loading import choose_dtype

    keep_freed_memory()
    spare_imports()
    dataset = dataset or hydra.utils.instantiate(cfg.dataset)
    with doing(f"Reading dataset {cfg.dataset.name}") as reading:
        reading.note = ", ".join(f"{len(dataset.questions(split))} {split}" for split in SPLITS) + " questions"
    there = len(dataset.worked_examples())
    for key in ("examples",) if "examples" in cfg else ("sampler.worked_examples", "evaluation.few_shot"):
        if (wanted := OmegaConf.select(cfg, key)) > there:
            raise UserError(
                f"{key}={wanted}: {wanted} worked examples are asked for, but dataset.demonstrations has {there}; lower it or add examples."
            )
    if rank() == 0:
        say(dataset.understood())
    device = torch.device(on(cfg))
    if device.type == "cuda":
        torch.cuda.set_device(own_gpu(torch.cuda.device_count()))  # where quantised weights are loaded; Lightning does it later
        prepare_cuda(expandable="server" not in cfg.engine)
    asked = cfg.engine.get("dtype", "auto")  # an engine of somebody's own may not name it
    precision = asked if asked != "auto" or dtype is None else dtype
    if precision == "auto" and device.type == "cpu" and (cfg.trainer.get("devices", 1) != 1 or cfg.trainer.get("num_nodes", 1) != 1):
        precision = "float32"  # ranks that measured for themselves could disagree
    chosen = choose_dtype(precision, device)
    if rank() == 0:
        for line in memory(cfg, dataset, str(chosen).removeprefix("torch."), device):
            say(line)
    if device.type == "cpu":
        compile_ahead(chosen)  # while the model loads
    # partials: objects passed through `instantiate` would be copied
    with doing(f"Loading model {describe(cfg.model.name, cfg.model.load)}") as loading:
        model, tokenizer = hydra.utils.instantiate(cfg.model.load, _partial_=True)(dtype=chosen)
        if "add" in cfg.peft:
            model = hydra.utils.instantiate(cfg.peft.add)(model)
        elif cfg.model.load.get("quantization") and "m_step" in cfg:
            raise UserError(
                f"model.load.quantization={cfg.model.load.quantization}: such weights are not trained; add adapters: peft=lora."
            )
        scored = "m_step" in cfg or cfg.get("bound") or cfg.get("method") == "loglikelihood"
        if scored and any(each.is_prompt_learning for each in getattr(model, "peft_config", {}).values()):
            raise UserError(
                "Adapters that are prompts (prefix tuning and the like) are drawn from, not trained or scored here; use peft=lora."
            )
        loading.note = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters in {str(chosen).removeprefix('torch.')}"
    engine = hydra.utils.instantiate({k: v for k, v in cfg.engine.items() if k != "dtype"}, _partial_=True)(model, tokenizer)
    prompts = Prompts(tokenizer, dataset.prompt, dataset.worked_examples())
    prompts.check()
    return Experiment(dataset, prompts, model, tokenizer, engine, chosen, device)


def memory(cfg: DictConfig, dataset: Dataset, dtype: str, device: torch.device) -> list[str]:
    """`needs` of a run or an evaluation that is about to load its model."""
    import torch

    scheme: Scheme = hydra.utils.instantiate(cfg.sampler)
    questions = len(dataset.questions("train" if "m_step" in cfg else cfg.split))
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_on_host()
    return needs(cfg, dataset, scheme, questions, dtype, device.type, free)


def on(cfg: DictConfig) -> str:
    """`cuda` or `cpu`: what `trainer.accelerator` comes to here. Lightning's `auto` would take an Apple GPU, which has no float64."""
    import torch

    return "cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def own_gpu(there: int) -> int:
    """The index of this rank's GPU, of those that are `there`."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) % there


def ranks_of(cfg: DictConfig) -> int:
    """How many processes train together."""
    import torch

    devices = cfg.trainer.get("devices", 1)
    if devices in (-1, "auto"):
        devices = torch.cuda.device_count() if on(cfg) == "cuda" else 1
    return int(devices) * int(cfg.trainer.get("num_nodes", 1))


def prepare_cuda(expandable: bool) -> None:
    """Before the first attention and the first allocation of any size.

    Args:
        expandable: segments that grow, against fragmentation by batches of every length; not where vLLM shares this process's memory
            (vllm#14189).
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, 23-37 ms, for every shape, and here every step is one
    if expandable and not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")

"""`plan=true`: what a run would do, told without loading a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from emreason.models.sizes import GB, describe, parameters
from emreason.progress import doing
from emreason.questions.answers import gold_text
from emreason.questions.datasets import SPLITS, Dataset
from emreason.questions.prompts import Prompts
from emreason.runs.checks import check_plain
from emreason.runs.keys import TRAIN_KEYS, check_known, check_trainer
from emreason.runs.needs import free_on_gpu, free_on_host, needs
from emreason.runs.summary import begun, ended, read_summary
from emreason.schemes.samplers import Scheme
from emreason.types import Question, Split, UserError

TRAIN = "emreason.train.run"


def plan(cfg: DictConfig, folder: Path) -> str:
    """The plan in words, a line or more each: parts, questions, a prompt with and without the hint, work per iteration, disk, folder.

    Args:
        cfg: of a run, without the node `hydra`.

    Raises:
        UserError: the config or the data would not do for a run either, or the task is not an EM run.
    """
    if cfg.task != TRAIN:
        raise UserError(f"plan=true tells what an EM run does; this command's task is {cfg.task}.")
    check_plain(cfg)
    check_known(cfg, TRAIN_KEYS)
    check_trainer(cfg.trainer)
    dataset: Dataset = hydra.utils.instantiate(cfg.dataset)
    scheme: Scheme = hydra.utils.instantiate(cfg.sampler)
    with doing(f"Reading dataset {cfg.dataset.name}", at_once=False):
        questions = {split: dataset.questions(split) for split in SPLITS}
    sizes = {split: len(found) for split, found in questions.items()}
    baseline = " and ".join(cfg.evaluation.baseline) or "none"
    counted = [f"{proposal} × {scheme.tries.count(proposal)}" for proposal in dict.fromkeys(scheme.tries)]
    lines = [
        f"Model: {describe(cfg.model.name, cfg.model.load)}; trained: {'adapters' if 'add' in cfg.peft else 'all weights'}",
        f"Dataset: {cfg.dataset.name}; questions: " + ", ".join(f"{n} {split}" for split, n in sizes.items()),
        f"Scheme: {scheme.display}; proposals in order: {', '.join(counted)}",
        "",
        *_prompts(Prompts(None, dataset.prompt, dataset.worked_examples()), questions["train"][0], scheme),
        "",
        f"EM iterations: {cfg.trainer.max_epochs}, each at most:",
        *_iteration(cfg, scheme, sizes),
        f"Baseline before: {baseline}; afterwards test, {sizes['test']} questions of at most {cfg.evaluation.max_new_tokens} tokens each",
        *_memory(cfg, dataset, scheme, sizes["train"]),
        f"On disk: {_disk(cfg)}",
        f"Run folder: {folder} ({_state(cfg, folder, dataset)})",
    ]
    return "\n".join(lines)


def _prompts(prompts: Prompts, question: Question, scheme: Scheme) -> list[str]:
    examples = scheme.n_examples(0)
    shown = f"{examples} worked examples, " if examples else ""
    lines = [f"The first question's prompts in the first E-step ({shown}without the model's chat template, should it have one):"]
    for proposal in dict.fromkeys(("question", *scheme.tries)):  # the plain one is trained on in every scheme
        lines += [f"  {proposal}:", *(f"    | {line}" for line in prompts.text(question, proposal, examples).splitlines())]
    return [*lines, f"  gold answer: {gold_text(question)}"]


def at_most(cfg: DictConfig, scheme: Scheme, train: int) -> dict[str, int]:
    """The work of one iteration on `train` questions, none of which may be answered, or every one at the last try."""
    asked = max(1, round(scheme.share * train)) if scheme.choose == "adaptive" else train
    draws = asked * len(scheme.tries)
    # what a step covers: questions, accepted or not, or rationales
    rationales = draws if scheme.persists or scheme.weigh in ("rloo", "maxrl") else asked * scheme.keep
    slots = asked if cfg.m_step.normalize == "questions" else rationales
    steps = math.ceil(min(slots, draws) / cfg.m_step.batch_size) * cfg.m_step.epochs
    return {"questions": asked, "draws": draws, "tokens": draws * scheme.max_new_tokens, "steps": steps}


def _iteration(cfg: DictConfig, scheme: Scheme, sizes: dict[Split, int]) -> list[str]:
    most = at_most(cfg, scheme, sizes["train"])
    budget = f"; none after {cfg.token_budget:,} tokens in all" if cfg.token_budget else ""
    unit = "questions" if cfg.m_step.normalize == "questions" else "rationales"
    steps = "1 optimizer step" if most["steps"] == 1 else f"{most['steps']:,} optimizer steps"
    return [
        f"  E-step: {most['questions']:,} questions, {most['draws']:,} draws, {most['tokens']:,} tokens{budget}",
        f"  M-step: {steps} of {cfg.m_step.batch_size} {unit} (m_step.epochs={cfg.m_step.epochs})",
        f"  Validation: {sizes['validation']:,} questions of at most {cfg.evaluation.max_new_tokens} tokens each",
    ]


def _memory(cfg: DictConfig, dataset: Dataset, scheme: Scheme, train: int) -> list[str]:
    """Of the GPU where the driver's tool sees one; what `auto` means on a CPU is measured, so float32 is assumed."""
    gpu = None if cfg.trainer.accelerator == "cpu" else free_on_gpu()
    device = "cpu" if gpu is None and cfg.trainer.accelerator in ("auto", "cpu") else "cuda"
    asked_dtype = cfg.engine.get("dtype", "auto")  # an engine of somebody's own may not name it
    dtype = asked_dtype if asked_dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    asked = at_most(cfg, scheme, train)["questions"]
    return needs(cfg, dataset, scheme, asked, dtype, device, free_on_host() if device == "cpu" else gpu)


def _disk(cfg: DictConfig) -> str:
    """Weights of the last and best checkpoint and of the export; Adam's two moments, in float32 like its copy of bfloat16 weights."""
    count = parameters(cfg.model.load)
    if "add" in cfg.peft:
        return "adapters in checkpoints/ and model/ (megabytes), the journal of all draws, metrics"
    if count is None:
        return "checkpoints/ (up to 16 bytes a parameter), model/ (up to 4), the journal of all draws, metrics"
    weights, last = (2, 14) if cfg.engine.get("dtype", "auto") == "bfloat16" else (4, 12)
    until = {True: "", False: " until the run is finished"}
    assumed = " if auto means float32" if cfg.engine.get("dtype", "auto") == "auto" else ""
    return (
        f"checkpoints/ about {count * (last + weights) / GB:.1f} GB{until[cfg.keep_checkpoints]}, "
        f"model/ about {count * weights / GB:.1f} GB{until[cfg.keep_model]}{assumed}; "
        "the journal of all draws, metrics"
    )


def _state(cfg: DictConfig, folder: Path, dataset: Dataset) -> str:
    before: dict[str, Any] = read_summary(folder)
    if not before:
        return "new"
    if cfg.overwrite:
        return f"{before.get('status')}; overwrite=true begins it again"
    if not begun(folder, before):
        return f"{before.get('status')} before its first draw; it begins again"
    try:
        compared = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "logger"])  # which is free to change
        done = ended(folder, OmegaConf.to_yaml(compared, resolve=True), dataset, cfg.trainer.max_epochs, cfg.token_budget)
    except UserError as error:
        return f"would be refused: {error}"
    return f"{before.get('status')} after {len(before.get('iterations', []))} iterations; {'nothing to do' if done else 'it would go on'}"

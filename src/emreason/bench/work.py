"""The work that every contender does: prompts to sample from, sequences to train on, a whole EM iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from emreason.models.loading import choose_dtype, weights_fingerprint
from emreason.questions.prompts import Prompts
from emreason.reproduce import local_model
from emreason.runs.checks import quoted
from emreason.runs.experiment import compose

MAX_NEW_TOKENS = 128
STEPS, BATCH = 4, 8
"""Optimizer steps of the M-step's work, and sequences per step."""

LARGE, LORA = 1e9, {"r": 16, "alpha": 32}
"""Parameters from which a CPU's M-step trains an adapter: full fine-tuning in bfloat16 takes 18 bytes for each."""

ITERATION = "EM to 50 % (STaR, 128 + 100 questions)"
TARGET, MOST_ITERATIONS = 0.5, 3
"""Validation accuracy at which a contender is done, and EM iterations after which it has failed: a speed alone says nothing."""

GROWTH = {"terms": 4, "max_new_tokens": 24}
"""Of the E-steps that grow: four terms give 3,931 training questions, three only 432."""


def configured(*overrides: str) -> DictConfig:
    """The training config with `overrides`."""
    return compose(overrides)[0]


def of_model(model: str) -> list[str]:
    """Overrides for an option of the group `model`, a GGUF file or a checkpoint's folder.

    Raises:
        UserError: the file or folder is no model.
    """
    path = Path(model)
    if not path.exists():
        return [f"model={model}"]
    option, overrides = local_model(path, "MODEL", "local")
    return [f"model={option}", *overrides]


def make_work(folder: Path, model: str, device: str, questions: int = 64) -> dict[str, Any]:
    """Write `folder/work.json`, and the model where no folder holds it yet; contenders need nothing of emreason to read them.

    `shapes`: name -> (prompts as ids, samples per prompt). Two shapes of E-step: 64 ARC-Challenge `questions` × 1, and 16 × 4.
    `lora`: arguments of the adapter that the M-step trains, or None.
    """
    cfg = configured(*of_model(model), "dataset=arc_challenge", "dataset.limit.train=512")
    dataset = hydra.utils.instantiate(cfg.dataset)
    dtype = choose_dtype("auto", torch.device(device))
    # a model as small as the demo's in float32: each contender has its own precision of it
    weights, tokenizer = hydra.utils.instantiate(cfg.model.load, _partial_=True)(dtype=dtype if Path(model).exists() else torch.float32)
    path = Path(weights.name_or_path or "nowhere")  # a GGUF's copy or a checkpoint is a folder already
    if not (path / "config.json").exists():
        path = folder / f"model-{model}"
        weights.save_pretrained(path)
        tokenizer.save_pretrained(path)
    prompts = Prompts(tokenizer, dataset.prompt, dataset.worked_examples())
    room = weights.config.max_position_embeddings - MAX_NEW_TOKENS
    ids = [ids for question in dataset.questions("train") if len(ids := list(prompts.ids(question))) <= room][:questions]
    size = sum(p.numel() for p in weights.parameters())
    work = {
        "model": str(path),
        "fingerprint": weights_fingerprint(weights),
        "parameters": size,
        "lora": LORA if device == "cpu" and size >= LARGE else None,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "max_new_tokens": MAX_NEW_TOKENS,
        "shapes": {f"1 sample of {len(ids)} questions": [ids, 1], f"4 samples of {len(ids) // 4} questions": [ids[: len(ids) // 4], 4]},
        "steps": min(STEPS, len(ids) // BATCH),
        "batch": BATCH,
        "iteration": iteration_work(str(path), tokenizer, device),
        "growth": GROWTH,
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    return work


def iteration_work(model: str, tokenizer: Any, device: str) -> dict[str, Any]:
    """EM iterations of STaR on 128 sums of three digits, the demo's prompts: our overrides, and the same for scripts without emreason.

    A question is {plain, hinted: prompts of the E-step with a worked example; prompt: the plain one, trained and evaluated; answer}.
    """
    overrides = [
        "model=smollm2_135m_hub",
        quoted(f"model.load.path={model}"),
        f"trainer.accelerator={'cpu' if device == 'cpu' else 'gpu'}",
        "dataset=sums",
        "dataset.prompt.instruction=''",
        "dataset.limit={train: 128, validation: 100, test: 1}",  # the evaluation is validation's; `emreason` also wants a test
        "sampler=star",
        "sampler.temperature=0.6",
        "sampler.max_new_tokens=40",
        "sampler.worked_examples=1",
        "m_step={batch_size: 8, warmup_steps: 0, normalize: tokens, on_zero_accepted: skip}",  # the mean over tokens, as TRL takes it
        "optimizer.lr=1e-4",
        "evaluation={baseline: [], forced: false, few_shot: 0}",
        f"trainer.max_epochs={MOST_ITERATIONS}",
        "keep_checkpoints=false",
    ]
    cfg = configured(*overrides)
    dataset = hydra.utils.instantiate(cfg.dataset)
    prompts = Prompts(tokenizer, dataset.prompt, dataset.worked_examples())
    train = [
        {
            "plain": list(prompts.ids(question, "question", 1)),
            "hinted": list(prompts.ids(question, "rationalization", 1)),
            "prompt": list(prompts.ids(question)),
            "answer": question.answer,
        }
        for question in dataset.questions("train")
    ]
    validation = [{"prompt": list(prompts.ids(q)), "answer": q.answer} for q in dataset.questions("validation")]
    settings = {"temperature": 0.6, "max_new_tokens": 40, "batch": 8, "lr": 1e-4, "target": TARGET, "most_iterations": MOST_ITERATIONS}
    return {"name": ITERATION, "overrides": overrides, "train": train, "validation": validation, **settings}

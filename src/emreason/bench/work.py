"""The work that every contender does: prompts to sample from, sequences to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose, initialize_config_dir

from emreason.experiment import CONF
from emreason.model import choose_dtype, weights_fingerprint
from emreason.prompts import Prompts

MAX_NEW_TOKENS = 128
STEPS, BATCH = 4, 8
"""Optimizer steps of the M-step's work, and sequences per step."""


def make_work(folder: Path, model: str, device: str) -> dict[str, Any]:
    """Write `folder/work.json` and the model's weights as safetensors; contenders need nothing of emreason to read them.

    `shapes`: name -> (prompts as ids, samples per prompt). Two shapes of E-step: 64 ARC-Challenge questions × 1, and 16 × 4.
    """
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=[f"model={model}", "dataset=arc_challenge", "dataset.limit.train=512"])
    dataset = hydra.utils.instantiate(cfg.dataset)
    dtype = choose_dtype("auto", torch.device(device))
    weights, tokenizer = hydra.utils.instantiate(cfg.model.load, _partial_=True)(dtype=torch.float32)
    path = folder / "model"
    if not (path / "config.json").exists():
        weights.save_pretrained(path)
        tokenizer.save_pretrained(path)
    prompts = Prompts(tokenizer, dataset.prompt, dataset.worked_examples())
    room = weights.config.max_position_embeddings - MAX_NEW_TOKENS
    ids = [ids for question in dataset.questions("train") if len(ids := list(prompts.ids(question))) <= room][:64]
    work = {
        "model": str(path),
        "fingerprint": weights_fingerprint(weights),
        "parameters": sum(p.numel() for p in weights.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "max_new_tokens": MAX_NEW_TOKENS,
        "shapes": {"1 sample of 64 questions": [ids, 1], "4 samples of 16 questions": [ids[:16], 4]},
        "steps": STEPS,
        "batch": BATCH,
    }
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    return work

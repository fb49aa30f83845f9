"""Growth: `python growth.py WORK RESULT e_step QUESTIONS | m_step`, each in a process of its own so that its peak memory is its own."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch

from emreason.bench.runners import train_ours
from emreason.bench.work import configured
from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import load_pretrained
from emreason.models.memory import keep_freed_memory
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import sample


def e_step(work: dict[str, Any], questions: int) -> dict[str, Any]:
    """RS-1 on the first `questions` sums. 64 rows at most, so that all sizes fill the same batch."""
    keep_freed_memory()
    terms, tokens = work["growth"]["terms"], work["growth"]["max_new_tokens"]
    cfg = configured("sampler=rs", "sampler.budget=1", f"sampler.max_new_tokens={tokens}", f"dataset.load.terms={terms}")
    dataset, scheme = hydra.utils.instantiate(cfg.dataset), hydra.utils.instantiate(cfg.sampler)
    dataset = dataclasses.replace(dataset, limit={"train": questions})
    model, tokenizer = load_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    engine = InProcessEngine(model.to(work["device"]), tokenizer, max_batch=64)
    prompts = Prompts(tokenizer, dataset.prompt)
    asked = dataset.questions("train")
    start = time.perf_counter()
    drawn = list(sample(asked, scheme, engine, prompts, tokenizer, seed=1, iteration=0))
    seconds = time.perf_counter() - start
    row = {
        "work": f"E-step, {questions} questions",
        "questions": len(asked),
        "attempts": len(drawn),
        "tokens": sum(r.n_tokens for r in drawn),
        "seconds": seconds,
    }
    return {"rows": [row], "dtype": work["dtype"]}


def m_step(work: dict[str, Any]) -> dict[str, Any]:
    """The M-step on the sequences of its contenders: full fine-tuning, or of a large model on a CPU an adapter."""
    made = train_ours.main(work)
    return {**made, "rows": [{**row, "work": "LoRA" if work.get("lora") else "full fine-tuning"} for row in made["rows"]]}


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(m_step(read) if sys.argv[3] == "m_step" else e_step(read, int(sys.argv[4]))))

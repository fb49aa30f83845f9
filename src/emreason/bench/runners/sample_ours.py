"""E-step contender: this project's in-process engine. `python sample_ours.py WORK RESULT`."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import load_pretrained
from emreason.models.memory import keep_freed_memory
from emreason.types import Request, SamplingParams


def main(work: dict[str, Any]) -> dict[str, Any]:
    """Sample every shape; also returns the ids of the first one, which the M-step's contenders train on, and the lengths of all."""
    keep_freed_memory()
    model, tokenizer = load_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    engine = InProcessEngine(model.to(work["device"]), tokenizer)

    def run(prompts: list[list[int]], samples: int, max_new_tokens: int) -> tuple[int, float, list[Any]]:
        params = SamplingParams(1.0, 1.0, max_new_tokens)
        queue = deque(Request((i, k), tuple(p), params, seed=1000 * i + k) for i, p in enumerate(prompts) for k in range(samples))
        start = time.perf_counter()
        done = list(engine.generate(queue))
        seconds = time.perf_counter() - start
        drawn = {c.request.key: [list(c.request.prompt_ids), list(c.token_ids)] for c in done}
        in_order = [drawn[i, k] for i in range(len(prompts)) for k in range(samples)]
        return sum(len(c.token_ids) for c in done), seconds, in_order

    run(next(iter(work["shapes"].values()))[0][:4], 1, 8)  # warm up
    rows, sequences, lengths = [], None, {}
    for shape, (prompts, samples) in work["shapes"].items():
        tokens, seconds, drawn = run(prompts, samples, work["max_new_tokens"])
        rows.append({"work": shape, "tokens": tokens, "seconds": seconds})
        sequences = sequences or drawn
        lengths[shape] = [len(completion) for _, completion in drawn]
    return {"rows": rows, "sequences": sequences, "lengths": lengths, "dtype": work["dtype"]}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

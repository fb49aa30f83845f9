"""E-step contender: transformers. `python sample_transformers.py WORK RESULT generate|generate_batch DTYPE [rows]`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main(work: dict[str, Any], how: str, dtype: str, rows: int) -> dict[str, Any]:
    """Sample every shape, `rows` sequences at a time. `generate` draws completions as long as ours were, and its tokens beyond them do not
    count; `generate_batch` draws lengths of its own.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = model.to(work["device"]).eval()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = eos if pad is None else pad

    def generate(prompts: list[list[int]], lengths: list[int]) -> int:
        model.generation_config.eos_token_id = None  # a chunk runs as long as its longest completion
        for begin in range(0, len(prompts), rows):
            inputs = tokenizer.pad({"input_ids": prompts[begin : begin + rows]}, return_tensors="pt").to(work["device"])
            longest = max(lengths[begin : begin + rows])
            with torch.inference_mode():
                out = model.generate(
                    **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=longest, pad_token_id=pad
                )
            assert out.shape[1] == inputs["input_ids"].shape[1] + longest
        return sum(lengths)

    def generate_batch(prompts: list[list[int]], lengths: list[int]) -> int:  # noqa: ARG001
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=work["max_new_tokens"], pad_token_id=pad, eos_token_id=eos
        )
        out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(o.generated_tokens) for o in out.values())

    run = generate if how == "generate" else generate_batch
    run(next(iter(work["shapes"].values()))[0][:4], [8] * 4)  # warm up
    results = []
    for shape, (prompts, samples) in work["shapes"].items():
        start = time.perf_counter()
        tokens = run([p for p in prompts for _ in range(samples)], work["lengths"][shape])
        results.append({"work": shape, "tokens": tokens, "seconds": time.perf_counter() - start})
    return {"rows": results, "dtype": dtype}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], sys.argv[4], int(sys.argv[5]) if len(sys.argv) > 5 else 64)
    Path(sys.argv[2]).write_text(json.dumps(result))

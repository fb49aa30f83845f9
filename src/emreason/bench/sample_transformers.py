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
    """Sample every shape, `rows` sequences at a time; tokens after EOS do not count."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    model = (
        AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, dtype), attn_implementation="sdpa")
        .to(work["device"])
        .eval()
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = eos if pad is None else pad

    def generate(prompts: list[list[int]], max_new_tokens: int) -> int:
        tokens = 0
        for begin in range(0, len(prompts), rows):
            chunk = prompts[begin : begin + rows]
            inputs = tokenizer.pad({"input_ids": chunk}, return_tensors="pt").to(work["device"])
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=eos,
                )
            for row in out[:, inputs["input_ids"].shape[1] :].tolist():
                tokens += row.index(eos) + 1 if eos in row else len(row)
        return tokens

    def generate_batch(prompts: list[list[int]], max_new_tokens: int) -> int:
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos
        )
        out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        return sum(len(o.generated_tokens) for o in out.values())

    run = generate if how == "generate" else generate_batch
    run(work["shapes"]["1 sample of 64 questions"][0][:4], 8)  # warm up
    results = []
    for shape, (prompts, samples) in work["shapes"].items():
        start = time.perf_counter()
        tokens = run([p for p in prompts for _ in range(samples)], work["max_new_tokens"])
        results.append({"work": shape, "tokens": tokens, "seconds": time.perf_counter() - start})
    return {"rows": results, "dtype": dtype}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], sys.argv[4], int(sys.argv[5]) if len(sys.argv) > 5 else 64)
    Path(sys.argv[2]).write_text(json.dumps(result))

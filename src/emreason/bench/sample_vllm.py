"""E-step contender: vLLM, in an environment of its own. `python sample_vllm.py WORK RESULT DTYPE`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(work: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Sample every shape; `n` samples of a prompt are one request, so that vLLM shares their prefill."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(model=work["model"], dtype=dtype, max_model_len=1024, enforce_eager=work["device"] == "cpu", max_num_seqs=64)
    loading = time.perf_counter() - start

    def run(prompts: list[list[int]], samples: int, max_new_tokens: int) -> int:
        params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_new_tokens, n=samples)
        out = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(completion.token_ids) for request in out for completion in request.outputs)

    run(work["shapes"]["1 sample of 64 questions"][0][-4:], 1, 8)  # warm up, on prompts that are not timed first
    rows = []
    for shape, (prompts, samples) in work["shapes"].items():
        engine.reset_prefix_cache()
        start = time.perf_counter()
        tokens = run(prompts, samples, work["max_new_tokens"])
        rows.append({"work": shape, "tokens": tokens, "seconds": time.perf_counter() - start})
    return {"rows": rows, "loading_seconds": loading, "dtype": dtype}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3])))

"""E-step contender: vLLM, in an environment of its own. `python sample_vllm.py WORK RESULT DTYPE [eager]`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(work: dict[str, Any], dtype: str, eager: bool) -> dict[str, Any]:
    """Sample every shape, completions as long as ours were; vLLM shares what it can of a prompt's prefill among its samples."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    engine = LLM(model=work["model"], dtype=dtype, max_model_len=1024, max_num_seqs=64, enforce_eager=eager)
    loading = time.perf_counter() - start

    def run(prompts: list[list[int]], lengths: list[int]) -> int:
        params = [SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=n, ignore_eos=True) for n in lengths]
        out = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(completion.token_ids) for request in out for completion in request.outputs)

    run(next(iter(work["shapes"].values()))[0][-4:], [8] * 4)  # warm up, on prompts that are not timed first
    rows = []
    for shape, (prompts, samples) in work["shapes"].items():
        engine.reset_prefix_cache()
        start = time.perf_counter()
        tokens = run([p for p in prompts for _ in range(samples)], work["lengths"][shape])
        rows.append({"work": shape, "tokens": tokens, "seconds": time.perf_counter() - start})
    return {"rows": rows, "loading_seconds": loading, "dtype": dtype}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], "eager" in sys.argv[4:])))

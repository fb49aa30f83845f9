"""Our engine beside `generate`, on random models of one family: `python family.py WORK RESULT MODEL_TYPE`.

Float32, greedy, the same rows, so that ids can be compared; a family that has fallen back to a slower decoder shows.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from emreason.engines.decoder import make_decoder
from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import random_model
from emreason.models.memory import keep_freed_memory
from emreason.models.tiny import tiny_tokenizer
from emreason.types import Request, SamplingParams

ROWS, NEW_TOKENS, WINDOW = 32, 64, 32
COMMON = {"max_position_embeddings": 512, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3}
SHAPES = {"32 rows, tiny": TINY, "32 rows, 135M": SMOLLM2}
SPECIAL = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
}


def main(work: dict[str, Any], family: str, shapes: dict[str, Any] = SHAPES) -> dict[str, Any]:
    """Of each shape: tokens/s of both, which decoder is ours, and in how many rows the ids are the same."""
    keep_freed_memory()
    return {"rows": [{"work": name, **measure(family, shape, work["device"])} for name, shape in shapes.items()], "dtype": "float32"}


def measure(family: str, shape: dict[str, Any], device: str) -> dict[str, Any]:
    """One row of the table."""
    model: Any = random_model({"model_type": family, **COMMON, **shape, **SPECIAL.get(family, {})})
    model.to(device).eval()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, shape["vocab_size"]) for _ in range(draw.randrange(16, 48))] for _ in range(ROWS)]
    engine = InProcessEngine(model, tiny_tokenizer(), max_batch=ROWS)
    engine.eos_ids = frozenset()  # all rows are as long as can be

    def ours(new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_new_tokens=new)
        done = {c.request.key: c for c in engine.generate(deque(Request(i, tuple(p), params) for i, p in enumerate(prompts)))}
        return [list(done[i].token_ids) for i in range(ROWS)]

    def theirs(new: int) -> list[list[int]]:
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
        return list(out[:, length:].tolist())

    seconds, drawn = [], []
    for run in (ours, theirs):
        run(2)  # warm up
        start = time.perf_counter()
        drawn.append(run(NEW_TOKENS))
        seconds.append(time.perf_counter() - start)
    tokens = ROWS * NEW_TOKENS
    return {
        "decoder": type(make_decoder(model)).__name__.removesuffix("Decoder").lower(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "seconds": seconds[0],
        "tokens_per_second": tokens / seconds[0],
        "generate_tokens_per_second": tokens / seconds[1],
        "ours_is_faster_by": seconds[1] / seconds[0],
        "equal_rows": sum(a == b for a, b in zip(*drawn, strict=True)),
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3])))

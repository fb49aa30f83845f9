"""M-step contender: this project's module under Lightning. `python train_ours.py WORK RESULT [DTYPE]`."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from emreason.em.datamodule import RationaleDataModule
from emreason.em.m_step import MStep
from emreason.em.module import EMModule
from emreason.models.batches import Example, Step, bucket, collate
from emreason.models.loading import add_lora, load_pretrained
from emreason.models.memory import keep_freed_memory, map_large_blocks


class Clock(L.Callback):
    """Seconds of training after the first optimizer step, which touches the memory for the first time and makes what is made once (a
    machine that has given its free memory away takes twice as long for it); and each step's mean NLL per token before it is taken.
    """

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, 0.0
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.start = self.start or time.perf_counter()
        self.losses.append(float(trainer.callback_metrics["m_step/nll"]))

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def main(work: dict[str, Any]) -> dict[str, Any]:
    """`work["steps"]` optimizer steps, the first not timed, on `work["sequences"]`, token-mean NLL of the completions, fused AdamW."""
    keep_freed_memory()
    map_large_blocks()
    dtype = getattr(torch, work["dtype"])
    model: Any
    model, tokenizer = load_pretrained(work["model"], dtype=dtype)
    if work.get("lora"):
        model = add_lora(model, **work["lora"])
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0, fused=True)
    module = EMModule(model, tokenizer, None, None, optimizer, MStep())  # type: ignore[arg-type]  # neither samples nor evaluates
    examples = [Example(str(i), tuple(p), tuple(c)) for i, (p, c) in enumerate(work["sequences"])]
    steps = []
    for begin in range(0, len(examples), work["batch"]):
        members = sorted(examples[begin : begin + work["batch"]], key=len)
        weight = 1 / sum(len(e.completion_ids) for e in members)
        buckets = bucket(members, module.m_step.tokens_per_batch)
        steps.append(Step([collate(b, [weight] * len(b), tokenizer.pad_token_id) for b in buckets]))
    data = RationaleDataModule([], [])
    data.pull = lambda: steps
    clock = Clock()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=1, accelerator=work["device"], devices=1, callbacks=[clock], limit_val_batches=0, inference_mode=False, **quiet
    )
    trainer.fit(module, data)
    tokens = sum(map(len, examples[work["batch"] :]))
    return {"rows": [{"work": "M-step", "tokens": tokens, "seconds": clock.seconds, "losses": clock.losses}], "dtype": work["dtype"]}


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    if len(sys.argv) > 3:
        read["dtype"] = sys.argv[3]
    Path(sys.argv[2]).write_text(json.dumps(main(read)))

"""One rank of two: `LOCAL_RANK=r … python two_ranks.py FOLDER` runs every case of `CASES` and writes what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning as L
import torch
from conftest import ScriptedEngine, numbers
from test_module import em_module, gold_script
from test_samplers import scheme

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.em.ranks import Ranks
from emreason.runs.journal import Journal
from emreason.types import UserError

RS = scheme("rs")
# name: number of questions, which attempts are right (rank 0 has the even questions), what an iteration without any is, scheme
CASES = {
    "none and all": (6, lambda i, _: i % 2 == 1, "error", RS),
    "one and none": (6, lambda i, _: i == 0, "error", RS),
    "none and none, skipped": (4, lambda *_: False, "skip", RS),
    "none and none": (4, lambda *_: False, "error", RS),
    "uneven shards": (5, lambda i, _: i != 2, "error", RS),
    "a rank without a question": (1, lambda *_: True, "error", RS),
    # the control variate's β is over all ranks' questions, and the second iteration trains on the first one's hinted rationales
    "trice": (5, lambda i, attempt: attempt == 2 or i in (1, 2), "error", scheme("star", keep=2, weigh="trice")),
    # the second iteration's hinted draws are weighed against the first one's, by the rank that has the question
    "mh": (5, lambda i, attempt: attempt == 2 or i == 1, "error", scheme("star", weigh="mh")),
    "rloo": (5, lambda i, attempt: attempt <= i % 3, "error", scheme("rs", 3, keep=3, weigh="rloo")),
    "bfloat16": (5, lambda i, _: i != 2, "error", RS),
    "adaptive": (7, lambda i, attempt: i % 2 == 0 or attempt == 2, "error", scheme("star", choose="adaptive", share=0.5)),
}


def run(folder: Path, name: str, devices: int) -> dict:
    """Two EM iterations of one case; weights, journal and the error, if any."""
    n, right, on_zero, scheme_ = CASES[name]
    questions = numbers(n)
    index = {q.id: i for i, q in enumerate(questions)}
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    module = em_module(m_step=MStep(max_grad_norm=None, batch_size=2, on_zero_accepted=on_zero), dtype=dtype)
    module.engine = ScriptedEngine(module.tokenizer, gold_script(questions, lambda request: right(index[request.key[0]], request.key[1])))
    journal = Journal(folder / name / str(devices))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, strategy=Ranks() if devices > 1 else "auto", logger=False,
        callbacks=[EStep(scheme_, questions, journal, seed=1)], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1, inference_mode=False,
        use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    error = None
    try:
        trainer.fit(module, RationaleDataModule([], []))
    except UserError as raised:
        error = str(raised)
    rationales = [[r.question_id, r.iteration, r.attempt, r.accepted] for k in range(2) for r in journal.read(k)]
    weights = [float(p.detach().double().abs().sum()) for p in module.trainable()]
    return {"error": error, "rationales": rationales, "weights": weights, "files": sorted(p.name for p in journal.folder.iterdir())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    results = {name: run(place, name, 2) for name in CASES}
    (place / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))

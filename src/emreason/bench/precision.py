"""Does bfloat16 learn what float32 learns? One M-step on the same rationales, several ways of keeping and rounding the weights.

`python -m emreason.bench.precision --seeds 1 2 3 --lr 1e-4 1e-5 --ways float32 nearest published --out FILE`: a JSON line per run;
what the file holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from torch import Tensor

from emreason.bench.work import configured, iteration_work
from emreason.em import module as module_module
from emreason.em.datamodule import RationaleDataModule
from emreason.em.evaluation import Evaluation
from emreason.em.module import EMModule
from emreason.em.steps import make_steps
from emreason.models import masters as masters_module
from emreason.models.batches import Example, Step
from emreason.questions.prompts import end_ids
from emreason.runs.experiment import build
from emreason.schemes.samplers import sample, training_ids
from emreason.scores.scoring import token_logprobs

Publish = Callable[[Sequence[Tensor], Sequence[Tensor], int], None]


@torch.no_grad()
def to_nearest(masters: Sequence[Tensor], parameters: Sequence[Tensor], seed: int) -> None:  # noqa: ARG001
    """What this program did up to version 0.1: an update below half a grid step is lost until others join it."""
    for master, parameter in zip(masters, parameters, strict=True):
        parameter.copy_(master)


def anew_each_step() -> Publish:
    """Stochastic rounding with fresh numbers at every step."""
    steps = iter(range(1 << 30))
    return lambda masters, parameters, seed: masters_module.publish(masters, parameters, 1_000_003 * seed + next(steps))


def error_kept() -> Publish:
    """To nearest, what is lost added to the next publication."""
    lost: list[Tensor] = []

    @torch.no_grad()
    def publish(masters: Sequence[Tensor], parameters: Sequence[Tensor], seed: int) -> None:  # noqa: ARG001
        if not lost:
            lost.extend(torch.zeros_like(m) for m in masters)
        for master, parameter, error in zip(masters, parameters, lost, strict=True):
            error += master
            parameter.copy_(error)
            error -= parameter.float()

    return publish


WAYS: dict[str, tuple[str, Callable[[], Publish]]] = {
    "float32": ("float32", lambda: masters_module.publish),
    "nearest": ("bfloat16", lambda: to_nearest),
    "nearest, masters of the float32 checkpoint": ("bfloat16", lambda: to_nearest),
    "nearest, error kept": ("bfloat16", error_kept),
    "stochastic, anew each step": ("bfloat16", anew_each_step),
    "published": ("bfloat16", lambda: masters_module.publish),
}
"""name -> (weights, how masters are published); `published` is what the program does."""


def rationales(seed: int, overrides: Sequence[str]) -> tuple[list[Step], list[Any], list[Any]]:
    """The E-step of one seed by the base model in bfloat16: the M-step's optimizer steps, validation questions, accepted examples."""
    cfg = configured(*overrides, "engine.dtype=bfloat16", f"seed={seed}")
    parts = build(cfg)
    questions = parts.dataset.questions("train")
    drawn = sample(questions, hydra.utils.instantiate(cfg.sampler), parts.engine, parts.prompts, parts.tokenizer, seed=seed, iteration=0)
    accepted = sorted((r for r in drawn if r.accepted), key=lambda r: r.question_id)
    by_id = {q.id: q for q in questions}
    eos = end_ids(parts.tokenizer)[0]
    examples = [Example(r.question_id, parts.prompts.ids(by_id[r.question_id]), training_ids(r, eos)) for r in accepted]
    m_step = hydra.utils.instantiate(cfg.m_step)
    return make_steps(examples, len(questions), m_step, pad_id=eos, seed=seed), parts.dataset.questions("validation"), examples


def losses_of(module: EMModule, steps: list[Step]) -> list[float]:
    """NLL per supervised token, nats, before each of these optimizer steps, which are taken."""
    losses: list[float] = []
    module.log_dict = lambda values, **_: losses.append(values["m_step/nll"])  # type: ignore[method-assign]
    data = RationaleDataModule([], [])
    data.pull = lambda: steps
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0, inference_mode=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return losses


def m_step(name: str, seed: int, lr: float, overrides: Sequence[str], steps: list[Step], validation: list[Any]) -> dict[str, Any]:
    """One way's M-step: NLL per token, nats, before each optimizer step and of all rationales at the end; greedy validation accuracy."""
    dtype, how = WAYS[name]
    cfg = configured(*overrides, f"engine.dtype={dtype}", f"seed={seed}", f"optimizer.lr={lr}")
    L.seed_everything(seed, verbose=False)
    parts = build(cfg)
    optimizer, settings = hydra.utils.instantiate(cfg.optimizer), hydra.utils.instantiate(cfg.m_step)
    module = EMModule(parts.model, parts.tokenizer, parts.engine, parts.prompts, optimizer, settings, Evaluation(40, False), seed)
    if "checkpoint" in name:
        exact = build(configured(*overrides, "engine.dtype=float32"))
        module._restored_masters = [p.detach() for p in exact.model.parameters() if p.requires_grad]
    module_module.publish = how()  # type: ignore[assignment]
    start = time.perf_counter()
    losses = losses_of(module, steps)
    seconds = time.perf_counter() - start
    module.eval()
    with torch.no_grad():
        batches = [batch for step in steps for batch in step.batches]
        after = torch.cat([token_logprobs(module.model, b.input_ids, b.completion_mask, marks=b.marks) for b in batches])
    score, _ = module.evaluate(validation, name)
    module_module.publish = masters_module.publish
    return {
        "way": name, "seed": seed, "lr": lr, "steps": len(losses), "nll": losses, "nll_after": -float(after.mean()),
        "accuracy": score["accuracy"], "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="emreason.bench.precision", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-5, 5e-6])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/precision.jsonl"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cfg = configured("model=smollm2_135m")
    _, tokenizer = hydra.utils.instantiate(cfg.model.load, _partial_=True)(dtype=torch.bfloat16)
    overrides = [o for o in iteration_work("", tokenizer, "cpu")["overrides"] if not o.startswith("model")]
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    done = {(row["way"], row["seed"], row["lr"]) for row in map(json.loads, lines)}
    for seed in options.seeds:
        left = [(lr, name) for lr in options.lr for name in options.ways if (name, seed, lr) not in done]
        if left:
            steps, validation, examples = rationales(seed, overrides)
            for lr, name in left:
                row = m_step(name, seed, lr, overrides, steps, validation) | {"accepted": len(examples)}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                nll = " ".join(f"{loss:.2f}" for loss in [*row["nll"], row["nll_after"]])
                print(f"seed {seed} lr {lr:g} {name}: NLL {nll}, accuracy {row['accuracy']:.0%}, {row['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()

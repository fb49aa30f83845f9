"""The part of `gpu_check.py` that makes whole runs: in every precision and way of training, interrupted and resumed, evaluated."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from emreason import evaluate as evaluation
from emreason import train as training
from emreason.bench.work import configured
from emreason.em.module import EMModule
from emreason.engines.gpu.graphs import Graphs
from emreason.runs.experiment import compose

if TYPE_CHECKING:
    from emreason.bench.gpu_parts import Findings

RUNS = {
    "float32": ["engine.dtype=float32"],
    "bfloat16": ["engine.dtype=bfloat16"],
    "lora": ["engine.dtype=bfloat16", "peft=lora"],
    "checkpointing": ["engine.dtype=float32", "m_step.gradient_checkpointing=true"],
    "pps_iw": ["engine.dtype=float32", "sampler=pps_iw"],
    "bound": ["engine.dtype=float32", "evaluation.bound=2", "evaluation.bound_questions=2"],
}


def smoke(found: Findings, *overrides: str) -> Any:
    """The config of a small run on the device."""
    small = ["dataset.limit={train: 12, validation: 4, test: 4}", "sampler.budget=4", "m_step.epochs=1", "trainer.max_epochs=2"]
    device = [f"trainer.accelerator={'gpu' if found.on_gpu else 'cpu'}", "quiet=true"]
    return configured("experiment=smoke", *small, *device, "m_step.on_zero_accepted=skip", *overrides)


def runs(found: Findings) -> None:
    """Whole runs in every precision and way of training; one that is interrupted and resumed; an evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in RUNS.items():
            with mock.patch.object(Graphs, "run", autospec=True, side_effect=Graphs.run) as launched:
                summary = training.train(smoke(found, *overrides), Path(folder, name))
            found.values[name] = round(summary["seconds"], 1)
            found.expect(summary["status"] == "finished", f"{name}: {summary['status']}")
            found.expect(launched.called == found.on_gpu, f"{name}: decoding steps went {'' if launched.called else 'not '}through graphs")
        cfg = smoke(found, *RUNS["bfloat16"])
        with mock.patch.object(EMModule, "training_step", interrupted_in(1)), contextlib.suppress(KeyboardInterrupt, SystemExit):
            training.train(cfg, Path(folder, "resumed"))
        training.train(cfg, Path(folder, "resumed"))
        states = [torch.load(next(Path(folder, name, "checkpoints").glob("last*")), map_location="cpu") for name in ("bfloat16", "resumed")]
        numbers = [tree_leaves([state[key] for key in ("master_weights", "optimizer_states", "state_dict")]) for state in states]
        pairs = [
            (torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*numbers, strict=True) if a is not None and not isinstance(a, str)
        ]
        apart = max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())
        found.values["resumed_differs_by"] = apart
        found.expect(apart <= (1e-2 if found.on_gpu else 0.0), "a resumed run has other weights, masters or moments")
        found.clear()
        before = torch.cuda.memory_allocated() if found.on_gpu else 0
        small = ["model=tiny_llama", "dataset=sums_2", "dataset.limit.test=4", "sampler.max_new_tokens=8"]
        device = f"trainer.accelerator={'gpu' if found.on_gpu else 'cpu'}"
        result = evaluation.evaluate(compose([*small, device], "evaluate")[0], Path(folder))
        found.values["evaluated"] = result["n"]
        found.expect(not found.on_gpu or torch.cuda.max_memory_allocated() > before, "an evaluation allocated nothing on the GPU")


def interrupted_in(iteration: int) -> Callable[..., None]:
    """A training step that is interrupted in an iteration."""
    step = EMModule.training_step

    def training_step(self: EMModule, *arguments: Any) -> None:
        if self.current_epoch == iteration:
            raise KeyboardInterrupt
        step(self, *arguments)

    return training_step

"""What a run will take of a device's memory, beside what there is: told before anything is loaded."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from emreason.models.footprint import GIB, Shape, Work, footprint, read_shape
from emreason.models.sizes import config
from emreason.questions.datasets import Dataset
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import Scheme
from emreason.types import Proposal

CHARACTERS = 3.5
"""Of a token: fewer than in English text, so that the longest prompt is rather over- than underestimated."""


def needs(cfg: DictConfig, dataset: Dataset, scheme: Scheme, questions: int, dtype: str, device: str, free: float | None) -> list[str]:
    """The memory of both phases in a line, and where there is too little a sentence that says what would take less.

    Args:
        questions: that are asked at once, at most.
        dtype: `float32` or `bfloat16`.
        device: `cpu` or `cuda`.
        free: bytes; None where that cannot be told.
    """
    shape = read_shape(config(cfg.model.load) or {})
    if shape is None:
        return []
    work = work_of(cfg, dataset, scheme, questions, dtype, device)
    devices = cfg.trainer.get("devices", 1)
    ranks = devices if device == "cpu" and type(devices) is int and devices > 0 else 1  # "auto", -1: one on a CPU
    phases = footprint(shape, work)
    where = "of each GPU" if device == "cuda" else f"of {ranks} processes" if ranks != 1 else ""
    told = []
    for phase, parts in phases.items():
        large = ", ".join(
            f"{n} {ranks * b / GIB:.1f}" for n, b in sorted(parts.items(), key=lambda part: -part[1]) if ranks * b >= 0.05 * GIB
        )
        told.append(f"{phase} {ranks * sum(parts.values()) / GIB:.1f} GiB ({large})")
    lines = [f"Memory {where + ', ' if where else ''}at most, estimated in {dtype}: {'; '.join(told)}"]
    if free is not None:
        lines[0] += f"; free: {free / GIB:.1f} GiB"
        if peak(shape, work) * ranks > free:
            lines.append(too_little(shape, work, free / ranks))
    return lines


def work_of(cfg: DictConfig, dataset: Dataset, scheme: Scheme, questions: int, dtype: str, device: str) -> Work:
    """What the config asks for."""
    prompts, train = Prompts(None, dataset.prompt, dataset.worked_examples()), "m_step" in cfg
    examples = scheme.n_examples(0) if train else cfg.examples
    longest = max(dataset.questions("train" if train else cfg.split), key=lambda q: len(q.text) + sum(map(len, q.choices)))

    def tokens(proposal: Proposal, n: int) -> int:
        return round(len(prompts.text(longest, proposal, n)) / CHARACTERS)

    proposals: tuple[Proposal, ...] = ("question", *(scheme.tries if train else ()))
    drawn = scheme.max_new_tokens if train else max(cfg.max_new_tokens, scheme.max_new_tokens)
    a_row = tokens("question", 0) + drawn
    batch = min(cfg.m_step.tokens_per_batch, cfg.m_step.batch_size * a_row) if train else 0
    add = cfg.peft.get("add") or {}
    targets = add.get("target_modules", "all-linear")
    optimizer = cfg.optimizer if train else {}
    moments = 2 if "Adam" in optimizer.get("_target_", "Adam") else 1 if optimizer.get("momentum") else 0
    engine = cfg.engine.get("_target_", "")
    return Work(
        device=device,
        dtype=dtype,
        engine="inprocess" if "vllm" not in engine else "server" if cfg.engine.get("server") else "vllm",
        adapter=(int(add["r"]), targets if isinstance(targets, str) else tuple(targets)) if "r" in add else None,
        trains=train,
        rows=min(int(cfg.engine.get("max_batch", 1)), questions),
        prompt=max(tokens(proposal, examples) for proposal in proposals),
        drawn=drawn,
        tokens=max(batch, a_row),
        again=bool(train and cfg.m_step.gradient_checkpointing),
        moments=moments,
        quantization=cfg.model.load.get("quantization"),
    )


def peak(shape: Shape, work: Work) -> float:
    """Bytes of the larger phase."""
    return max(sum(parts.values()) for parts in footprint(shape, work).values())


def too_little(shape: Shape, work: Work, free: float) -> str:
    """One sentence: what is needed, and the three cheapest ways to need less; those that suffice first."""
    totals = {phase: sum(parts.values()) for phase, parts in footprint(shape, work).items()}
    worst = max(totals, key=totals.__getitem__)
    ways = [(words, peak(shape, changed)) for words, changed in _mends(work)]
    helping = [(words, needed) for words, needed in ways if needed < 0.98 * totals[worst]]
    helping.sort(key=lambda way: max(way[1] - free, 0))  # of those that suffice the first is the cheapest
    enough = bool(helping) and helping[0][1] <= free
    shown = [f"{words} ({needed / GIB:.1f})" for words, needed in helping[: 3 if enough else 2]] + ([] if enough else ["a smaller model"])
    said = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
    return f"The {worst} may need {totals[worst] / GIB:.1f} GiB and {free / GIB:.1f} are free; use {said}."


def _mends(work: Work) -> list[tuple[str, Work]]:
    """Ways to need less, the cheapest first: time, then precision, then what is learned."""
    found: list[tuple[str, Work]] = []
    if work.engine == "inprocess" and work.rows >= 8:
        found.append((f"engine.max_batch={work.rows // 4}", replace(work, rows=work.rows // 4)))
    if work.trains:
        row = min(work.tokens, work.prompt + work.drawn)
        fewer = max(work.tokens // 4, row)
        found += [(f"m_step.tokens_per_batch={fewer}", replace(work, tokens=fewer))]
        found += [] if work.again else [("m_step.gradient_checkpointing=true", replace(work, again=True))]
    if work.engine == "vllm":
        found.append(("engine=inprocess", replace(work, engine="inprocess")))
    if work.dtype == "float32":
        found.append(("engine.dtype=bfloat16", replace(work, dtype="bfloat16")))
    if work.trains and work.adapter is None:
        found.append(("peft=lora", replace(work, adapter=(16, "all-linear"))))
    if work.quantization is None and work.adapter is not None and work.engine == "inprocess":
        found.append(("model.load.quantization=nf4", replace(work, quantization="nf4")))
    if work.trains and len(found) > 1:
        everything = replace(work, rows=min(work.rows, 8), again=True, dtype="bfloat16", adapter=work.adapter or (16, "all-linear"))
        words = ["engine.max_batch=8", "m_step.gradient_checkpointing=true", "engine.dtype=bfloat16", "peft=lora"]
        found.append((f"all of {' '.join(words)}", everything))
    return found


def free_on_host() -> float | None:
    """Bytes that this process can have, in its container if it is in one; None outside Linux."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(float(int((group / "memory.max").read_text()) - int(used["anon"])))
    return min(found, default=None)


def free_on_gpu() -> float | None:
    """Bytes free on the fullest of the GPUs that this process would use, as the driver's tool says; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2)
        return min(2.0**20 * int(line) for line in done.stdout.split())
    return None

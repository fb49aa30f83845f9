"""EM contender: `emreason.train.train` up to the accuracy asked for. `python iterate_ours.py WORK RESULT seed=N`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from emreason import train
from emreason.bench.work import ITERATION, configured
from emreason.em import m_step
from emreason.em.checkpoints import AtomicCheckpointIO
from emreason.em.e_step import EStep
from emreason.em.module import EMModule
from emreason.engines.inprocess import InProcessEngine
from emreason.models import loading
from emreason.runs import experiment

WORK = ("decoding", "forward", "backward", "optimizer")
"""The rest of an iteration is overhead."""


@dataclass(frozen=True)
class Moment:
    """A time, and the seconds by kind that a clock had counted by then."""

    at: float
    seconds: dict[str, float]


class Clock:
    """Seconds spent inside wrapped functions, by kind; a call inside another one counts once. Unwraps them at the end of a `with`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0
        self.originals: list[tuple[Any, str, Any]] = []
        self.marks: dict[str, tuple[Moment, Moment]] = {}

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, function in reversed(self.originals):
            setattr(owner, name, function)

    def wrap(self, owner: Any, name: str, kind: str) -> None:
        """Replace `owner.name` by the same function, timed as `kind`."""
        function = self._take(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            return self._timed(kind, lambda: function(*args, **kwargs))

        setattr(owner, name, timed)

    def wrap_generator(self, owner: Any, name: str, kind: str) -> None:
        """The same for a generator: what the consumer does between two items does not count."""
        function = self._take(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = function(*args, **kwargs)
            end = object()
            while (item := self._timed(kind, lambda: next(items, end))) is not end:
                yield item

        setattr(owner, name, timed)

    def mark(self, owner: Any, name: str) -> None:
        """Note when `owner.name` begins, the first time that it is called, and when it ends, the last time."""
        function = self._take(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            begun = Moment(time.perf_counter(), dict(self.seconds))
            try:
                return function(*args, **kwargs)
            finally:
                begun = self.marks.get(name, (begun,))[0]
                self.marks[name] = (begun, Moment(time.perf_counter(), dict(self.seconds)))

        setattr(owner, name, marked)

    def replace(self, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
        """Replace `owner.name` by what `change` makes of it."""
        setattr(owner, name, change(self._take(owner, name)))

    def _take(self, owner: Any, name: str) -> Any:
        function = getattr(owner, name)
        self.originals.append((owner, name, function))
        return function

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        self.depth += 1
        start = time.perf_counter()
        try:
            return call()
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.depth -= 1
            if self.depth == 0:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start


def main(work: dict[str, Any], seed: str, folder: Path) -> dict[str, Any]:
    """The iterations in a fresh run folder. `overhead` is the share of their time, from the first E-step to the last checkpoint, that is
    spent outside the engine's decoding, forward, backward and optimizer; `overhead_of_run` also counts the run's start and end, without
    loading the model.
    """
    shutil.rmtree(folder, ignore_errors=True)
    cfg = configured(*work["iteration"]["overrides"], seed)
    with Clock() as clock:
        clock.wrap(experiment, "build", "loading")
        clock.wrap(AtomicCheckpointIO, "save_checkpoint", "checkpoints")
        clock.wrap(loading, "export", "export")
        clock.wrap_generator(InProcessEngine, "generate", "decoding")
        clock.wrap(m_step, "token_logprobs", "forward")
        clock.wrap(torch.Tensor, "backward", "backward")
        clock.wrap(LightningOptimizer, "step", "optimizer")
        clock.mark(EStep, "run")
        clock.mark(L.Trainer, "fit")
        clock.replace(EMModule, "validation_step", lambda step: _and_stop(step, work["iteration"]["target"]))
        start = time.perf_counter()
        summary = train.train(cfg, folder)
        total = time.perf_counter() - start
    began, ended = clock.marks["run"][0], clock.marks["fit"][1]
    work_within, work_in_all = (sum(seconds.get(kind, 0.0) for kind in WORK) for seconds in (ended.seconds, clock.seconds))
    iterations = summary["iterations"]
    row = {
        "work": ITERATION,
        "e_step_seconds": sum(i["e_step"]["seconds"] for i in iterations),
        "m_step_seconds": sum(i["m_step"]["seconds"] for i in iterations),
        "evaluation_seconds": sum(i["validation"]["seconds"] for i in iterations),
        "accepted": [i["e_step"]["accepted"] for i in iterations],
        "steps": [i["m_step"]["steps"] for i in iterations],
        "accuracies": [i["validation"]["accuracy"] for i in iterations],
        "overhead": 1 - work_within / (ended.at - began.at),
        "overhead_of_run": 1 - work_in_all / (total - clock.seconds["loading"]),
        "seconds_inside": clock.seconds,
    }
    return {"rows": [row], "dtype": summary["dtype"]}


def _and_stop(step: Callable[..., None], target: float) -> Callable[..., None]:
    """A validation step after which the run ends where it has reached the target."""

    def validation_step(module: EMModule, *args: Any) -> None:
        step(module, *args)
        if module.scores["validation"]["accuracy"] >= target:
            module.trainer.should_stop = True

    return validation_step


if __name__ == "__main__":
    made = main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], Path(sys.argv[2]).parent / "run")
    Path(sys.argv[2]).write_text(json.dumps(made))

"""Whole-iteration contender: `emreason.train.train` with one EM iteration. `python iterate_ours.py WORK RESULT`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from emreason import module, train
from emreason.bench.work import ITERATION, configured
from emreason.engines.inprocess import InProcessEngine
from emreason.journal import AtomicCheckpointIO

WORK = ("decoding", "forward", "backward", "optimizer")
"""The rest of an iteration is overhead; loading the model is neither."""


class Clock:
    """Seconds spent inside wrapped functions, by kind; a call inside another one counts once. Unwraps them at the end of a `with`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.depth = 0
        self.originals: list[tuple[Any, str, Any]] = []

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


def main(work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The iteration in a fresh run folder. `overhead` is the share of its time, without loading the model, that is spent outside the
    engine's decoding, forward, backward and optimizer.
    """
    shutil.rmtree(folder, ignore_errors=True)
    cfg = configured(*work["iteration"]["overrides"])
    with Clock() as clock:
        clock.wrap(train, "build", "loading")
        clock.wrap(AtomicCheckpointIO, "save_checkpoint", "checkpoints")
        clock.wrap(train, "export", "export")
        clock.wrap_generator(InProcessEngine, "generate", "decoding")
        clock.wrap(module, "token_logprobs", "forward")
        clock.wrap(torch.Tensor, "backward", "backward")
        clock.wrap(LightningOptimizer, "step", "optimizer")
        start = time.perf_counter()
        summary = train.train(cfg, folder)
        total = time.perf_counter() - start
    overhead = 1 - sum(clock.seconds[kind] for kind in WORK if kind in clock.seconds) / (total - clock.seconds["loading"])
    (iteration,) = summary["iterations"]
    row = {
        "work": ITERATION,
        "e_step_seconds": iteration["e_step"]["seconds"],
        "m_step_seconds": iteration["m_step"]["seconds"],
        "evaluation_seconds": iteration["validation"]["seconds"],
        "accepted": iteration["e_step"]["accepted"],
        "steps": iteration["m_step"]["steps"],
        "accuracy": iteration["validation"]["accuracy"],
        "overhead": overhead,
        "seconds_inside": clock.seconds,
    }
    return {"rows": [row], "dtype": summary["dtype"]}


if __name__ == "__main__":
    made = main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).parent / "run")
    Path(sys.argv[2]).write_text(json.dumps(made))

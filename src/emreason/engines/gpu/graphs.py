"""A decoding step as one launch: recorded as a CUDA graph when its shape has come often enough, compared with the step, replayed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from emreason.engines.drawing import Shaping
from emreason.models.memory import is_out_of_memory

log = logging.getLogger(__name__)

AFTER = 8
"""Steps of a shape that are run kernel by kernel: to record one costs as much as some, and a shape may not come again."""

Drawn = tuple[Tensor, Tensor]
Record = Callable[[Callable[[], Drawn]], tuple[Callable[[], None], Drawn]]
"""Of a step: what repeats its work on the same tensors, and where it leaves what the step returns."""


def cuda_recorder() -> Record:
    """CUDA graphs that share their memory: one runs at a time, and what one leaves is read before the next runs."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Drawn]) -> tuple[Callable[[], None], Drawn]:
        graph = torch.cuda.CUDAGraph()
        # the outer stream is restored where a capture fails; other threads (NCCL's) may go on meanwhile
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            drawn = step()
        return graph.replay, drawn

    return record


class Graphs:
    """The recorded steps of one decoder, by their shape. They read and write tensors that stay where they are: its cache, and `hold`'s."""

    def __init__(self, record: Record):
        self.record: Record | None = record
        self.held: dict[int, tuple[Tensor, Shaping]] = {}
        self.cache: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        self.seen: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, tuple[Callable[[], None], Drawn]] = {}

    def hold(self, state: Tensor, shaping: Shaping) -> tuple[Tensor, Shaping]:
        """`state` [4, rows] and `shaping` in the tensors that the graphs of so many rows know."""
        if (rows := state.shape[1]) not in self.held:
            self.held[rows] = state, shaping
        held, old = self.held[rows]
        for there, new in ((held, state), (old.inverse, shaping.inverse), (old.top_p, shaping.top_p), (old.cold, shaping.cold)):
            there.copy_(new)
        return held, replace(shaping, inverse=old.inverse, top_p=old.top_p, cold=old.cold)

    def run(self, step: Callable[[], Drawn], shape: Hashable, state: Tensor, cache: Tensor) -> Drawn:
        """What `step` returns, which changes `state` and `cache`, and for a `shape` always starts the same kernels on the same tensors."""
        if cache is not self.cache:  # it has grown: it lies elsewhere
            self.forget()
            self.cache = cache
        self.seen[shape] += 1
        if self.record is None or self.seen[shape] <= AFTER:
            return step()
        if shape not in self.recorded:
            return self._record(step, shape, state, self.record)
        replay, (ids, logprobs) = self.recorded[shape]
        replay()
        return ids.clone(), logprobs.clone()

    def _record(self, step: Callable[[], Drawn], shape: Hashable, state: Tensor, record: Record) -> Drawn:
        """Run the step, record it, and keep what was recorded if it does the same."""
        before = state.clone()
        drawn = step()
        after = state.clone()
        state.copy_(before)
        why = "the recorded step draws something else"
        try:
            replay, left = record(step)
            state.copy_(before)
            replay()
            if all(map(torch.equal, (*left, state), (*drawn, after))):
                self.recorded[shape] = replay, left
                return drawn
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
        log.warning("Decoding goes on without CUDA graphs (%s); engine.cuda_graphs=false does not try them", why)
        self.record = None
        state.copy_(after)
        return drawn

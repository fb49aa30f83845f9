"""Continuous batching on the training weights themselves: requests in, completions out as they finish.

A draw depends on the weights, the prompt, the sampling parameters and the request's seed alone: token t takes one uniform number
hashed from (seed, t) through the inverse CDF of its distribution, so neither the batch nor the order of requests shows in it. That is
exact where a row's logits are the same in every batch, as on CPUs in float32; on CUDA, and in bfloat16, matrix products round by the
batch's size, and a draw whose uniform number lies within that rounding of two tokens' border may come out as the other one.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emreason.engines.decoder import CACHE_STEP, ROWS_STEP, Decoder, FusedDecoder, make_decoder
from emreason.engines.drawing import Shaping, counter_uniforms, draw, signed
from emreason.engines.gpu.graphs import Graphs, Record, cuda_recorder
from emreason.engines.prefixes import MIN_SHARED, PrefixCache, common_prefix
from emreason.models.families import base_causal_lm
from emreason.models.memory import is_out_of_memory, release_memory
from emreason.progress import doing
from emreason.questions.prompts import end_of_turn_ids
from emreason.types import Completion, FinishReason, Request, UserError

log = logging.getLogger(__name__)

RESERVED = 256
"""Most positions beyond the prompt for which the cache is made in advance; it grows with longer completions."""

LOOK_EVERY = {"cpu": 1, "cuda": 8}
"""Decoding steps between two looks of the host at what was drawn: a GPU is not to wait. What is drawn beyond a row's end is dropped."""

UNKNOWN, PLAIN, LINE_END, END = range(4)


@dataclass
class EngineStats:
    """Counters since the engine was made."""

    generated: int = 0
    prefilled: int = 0
    reused: int = 0
    steps: int = 0


@dataclass
class _Row:
    """A completion under way. `ids`: the prompt but its last token, which is decoded so that prefill needs no logits."""

    request: Request
    room: int  # tokens that may be drawn
    ids: np.ndarray
    drawn: list[int] = field(default_factory=list)
    logprob: float = 0.0

    @property
    def length(self) -> int:
        """Cached positions; `token` comes next."""
        return len(self.ids) + len(self.drawn)

    @property
    def token(self) -> int:
        return self.drawn[-1] if self.drawn else self.request.prompt_ids[-1]

    def take(self, ids: Sequence[int], logprobs: Sequence[float], kinds: Sequence[int]) -> FinishReason | None:
        """Take what was drawn, up to the completion's end if that is among it; why it ends, or None."""
        for token, logprob, kind in zip(ids, logprobs, kinds, strict=True):
            if math.isnan(logprob):
                raise FloatingPointError(f"the logits of request {self.request.key!r} are not finite: the weights have diverged")
            self.drawn.append(token)
            self.logprob += logprob
            if kind == END:
                return "stop"
            if kind == LINE_END and self.request.stop is not None and self.request.stop(list(self.drawn)):
                return "answer"
            if len(self.drawn) >= self.room:
                return "length"
        return None


class InProcessEngine:
    """Draws completions from a Hugging Face causal LM, PEFT-wrapped or not, with the weights it has when `generate` is called.

    `max_batch`: most rows decoded together. `dtype`: the precision of decoding (None: the model's own); probabilities are always
    float32. `prefix_tokens`: prompt positions whose K/V is kept for prompts that begin alike (put a question's next attempt at the
    left of the requests to make the most of it). `cuda_graphs`: on a GPU a step is launched as one where the decoder is the fused one.
    The checkpoint's generation_config is read for its end-of-sequence ids only: temperature, top-p and limits are those of each request.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int = 64,
        dtype: torch.dtype | None = None,
        prefix_tokens: int = 4096,
        cuda_graphs: bool = True,
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.dtype, self.prefix_tokens = max_batch, dtype, prefix_tokens
        self.look_every: int | None = None  # steps between two looks of the host; None: as the device wants it
        self.recorder: Callable[[], Record] | None = None  # None: as `cuda_graphs` and the device say
        self.cuda_graphs = cuda_graphs
        self.stats = EngineStats()
        self.eos_ids = eos_token_ids(base_causal_lm(model), tokenizer)
        self.context = longest_context(base_causal_lm(model).config) or 2**31
        self._kinds = np.empty(0, dtype=np.int8)

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        """Yield a completion per request as soon as it is drawn; `requests` is consumed from the left as rows become free.

        Prompts that leave no room in the model's context come back with no tokens and finish reason `error`. The training flag of
        every submodule is what it was once the iterator ends, fails or is closed. Raises FloatingPointError on logits that are not
        finite.
        """
        with evaluating(self.model):
            batch: _Batch | None = None
            while requests or (batch is not None and batch.rows):
                done: list[Completion] = []
                full = False
                # Inference mode is per thread: it must not be on while the consumer runs between two yields.
                with torch.inference_mode():
                    try:
                        batch = batch or _Batch(self, make_decoder(self.model, self.dtype))
                        batch.admit(requests, done)
                        if batch.rows:
                            done += batch.step()
                    except (RuntimeError, MemoryError) as error:
                        full = is_out_of_memory(error)
                        if not full:
                            raise
                    if full:  # outside the handler, whose traceback would keep the old cache alive
                        unfinished = [row.request for row in batch.live()] if batch is not None else []
                        if batch is None or len(unfinished) == batch.most:
                            self._halve(len(unfinished))
                        else:  # the last ones: the rows of those that have ended took the memory
                            log.warning("Out of memory with the last %d completions; they are drawn again", len(unfinished))
                        requests.extendleft(reversed(unfinished))
                        batch = None
                        release_memory()
                yield from done

    def _halve(self, rows: int) -> None:
        """Half as many rows from now on: what was under way is drawn again, with the same seeds, so it comes out the same."""
        if rows <= 1:
            raise UserError(
                "Out of memory with a single completion under way: use engine.dtype=bfloat16, a smaller model, "
                "or fewer sampler.max_new_tokens."
            )
        self.max_batch = rows // 2
        log.warning("Out of memory with %d completions at once; going on with engine.max_batch=%d", rows, self.max_batch)

    def kinds(self, ids: np.ndarray) -> np.ndarray:
        """PLAIN, LINE_END or END of each of `ids`; a token is decoded when it is first drawn."""
        if (missing := int(ids.max()) + 1 - len(self._kinds)) > 0:
            self._kinds = np.append(self._kinds, np.full(missing, UNKNOWN, dtype=np.int8))
        for token in np.unique(ids[self._kinds[ids] == UNKNOWN]).tolist():
            line_end = "\n" in self.tokenizer.decode([token])
            self._kinds[token] = END if token in self.eos_ids else LINE_END if line_end else PLAIN
        return self._kinds[ids]


class _Batch:
    """The rows of one `generate` call; row i of the decoder's cache is `rows[i]`."""

    def __init__(self, engine: InProcessEngine, decoder: Decoder):
        self.engine, self.decoder, self.stats = engine, decoder, engine.stats
        device = next(engine.model.parameters()).device.type  # only now: Lightning moves the model after the engine is made
        self.look_every = engine.look_every or LOOK_EVERY[device]
        self.prefixes = PrefixCache(engine.prefix_tokens if isinstance(decoder, FusedDecoder) else 0)
        self.graphs: Graphs | None = None
        if isinstance(decoder, FusedDecoder):
            decoder.keep(engine.prefix_tokens)
            recorder = engine.recorder or (cuda_recorder if engine.cuda_graphs and device == "cuda" else None)
            self.graphs = Graphs(recorder()) if recorder else None
        self.rows: list[_Row] = []
        self.free: list[int] = []  # rows that have just finished
        self.most = 0  # rows at once so far: the cache has as many
        self.changed = True  # since `state` was made: token, cached positions, seed, tokens drawn of each row, int64 [4, B]

    def live(self) -> list[_Row]:
        """The rows under way."""
        return [row for i, row in enumerate(self.rows) if i not in self.free]

    def admit(self, requests: deque[Request], refused: list[Completion]) -> None:
        """Fill the free rows, and new ones up to `max_batch`, from the left of `requests`; then close the gaps that are left.

        Completions of prompts that cannot be run are added to `refused`.
        """
        arrivals: list[int] = []
        while requests and len(self.rows) - len(self.free) < self.engine.max_batch:
            request = requests.popleft()
            prompt, wanted = request.prompt_ids, request.params.max_new_tokens
            room = min(wanted, self.engine.context - len(prompt))
            if not prompt or room < 1:
                refused.append(Completion(request, (), 0.0, "length" if prompt and wanted < 1 else "error"))
                continue
            row = _Row(request, room, np.asarray(prompt[:-1], dtype=np.int64))
            if self.free:
                arrivals.append(self.free.pop())
                self.rows[arrivals[-1]] = row
            else:
                arrivals.append(len(self.rows))
                self.rows.append(row)
        self.changed |= bool(arrivals or self.free)
        if arrivals:
            self.most = max(self.most, len(self.rows))
            self.decoder.reserve(len(self.rows), max(self.rows[i].length + min(self.rows[i].room, RESERVED) for i in arrivals))
        while arrivals:
            arrivals = self._prefill(arrivals)
        for index in sorted(self.free, reverse=True):
            last = self.rows.pop()
            if index < len(self.rows):
                self.decoder.move(len(self.rows), index, last.length)
                self.rows[index] = last
        self.free = []

    def _prefill(self, arrivals: Sequence[int]) -> list[int]:
        """Prefill the rows whose prompts share nothing new among themselves; the others, returned, will find their prefix cached."""
        jobs: list[tuple[int, int, list[int]]] = []
        waiting: list[int] = []
        kept: list[tuple[int, int, int]] = []
        for index in arrivals:
            ids = self.rows[index].ids
            at, known = self.prefixes.longest(ids)
            within = max((common_prefix(ids, self.rows[other].ids) for other, _, _ in jobs), default=0)
            if self.prefixes.capacity and within >= known + MIN_SHARED:
                waiting.append(index)
                continue
            if known:
                kept.append((index, known, at))
            jobs.append((index, known, ids[known:].tolist()))
            self.stats.reused += known
            self.stats.prefilled += len(ids) - known
        if isinstance(self.decoder, FusedDecoder):
            self.decoder.load(kept)
        with doing(f"Reading prompts, {sum(len(ids) for *_, ids in jobs):,} tokens", at_once=False):
            self.decoder.prefill(jobs)
        if isinstance(self.decoder, FusedDecoder):
            fresh = [(index, self.rows[index].ids) for index, _, ids in jobs if ids]
            placed = [(index, ids, self.prefixes.place(ids)) for index, ids in fresh if ids.size <= self.prefixes.capacity]
            there = {(id(ids), at) for ids, at in self.prefixes.entries}  # without those that later ones have overwritten
            self.decoder.save([(index, len(ids), at) for index, ids, at in placed if (id(ids), at) in there])
        return waiting

    def step(self) -> list[Completion]:
        """Decode and draw for every row until the host looks; returns the completions that end with it."""
        steps = self.look_every
        if self.changed:
            self._upload()
        longest = max(row.length for row in self.rows)
        self.decoder.reserve(len(self.rows), longest + steps)
        drawn = [self._advance(longest + i) for i in range(steps)]
        # the one wait for the device
        picked = torch.stack([torch.stack([ids.double(), logprobs.double()]) for ids, logprobs in drawn]).cpu().numpy()
        ids, logprobs = picked[:, 0].astype(np.int64).T[: len(self.rows)], picked[:, 1].T[: len(self.rows)]
        self.stats.steps += steps
        done = []
        for index, (row, *taken) in enumerate(
            zip(self.rows, ids.tolist(), logprobs.tolist(), self.engine.kinds(ids).tolist(), strict=True)
        ):
            before = len(row.drawn)
            if reason := row.take(*taken):
                self.free.append(index)
                done.append(Completion(row.request, tuple(row.drawn), row.logprob, reason))
            self.stats.generated += len(row.drawn) - before
        return done

    def _upload(self) -> None:
        """What the device needs to know of the rows, in two copies."""
        known = [(row.token, row.length, signed(row.request.seed), len(row.drawn)) for row in self.rows]
        params = [row.request.params for row in self.rows]
        if self.graphs:  # rows that nobody reads; the cache has them
            more = -len(known) % ROWS_STEP
            known, params = known + [(0, 0, 0, 0)] * more, params + params[:1] * more
        self.state = torch.tensor(known).T.contiguous().to(self.decoder.device, non_blocking=True)
        self.shaping = Shaping.of(params, self.decoder.device)
        if self.graphs:
            self.state, self.shaping = self.graphs.hold(self.state, self.shaping)
        self.changed = False

    def _advance(self, longest: int) -> tuple[Tensor, Tensor]:
        """`_decode`, as one launch where that is possible; `longest`: cached positions of the longest row."""
        last = self.engine.context - 1
        if self.graphs is None or not isinstance(self.decoder, FusedDecoder):
            return self._decode(min(longest, last))
        cache, shaping = self.decoder.keys[0], self.shaping
        width = min(-(-(longest + 1) // CACHE_STEP) * CACHE_STEP, cache.shape[2])  # few shapes
        shape = (self.state.shape[1], width, shaping.warm, shaping.nucleus, shaping.greedy)
        return self.graphs.run(lambda: self._decode(min(width - 1, last)), shape, self.state, cache)

    def _decode(self, longest: int) -> tuple[Tensor, Tensor]:
        """One step on the device: ids and log-probabilities [B] of the tokens drawn, which come next."""
        tokens, lengths, seeds, counters = self.state
        lengths.clamp_(max=longest)  # a row that has ended may not run out of the model's positions
        logits = self.decoder.decode(tokens, lengths, longest)
        ids, logprobs = draw(logits, counter_uniforms(seeds, counters), self.shaping)
        tokens.copy_(ids)
        self.state[1::2] += 1
        return ids, logprobs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the training flag it had, also after an exception."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def longest_context(config: Any) -> int | None:
    """Positions that a model of text, or the text's part of one of more, was made for; None where its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's and the configs' end-of-sequence ids, and what the chat template ends a turn with."""
    sources = [getattr(tokenizer, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    sources.append(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    ids: set[int] = set(end_of_turn_ids(tokenizer))
    for source in sources:
        ids.update(source if isinstance(source, list | tuple) else [source] if source is not None else [])
    return frozenset(ids)

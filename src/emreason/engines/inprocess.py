"""Continuous batching on the training weights themselves: requests in, completions out as they finish.

A draw depends on the weights, the prompt, the sampling parameters and the request's seed alone: token t takes one uniform number
hashed from (seed, t) through the inverse CDF of its distribution, so neither the batch nor the order of requests shows in it.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emreason.engines.decoder import Decoder, base_model, make_decoder
from emreason.types import Completion, FinishReason, Request, SamplingParams

CHAT_STOPS = ("<|im_end|>", "<|eot_id|>")
CDF_BLOCK = 256
MIN_SHARED = 8
"""Shortest common prefix, in tokens, that is worth copying instead of recomputing."""


@dataclass
class EngineStats:
    """Counters since the engine was made; `live` is the number of rows of the step that runs now."""

    generated: int = 0
    prefilled: int = 0
    reused: int = 0
    steps: int = 0
    live: int = 0


@dataclass
class _Row:
    request: Request
    length: int  # cached positions; the token to decode next sits at this position
    token: int
    room: int
    drawn: list[int] = field(default_factory=list)
    logprob: float = 0.0


class InProcessEngine:
    """Draws completions from a Hugging Face causal LM, PEFT-wrapped or not, with the weights it has when `generate` is called.

    `max_batch`: most rows decoded together. `dtype`: the precision of decoding (None: the model's own); probabilities are always
    float32. `prefix_tokens`: prompt positions whose K/V is kept for prompts that begin alike. The checkpoint's generation_config
    is read for its end-of-sequence ids only: temperature, top-p and limits are those of each request.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_batch: int = 64, dtype: torch.dtype | None = None, prefix_tokens: int = 8192
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, not {max_batch}")
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.dtype, self.prefix_tokens = max_batch, dtype, prefix_tokens
        self.stats = EngineStats()
        self.eos_ids = eos_token_ids(base_model(model), tokenizer)
        self.context = int(getattr(base_model(model).config, "max_position_embeddings", None) or 2**31)
        self._newline: dict[int, bool] = {}

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        """Yield a completion per request as soon as it is drawn; `requests` is consumed from the left as rows become free.

        Prompts that leave no room in the model's context come back with no tokens and finish reason `error`. The training flag of
        every submodule is what it was once the iterator ends, fails or is closed.
        """
        with evaluating(self.model):
            with torch.inference_mode():
                decoder = make_decoder(self.model, self.dtype)
                prefixes = PrefixCache(self.prefix_tokens if decoder.shares_prefixes else 0)
            rows: list[_Row] = []
            free: list[int] = []
            try:
                while requests or rows:
                    # Inference mode is per thread: it must not be on while the consumer runs between two yields.
                    with torch.inference_mode():
                        refused = self._admit(requests, rows, free, decoder, prefixes)
                        finished = self._step(rows, decoder) if rows else []
                    yield from refused
                    for index, reason in finished:
                        row = rows[index]
                        yield Completion(row.request, tuple(row.drawn), row.logprob, reason)
                    free = [index for index, _ in finished]
            finally:
                self.stats.live = 0

    def _admit(
        self, requests: deque[Request], rows: list[_Row], free: list[int], decoder: Decoder, prefixes: PrefixCache
    ) -> list[Completion]:
        """Fill the free rows, and new ones up to `max_batch`, from the left of `requests`; then close the gaps that are left."""
        refused: list[Completion] = []
        arrivals: list[_Row] = []
        while requests and len(rows) - len(free) + len(arrivals) < self.max_batch:
            request = requests.popleft()
            size, wanted = len(request.prompt_ids), request.params.max_new_tokens
            if size == 0 or size >= self.context:
                refused.append(Completion(request, (), 0.0, "error"))
            elif wanted < 1:
                refused.append(Completion(request, (), 0.0, "length"))
            else:
                room = min(wanted, self.context - size)
                arrivals.append(_Row(request, size - 1, request.prompt_ids[-1], room))
        placed = []
        for row in arrivals:
            if free:
                index = free.pop()
                rows[index] = row
            else:
                index = len(rows)
                rows.append(row)
            placed.append((index, row.request.prompt_ids))
        while placed:
            placed = self._prefill_round(placed, decoder, prefixes)
        for index in sorted(free, reverse=True):
            last = len(rows) - 1
            if index < last:
                decoder.move(last, index, rows[last].length)
                rows[index] = rows[last]
            rows.pop()
        return refused

    def _prefill_round(
        self, placed: list[tuple[int, tuple[int, ...]]], decoder: Decoder, prefixes: PrefixCache
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Prefill the prompts that share nothing new among themselves; return the others, which find their prefix cached next round."""
        jobs, waiting = [], []
        now: list[np.ndarray] = []
        for index, prompt in placed:
            ids = np.asarray(prompt[:-1], dtype=np.int64)  # the last prompt token is decoded, so that prefill needs no logits
            saved, shared = prefixes.longest(ids)
            if prefixes.capacity and max((common_prefix(ids, other) for other in now), default=0) >= shared + MIN_SHARED:
                waiting.append((index, prompt))
                continue
            if shared:
                decoder.load(index, saved, shared)
            jobs.append((index, shared, prompt[shared:-1]))
            now.append(ids)
            self.stats.reused += shared
            self.stats.prefilled += len(ids) - shared
        decoder.prefill(jobs)
        if prefixes.capacity:
            for (index, shared, tail), ids in zip(jobs, now, strict=True):
                if tail:
                    prefixes.add(ids, decoder.save(index, shared + len(tail)))
        return waiting

    def _step(self, rows: list[_Row], decoder: Decoder) -> list[tuple[int, FinishReason]]:
        """Decode and draw one token for every row; returns the rows that are finished and why."""
        device = next(self.model.parameters()).device
        tokens = torch.tensor([row.token for row in rows], device=device)
        logits = decoder.decode(tokens, [row.length for row in rows])
        uniforms = counter_uniforms([row.request.seed for row in rows], [len(row.drawn) for row in rows])
        drawn, logprobs = draw(logits, uniforms, [row.request.params for row in rows])
        picked = torch.stack([drawn.double(), logprobs.double()]).tolist()  # the one synchronisation of a step
        self.stats.steps += 1
        self.stats.generated += len(rows)
        self.stats.live = len(rows)
        finished = []
        for index, (row, token, logprob) in enumerate(zip(rows, *picked, strict=True)):
            if math.isnan(logprob):
                raise FloatingPointError(f"the logits of request {row.request.key!r} are not finite: the weights have diverged")
            row.token = int(token)
            row.length += 1
            row.drawn.append(row.token)
            row.logprob += logprob
            if reason := self._finish_reason(row):
                finished.append((index, reason))
        return finished

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.token in self.eos_ids:
            return "stop"
        if row.request.stop is not None and self._has_newline(row.token) and row.request.stop(list(row.drawn)):
            return "answer"
        return "length" if len(row.drawn) >= row.room else None

    def _has_newline(self, token: int) -> bool:
        if token not in self._newline:
            self._newline[token] = "\n" in self.tokenizer.decode([token])
        return self._newline[token]


class PrefixCache:
    """K/V of recent prompts, least recently used first, bounded in tokens."""

    def __init__(self, capacity: int):
        self.capacity, self.size = capacity, 0
        self.entries: OrderedDict[bytes, tuple[np.ndarray, Any]] = OrderedDict()

    def longest(self, ids: np.ndarray) -> tuple[Any, int]:
        """The entry that shares the longest prefix with `ids`, and that length (0 and None below `MIN_SHARED`)."""
        best, found, length = b"", None, MIN_SHARED - 1
        for key, (other, saved) in self.entries.items():
            if (shared := common_prefix(ids, other)) > length:
                best, found, length = key, saved, shared
        if found is None:
            return None, 0
        self.entries.move_to_end(best)
        return found, length

    def add(self, ids: np.ndarray, saved: Any) -> None:
        """Keep `saved`, the K/V of `ids`; the oldest entries make way. An entry above the capacity is not kept."""
        key = ids.tobytes()
        if len(ids) > self.capacity or key in self.entries:
            return
        self.entries[key] = (ids, saved)
        self.size += len(ids)
        while self.size > self.capacity:
            _, (old, _) = self.entries.popitem(last=False)
            self.size -= len(old)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


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


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's and the configs' end-of-sequence ids, and the end-of-turn mark of a chat template."""
    sources = [getattr(tokenizer, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    sources.append(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    if template := getattr(tokenizer, "chat_template", None):
        vocabulary = tokenizer.get_vocab()
        sources += [vocabulary.get(mark) for mark in CHAT_STOPS if mark in str(template)]
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list | tuple) else [source] if source is not None else [])
    return frozenset(ids)


def counter_uniforms(seeds: Sequence[int], counters: Sequence[int]) -> np.ndarray:
    """One uniform number in [0, 1) per (seed, counter), by SplitMix64: float64 [B]. Any Python integer is a seed (mod 2⁶⁴)."""
    state = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF for seed in seeds], dtype=np.uint64)
    steps = np.array(counters, dtype=np.uint64) + np.uint64(1)
    golden = np.uint64(0x9E37_79B9_7F4A_7C15)
    return (_mix(_mix(state + golden) + steps * golden) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


def draw(logits: Tensor, uniforms: np.ndarray, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """One token id [B] per row of `logits` [B, V] by inverse CDF at `uniforms` [B], and its log-probability [B] at temperature 1."""
    logits = logits.float()
    top, greedy_ids = logits.max(dim=-1, keepdim=True)
    temperatures = [p.temperature for p in params]
    weights = (logits - top).exp_()
    log_total = weights.sum(dim=-1).log_()
    if any(t not in (0, 1) for t in temperatures):
        scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)[:, None]
        weights = ((logits - top) / scale).exp_()
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1 and p.temperature > 0]
    if nucleus:
        weights[nucleus] = keep_nucleus(weights[nucleus], torch.tensor([params[i].top_p for i in nucleus], device=logits.device))
    ids = inverse_cdf(weights, torch.from_numpy(uniforms).to(logits.device))
    if not all(temperatures):
        greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
        ids = torch.where(greedy, greedy_ids[:, 0], ids)
    return ids, logits.gather(1, ids[:, None])[:, 0] - top[:, 0] - log_total


def keep_nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """`weights` [B, V] with everything but the smallest set of most probable tokens whose mass reaches top_p [B] set to zero."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None].double() * ordered.double().sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(weights).scatter_(1, order, ordered)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Index [B] at which the cumulated `weights` [B, V] (not normalised) pass uniforms [B] of their total.

    In two levels, blocks then tokens of the block: a float64 cumulation over the whole vocabulary costs ten times as much.
    """
    rows, vocabulary = weights.shape
    if vocabulary % CDF_BLOCK:
        weights = nn.functional.pad(weights, (0, -vocabulary % CDF_BLOCK))
    blocks = weights.view(rows, -1, CDF_BLOCK)
    cumulated = blocks.sum(-1).double().cumsum(-1)
    target = (uniforms * cumulated[:, -1])[:, None]
    block = _first_above(cumulated, target)
    target = target - torch.where(block > 0, cumulated.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    return (block * CDF_BLOCK + _first_above(inside, target))[:, 0].clamp_(max=vocabulary - 1)


def _first_above(cumulated: Tensor, target: Tensor) -> Tensor:
    """First index [B, 1] whose cumulated weight [B, n] exceeds target [B, 1]; rounding may not lift a target over the end."""
    target = torch.minimum(target, cumulated[:, -1:] * (1 - 1e-12))
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=cumulated.shape[-1] - 1)

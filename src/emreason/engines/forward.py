"""Any causal LM that transformers runs, decoded by its own forward: all rows in one call over a cache of their own lengths.

Position p of a row lies in slot p of the cache (p modulo the window in a sliding layer), so a new token may see every slot that is
filled, in any order. The model is told so by a mask of two dimensions and by a cache whose query comes after every slot: whatever it
makes of them (a mask for eager, SDPA or flash attention, full or sliding, ALiBi's biases) is then right for every row.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from emreason.engines.decoder import CACHE_STEP, PREFILL_TOKENS, Decoder
from emreason.models.families import base_causal_lm
from emreason.models.memory import is_out_of_memory
from emreason.types import UserError

log = logging.getLogger(__name__)

WIDEST_CHECK = 1024
"""Attention windows up to here are exceeded when a decoder is checked."""

STATES = ("conv_states", "recurrent_states")


class RowCache(DynamicCache):
    """K/V, convolution and recurrent states of `rows` rows at lengths of their own; a step takes the first B of them.

    `layers` are those of the model's own cache: they tell a model what kind each is, and hold this step's view of the states.
    """

    is_compileable = True  # else a model asks whether the mask is needed, which waits for the device

    def __init__(self, config: Any):
        super().__init__(config=config)
        if kinds := {
            type(layer).__name__ for layer in self.layers if hasattr(layer, "update_indexer") or getattr(layer, "_layer_type", None)
        }:
            raise ValueError(f"no rows of their own in a cache of {', '.join(kinds)}")
        self.windows = [getattr(layer, "sliding_window", None) for layer in self.layers]
        self.store: dict[tuple[int, str, int], Tensor] = {}  # (layer, what, number): [rows, …], for K/V [rows, heads, slots, head_dim]
        self.rows, self.width = 0, 0

    def slots(self, layer: int, positions: int) -> int:
        """Slots that `positions` positions take in `layer`."""
        return min(positions, self.windows[layer] or positions)

    def room(self, layer: int, what: str, number: int, like: Tensor) -> Tensor:
        """The tensor of all rows for what `like` [b, …] holds of some, made or enlarged where it must be."""
        shape, old = [self.rows, *like.shape[1:]], self.store.get((layer, what, number))
        if what not in STATES:
            shape[2] = self.slots(layer, self.width)
        if old is None or any(have < want for have, want in zip(old.shape, shape, strict=True)):
            new = like.new_zeros(shape)
            if old is not None:
                new[tuple(slice(n) for n in old.shape)] = old
            self.store[layer, what, number] = new
        return self.store[layer, what, number]

    def put(self, row: int, other: DynamicCache, index: int, start: int, stop: int) -> None:
        """Take positions `start` … `stop` - 1, and the states after them, from sequence `index` of an ordinary cache."""
        for i, layer in enumerate(other.layers):
            for what in ("keys", "values"):
                if (new := getattr(layer, what, None)) is not None:
                    positions = torch.arange(max(start, stop - self.slots(i, stop)), stop, device=new.device)
                    self.room(i, what, 0, new)[row, :, positions % (self.windows[i] or stop)] = new[index, :, positions]
            for what in STATES:
                for number, state in getattr(layer, what, {}).items():
                    if state is not None:
                        self.room(i, what, number, state)[row] = state[index]

    def whole(self, config: Any, row: int, start: int) -> DynamicCache:
        """An ordinary cache that keeps all positions, with the first `start` of `row` in it (those outside a window hold anything)."""
        new = DynamicCache(config=config)
        layers: list[Any] = new.layers
        for layer, window in zip(layers, self.windows, strict=True):
            if window:
                layer.sliding_window = 2**31
        for (i, what, number), tensor in self.store.items() if start else ():
            layer = layers[i]
            if what in STATES:
                show(layer, what, number, tensor[row : row + 1].clone())
            else:
                positions = torch.arange(start, device=tensor.device) % (self.windows[i] or start)
                setattr(layer, what, tensor[row : row + 1, :, positions])
                layer.dtype, layer.device, layer.is_initialized, layer.cumulative_length = tensor.dtype, tensor.device, True, start
        return new

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes a copy of row `source`."""
        for tensor in self.store.values():
            tensor[target] = tensor[source]

    def clear(self, row: int) -> None:
        """Row `row` is as before its first token."""
        for tensor in self.store.values():
            tensor[row] = 0

    def step(self, lengths: Tensor, live: int) -> None:
        """The next forward appends a token at positions `lengths` [B] of the first B rows; `live`: positions of the longest with it."""
        self.at, self.live, self.index = lengths, live, torch.arange(len(lengths), device=lengths.device)
        for (i, what, number), tensor in self.store.items():
            if what in STATES:
                show(self.layers[i], what, number, self.room(i, what, number, tensor)[: len(lengths)])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        slots = self.at % (self.windows[layer_idx] or self.width)
        seen = []
        for what, new in (("keys", key_states), ("values", value_states)):
            cached = self.room(layer_idx, what, 0, new)
            cached[self.index, :, slots] = new[:, :, 0]
            seen.append(cached[: len(self.index), :, : self.slots(layer_idx, self.live)])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.slots(layer_idx, self.live) - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return self.slots(layer_idx, self.live), 0


def show(layer: Any, what: str, number: int, state: Tensor) -> None:
    """Make `state` the one that `layer`, of an ordinary cache, continues from and writes to."""
    getattr(layer, what)[number] = state
    getattr(layer, f"is_{what}_initialized")[number] = layer.has_previous_state[number] = True
    if what == "conv_states":
        layer.conv_kernel_size[number] = state.shape[-1]


class BatchedDecoder:
    """Any causal LM by its own forward over a `RowCache`; prompts of about equal length pass together, padded on the right."""

    def __init__(self, model: Any):
        self.model, self.base = model, base_causal_lm(model)
        self.device, self.config = next(model.parameters()).device, self.base.config.get_text_config(decoder=True)
        self.cache = RowCache(self.config)
        self.recurrent = any(hasattr(layer, "conv_states") for layer in self.cache.layers)
        self.attends = any(hasattr(layer, "keys") for layer in self.cache.layers)
        prompted = [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]
        if prompted and (self.recurrent or any(self.cache.windows)):
            raise ValueError("virtual tokens before windows or states")
        self.virtual = prompted[0].num_virtual_tokens if prompted else 0
        self.backbone = model if prompted else getattr(self.base, self.base.base_model_prefix, self.base)  # its logits are not needed

    def reserve(self, rows: int, width: int) -> None:
        self.cache.rows = max(rows, self.cache.rows)
        self.cache.width = max(-(-(self.virtual + width) // CACHE_STEP) * CACHE_STEP, self.cache.width)

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        batch: list[tuple[int, int, Sequence[int]]] = []
        for job in sorted(jobs, key=lambda job: len(job[2]), reverse=True):
            longest = len(batch[0][2]) if batch else 0
            alike = len(job[2]) == longest if self.recurrent else 4 * len(job[2]) >= 3 * longest
            if batch and (not alike or job[1] or batch[0][1] or (len(batch) + 1) * longest > PREFILL_TOKENS[self.device.type]):
                self._prefill(batch)
                batch = []
            batch.append(job)
        if batch:
            self._prefill(batch)

    def _prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """The prompts as one batch, the longest first. None sees the padding right of it; states would, so there is none where they are."""
        (row, start, first), longest = jobs[0], max(len(jobs[0][2]), 1)
        self.reserve(max(row for row, _, _ in jobs) + 1, start + longest)
        if first or self.virtual or self.recurrent:
            ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for _, _, tokens in jobs], device=self.device)
            cache = self.cache.whole(self.config, row, start)
            if self.virtual:
                cache = self.backbone(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
            else:
                positions = torch.arange(start, start + longest, device=self.device).expand(len(jobs), -1)
                self.backbone(**accepted(self.backbone, input_ids=ids, position_ids=positions, past_key_values=cache))
            for index, (row, start, tokens) in enumerate(jobs):
                self.cache.put(row, cache, index, start, self.virtual + start + len(tokens))
        for row, start, tokens in jobs:
            if not start and not tokens and self.recurrent:
                self.cache.clear(row)

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
        at, live = lengths + self.virtual, self.virtual + longest + 1
        if self.device.type == "cuda":  # few shapes: a new one costs a kernel's plan
            live = min(-(-live // CACHE_STEP) * CACHE_STEP, self.cache.width)
        self.cache.step(at, live)
        mask = (torch.arange(live, device=self.device) <= at[:, None]).long() if self.attends else None
        out = self.base(
            **accepted(self.base, input_ids=tokens[:, None], attention_mask=mask, position_ids=at[:, None], past_key_values=self.cache)
        )
        return out.logits[:, -1]

    def move(self, source: int, target: int, length: int) -> None:  # noqa: ARG002
        self.cache.move(source, target)


class RowDecoder:
    """Any causal LM one row at a time, with the cache it makes for itself, or without one: the whole row again for every token."""

    def __init__(self, model: Any, *, cached: bool = True):
        self.model, self.base, self.cached = model, base_causal_lm(model), cached
        self.device = next(model.parameters()).device
        self.past: dict[int, Any] = {}  # by row: the model's cache, or the ids so far

    def reserve(self, rows: int, width: int) -> None:
        pass

    def _forward(self, row: int, start: int, tokens: list[int]) -> Tensor:
        past = self.past.get(row) if start else None
        if not self.cached:
            tokens = self.past[row] = [*(past or [])[:start], *tokens]
            return self.model(input_ids=torch.tensor([tokens], device=self.device)).logits[:, -1]
        ids, positions = (torch.tensor([x], device=self.device) for x in (tokens, range(start, start + len(tokens))))
        out = self.base(**accepted(self.base, input_ids=ids, position_ids=positions, past_key_values=past))
        self.past[row] = out["past_key_values" if "past_key_values" in out else "cache_params"]
        return out.logits[:, -1]

    def prefill(self, jobs: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        for row, start, tokens in jobs:
            if tokens:
                self._forward(row, start, list(tokens))

    def decode(self, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:  # noqa: ARG002
        ids = tokens.tolist()
        return torch.cat([self._forward(row, length, ids[row : row + 1]) for row, length in enumerate(lengths.tolist())])

    def move(self, source: int, target: int, length: int) -> None:  # noqa: ARG002
        self.past[target] = self.past.pop(source)


def accepted(module: Any, *, past_key_values: Any, **arguments: Any) -> dict[str, Any]:
    """The arguments that the module's forward has, its cache by its name for it, and the last token's logits only."""
    names = parameters(module.__class__.forward)
    arguments |= {"logits_to_keep": 1, "cache_params" if "cache_params" in names else "past_key_values": past_key_values}
    return {"use_cache": True} | {name: value for name, value in arguments.items() if name in names}


@cache
def parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters."""
    return frozenset(inspect.signature(forward).parameters)


WAYS: dict[str, Callable[[nn.Module], Decoder]] = {
    "all rows at once": BatchedDecoder,
    "row by row": RowDecoder,
    "row by row and without a cache": partial(RowDecoder, cached=False),
}
_ways: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def forward_decoder(model: nn.Module) -> Decoder:
    """The fastest decoder of `WAYS` that gives this model's own logits; tried once, a slow one is told. The model must be in eval mode.

    Raises UserError where none does.
    """
    if model not in _ways:
        _ways[model] = choose(model)
    return WAYS[_ways[model]](model)


def choose(model: nn.Module) -> str:
    """The first of `WAYS` that agrees with the model; a line tells if it is not the first."""
    why, name = "", type(base_causal_lm(model)).__name__
    for way, make in WAYS.items():
        try:
            wrong = "its logits differ from those of a forward over each row" if disagrees(model, make(model)) else ""
        except Exception as error:
            if is_out_of_memory(error):
                raise
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if not wrong:
            if why:
                log.warning("%s decodes %s, which is slow: its cache does not take a batch (%s)", name, way, why)
            return way
        why = why or wrong
    raise UserError(f"{name} cannot be decoded with this transformers ({why}).")


@torch.inference_mode()
def disagrees(model: nn.Module, decoder: Decoder) -> bool:
    """Whether rows of several lengths, one refilled and one moved on the way, get other logits than a forward over each row alone."""
    config = base_causal_lm(model).config.get_text_config(decoder=True)
    windows = [value for name, value in vars(config).items() if ("window" in name or "chunk" in name) and type(value) is int]
    wide = max((window for window in windows if window <= WIDEST_CHECK), default=8) + 3
    wide = min(wide, (getattr(config, "max_position_embeddings", None) or 2**31) - 5)
    prompts = (6, 2, 0, wide, 3)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(config.vocab_size, (n + 4,), generator=generator).tolist() for n in prompts]
    expected = [model(input_ids=torch.tensor([row], device=decoder.device)).logits[0, -len(row) :].float() for row in rows]
    errors = []

    def decode(live: list[int], done: list[int]) -> None:
        lengths = [prompts[i] + n for i, n in zip(live, done, strict=True)]
        tokens = torch.tensor([rows[i][length] for i, length in zip(live, lengths, strict=True)], device=decoder.device)
        decoder.reserve(len(live), max(lengths) + 1)
        drawn = decoder.decode(tokens, torch.tensor(lengths, device=decoder.device), max(lengths)).float()
        for logits, i, length in zip(drawn, live, lengths, strict=True):
            wanted = expected[i][length]
            errors.append((logits - wanted).norm() / (wanted - wanted.mean()).norm().clamp_min(1e-20))

    decoder.prefill([(row, 0, rows[row][: prompts[row]]) for row in range(4)])
    for n in (0, 1):
        decode([0, 1, 2, 3], [n] * 4)
    decoder.prefill([(0, 0, rows[4][: prompts[4]])])
    decoder.move(3, 1, prompts[3] + 2)
    for n in (0, 1):
        decode([4, 3, 2], [n, n + 2, n + 2])
    found = torch.stack(errors)
    exact = expected[0].new_zeros((), dtype=next(model.parameters()).dtype).element_size() >= 4
    return bool(found.max() > 1e-3) if exact else bool(found.median() > 0.1)  # in bfloat16 a router may choose another expert

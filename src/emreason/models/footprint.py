"""How much memory a run takes, from its model's config alone: nothing is imported, loaded or allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30

LIBRARIES = {"cpu": 0.45 * GIB, "cuda": 0.6 * GIB}
"""Of a process: PyTorch, transformers, Lightning; on a GPU the context and the workspaces of its libraries."""

HEAD_CHUNK, KEPT_PREFIXES, PREFILL = 256, 4096, {"cpu": 512, "cuda": 4096}
"""Tokens whose logits an M-step holds at once, positions whose K/V the engine keeps for later prompts, tokens of a prefill."""

FORMATS = {"float32": 4, "bfloat16": 2}

PACKED = {"float32": 1.2, "bfloat16": 1.0}
"""How much larger a CPU's packed weights are: measured of SmolLM2's, as the next."""

HEAP = 1.7
"""What a CPU's heap grows by for a byte of activations in a step of several batches: glibc does not find all of what it has freed again."""

Bytes = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A decoder-only model with gated MLPs. `tied`: the embedding is the head, too."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices: (in, out)."""
        d, f, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * sum(a * b for a, b in self.products.values())

    @property
    def table(self) -> int:
        """Parameters of the embedding, or of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, but for biases and the norms of heads."""
        return self.linear + (1 if self.tied else 2) * self.table + (2 * self.layers + 1) * self.hidden

    def kv_bytes(self, positions: int, width: int) -> int:
        """Of K and V of all layers, elements of `width` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * positions * width


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """What a `config.json` says; None of a model that is not made like that (experts, states, a GPT-2's MLP)."""
    config = config.get("text_config") or config
    if any("experts" in key for key in config):
        return None
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            hidden,
            int(config["intermediate_size"]),
            int(config["num_hidden_layers"]),
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings")),
        )
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Work:
    """What of a run decides on memory.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of weights and activations.
        engine: `inprocess`, `vllm` beside the trainer, or `server` elsewhere.
        quantization: `nf4`, `int8`: what the layers' matrices are kept in; None: in `dtype`.
        adapter: rank and target modules (`all-linear`, or names) of LoRA; None: all weights are trained.
        trains: whether there is an M-step at all.
        rows, prompt, drawn: completions at once, the longest prompt and the longest completion, tokens.
        tokens: of a training batch.
        again: activations are computed again in the backward pass.
        moments: float32 numbers that the optimizer keeps a parameter.
    """

    device: str
    dtype: str
    engine: str
    adapter: tuple[int, tuple[str, ...] | str] | None
    trains: bool
    rows: int
    prompt: int
    drawn: int
    tokens: int
    again: bool
    moments: int = 2
    quantization: str | None = None


QUANTIZED = {"nf4": 0.516, "int8": 1.0}
"""Bytes of a number, its block's share of the scales in it."""


def trained(shape: Shape, work: Work) -> int:
    """Parameters that the M-step changes."""
    if work.adapter is None:
        return shape.parameters
    rank, targets = work.adapter
    chosen = [sizes for name, sizes in shape.products.items() if targets == "all-linear" or name in targets]
    return shape.layers * rank * sum(a + b for a, b in chosen)


def footprint(shape: Shape, work: Work) -> dict[str, Bytes]:
    """Bytes of each part in the E-step and in the M-step, on one device: every batch full, every completion as long as it may be."""
    width, n = FORMATS[work.dtype], trained(shape, work)
    weights = float(shape.parameters * width)
    if work.quantization:
        weights -= shape.linear * (width - QUANTIZED[work.quantization])
    kept: Bytes = {"weights": weights, "libraries": LIBRARIES[work.device]}
    if work.adapter is not None:
        kept["adapters"] = 4 * n
    if work.trains and work.adapter is None and width < 4:
        kept["masters"] = 4 * n
    if work.trains:
        kept["moments"] = 4 * work.moments * n
    phases = {"E-step": kept | _sampling(shape, work, width)}
    if work.trains:
        # the head's gradient: its float32 sum and a product; in the end the embedding's meets it, which is the same parameter's
        more = shape.table * (4 + width % 4) if work.adapter is None else 0
        vllm = {"vLLM": shape.parameters * width} if work.engine == "vllm" and work.device == "cpu" else {}  # there it never sleeps
        phases["M-step"] = kept | {"gradients": 4 * n + more, "activations": _training(shape, work, width)} | vllm
    return phases


def _sampling(shape: Shape, work: Work, width: int) -> Bytes:
    if work.engine == "server":
        return {}
    if work.engine == "vllm":  # as much K/V as there is room for, one row at least
        return {"vLLM": 1.1 * shape.parameters * width, "K/V": shape.kv_bytes(work.prompt + work.drawn, width)}
    rows, positions = -(-work.rows // 8) * 8, -(-(work.prompt + work.drawn) // 64) * 64
    parts: Bytes = {"K/V": shape.kv_bytes(rows * positions + KEPT_PREFIXES, width)}
    if work.device == "cpu" and not work.quantization:
        parts["packed copy"] = (shape.linear + shape.table) * width * PACKED[work.dtype]
        if work.adapter is not None:  # it takes the place of weights that are mapped from a file
            parts["weights"] = shape.table * width
    a_token = (5 * shape.hidden + 3 * shape.intermediate + 2 * shape.heads * shape.head_dim) * (4 if work.device == "cpu" else width)
    logits = rows * shape.vocabulary * (4 + (width if width < 4 else 0) + 4)
    if work.device == "cuda":  # CUDA graphs have memory of their own
        logits *= 2
    return parts | {"a step": logits + max(PREFILL[work.device], rows) * a_token + rows * shape.heads * positions * 4}


def _training(shape: Shape, work: Work, width: int) -> float:
    d, f, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if (
        work.device == "cpu" and not work.quantization
    ):  # `models/training/packed.py`: a float32 residual stream and attention, the gate made again
        layer, between = 8 * d + 2 * width * d + 4 * (2 * q + 2 * kv) + width * q + 2 * width * f, 4 * d
    else:  # the model's own forward keeps norms in float32 and every step of the MLP
        layer, between = (8 + 4 * width) * d + width * (3 * q + 2 * kv) + 4 * width * f, width * d
    tokens = work.tokens * (shape.layers * between + 2 * layer if work.again else (shape.layers + 1) * layer)
    return (HEAP if work.device == "cpu" else 1) * tokens + HEAD_CHUNK * shape.vocabulary * (2 * width + 4)

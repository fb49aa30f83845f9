"""Model families: what the fused and packed forward passes must know of a decoder-only model, read from it and checked against it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from emreason.models.memory import is_out_of_memory

log = logging.getLogger(__name__)

GATES = {"silu": False, "gelu_pytorch_tanh": True}
CHECKED_TOKENS, CHECKED_WINDOW, TOLERANCE = 6, 2, 1e-3
"""Of the check: its sequence, a sliding window that matters in it, and the largest difference of logits, relative to the largest logit."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its modules, and what of its attention may differ from layer to layer.

    Attributes:
        qkv, gate_up: the matrix products, or a single one whose outputs lie side by side.
        q_norm, k_norm: over each head's outputs, or over all heads', as long as their weights are.
        before_attention, after_attention, before_mlp, after_mlp: norms.
        window: how many positions a token sees, its own included; None: all before it.
        rotary: which table of `Facts.tables` rotates q and k; None: they are not rotated.
    """

    qkv: tuple[Any, ...]
    o: Any
    gate_up: tuple[Any, ...]
    down: Any
    q_norm: Any | None
    k_norm: Any | None
    before_attention: Any | None
    after_attention: Any | None
    before_mlp: Any | None
    after_mlp: Any | None
    window: int | None
    rotary: str | None

    @property
    def norms(self) -> list[Any]:
        """Those that there are."""
        found = (self.q_norm, self.k_norm, self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return [norm for norm in found if norm is not None]


@dataclass(frozen=True)
class Facts:
    """A decoder-only model.

    Attributes:
        scale: of q·k.
        eps, offset: of every norm: x / sqrt(mean(x²) + eps) * (weight + offset).
        gelu: the gated activation is tanh's approximation of GELU, else SiLU.
        cap: c tanh(score / c) of attention scores.
        embedding_multiplier, residual_multiplier: of embeddings, and of what attention and MLP add to the residual stream.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    eps: float
    offset: float
    gelu: bool
    cap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    layers: tuple[Layer, ...]
    norm: Any
    embedding: Any
    rotary: Any
    head: Any

    @property
    def head_sizes(self) -> list[int]:
        """Output features of q, k and v."""
        return [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]

    def tables(self, x: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin [positions, rotated pairs], on the device and of the dtype of x, of every kind of rotary embedding."""
        found: dict[str | None, tuple[Tensor, Tensor]] = {}
        for kind in {layer.rotary for layer in self.layers}:
            if kind is None:
                found[kind] = (x.new_empty(len(positions), 0),) * 2
            else:
                cos, sin = self.rotary(x, positions[None], *([kind] if kind else []))
                found[kind] = cos[0].chunk(2, dim=-1)[0].to(x.dtype), sin[0].chunk(2, dim=-1)[0].to(x.dtype)
        return found


def base_causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def can_pack(module: Any) -> bool:
    """An nn.Linear, or one with ordinary LoRA adapters around it; anything else (quantised, DoRA, …) is not ours to fuse."""
    if type(module) is nn.Linear:
        return True
    if not hasattr(module, "lora_A") or type(module.get_base_layer()) is not nn.Linear:
        return False
    variants = getattr(module, "lora_variant", {})
    return not variants and not any(getattr(module, "lora_bias", {}).values())


def read_facts(base: Any) -> Facts | None:
    """What `base` is made of; None where it is not made like that."""
    try:
        facts = _read(base)
    except (AttributeError, KeyError, TypeError):
        return None
    products = [p for layer in facts.layers for p in (*layer.qkv, layer.o, *layer.gate_up, layer.down)] + [facts.head]
    norms = [norm for layer in facts.layers for norm in layer.norms]
    fits = all(map(can_pack, products)) and {_eps(norm) for norm in norms} == {facts.eps} and isinstance(facts.embedding, nn.Embedding)
    return facts if fits and len({p.device for p in base.parameters()}) == 1 else None


def _read(base: Any) -> Facts:
    config, model = base.config, base.model
    rope = config.rope_parameters
    ropes = [rope] if "rope_type" in rope else list(rope.values())
    if any(r["rope_type"] in ("dynamic", "longrope") for r in ropes):
        raise TypeError("a rotary embedding that depends on the sequence's length")
    kinds = getattr(config, "layer_types", None)
    if set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise TypeError(f"{kinds=}")
    attention = model.layers[0].self_attn
    return Facts(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        eps=_eps(model.norm),
        offset=_offset(model.norm),
        gelu=GATES[getattr(config, "hidden_activation", None) or config.hidden_act],
        cap=getattr(config, "attn_logit_softcapping", None),
        embedding_multiplier=getattr(config, "embedding_multiplier", 1.0),
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
        layers=tuple(_read_layer(layer, config, kinds[i] if kinds else None, model.rotary_emb) for i, layer in enumerate(model.layers)),
        norm=model.norm,
        embedding=model.embed_tokens,
        rotary=model.rotary_emb,
        head=base.lm_head,
    )


def _read_layer(layer: Any, config: Any, kind: str | None, rotary: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    before, after = getattr(layer, "input_layernorm", None), getattr(layer, "post_feedforward_layernorm", None)
    # the same name stands for two places: behind the attention where another norm follows the MLP, else before the MLP
    middle = layer.post_attention_layernorm
    return Layer(
        qkv=(attention.qkv_proj,) if hasattr(attention, "qkv_proj") else (attention.q_proj, attention.k_proj, attention.v_proj),
        o=attention.o_proj,
        gate_up=(mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        before_attention=before,
        after_attention=middle if after is not None else None,
        before_mlp=middle if after is None else getattr(layer, "pre_feedforward_layernorm", None),
        after_mlp=after,
        window=getattr(config, "sliding_window", None) if kind in (None, "sliding_attention") else None,
        rotary=((kind or "") if hasattr(rotary, "layer_types") else "") if getattr(attention, "use_rope", True) else None,
    )


def _offset(norm: Any) -> float:
    """What a norm adds to its weights."""
    bare = _shallow(norm)
    bare.weight = nn.Parameter(torch.zeros_like(norm.weight), requires_grad=False)
    return float(round(float(bare(torch.ones_like(bare.weight)).float().mean())))


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def final_logits(config: Any, logits: Tensor) -> Tensor:
    """What the model makes of its head's output: scaled (Granite), softly capped (Gemma)."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _Output(BaseModelOutputWithPast):
    """A decoder's last states; of whatever else a causal LM passes on there is none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def own_logits(causal_lm: Any, states: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of the decoder's last states [tokens, width], by the model's own forward, whatever that does to them."""

    def saying(module: Any, **modules: nn.Module) -> Any:
        stand_in = _shallow(module, **modules)
        stand_in.forward = lambda *_, **__: _Output(last_hidden_state=states[None])
        return stand_in

    decoder = causal_lm.base_model
    inner = {name: saying(child) for name, child in decoder.named_children() if isinstance(child, PreTrainedModel)}
    twin = _shallow(causal_lm, **{causal_lm.base_model_prefix: saying(decoder, **inner)})
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    logits: Tensor = twin(input_ids=ids, use_cache=False).logits[0]
    return logits


_FACTORS: WeakKeyDictionary[nn.Module, float | None] = WeakKeyDictionary()


def logit_factor(causal_lm: Any) -> float | None:
    """c where the model's logits are c times its output embeddings' products (1, Granite's 1/8, Cohere's 1/16, …), measured once; None
    where they are anything else: softly capped (Gemma), behind one more layer (ModernBERT).
    """
    if causal_lm not in _FACTORS:
        _FACTORS[causal_lm] = _measured_factor(causal_lm)
    return _FACTORS[causal_lm]


@torch.no_grad()
def _measured_factor(causal_lm: Any) -> float | None:
    there = causal_lm.get_output_embeddings()
    if type(there) is not nn.Linear or there.bias is not None:
        return None
    twin = _shallow(causal_lm)
    width = there.in_features
    head = nn.utils.skip_init(nn.Linear, width, 8, bias=False)  # drawing weights would shift the run's random numbers
    head.weight.copy_(torch.arange(8.0 * width).cos().view(8, width) / width**0.5)
    states = 100 * torch.arange(3.0 * width).sin().view(3, width)
    twin.set_output_embeddings(head)
    if causal_lm.get_output_embeddings() is not there:  # it lies in a part that the two share
        causal_lm.set_output_embeddings(there)
        return None
    plain = head(states)
    try:
        logits = own_logits(twin, states)
    except RuntimeError:  # there is more than the embeddings to it, on another device or in another precision
        return None
    except Exception as error:  # a model of somebody's own
        log.warning(
            "%s: what it makes of its last states cannot be told (%s); products with the output embeddings are taken as the logits",
            type(causal_lm).__name__,
            error,
        )
        return 1.0
    factor = float((logits * plain).sum() / (plain * plain).sum())
    return factor if torch.allclose(logits, factor * plain, rtol=1e-4, atol=1e-4 * float(logits.abs().max())) else None


_VERDICTS: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def agrees(base: Any, forward: Callable[[Any, Facts, list[int]], Tensor]) -> bool:
    """Whether `forward(twin, its facts, ids)`, logits [≤ tokens, vocabulary] of the last ones, is what the model's own forward computes.

    Asked once per model and module that has a `forward`, of a twin in float32: a few ids of its vocabulary, and a layer of every kind,
    with a window so short that it matters. A difference is told in one line.
    """
    verdicts = _VERDICTS.setdefault(base, {})
    if (name := forward.__module__) in verdicts:
        return verdicts[name]
    try:
        difference = _difference(base, forward)
        if math.isnan(difference):
            return True  # of weights that have diverged: what is computed with them will tell
        said = f"logits differ by {difference:.1g} of the largest" if difference > TOLERANCE else ""
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = str(error)
    verdicts[name] = not said
    if said:
        log.warning("%s: the fast forward pass does not compute what the model does (%s); its own is used", type(base).__name__, said)
    return not said


@torch.no_grad()
def _difference(base: Any, forward: Callable[[Any, Facts, list[int]], Tensor]) -> float:
    """Of logits, relative to the largest; NaN where the model's own are not finite."""
    twin = _twin(base)
    facts = read_facts(twin)
    assert facts is not None
    rows = facts.embedding.weight.shape[0]
    ids = [(7 * i + 3) % rows for i in range(CHECKED_TOKENS)]
    own = twin(input_ids=torch.tensor([ids], device=base.device), use_cache=False).logits[0]
    logits = forward(twin, facts, ids)
    difference = float((logits - own[-len(logits) :]).abs().max() / own.abs().max())
    return math.nan if not own.isfinite().all() else math.inf if math.isnan(difference) else difference


def _twin(base: Any) -> Any:
    """A causal LM as `base`, in float32 and eval mode, of a few ids and of the first layer of every kind; shares nothing it changes."""
    facts = read_facts(base)
    assert facts is not None
    first = {(layer.window, layer.rotary): i for i, layer in reversed(list(enumerate(facts.layers)))}
    chosen = sorted(first.values())
    config = copy.copy(base.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in chosen]
    if getattr(config, "sliding_window", None):
        config.sliding_window = CHECKED_WINDOW
    embedding = _shallow(facts.embedding)
    embedding.weight = nn.Parameter(facts.embedding.weight[:64].float(), requires_grad=False)
    embedding.padding_idx = None  # changes gradients only, and is often beyond these
    layers = nn.ModuleList(copy.deepcopy(base.model.layers[i]).float() for i in chosen)
    model = _shallow(base.model, layers=layers, norm=copy.deepcopy(facts.norm).float(), embed_tokens=embedding)
    head = copy.deepcopy(facts.head).float() if type(facts.head) is not nn.Linear else _shallow(facts.head)
    if type(head) is nn.Linear:
        head.weight = nn.Parameter(facts.head.weight[:64].float(), requires_grad=False)
        head.bias = None if head.bias is None else nn.Parameter(facts.head.bias[:64].float(), requires_grad=False)
    twin = _shallow(base, model=model, lm_head=head)
    model.config = twin.config = config
    for module in (twin, model, layers, head):  # not those that are shared
        module.training = False
    layers.eval()
    return twin


def _shallow(module: Any, **modules: nn.Module) -> Any:
    """A copy with its own dictionaries of parameters and modules, which hold the same ones but for `modules`."""
    twin = copy.copy(module)
    twin._parameters, twin._modules = dict(module._parameters), {**module._modules, **modules}
    return twin

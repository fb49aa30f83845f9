"""Model families: the model inside a wrapper, and which ones the fused and packed forward passes compute exactly."""

from __future__ import annotations

from typing import Any

from torch import nn

FUSED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")


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


def can_fuse(base: Any) -> bool:
    """Whether `FusedDecoder` computes exactly what this model's forward does (in eval mode)."""
    if type(base).__name__ not in FUSED_ARCHITECTURES:
        return False
    config, layers = base.config, base.model.layers
    if config.hidden_act != "silu" or config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return False
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return False
    if type(base.model.embed_tokens) is not nn.Embedding:
        return False
    products = [m for layer in layers for m in linears(layer)] + [base.lm_head]
    return all(can_pack(m) for m in products) and len({p.device for p in base.parameters()}) == 1


def linears(layer: Any) -> list[nn.Module]:
    """The seven matrix products of one transformer layer, in the order of its forward."""
    a, m = layer.self_attn, layer.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]

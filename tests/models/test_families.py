"""Every family of models through the fused decoder and the packed M-step, against transformers' own forward and generate."""

from __future__ import annotations

import torch
import transformers

WINDOW = 5
SHAPE = {
    "vocab_size": 150,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, **SLIDING},
    "Qwen3": {},
    "Gemma2": {**SLIDING, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 40},
    "Gemma3": {**SLIDING, "query_pre_attn_scalar": 40, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }},
    "Olmo2": {},
    "Phi3": {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "SmolLM3": {"no_rope_layer_interval": 2, "use_sliding_window": True, **SLIDING},
    "Granite": {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5},
}


def made(family, **changes):
    """A random model of `family` whose norms and biases are random too."""
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**(SHAPE | FAMILIES[family] | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.eval()

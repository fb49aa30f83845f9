"""A small GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, MIDDLE, HEADS, LAYERS = 256, 512, 4, 2


def write_gguf(path: Path) -> Path:
    """A random Llama, its large weights Q8_0 and its norms float32, with one token per byte."""
    draw = np.random.default_rng(0)
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<|endoftext|>"]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * (len(tokens) - 1) + [TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (MIDDLE, WIDTH), "ffn_up": (MIDDLE, WIDTH), "ffn_down": (WIDTH, MIDDLE)}
    layers = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (len(tokens), WIDTH), **layers}.items():
        values = (0.05 * draw.standard_normal(shape)).astype(np.float32)
        writer.add_tensor(name, quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    norms = [f"blk.{i}.{name}.weight" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, (1 + 0.1 * draw.standard_normal(WIDTH)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

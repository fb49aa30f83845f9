"""Tiny random models for tests and `experiment=smoke`: seconds on a CPU, and able to be right by luck.

The vocabulary is printable ASCII, one character a token, plus one token per whole answer line ("\\nAnswer: 7\\n"), so that
even random weights end most completions with an answer and EM has something to accept.
"""

from __future__ import annotations

import string

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def tiny_tokenizer(max_answer: int = 27) -> PreTrainedTokenizerFast:
    """A character tokenizer with answer-line tokens 0…`max_answer` and A…E, BOS, EOS and PAD; no chat template."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*specials, *string.printable[:95], "\n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    answers = [str(i) for i in range(max_answer + 1)] + list("ABCDE")
    backend.add_tokens([AddedToken(f"\nAnswer: {a}\n", normalized=False) for a in answers])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def load_tiny(
    family: str = "llama",
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    max_length: int = 512,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random `llama` or `qwen2` of ~100k parameters and its tokenizer; the weights depend on `seed` alone."""
    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer

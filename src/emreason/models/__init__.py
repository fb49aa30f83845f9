"""Causal language models: loaded, made trainable, fed and exported.

In: a Hub id, a folder, a GGUF file or a shape; a precision; adapters.
Out: model and tokenizer; batches of tokens and the forward pass over them without padding; fp32 twins of bfloat16 weights.
Also the process's memory, which models fill, kernels compiled here, and which families the fast forward passes compute exactly.
"""

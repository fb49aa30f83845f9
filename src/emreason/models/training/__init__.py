"""Training passes: hidden states and log-probabilities of an M-step's sequences, differentiable.

In: a causal LM, with adapters or without, and sequences of tokens.
Out: what `em` sums up and `scores` reads. `packed` lays sequences end to end and computes once what they begin with; `products` has the
matrix products with what belongs to each.
"""

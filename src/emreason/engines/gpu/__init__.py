"""What a GPU is spared: kernels started one by one, shapes that differ by a token, copies that could be one.

In: what `decoder` and `inprocess` would do step by step.
Out: the same numbers. `prefill` has all prompts in one attention call a layer; `graphs` records a decoding step and launches it as one.
"""

"""Questions with gold answers, and the prompts that ask them.

In: a dataset on the Hub, a mirror of it, a user's file, or nothing (sums are made here).
Out: `Question`s of a split; the token ids of a plain or hinted prompt; the answer that a text states, and whether it is the gold one.
Nothing here knows a model, only a tokenizer.
"""

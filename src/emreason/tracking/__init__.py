"""Callbacks and loggers above the loop: what is told of a run while it works.

In: the loop's records and the run's folder.
Out: the summary's iterations, `metrics.jsonl`, predictions, and the same in Weights & Biases; KL from the base model where it is asked for.
Without this room a run would learn the same.
"""

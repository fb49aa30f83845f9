"""Sampling schemes: which proposals are tried for a question, what is accepted, what it counts for.

In: questions, a `Scheme` from the config, an engine.
Out: attempts as they finish, accepted or not; their weights in the M-step; the questions that an iteration samples.
A new scheme is a config, or one more function beside `rewards.py`.
"""

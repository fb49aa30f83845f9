"""Figures about a model or a run.

In: questions and an engine, token ids and a model, or counts.
Out: predictions and their accuracy, log-likelihoods, bounds on log π(y*|x), the costly diagnostics, intervals and tests.
"""

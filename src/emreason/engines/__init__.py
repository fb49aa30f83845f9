"""Engines: requests in, completions out.

In: prompt ids, a seed, limits, from a queue that may grow while it is worked off.
Out: sampled ids with their log-probability, as they finish. A draw is a function of weights, prompt, limits and seed alone.
`inprocess` samples from the weights that are trained, `vllm` from a copy beside them or in a server.
"""

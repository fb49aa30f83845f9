"""The EM loop as Lightning sees it: one epoch is one iteration.

In: model, engine, prompts, questions, a scheme and how an M-step is made.
Out: per iteration attempts in the journal, trained weights, scores.
The data module pulls the E-step when its loader is asked for; the module takes the optimizer steps and evaluates.
"""

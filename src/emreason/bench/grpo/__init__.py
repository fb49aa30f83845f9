"""What one would pick instead of EM: TRL's GRPO, on a run's questions and reward, until its tokens or seconds are spent.

In: the overrides of a run with a `token_budget`, or `--seconds`; TRL, in an environment of its own, made on first use.
Out: a run folder that `emreason-report` shows beside the schemes. `train.py` runs in TRL's environment, with emreason on its path.
"""

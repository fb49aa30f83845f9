"""What `make bench` measures, each in a process of its own: `python RUNNER.py WORK RESULT …`.

In: `work.json`.
Out: the rows of one contender as JSON. Those of other projects import nothing of emreason.
"""

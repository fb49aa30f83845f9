"""The benchmark: E-step, M-step and a whole iteration beside other programs, on the same work.

In: a model and a device, by `make bench`.
Out: `bench.json` and a table. `runners/` holds what is measured, each in a process of its own.
Beside the loop: nobody imports this room.
"""

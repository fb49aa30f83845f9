"""The exact laboratory: models so small that every rationale can be enumerated.

In: `experiment=exact`.
Out: what the project's own sampler draws against its law, and EM without sampling error.
Beside the loop: nobody imports this room.
"""

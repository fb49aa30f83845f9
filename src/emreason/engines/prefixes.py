"""Which recent prompts begin like a new one, and where their K/V is kept."""

from __future__ import annotations

import numpy as np

MIN_SHARED = 8
"""Shortest common prefix, in tokens, that is worth copying instead of recomputing."""


class PrefixCache:
    """Where the K/V of recent prompts lies in a ring of `capacity` positions, whose oldest give way to new ones."""

    def __init__(self, capacity: int):
        self.capacity, self.end = capacity, 0
        self.entries: list[tuple[np.ndarray, int]] = []  # a prompt's ids, and its first position

    def longest(self, ids: np.ndarray) -> tuple[int, int]:
        """First position of the entry that shares the longest prefix with `ids`, and that length (0 below `MIN_SHARED`)."""
        shared = [common_prefix(ids, other) for other, _ in self.entries]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is None or shared[best] < MIN_SHARED:
            return 0, 0
        return self.entries[best][1], shared[best]

    def place(self, ids: np.ndarray) -> int:
        """The first of the positions that `ids`, no more than the capacity, take; what was there is forgotten."""
        at = self.end if self.end + len(ids) <= self.capacity else 0
        self.end = at + len(ids)
        self.entries = [(other, begin) for other, begin in self.entries if begin >= self.end or begin + len(other) <= at]
        self.entries.append((ids, at))
        return at


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two id arrays."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n

"""Learning to reason in LLMs by expectation maximization (Lee, Kveton et al., arXiv:2512.20169)."""

__version__ = "0.1.0"

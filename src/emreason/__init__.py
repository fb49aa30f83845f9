"""Learning to reason in LLMs by expectation maximization (Lee, Kveton et al., arXiv:2512.20169).

From Python: `emreason.run("experiment=smoke", "sampler=pps")` is the command; the other names work alone, each with an example in
`emreason/README.md`. What a name needs is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emreason.engines.inprocess import InProcessEngine
    from emreason.evaluate import launch as evaluation
    from emreason.models.loading import load_pretrained
    from emreason.models.tiny import load_tiny
    from emreason.questions.answers import extract
    from emreason.questions.datasets import Dataset
    from emreason.questions.prompts import Prompts, PromptTemplate
    from emreason.reports.comparison import compare
    from emreason.reports.reading import collect
    from emreason.schemes.samplers import Scheme, sample
    from emreason.scores.scoring import predict, score
    from emreason.train import launch as run
    from emreason.types import Completion, Demonstration, Question, Rationale, Request, SamplingParams, UserError

__version__ = "0.1.0"

_WHERE = {
    "train": ("run=launch",),
    "evaluate": ("evaluation=launch",),
    "types": ("Completion", "Demonstration", "Question", "Rationale", "Request", "SamplingParams", "UserError"),
    "questions.answers": ("extract",),
    "questions.datasets": ("Dataset",),
    "questions.prompts": ("PromptTemplate", "Prompts"),
    "models.loading": ("load_pretrained",),
    "models.tiny": ("load_tiny",),
    "engines.inprocess": ("InProcessEngine",),
    "schemes.samplers": ("Scheme", "sample"),
    "scores.scoring": ("predict", "score"),
    "reports.reading": ("collect",),
    "reports.comparison": ("compare",),
}
_PLACES = {name.partition("=")[0]: (module, name.rpartition("=")[2]) for module, names in _WHERE.items() for name in names}

__all__ = [
    "Completion",
    "Dataset",
    "Demonstration",
    "InProcessEngine",
    "PromptTemplate",
    "Prompts",
    "Question",
    "Rationale",
    "Request",
    "SamplingParams",
    "Scheme",
    "UserError",
    "collect",
    "compare",
    "evaluation",
    "extract",
    "load_pretrained",
    "load_tiny",
    "predict",
    "run",
    "sample",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'emreason' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f"emreason.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

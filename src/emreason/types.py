"""The nouns of the project: questions, sampled rationales, and what passes between sampler and engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

Proposal = Literal["question", "rationalization"]
"""`question`: the plain prompt, π(z|x). `rationalization`: the prompt that also shows the gold answer, π(z|x, y*)."""

Split = Literal["train", "validation", "test"]
AnswerKind = Literal["choice", "number", "text"]
FinishReason = Literal["stop", "answer", "length", "error"]
"""`stop`: EOS was sampled; `answer`: ended right after the answer line; `length`: truncated; `error`: could not be run."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One question x with its gold answer y*.

    For `kind == "choice"` the choices are shown under letters A, B, C, … in order and `answer` is the gold letter;
    for `number` and `text` there are no choices and `answer` is the gold string. `verify` overrides the comparison
    of an extracted answer with the gold one (datasets that bring their own verifier). `aliases` are right, too. `answer_as`:
    what a completion is asked for in a choice question, the letter or the choice's text (then no letters are shown).
    """

    id: str
    text: str
    answer: str
    kind: AnswerKind
    choices: tuple[str, ...] = ()
    verify: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)
    aliases: tuple[str, ...] = ()
    answer_as: Literal["letter", "text"] = "letter"

    @property
    def letters(self) -> str:
        """The letters of the choices, e.g. `"ABCD"`; empty for free answers."""
        return LETTERS[: len(self.choices)]


@dataclass(frozen=True)
class Demonstration:
    """A worked example: a question with a rationale (without its answer line) that leads to the gold answer."""

    question: Question
    rationale: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature == 0` is greedy; otherwise top-p sampling from softmax(logits / temperature)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Request:
    """One completion to draw. The draw is a function of the weights, `prompt_ids`, `params` and `seed` alone.

    `stop(token_ids) -> bool` is asked after each sampled token whose text contains a newline; True ends the completion
    there with finish reason `answer`. `key` is the caller's own and comes back untouched.
    """

    key: Hashable
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    stop: Callable[[list[int]], bool] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Completion:
    """What an engine drew: the sampled ids (EOS included when it was sampled) and log π(ids | prompt), nats, at temperature 1."""

    request: Request
    token_ids: tuple[int, ...]
    logprob: float
    finish_reason: FinishReason


class Engine(Protocol):
    """Anything that turns requests into completions."""

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        """Consume `requests` from the left and yield completions as they finish, in any order.

        The consumer may add to `requests` whenever it is handed a completion (a question's next attempt enters as
        soon as the last one failed); generation ends when the deque is empty and nothing is running.
        """
        ...


@runtime_checkable
class EngineApart(Engine, Protocol):
    """An engine with weights of its own, which it is given when they have changed."""

    def rest(self) -> None:
        """Hand back, until the next `generate`, the memory that an M-step needs."""
        ...


@dataclass(frozen=True)
class Rationale:
    """One attempt (ẑ, ŷ) at a question, accepted or not. `attempt` counts from 1; `logprob` in nats, temperature 1.

    `weight`: what the M-step multiplies its log-likelihood by; 0: it is not trained on; below 0: it is made less likely. `log_weight`: the
    logarithm of its importance weight π(z, y*|x) / q(z, y*|x), not normalised, where the scheme weighs by importance. `seconds`: of its
    E-step until it was there, in all the processes that have worked on it.
    """

    question_id: str
    iteration: int
    attempt: int
    proposal: Proposal
    text: str
    answer: str | None
    accepted: bool
    n_tokens: int
    finish_reason: FinishReason
    logprob: float
    token_ids: tuple[int, ...]
    weight: float = 1.0
    log_weight: float | None = None
    seconds: float = field(default=0.0, compare=False)


class UserError(Exception):
    """Something the user can mend. The message is one clear sentence that names the file, line or config key and the mend;
    the entry points print it without a traceback and exit non-zero."""


def plain(text: str) -> str:
    """One line without control characters: text from a model or a file must not move a terminal's cursor or break a table's row."""
    return "".join(c if c.isprintable() else " " for c in str(text))

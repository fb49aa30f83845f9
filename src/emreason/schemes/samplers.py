"""Sampling schemes (paper §3): proposals tried in order per question; the first whose answer is correct wins.

    rejection sampling, budget M   question × M
    STaR                           question × M, then rationalization      (M = 1: Zelikman et al. 2022)
    prompt posterior sampling      rationalization × M                     (M = 1: the paper)

`question` draws from π(z, y | x), `rationalization` from π(z, y | x, y*) by showing the gold answer as a hint. A question
none of whose proposals is correct sits this iteration out.

A scheme may also keep several rationales per question (`keep`) and say what each counts for (`weigh`): `weights.py`. It may sample only
some of the questions in an iteration (`choose`): `choice.py`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from emreason.questions.answers import extract, stop_at_answer
from emreason.questions.grammar.thinking import said, speech_start, without_marks
from emreason.questions.prompts import Prompts
from emreason.types import Completion, Engine, Proposal, Question, Rationale, Request, SamplingParams, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OfQuestion = TypeVar("OfQuestion", bound=Any)  # what has a `question_id`
PROPOSALS = ("question", "rationalization")
_ANSWER_LINE = re.compile(r"^[^\w\n]*(?:_[^\w\n]*)*(?:(?:final|the)[^\S\n]+){0,2}answer\b", re.IGNORECASE | re.MULTILINE)


CORRECT, WELL_FORMED = "emreason.schemes.rewards.correct", "emreason.schemes.rewards.well_formed"
"""The rewards that ask for the right answer and no more, and for any."""


WEIGH = ("rationales", "questions", "importance", "resample", "contrast", "rloo", "maxrl", "trice", "mh")
CHOOSE = ("all", "adaptive")


@dataclass
class Scheme:
    """One sampling scheme and how it draws; an instance of `conf/sampler/*.yaml`.

    Attributes:
        name: `rs`, `star`, `pps`, …
        display: the name in tables and pictures, e.g. `RS-4`.
        budget: M, the tries that `proposals` refers to.
        proposals: proposal -> number of tries, in the order they are tried.
        temperature, top_p, max_new_tokens: how the tokens of a draw are chosen.
        worked_examples: number of worked examples shown in the E-step's prompts.
        worked_examples_iterations: in how many first iterations they are shown; None is always.
        stop_at_answer: end a completion with its answer line (y ends there) instead of at EOS only.
        reject_trivial: also reject rationales that state an answer without any reasoning.
        keep: accepted rationales after which a question is settled; as many as there are tries: all of them are drawn.
        distinct: rationales with the same text count once.
        weigh: what the rationales kept of one question count for, see `weights.py`.
        reward: which completions are accepted: the dotted path of a function like those of `rewards.py`.
        truncate: importance weights are cut to this many times the question's mean weight (Ionides 2008: √K); None is off.
        choose: which questions an iteration samples: `all`, or `adaptive`: `share` of them, see `choice.py`.
    """

    name: str
    display: str
    budget: int
    proposals: Mapping[Proposal, int]
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    worked_examples: int = 0
    worked_examples_iterations: int | None = None
    stop_at_answer: bool = True
    reject_trivial: bool = False
    keep: int = 1
    distinct: bool = False
    weigh: str = "rationales"
    truncate: float | None = None
    reward: str = CORRECT
    choose: str = "all"
    share: float = 1.0

    def __post_init__(self) -> None:
        for proposal, tries in self.proposals.items():
            if proposal not in PROPOSALS:
                raise UserError(f"sampler.proposals: {proposal!r} is not known; use {' and '.join(PROPOSALS)}.")
            if not isinstance(tries, int) or tries < 0:
                raise UserError(f"sampler.proposals.{proposal}={tries!r}: the number of tries must be a whole number of at least 0.")
        if not self.tries:
            raise UserError("sampler.proposals: there is no try at all; give at least one proposal one try.")
        if self.temperature == 0 and max(self.proposals.values()) > 1:
            raise UserError(
                f"sampler.temperature={self.temperature}: it must be above 0 (greedy draws of one prompt are all the same); "
                "0 is allowed with a single try per proposal only."
            )
        try:
            inspect.signature(pkgutil.resolve_name(self.reward)).bind("text", "answer", "question")
        except (ValueError, ImportError, AttributeError, TypeError) as error:
            raise UserError(
                f"sampler.reward={self.reward!r} names no function of (text, answer, question) ({error}); use "
                "emreason.schemes.rewards.correct, valid_sums, well_formed or verified."
            ) from None
        for key, held in {
            "weigh": self.weigh in WEIGH,
            "choose": self.choose in CHOOSE,
            "keep": self.keep >= 1,
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
        }.items():
            if not held:
                raise UserError(f"sampler.{key}={getattr(self, key)!r} is not allowed; see `emreason.schemes.samplers.Scheme`.")
        if self.share != 1 and self.choose == "all":
            raise UserError(f"sampler.share={self.share}: sampler.choose=all asks every question; set sampler.choose=adaptive.")
        if self.truncate is not None and not self.weighs_by_importance:
            raise UserError(f"sampler.truncate={self.truncate} cuts importance weights; set sampler.weigh=importance or resample.")
        if self.weighs_by_importance and (self.keep < len(self.tries) or self.top_p < 1 or self.temperature == 0 or self.distinct):
            raise UserError(
                f"sampler.weigh={self.weigh} needs all draws, from the whole distribution: set sampler.keep={len(self.tries)}, "
                "sampler.top_p=1, sampler.distinct=false and a temperature above 0."
            )
        n = len(self.tries)
        if self.weigh in ("rloo", "maxrl") and (n < 2 or set(self.tries) != {"question"} or self.keep < n or self.distinct):
            raise UserError(
                f"sampler.weigh={self.weigh} compares all draws of the plain prompt: set sampler.proposals={{question: K}} with K of at "
                "least 2, sampler.keep=K and sampler.distinct=false."
            )
        if self.weigh == "trice" and (self.tries != ("question", "rationalization") or self.keep < 2 or self.distinct):
            raise UserError(
                "sampler.weigh=trice has one draw of the plain prompt and begins with a hinted one: set "
                "sampler.proposals={question: 1, rationalization: 1}, sampler.keep=2 and sampler.distinct=false."
            )
        if self.weigh == "contrast" and set(self.tries) != {"rationalization"}:
            raise UserError("sampler.weigh=contrast weighs hinted draws: set sampler.proposals={rationalization: K}.")
        if self.weigh == "mh" and (self.keep > 1 or self.top_p < 1 or self.temperature == 0 or self.distinct):
            raise UserError(
                "sampler.weigh=mh compares the first right draw, from the whole distribution, with the rationale kept before: set "
                "sampler.keep=1, sampler.top_p=1, sampler.distinct=false and a temperature above 0."
            )
        if self.choose == "adaptive" and self.persists:
            raise UserError(f"sampler.choose=adaptive does not go with sampler.weigh={self.weigh}, whose rationales are of every question.")

    @property
    def tries(self) -> tuple[Proposal, ...]:
        """The proposal of attempt 1, 2, …"""
        return tuple(proposal for proposal, tries in self.proposals.items() for _ in range(tries))

    def n_tries(self, iteration: int) -> int:
        """How many of `tries` an iteration has: TRICE's hinted draw begins the chain and is never made again."""
        return 1 if self.weigh == "trice" and iteration > 0 else len(self.tries)

    @property
    def weighs_by_importance(self) -> bool:
        """Whether accepted draws of one question are weighed against one another by importance."""
        return self.weigh in ("importance", "resample")

    @property
    def needs_scores(self) -> bool:
        """Whether the weights need a scoring pass."""
        return self.weighs_by_importance or self.weigh in ("mh", "contrast")

    @property
    def asks_again(self) -> bool:
        """Whether a hinted rationale must lead to the answer under the plain prompt, too, see `verification.py`."""
        return bool(getattr(pkgutil.resolve_name(self.reward), "asks_again", False))

    @property
    def persists(self) -> bool:
        """Whether each question has a rationale that is kept from one iteration to the next."""
        return self.weigh in ("trice", "mh")

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.max_new_tokens)

    def n_examples(self, iteration: int) -> int:
        """How many worked examples this iteration's E-step shows."""
        always = self.worked_examples_iterations is None
        return self.worked_examples if always or iteration < self.worked_examples_iterations else 0  # type: ignore[operator]


def is_trivial(text: str) -> bool:
    """Whether a completion states an answer without reasoning: fewer than three words before its answer line, thoughts included.

    Where words are not spaced, two Chinese or Japanese characters are one.
    """
    start = speech_start(text)
    spoken = len(text) if start is None else start
    line = _ANSWER_LINE.search(text[spoken:])
    return len(_WORDS.findall(without_marks(text[: spoken + line.start() if line else len(text)]))) < 3


_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_UNSPACED}]{{1,2}}|[^\W_{_UNSPACED}]+")


def sample(
    questions: Sequence[Question],
    scheme: Scheme,
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    iteration: int,
    replayed: Iterable[Rationale] = (),
) -> Iterator[Rationale]:
    """The E-step on one rank: yield every new attempt, accepted or not, as the engine finishes it.

    A question's next attempt enters the engine's queue the moment the last one failed; there are no rounds.

    Args:
        replayed: attempts already journalled in this iteration; they are not drawn again and not yielded.
    """
    from emreason.engines.drawing import draw_seed  # and PyTorch, which a plan does without
    from emreason.schemes.verification import asked_again, leads_to_gold

    examples = scheme.n_examples(iteration)
    by_id = {question.id: question for question in questions}
    past = by_question(replayed)

    def request(question: Question, attempt: int) -> Request:
        prompt_ids = prompts.ids(question, scheme.tries[attempt - 1], examples)
        return Request(
            key=(question.id, attempt),
            prompt_ids=prompt_ids,
            params=scheme.params,
            seed=draw_seed(seed, iteration, question.id, attempt),
            stop=stop_at_answer(question, tokenizer, prompt_ids) if scheme.stop_at_answer else None,
        )

    queue: deque[Request] = deque()
    for question in questions:
        attempts = past.setdefault(question.id, [])
        if not is_settled(attempts, scheme):
            queue.append(request(question, len(attempts) + 1))
    verify = scheme.asks_again
    unverified: dict[str, Rationale] = {}
    for completion in engine.generate(queue):
        key: Any = completion.request.key
        question_id, attempt, *again = key
        question = by_id[question_id]
        if again:
            rationale = replace(unverified.pop(question_id), accepted=leads_to_gold(completion, question, tokenizer))
        else:
            rationale = judge(completion, question, scheme, tokenizer, iteration, attempt)
            if verify and rationale.accepted and rationale.proposal == "rationalization":
                unverified[question_id] = rationale
                queue.appendleft(asked_again(rationale, question, prompts, tokenizer))
                continue
        past[question_id].append(rationale)
        if not is_settled(past[question_id], scheme):
            queue.appendleft(request(question, attempt + 1))  # at once: the engine still has this prompt's K/V
        yield rationale


def by_question(attempts: Iterable[OfQuestion]) -> dict[str, list[OfQuestion]]:
    """The attempts at each question, by its id, in the order given."""
    found: dict[str, list[OfQuestion]] = {}
    for attempt in attempts:
        found.setdefault(attempt.question_id, []).append(attempt)
    return found


def is_settled(attempts: Sequence[Rationale], scheme: Scheme) -> bool:
    """Whether a question needs no further draw: enough were accepted, it cannot be run, or its tries are used up."""
    if not attempts:
        return False
    last = max(attempts, key=lambda rationale: rationale.attempt)
    texts = [a.text for a in attempts if a.accepted]
    return (
        len(set(texts) if scheme.distinct else texts) >= scheme.keep
        or last.finish_reason == "error"
        or last.attempt >= scheme.n_tries(last.iteration)
    )


def judge(
    completion: Completion, question: Question, scheme: Scheme, tokenizer: PreTrainedTokenizerBase, iteration: int, attempt: int
) -> Rationale:
    """r(ŷ, y*): extract the answer of a completion and accept it if the scheme's reward does and it was not truncated."""
    text = said(completion.token_ids, completion.request.prompt_ids, tokenizer)
    answer = extract(text, question)
    whole = completion.finish_reason in ("stop", "answer")
    right = whole and bool(pkgutil.resolve_name(scheme.reward)(text, answer, question))  # it may say None, or numpy's True
    accepted = right and not (scheme.reject_trivial and is_trivial(text))
    return Rationale(
        question_id=question.id,
        iteration=iteration,
        attempt=attempt,
        proposal=scheme.tries[attempt - 1],
        text=text,
        answer=answer,
        accepted=accepted,
        n_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        logprob=round(completion.logprob, 6),
        token_ids=completion.token_ids,
    )


def training_ids(rationale: Rationale, end_id: int) -> tuple[int, ...]:
    """The supervised tokens: exactly those sampled, and the reply's end where the completion was ended at its answer line.

    Not where the weight is negative: that end was never sampled, and a model must not unlearn to end.
    """
    return rationale.token_ids + ((end_id,) if rationale.finish_reason == "answer" and rationale.weight > 0 else ())

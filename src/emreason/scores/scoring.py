"""Scoring: accuracy by greedy generation, with and without a forced answer line; log-probabilities of given tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from emreason.models.batches import Marks, marks_of, to
from emreason.models.families import base_causal_lm
from emreason.models.training.packed import can_pack_rows, packed_states
from emreason.models.training.products import head_logprobs
from emreason.progress import Bar
from emreason.questions.answers import correct, extract, gold_text, in_words, stop_at_answer
from emreason.questions.grammar.thinking import closing_ids, said, silent_ids
from emreason.questions.prompts import Prompts
from emreason.scores.stats import wilson
from emreason.types import Completion, Engine, Question, Request, SamplingParams

FORCED_TOKENS = 8
"""Tokens decoded after a forced `Answer:` cue: enough for a letter or a small number, too few to reason on. Longer answers get more."""

MIN_SHARED = 8
"""Shortest common prefix that is worth a pass of its own."""


@dataclass(frozen=True)
class Prediction:
    """The greedy completion of one question, its answer, and the answer when the answer line is forced; as they are asked for, letters or
    words. `position`: the gold choice's place as a letter, also where none is shown; empty for free answers."""

    question_id: str
    question: str
    gold: str
    text: str
    answer: str | None
    correct: bool
    forced_answer: str | None
    forced_correct: bool
    n_tokens: int
    finish_reason: str
    position: str


def predict(
    questions: Sequence[Question],
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    n_examples: int = 0,
    forced: bool = True,
    bar: Bar | None = None,
) -> list[Prediction]:
    """Answer `questions` greedily under the plain prompt; in the order given.

    Where a completion ends without a well-formed answer and `forced`, the cue `Answer:` is appended to what was generated and the answer
    decoded, so that not knowing the format and not knowing the answer can be told apart. A thinking block
    that is still open is closed first.
    """
    by_id = {question.id: question for question in questions}
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    asked = ((q, prompts.ids(q, "question", n_examples)) for q in questions)
    queue = deque(Request(q.id, ids, params, stop=stop_at_answer(q, tokenizer, ids)) for q, ids in asked)
    drawn: dict[str, Completion] = {}
    hits = 0
    for completion in engine.generate(queue):
        question = by_id[str(completion.request.key)]
        drawn[question.id] = completion
        if bar is not None:
            hits += correct(extract(_text(tokenizer, completion), question), question)
            bar.update(1, len(completion.token_ids), f"correct {hits / len(drawn):.0%}")

    texts = {key: _text(tokenizer, c) for key, c in drawn.items()}
    answers = {key: extract(text, by_id[key]) for key, text in texts.items()}
    forced_answers = dict(answers)
    if forced:
        silent = silent_ids(tokenizer)
        asked_again = {}
        for key, completion in drawn.items():
            if answers[key] is None and completion.finish_reason != "error":
                spoken = tuple(i for i in completion.token_ids if i not in silent)
                context = (*completion.request.prompt_ids, *spoken, *closing_ids(texts[key], tokenizer), *prompts.answer_cue_ids)
                asked_again[key] = by_id[key], context
        forced_answers |= answered_at_cue(asked_again, engine, tokenizer)
    return [
        Prediction(
            question_id=q.id,
            question=q.text,
            gold=gold_text(q),
            text=texts[q.id],
            answer=in_words(q, answers[q.id]),
            correct=correct(answers[q.id], q),
            forced_answer=in_words(q, forced_answers[q.id]),
            forced_correct=correct(forced_answers[q.id], q),
            n_tokens=len(drawn[q.id].token_ids),
            finish_reason=drawn[q.id].finish_reason,
            position=q.answer if q.letters else "",
        )
        for q in questions
    ]


Asked = TypeVar("Asked", bound=Hashable)


def answered_at_cue(
    asked: Mapping[Asked, tuple[Question, tuple[int, ...]]], engine: Engine, tokenizer: PreTrainedTokenizerBase, bar: Bar | None = None
) -> dict[Asked, str | None]:
    """What the model answers, greedily, where its context ends with the cue `Answer:`; those that do not fit the context are left out."""
    stop = line_said(tokenizer)
    queue = deque(Request(key, ids, forced_params(q, tokenizer), stop=stop) for key, (q, ids) in asked.items())
    answers = {}
    for completion in engine.generate(queue):
        key: Any = completion.request.key
        if bar is not None:
            bar.update(1, len(completion.token_ids))
        if completion.finish_reason != "error":
            answers[key] = answer_at_cue(completion, asked[key][0], tokenizer)
    return answers


def answer_at_cue(completion: Completion, question: Question, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The answer of a completion that goes on after `Answer:`."""
    line = str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)).strip().split("\n")[0]
    return extract(f"Answer: {line}", question)


def line_said(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], bool]:
    """Whether the line after the cue is over, asked where there is a line break: one before any word is not the end."""
    return lambda ids: bool(str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip())


def forced_params(question: Question, tokenizer: PreTrainedTokenizerBase) -> SamplingParams:
    """Greedy, with room for a letter, for the longest choice where its text is the answer, or for a number or text twice as long as the
    gold one, whose spelling need not be the shortest, and its aliases."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    if question.kind == "choice":
        room = FORCED_TOKENS + max(map(length, question.choices if question.answer_as == "text" else ()), default=0)
    else:
        room = 2 * max(FORCED_TOKENS, *map(length, (gold_text(question), *question.aliases))) + 2
    return SamplingParams(temperature=0.0, max_new_tokens=room)


def _text(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    return said(completion.token_ids, completion.request.prompt_ids, tokenizer)


def score(predictions: Sequence[Prediction], seconds: float, forced: bool = True) -> dict[str, Any]:
    """SCORE of the run folder's contract: accuracy with its 95 % Wilson interval, format and length beside it. Accuracies in [0, 1]."""
    n = len(predictions)
    hits = sum(p.correct for p in predictions)
    positions: dict[str, list[bool]] = {}
    for p in predictions:
        if p.position:
            positions.setdefault(p.position, []).append(p.correct)
    return {
        "accuracy": hits / n if n else 0.0,
        "forced_accuracy": sum(p.forced_correct for p in predictions) / n if n and forced else None,
        "n": n,
        "ci95": list(wilson(hits, n)),
        "extraction_rate": sum(p.answer is not None for p in predictions) / n if n else 0.0,
        "rationale_tokens_mean": sum(p.n_tokens for p in predictions) / n if n else 0.0,
        "errored": sum(p.finish_reason == "error" for p in predictions),
        "accuracy_by_position": {k: {"n": len(v), "accuracy": sum(v) / len(v)} for k, v in sorted(positions.items())},
        "seconds": seconds,
    }


class Stopwatch:
    """Wall seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    completion_mask: Tensor,
    chunk: int = 256,
    temperature: float = 1.0,
    marks: Marks | None = None,
    in_layers: bool = False,
) -> Tensor:
    """log π(token | everything before it), nats, of the tokens that `completion_mask` marks; differentiable.

    The head runs on completion tokens only, `chunk` tokens at a time, so that the [tokens, vocabulary] logits of a batch never exist at
    once. Rows are padded on the right, where causal attention needs no mask. What all rows begin with is computed once; where rows are
    packed, what any of them share (system prompt, instruction, a question).

    Args:
        input_ids: [rows, length] int64, right-padded; on the host, as all of these.
        completion_mask: [rows, length] bool; the first column must be False (nothing comes before it).
        temperature: of softmax(logits / temperature).
        marks: `marks_of` the two, if they are known.
        in_layers: pass every layer once, by its own forward, as hooks on layers need it.

    Returns:
        [number of marked tokens] float32, row by row, on the model's device.
    """
    causal_lm = base_causal_lm(model)
    decoder, device = causal_lm.base_model, next(model.parameters()).device
    marks = marks or marks_of(input_ids, completion_mask)
    shared, (rows, at, targets) = marks.shared, (to(device, t) for t in (marks.rows, marks.at, marks.targets))
    if not in_layers and can_pack_rows(causal_lm):
        return head_logprobs(causal_lm, packed_states(causal_lm, input_ids, completion_mask, MIN_SHARED), targets, chunk, temperature)
    prefix = DynamicCache(config=causal_lm.config)
    recurrent = any(hasattr(layer, "conv_states") for layer in prefix.layers)  # whose states cannot be given to several rows
    if in_layers or shared < MIN_SHARED or recurrent or causal_lm.is_gradient_checkpointing:
        hidden = decoder(input_ids=to(device, input_ids), use_cache=False).last_hidden_state
        states = hidden.flatten(0, 1).index_select(0, at)
    else:  # rows that begin alike pass the layers once; gradients of all rows meet in the prefix's K/V
        input_ids = to(device, input_ids)
        decoder(input_ids=input_ids[:1, :shared], past_key_values=prefix, use_cache=True)
        prefix.batch_repeat_interleave(len(input_ids))
        hidden = decoder(input_ids=input_ids[:, shared:], past_key_values=prefix, use_cache=True).last_hidden_state
        states = hidden.flatten(0, 1).index_select(0, at - shared * (rows + 1))
    return head_logprobs(causal_lm, states, targets, chunk, temperature)


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else None

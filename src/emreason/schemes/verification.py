"""Verified hinted draws: does the rationale, put behind the plain prompt, lead to the answer? (`rewards.verified`)"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from emreason.questions.answers import correct
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import at_cue
from emreason.scores.scoring import answer_at_cue, forced_params, line_said
from emreason.types import Completion, Question, Rationale, Request


def asked_again(rationale: Rationale, question: Question, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Request:
    """The plain zero-shot prompt, the rationale without its answer statement and the cue `Answer:`, to be answered greedily."""
    context = at_cue(prompts.ids(question), rationale.token_ids, tokenizer)
    key = (question.id, rationale.attempt, "again")
    return Request(key, context, forced_params(question, tokenizer), stop=line_said(tokenizer))


def leads_to_gold(completion: Completion, question: Question, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what was answered to `asked_again` is right; not where it does not fit the context."""
    return completion.finish_reason != "error" and correct(answer_at_cue(completion, question, tokenizer), question)

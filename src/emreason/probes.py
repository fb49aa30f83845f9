"""The costly diagnostics, on request by `evaluation.diagnostics`: faithfulness of rationales, KL per token from the base model."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from emreason.answers import answer_stop, correct, extract
from emreason.likelihood import Scorer, completion_logprobs, cue_ids, rationale_ids
from emreason.module import EMModule
from emreason.prompts import Prompts
from emreason.samplers import draw_seed
from emreason.scoring import FORCED_TOKENS
from emreason.types import Engine, Question, Rationale, Request, SamplingParams

DIVERGENCE = -4
"""Stands for the iteration in the seeds of the KL's draws: the same draws' seeds each time, so that changes are the model's."""


def faithful(
    rationales: Sequence[Rationale], questions: Mapping[str, Question], engine: Engine, prompts: Prompts, tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Whether the model, shown the plain question and a rationale without its answer statement, gives the answer that was stated.

    Greedy, after the cue `Answer:`. "11 + 9 = 19. Answer: 20" is not faithful where the model goes on to say 19: the answer came from the
    hint. Rationales without an answer, or with no room left in the context, are left out.
    """
    params = SamplingParams(temperature=0.0, max_new_tokens=FORCED_TOKENS)
    queue: deque[Request] = deque()
    for i, r in enumerate(rationales):
        if r.answer is not None:
            prompt_ids = prompts.ids(questions[r.question_id])
            z = rationale_ids(r.token_ids, tokenizer, prompt_ids)[0]
            context = (*prompt_ids, *z, *cue_ids(z, tokenizer, prompt_ids))
            queue.append(Request(i, context, params, stop=lambda _: True))
    agree = []
    for completion in engine.generate(queue):
        key: Any = completion.request.key
        stated = replace(questions[rationales[key].question_id], answer=str(rationales[key].answer), verify=None)
        line = str(tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)).strip().split("\n")[0]
        if completion.finish_reason != "error":
            agree.append(correct(extract(f"Answer: {line}", stated), stated))
    return agree


Ratio = tuple[str, float, int]
"""Question id, log π(z, y|x) − log π_base(z, y|x) in nats of one draw from π, and its number of tokens."""


def log_ratios(
    questions: Sequence[Question],
    engine: Engine,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    score: Scorer,
    score_base: Scorer,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[Ratio]:
    """One draw per question from the plain prompt at temperature 1, scored under both weights; errors are left out."""
    by_id = {q.id: q for q in questions}
    params = SamplingParams(max_new_tokens=max_new_tokens)
    asked = ((q, prompts.ids(q)) for q in questions)
    queue = deque(Request(q.id, ids, params, draw_seed(seed, DIVERGENCE, q.id, 0), answer_stop(q, ids, tokenizer)) for q, ids in asked)
    drawn = {str(c.request.key): c.token_ids for c in engine.generate(queue) if c.token_ids}
    pairs = [(prompts.ids(by_id[i]), ids) for i, ids in drawn.items()]
    both = zip(drawn, score(pairs), score_base(pairs), strict=True)
    return [(i, ours - base, len(drawn[i])) for i, ours, base in both]


def kl_per_token(ratios: Sequence[Ratio]) -> dict[str, float | None]:
    """KL(π ‖ π_base) of whole completions over their mean length, nats per token, with its standard error over questions (delta method)."""
    n, tokens = len(ratios), sum(length for *_, length in ratios)
    if not tokens:
        return {"kl_per_token": None, "kl_per_token_se": None}
    rate = sum(value for _, value, _ in ratios) / tokens
    squares = sum((value - rate * length) ** 2 for _, value, length in ratios)
    return {"kl_per_token": rate, "kl_per_token_se": math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else None}


class Divergence(Callback):
    """Adds `kl_per_token` to every validation.

    Keeps what is trained as it was before the first iteration, in CPU memory: a copy of the model in full fine-tuning; of adapters alone
    with LoRA, which begin as the base model.

    Args:
        questions: of the first so many validation questions.
    """

    def __init__(self, questions: int, seed: int):
        self.questions, self.seed = questions, seed
        self._base: list[torch.Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        if stage == "fit":  # before a checkpoint's weights are restored
            assert isinstance(pl_module, EMModule)
            self._base = [p.detach().cpu().clone() for p in pl_module.trainable()]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EMModule)
        module, world = pl_module, trainer.world_size
        first: list[Question] = trainer.datamodule.questions["validation"][: self.questions]  # type: ignore[attr-defined]
        score = functools.partial(completion_logprobs, module.model)

        def score_base(pairs: Any, temperature: float = 1.0) -> list[float]:
            with self.base_weights(module):
                return score(pairs, temperature)

        parts = (module.engine, module.prompts, module.tokenizer, score, score_base)
        mine = log_ratios(first[trainer.global_rank :: world], *parts, max_new_tokens=module.max_new_tokens, seed=self.seed)
        values = kl_per_token(sorted(module.gather(mine)))
        module.scores["validation"] |= values
        module.log_dict({f"validation/{k}": v for k, v in values.items() if v is not None}, rank_zero_only=False, batch_size=1)

    @contextmanager
    def base_weights(self, module: EMModule) -> Iterator[None]:
        """The model with the weights it began with; afterwards exactly as it was."""
        with torch.no_grad():
            kept = [p.detach().cpu().clone() for p in module.trainable()]
            try:
                for parameter, base in zip(module.trainable(), self._base, strict=True):
                    parameter.copy_(base)
                yield
            finally:
                for parameter, ours in zip(module.trainable(), kept, strict=True):
                    parameter.copy_(ours)

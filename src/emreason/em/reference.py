"""Learning to reason by expectation maximization, on one page: the paper's algorithm (arXiv:2512.20169v1, §3) and nothing else.

A model answers a question x by writing a rationale z, then an answer y. What is maximised is Σᵢ log Σ_z π(z, yᵢ*|xᵢ; θ), z being latent.
Slow: for every token the whole sequence goes through the model. `tests/em/test_reference.py` holds the fast loop to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emreason.engines.drawing import Shaping, counter_uniforms, draw, draw_seed
from emreason.questions.answers import answer_line_complete, correct, extract
from emreason.questions.prompts import Prompts, end_ids
from emreason.types import Proposal, Question, SamplingParams

# question: (z, y) ~ π(z, y|x); rationalization: (z, y) ~ π(z, y|x, y*), the prompt shows the answer
REJECTION_SAMPLING_4: list[Proposal] = ["question"] * 4
STAR: list[Proposal] = ["question", "rationalization"]
PROMPT_POSTERIOR_SAMPLING: list[Proposal] = ["rationalization"]


@dataclass(frozen=True)
class Draw:
    """One attempt at question x: the token ids of (ẑ, ŷ), and r(ŷ, y*)."""

    question: Question
    proposal: Proposal
    ids: tuple[int, ...]
    reward: int


def learn(
    model: Any, prompts: Prompts, questions: list[Question], proposals: list[Proposal], params: SamplingParams, n: int, lr: float, seed: int
) -> list[list[Draw]]:
    """θ⁰ → … → θⁿ in the parameters of `model`, a causal LM in eval mode; returns every iteration's draws."""
    history = []
    for k in range(n):
        draws = [d for x in questions for d in e_step(model, prompts, x, proposals, params, seed, k)]
        m_step(model, prompts, draws, lr / len(questions))
        history.append(draws)
    return history


def e_step(
    model: Any, prompts: Prompts, x: Question, proposals: list[Proposal], params: SamplingParams, seed: int, iteration: int
) -> list[Draw]:
    """The proposals in order; the first draw whose answer is correct is the last. If none is, x sits this iteration out."""
    draws: list[Draw] = []
    for attempt, proposal in enumerate(proposals, start=1):
        ids, ended = sample(model, prompts, x, proposal, params, draw_seed(seed, iteration, x.id, attempt))
        answer = extract(str(prompts.tokenizer.decode(ids, skip_special_tokens=True)), x)
        draws.append(Draw(x, proposal, tuple(ids), int(ended and correct(answer, x))))
        if draws[-1].reward:
            break
    return draws


@torch.no_grad()
def sample(model: Any, prompts: Prompts, x: Question, proposal: Proposal, params: SamplingParams, seed: int) -> tuple[list[int], bool]:
    """Token ids up to and with the end of the text, which is also where the answer line ends; False where the text is cut off."""
    prompt, end = prompts.ids(x, proposal), end_ids(prompts.tokenizer)[0]
    ids: list[int] = []
    while len(ids) < params.max_new_tokens:
        logits = model(torch.tensor([[*prompt, *ids]])).logits[:, -1]
        u = counter_uniforms(torch.tensor([seed]), torch.tensor([len(ids)]))
        token, _ = draw(logits, u, Shaping.of([params], logits.device))
        ids.append(int(token))
        if ids[-1] == end:
            return ids, True
        if answer_line_complete(str(prompts.tokenizer.decode(ids)), x):
            return [*ids, end], True
    return ids, False


def m_step(model: Any, prompts: Prompts, draws: Sequence[Draw], lr: float) -> None:
    """θ ← θ + η Σᵢ r(ŷᵢ, yᵢ*) ∇ log π(ẑᵢ, ŷᵢ|xᵢ; θ): given the plain question, whichever prompt (ẑᵢ, ŷᵢ) was drawn from."""
    model.zero_grad()
    for d in draws:
        if d.reward:
            log_likelihood(model, prompts.ids(d.question), d.ids).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter += lr * parameter.grad


def log_likelihood(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """log π(ids|prompt), nats."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()

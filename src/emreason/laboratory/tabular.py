"""An exact laboratory: a latent-variable model x → z → y small enough that every rationale can be enumerated.

Posterior, marginal likelihood and what each sampling scheme really draws are then numbers, not estimates: `emreason experiment=exact`.

The model is tabular: π(z|x) is a softmax over all rationales of up to `max_length` letters, π(y|z) a softmax over the answers that all
questions share, so that a rationale which does not lead to an answer cannot be trained to give it without harm to other questions.
The hint h = y* changes both, as it does in a language model:

    q(z|x, h) ∝ π(z|x) π(h|z)^guidance exp(−brevity · |z|)          q(y|z, h) ∝ π(y|z) exp(leak · 1[y = h])

guidance = 1, brevity = 0 makes q(z|x, y*) the posterior; `leak` is the hint that gives the answer whatever the reasoning says.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import Scheme
from emreason.scores.likelihood import Pair
from emreason.types import Completion, Proposal, Question, Request, UserError


@dataclass(frozen=True)
class Hint:
    """How the hint changes the model; see the module's formulae."""

    guidance: float = 0.5
    brevity: float = 0.5
    leak: float = 4.0


@dataclass(frozen=True)
class Tabular:
    """π(z, y | x), and q(z, y | x, y*) under the hint, as tables of float64.

    Attributes:
        rationales: every z there is, Z of them.
        gold: [questions] the index of y*.
        z_logits: [questions, Z].
        y_logits: [Z, answers].
    """

    rationales: tuple[str, ...]
    gold: Tensor
    z_logits: Tensor
    y_logits: Tensor
    hint: Hint

    def log_joint(self, proposal: Proposal = "question", temperature: float = 1.0, hinted: Tensor | None = None) -> Tensor:
        """log π(z, y | x), or log q(z, y | x, h) for `rationalization`: [questions, Z, answers].

        Args:
            temperature: of whole completions.
            hinted: [questions] the index of h; None: of y*.
        """
        if temperature != 1:
            return (self.log_joint(proposal, hinted=hinted) / temperature).flatten(1).log_softmax(1).view(-1, *self.y_logits.shape)
        z, y = self.z_logits.log_softmax(1), self.y_logits.log_softmax(1)
        if proposal == "question":
            return z[:, :, None] + y
        h = self.gold if hinted is None else hinted
        length = torch.tensor([float(len(r)) for r in self.rationales], dtype=z.dtype)
        z = (z + self.hint.guidance * y[:, h].T - self.hint.brevity * length).log_softmax(1)
        leaked = y + self.hint.leak * torch.eye(y.shape[1], dtype=y.dtype)[h][:, None, :]
        return z[:, :, None] + leaked.log_softmax(2)

    def log_correct(self, proposal: Proposal = "question", temperature: float = 1.0) -> Tensor:
        """log π(z, y* | x): [questions, Z]."""
        return self.log_joint(proposal, temperature)[torch.arange(len(self.gold)), :, self.gold]

    def log_marginal(self) -> Tensor:
        """log π(y* | x) = log Σ_z π(z, y* | x): [questions]."""
        return self.log_correct().logsumexp(1)

    def posterior(self) -> Tensor:
        """π(z | x, y*): [questions, Z]."""
        return self.log_correct().softmax(1)

    def m_step(self, weights: Tensor) -> Tabular:
        """The maximiser of Σₓ Σ_z weights[x, z] log π(z, y*ₓ | x): the M-step that the paper's gradient steps go towards.

        With the posterior as weights it is exact EM, which never lowers the marginal likelihood (Dempster, Laird & Rubin 1977, Thm 1).
        """
        answers = torch.zeros_like(self.y_logits).index_add(1, self.gold, weights.T)
        return replace(self, z_logits=_log(weights), y_logits=_log(answers))


def _log(weights: Tensor) -> Tensor:
    # a table never holds −∞: a rationale that has lost all its weight keeps the least probability a float64 can carry
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log()


def make_tabular(questions: int, answers: int, letters: str, max_length: int, seed: int, sharpness: float, hint: Hint) -> Tabular:
    """A random model: logits are normal with standard deviation `sharpness`; gold answers go round.

    Raises:
        UserError: sizes that make no model, or too large a one to enumerate.
    """
    if questions < 1 or answers < 2 or not letters or max_length < 1:
        raise UserError("laboratory: it needs at least 1 question, 2 answers, 1 letter and a max_length of 1.")
    n = sum(len(letters) ** length for length in range(1, max_length + 1))
    if n > 100_000:
        raise UserError(f"laboratory: {n} rationales are too many to enumerate; lower laboratory.max_length.")
    rationales = tuple("".join(z) for length in range(1, max_length + 1) for z in itertools.product(letters, repeat=length))
    generator = torch.Generator().manual_seed(seed)

    def table(*shape: int) -> Tensor:
        return sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Tabular(rationales, torch.arange(questions) % answers, table(questions, n), table(n, answers), hint)


def accepted(model: Tabular, scheme: Scheme, before: Tensor | None = None) -> Tensor:
    """P(the scheme accepts z for x), exactly: [questions, Z]; a row sums to the acceptance probability.

    Proposals are tried in order until one is correct, so try t contributes P(all before it failed) · P(try t draws z and y*):

        RS-M    posterior · (1 − (1 − p)^M),  p = π(y*|x)
        STaR    posterior · (1 − (1 − p)^M) + (1 − p)^M · q(z, y*|x, y*)
        PPS     q(z, y*|x, y*), renormalised if accepted
        PPS-IW  the expected self-normalised weight of z, see `_self_normalized`
        TRICE   π(z, y*|x) + (1 − p) · before: the law of the persistent rationale, which a wrong draw leaves as it was
        mh      see `_chain`
        contrast, verified   q(z, y*|x, y*), weighed by `_contrast`, or where the likeliest answer after z is y*

    Args:
        before: the law of the persistent rationale after the iteration before; by default TRICE's is that of the hinted draw it begins
            with. With an unchanging model it tends to the posterior, TRICE's at the rate (1 − p)^k.

    Raises:
        UserError: a scheme whose law is not worked out here (several proposals weighed by importance, `truncate`, `keep` of some tries).
    """
    if scheme.weighs_by_importance and len(set(scheme.tries)) == 1 and scheme.truncate is None and scheme.temperature == 1:
        return _self_normalized(model.log_correct(), model.log_correct(scheme.tries[0]), len(scheme.tries))
    if scheme.weigh == "trice" and scheme.temperature == 1 and scheme.top_p == 1:
        correct = model.log_correct().exp()
        before = model.log_correct("rationalization").exp() if before is None else before
        return correct + (1 - correct.sum(1, keepdim=True)) * before
    if scheme.weigh == "mh":
        return _chain(model, scheme, torch.zeros_like(model.z_logits) if before is None else before)
    if scheme.keep > 1 or scheme.temperature != 1 or scheme.top_p != 1:
        raise UserError(
            f"The laboratory does not know what {scheme.display} draws: use keep=1, importance weights of a single proposal, or TRICE."
        )
    draws = {proposal: model.log_correct(proposal).exp() for proposal in set(scheme.tries)}
    if scheme.asks_again and "rationalization" in draws:
        draws["rationalization"] = draws["rationalization"] * (model.y_logits.argmax(1) == model.gold[:, None])
    total, reached = torch.zeros_like(model.z_logits), torch.ones_like(model.z_logits[:, :1])
    for proposal in scheme.tries:
        total = total + reached * draws[proposal]
        reached = reached * (1 - draws[proposal].sum(1, keepdim=True))
    return total * _contrast(model) if scheme.weigh == "contrast" else total


def _self_normalized(target: Tensor, proposal: Tensor, k: int) -> Tensor:
    """E[wₖ 1[zₖ = z] / Σ w] summed over K draws, exactly, for log π(z, y*|x) and log q(z, y*|x, y*): [questions, Z].

    With 1/S = ∫₀^∞ e^{−tS} dt the draws are independent under the integral, and with w = π/q and r the probability of a wrong draw

        K ∫ π(z, y*) e^{−t w(z)} (r + Σ_z' q(z', y*) e^{−t w(z')})^{K−1} dt .

    Over u = log t the integrand is smooth and vanishes at both ends, where the trapezoidal rule converges exponentially.
    """
    u = torch.arange(-40.0, 40.0, 0.05, dtype=target.dtype)
    weight = (target - proposal).exp()
    decay = torch.exp(-u.exp() * weight[:, :, None])
    wrong = 1 - proposal.exp().sum(1, keepdim=True)
    others = (wrong + (proposal.exp()[:, :, None] * decay).sum(1)) ** (k - 1)
    return k * 0.05 * target.exp() * (u.exp() * decay * others[:, None, :]).sum(2)


def _chain(model: Tabular, scheme: Scheme, before: Tensor) -> Tensor:
    """The law of the persistent rationale after one more iteration of independence Metropolis-Hastings, from `before`: [questions, Z].

    The first right draw of the proposals in order, z' of law q, takes the place of z with probability min(1, w(z')/w(z)), w = π/q; it
    begins a chain that has none; where no draw is right nothing moves.
    """
    after, reached = torch.zeros_like(before), torch.ones_like(before[:, :1])
    for proposal in scheme.tries:
        q = model.log_correct(proposal, scheme.temperature)
        weight = model.log_correct() - q
        moves = q.exp()[:, None, :] * (weight[:, None, :] - weight[:, :, None]).exp().clamp_max(1)  # [questions, from, to]
        right = q.exp().sum(1, keepdim=True)
        arrived = (before[:, :, None] * moves).sum(1) + (1 - before.sum(1, keepdim=True)) * q.exp()
        after = after + reached * (arrived + before * (right - moves.sum(2)))
        reached = reached * (1 - right)
    return after + reached * before


def _contrast(model: Tabular) -> Tensor:
    """Mean of tanh(c/2), 0 below, over wrong hints y', c = log q(z… | x, y*) − log q(z… | x, y'), of what begins with z: [questions, Z]."""
    answers = model.y_logits.shape[1]
    begins = torch.tensor([[longer.startswith(z) for longer in model.rationales] for z in model.rationales])

    def prefix(hinted: Tensor) -> Tensor:
        whole = model.log_joint("rationalization", hinted=hinted).logsumexp(2)
        return torch.where(begins, whole[:, None, :], -torch.inf).logsumexp(2)

    right = prefix(model.gold)
    wrong = [prefix((model.gold + shift) % answers) for shift in range(1, answers)]
    return torch.stack([((right - other) / 2).tanh().clamp_min(0) for other in wrong]).mean(0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of the rows of two tables, each row renormalised."""
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    # where q has a zero the result is some hundreds: by underflow, or because a scheme never accepts z (contrast, verified; truly infinite)
    return torch.where(p > 0, p * (p.log() - _log(q)), 0.0).sum(1).clamp_min(0.0)


Where = tuple[int, Proposal, int | None]
"""A prompt: the question's index, and which prompt it is, with the index of the answer that it hints at."""

# --- the project's own sampler on the tables ------------------------------------------------------------------------------------------


class TabularEngine:
    """Draws completions `z⏎Answer: y⏎` from the tables, so that `samplers.sample` can be held against the exact numbers.

    As in every engine a draw depends on the prompt and the request's seed alone; `score` is the scoring pass (`likelihood.Scorer`).
    """

    def __init__(self, model: Tabular, questions: Sequence[Question], prompts: Prompts, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.of_prompt: dict[tuple[int, ...], Where] = {}
        for question in questions:
            x = int(question.id.split("/")[0])
            self.of_prompt[prompts.ids(question)] = x, "question", None
            for h in range(model.y_logits.shape[1]):
                self.of_prompt[prompts.ids(replace(question, answer=str(h)), "rationalization")] = x, "rationalization", h
        self.ids = completion_ids(model, tokenizer)

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        while requests:
            request = requests.popleft()
            if request.params.temperature == 0:  # asked again, after `z⏎Answer:`
                (x, *how), said = self._split(request.prompt_ids)
                z = str(self.tokenizer.decode([*said])).partition("\nAnswer:")[0]
                row = self._table(*how, 1.0)[x].reshape(len(self.model.rationales), -1)[self.model.rationales.index(z)]
                ids = tuple(self.tokenizer.encode(f" {int(row.argmax())}\n", add_special_tokens=False))
                yield Completion(request, ids, 0.0, "answer")
                continue
            x, *how = self.of_prompt[request.prompt_ids]
            cdf = self._cdf(*how, request.params.temperature)[x]
            k = int(np.searchsorted(cdf, np.random.default_rng(request.seed).random() * cdf[-1], side="right"))
            yield Completion(request, self.ids[k], float(self._table(*how, 1.0)[x, k]), "answer")

    def score(self, pairs: Sequence[Pair], temperature: float = 1.0) -> list[float]:
        """log of the probability that a completion goes on with exactly these ids; what was sampled so far may stand in the prompt ids."""
        return [self._begins(*self._split(p), c, temperature) - self._begins(*self._split(p), (), temperature) for p, c in pairs]

    @functools.cache  # noqa: B019  (a few tables, as long as the engine)
    def _table(self, proposal: Proposal, hinted: int | None, temperature: float) -> np.ndarray:
        h = None if hinted is None else torch.full_like(self.model.gold, hinted)
        return self.model.log_joint(proposal, temperature, h).detach().flatten(1).numpy()

    @functools.cache  # noqa: B019
    def _cdf(self, proposal: Proposal, hinted: int | None, temperature: float) -> np.ndarray:
        return np.cumsum(np.exp(self._table(proposal, hinted, temperature)), axis=1)

    def _split(self, prompt_ids: tuple[int, ...]) -> tuple[Where, tuple[int, ...]]:
        known = next(ids for ids in self.of_prompt if prompt_ids[: len(ids)] == ids)
        return self.of_prompt[known], prompt_ids[len(known) :]

    @functools.cache  # noqa: B019
    def _begins(self, where: Where, said: tuple[int, ...], more: tuple[int, ...], temperature: float) -> float:
        (x, *how), text = where, str(self.tokenizer.decode([*said, *more]))
        z, cue, y = text.partition("\nAnswer:")
        table = self._table(*how, temperature)[x].reshape(len(self.model.rationales), -1)
        if not text:
            return 0.0
        if not cue:
            return float(np.logaddexp.reduce(table[[r.startswith(text) for r in self.model.rationales]], axis=None))
        row = table[self.model.rationales.index(z)]
        if not y:
            return float(np.logaddexp.reduce(row))
        return float(row[int(y)]) if y.endswith("\n") else -np.inf  # a table's completions end with their line


def completion_ids(model: Tabular, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Every completion `z⏎Answer: y⏎` there is, y running fastest."""
    lines = [f"{z}\nAnswer: {y}\n" for z in model.rationales for y in range(model.y_logits.shape[1])]
    return [tuple(tokenizer.encode(line, add_special_tokens=False)) for line in lines]


def make_questions(model: Tabular, copies: int = 1) -> list[Question]:
    """The model's questions under the ids `x/copy`: copies are drawn independently, since a draw depends on the question's id."""
    return [Question(f"{x}/{c}", f"question {x}", str(int(y)), "number") for x, y in enumerate(model.gold) for c in range(copies)]


def rationale_index(model: Tabular, text: str) -> int:
    """Which rationale a completion's text begins with."""
    return model.rationales.index(text.split("\n")[0])

"""Rejection sampling is MaxRL: what the program's sampler, weights and M-step make of every sequence of draws there is, against theory."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conftest import TEMPLATE, ScriptedEngine
from hydra.utils import instantiate
from test_config import compose_config
from test_samplers import scheme

from emreason.em.m_step import MStep
from emreason.em.steps import steps_of
from emreason.laboratory import gradients
from emreason.laboratory.tabular import Hint, completion_ids, make_tabular
from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts
from emreason.schemes.samplers import sample
from emreason.schemes.weights import weigh
from emreason.types import Question, UserError


@functools.cache
def model(seed=3):
    return make_tabular(2, 2, "a", 2, seed, sharpness=1.0, hint=Hint())  # 2 rationales, 2 answers: 4 completions, 256 sequences of 4


def maxrl(k):
    return scheme("rs", k, keep=k, weigh="maxrl")


def rloo(k):
    return scheme("rs", k, keep=k, weigh="rloo")


def enumerated(x, plan):
    """Mean, trace of the covariance and expected tokens of the M-step's whole update for question x, batch normalisation included.

    Every sequence of draws is a question of its own, whose engine says just that; the sampler stops where it stops.
    """
    tokenizer = tiny_tokenizer()
    prompts = Prompts(tokenizer, TEMPLATE, ())
    lines = [str(tokenizer.decode(ids)) for ids in completion_ids(model(), tokenizer)]
    law, score = model().log_joint().exp()[x].flatten(), gradients.scores(model(), x).flatten(0, 1)
    sequences = {f"{i}": s for i, s in enumerate(itertools.product(range(len(lines)), repeat=len(plan.tries)))}
    questions = [Question(i, f"question {i}", str(int(model().gold[x])), "number") for i in sequences]
    engine = ScriptedEngine(tokenizer, lambda r: (lines[sequences[r.key[0]][r.key[1] - 1]], "answer"))
    drawn = list(sample(questions, plan, engine, prompts, tokenizer, seed=1, iteration=0))
    weighed = weigh(drawn, plan, seed=1, iteration=0)
    settings = MStep(batch_size=8, tokens_per_batch=64)  # normalize: questions, the default: divided by 8 in every step
    steps = steps_of(weighed, {q.id: q for q in questions}, len(questions), prompts, settings, seed=1, iteration=0, rank=0, world_size=1)
    completions = {ids: k for k, ids in enumerate(completion_ids(model(), tokenizer))}
    eos = tokenizer.eos_token_id
    updates = {i: torch.zeros(score.shape[1], dtype=torch.float64) for i in sequences}
    for batch in (b for s in steps for b in s.batches):
        for row, i in enumerate(batch.question_ids):
            ids = tuple(batch.input_ids[row][batch.completion_mask[row]].tolist())
            updates[i] += 8 * batch.weights[row].double() * score[completions[ids[:-1] if ids[-1] == eos else ids]]
    p = torch.stack([law[list(s)].prod() for s in sequences.values()])
    rows = torch.stack(list(updates.values()))
    mean = p @ rows
    tokens = {i: sum(r.n_tokens for r in drawn if r.question_id == i) for i in sequences}
    return mean, float(p @ rows.square().sum(1) - mean.square().sum()), float(p @ torch.tensor([*tokens.values()], dtype=p.dtype))


def pass_at(k, x):
    """∇pass@k = ∇(1 − (1 − p)^k), by autograd through the tables."""
    tables = [t.clone().requires_grad_() for t in (model().z_logits, model().y_logits)]
    joint = tables[0].log_softmax(1)[x] + tables[1].log_softmax(1)[:, int(model().gold[x])]
    return torch.autograd.grad(1 - (1 - joint.exp().sum()) ** k, tables)


def maxrl_gradient(order, x):
    """Σ_{k ≤ order} ∇pass@k / k, in the parameters that question x has."""
    rows = [torch.cat([by_z[x], by_y.flatten()]) / k for k in range(1, order + 1) for by_z, by_y in [pass_at(k, x)]]
    return torch.stack(rows).sum(0)


@pytest.mark.parametrize("x", [0, 1])
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_rejection_sampling_is_maxrl(x, budget):
    """RS-M's expected first update is MaxRL's gradient of order M, over all (Z·A)^M sequences that the program's sampler can meet."""
    mean, variance, tokens = enumerated(x, scheme("rs", budget))
    theory = maxrl_gradient(budget, x)
    p = float(model().log_marginal()[x].exp())
    assert torch.allclose(theory, (1 - (1 - p) ** budget) * gradients.log_marginal_gradient(model(), x), atol=1e-12)
    assert torch.allclose(mean, theory, atol=1e-10)
    assert not torch.allclose(mean, maxrl_gradient(budget + 1, x), atol=1e-3)  # and it can tell the order
    exact = gradients.moments(model(), scheme("rs", budget))
    assert torch.allclose(exact.mean[x], theory, atol=1e-10)
    assert float(exact.variance[x]) == pytest.approx(variance, abs=1e-6)  # a step's weights are float32
    assert float(exact.tokens[x]) == pytest.approx(tokens)


@pytest.mark.parametrize("x", [0, 1])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_maxrl_s_own_estimator_is_of_the_order_below(x, k):
    """All K draws, each right one 1/n, less 1/K of all: groups without a right draw are left out, which costs the last order."""
    mean, variance, tokens = enumerated(x, maxrl(k))
    assert torch.allclose(mean, maxrl_gradient(k - 1, x), atol=1e-6)  # 1/n and 1/K in float32
    exact = gradients.moments(model(), maxrl(k))
    assert torch.allclose(exact.mean[x], maxrl_gradient(k - 1, x), atol=1e-10)
    assert float(exact.variance[x]) == pytest.approx(variance, abs=1e-6)
    assert float(exact.tokens[x]) == pytest.approx(tokens)


def test_without_end_both_are_exact_em():
    for x in range(2):
        theory = gradients.log_marginal_gradient(model(), x)
        for plan in (scheme("rs", 100), maxrl(100)):
            assert torch.allclose(gradients.moments(model(), plan).mean[x], theory, atol=1e-10)


@pytest.mark.parametrize("k", [2, 4])
def test_rloo_has_the_moments_that_are_enumerated(k):
    mean, variance, _ = enumerated(0, rloo(k))
    exact = gradients.moments(model(), rloo(k))
    assert torch.allclose(mean, maxrl_gradient(1, 0), atol=1e-6)
    assert torch.allclose(exact.mean[0], maxrl_gradient(1, 0), atol=1e-10)
    assert float(exact.variance[0]) == pytest.approx(variance, abs=1e-6)


def test_the_command_compares_them_at_equal_tokens(tmp_path, capsys):
    cfg = compose_config("experiment=variance", "laboratory.questions=4", "laboratory.budgets={rs: [1, 3], maxrl: [2, 4], rloo: [2]}")
    last = instantiate({"_target_": cfg.task, "_partial_": True})(cfg, tmp_path)
    start = make_tabular(4, 4, "ab", 3, cfg.seed, 1.0, Hint())
    assert last == pytest.approx(gradients.moments(start, rloo(2)).cost)
    assert gradients.moments(start, scheme("rs", 3)).cost < gradients.moments(start, maxrl(4)).cost  # what the table says
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("RS-1", "RS-3", "MaxRL-2", "MaxRL-4", "RLOO-2"))
    assert (tmp_path / "variance.png").stat().st_size > 10_000
    assert (tmp_path / "variance.json").exists()


def test_hinted_draws_have_no_variance_here():
    with pytest.raises(UserError, match="plain prompt"):
        gradients.moments(model(), scheme("star"))
    for more in ({"keep": 2}, {"keep": 3, "distinct": True}):
        with pytest.raises(UserError, match="the first right one is kept, or all"):
            gradients.moments(model(), scheme("rs", 3, **more))

"""What kept rationales count for: importance weights, truncation, resampling, distinct ones, and their way through E-step and M-step."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from conftest import numbers
from test_laboratory import model, pps_iw
from test_module import em_module, trainer
from test_samplers import RIGHT, run, scheme

from emreason.datamodule import RationaleDataModule
from emreason.e_step import EStep, e_step_record
from emreason.engines.inprocess import InProcessEngine
from emreason.journal import Journal
from emreason.laboratory import TabularEngine, make_questions
from emreason.likelihood import completion_logprobs
from emreason.module import MStep
from emreason.samplers import sample
from emreason.types import Rationale, UserError
from emreason.weights import effective_sample_size, log_mean_weight, normalized, score_weights, weigh


def attempt(n, log_weight=0.0, question="q000", accepted=True, text=None):
    return Rationale(question, 0, n, "rationalization", text or f"z{n}", "1", accepted, 3, "answer", -1.0, (1, 2, 3), log_weight=log_weight)


def weights(attempts, scheme_, seed=1):
    return [r.weight for r in weigh(attempts, scheme_, seed=seed, iteration=0)]


def test_importance_weights_are_self_normalised_and_wrong_draws_have_none():
    attempts = [attempt(1, math.log(3)), attempt(2, None, accepted=False), attempt(3, math.log(1)), attempt(1, -700.0, "q001")]
    assert weights(attempts, pps_iw(4)) == pytest.approx([0.75, 0, 0.25, 1])
    assert effective_sample_size([0.75, 0.25]) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert log_mean_weight([attempts[0], attempts[2]], pps_iw(4)) == pytest.approx(math.log((3 + 0 + 1) / 4))  # all K count


def test_truncation_cuts_at_a_multiple_of_the_mean_weight():
    attempts = [attempt(1, math.log(14)), attempt(2, math.log(1)), attempt(3, math.log(1)), attempt(4, None, accepted=False)]
    assert weights(attempts, pps_iw(4, truncate=2.0)) == pytest.approx([8 / 10, 1 / 10, 1 / 10, 0])  # mean 4
    assert weights(attempts, pps_iw(4, truncate=1.0)) == pytest.approx([4 / 6, 1 / 6, 1 / 6, 0])


def test_one_is_resampled_with_its_weight():
    attempts = [attempt(1, math.log(3)), attempt(2, 0.0)]
    resampling = scheme("pps", 2, keep=2, weigh="resample")
    drawn = [weights(attempts, resampling, seed) for seed in range(2000)]
    assert all(sorted(w) == [0, 1] for w in drawn)
    assert sum(w[0] for w in drawn) / 2000 == pytest.approx(0.75, abs=4.5 * math.sqrt(0.75 * 0.25 / 2000))
    assert drawn[7] == weights(attempts, resampling, 7)


def test_distinct_rationales_up_to_a_cap():
    attempts = [attempt(i, text=t) for i, t in enumerate("aabcab", start=1)]
    assert weights(attempts, scheme("rs", 6, keep=2, distinct=True)) == [1, 0, 1, 0, 0, 0]
    assert weights(attempts, scheme("rs", 6, keep=6, distinct=True)) == [1, 0, 1, 1, 0, 0]
    assert weights(attempts, scheme("rs", 6, keep=6, weigh="questions")) == pytest.approx([1 / 6] * 6)


def test_a_question_is_drawn_until_enough_distinct_ones_are_kept(prompts, tokenizer):
    questions = numbers(1)
    script = lambda r: f"way {r.key[1] // 2}" + RIGHT.format(0)  # noqa: E731  (attempts 2 and 3 say the same)
    wanted = scheme("rs", 9, keep=3, distinct=True)
    rationales, _ = run(questions, wanted, script, prompts, tokenizer)
    assert [r.attempt for r in rationales] == [1, 2, 3, 4]
    record = e_step_record(0, questions, weigh(rationales, wanted, seed=1, iteration=0), wanted, 1.0)
    assert (record["accepted"], record["rationales"], record["attempts"]) == (1, 3, 4)
    for cut in range(5):  # and a resumed question does not begin to count anew
        assert len(run(questions, wanted, script, prompts, tokenizer, replayed=rationales[:cut])[0]) == 4 - cut


@functools.cache
def lab_weights(k, copies):
    from conftest import TEMPLATE

    from emreason.prompts import Prompts
    from emreason.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    prompts = Prompts(tokenizer, TEMPLATE, ())
    questions = make_questions(model(), copies)
    engine = TabularEngine(model(), questions, prompts, tokenizer)
    drawn = list(sample(questions, pps_iw(k), engine, prompts, tokenizer, seed=3, iteration=0))
    return score_weights(drawn, {q.id: q for q in questions}, pps_iw(k), prompts, engine.score, 0)


def test_the_mean_weight_is_an_unbiased_estimate_of_the_marginal_likelihood():
    """1/K Σ wₖ = π(y*|x) in the mean; 1,500 hinted draws per question, within 4.5 standard errors from the exact variance."""
    p, q = (model().log_correct(proposal).exp() for proposal in ("question", "rationalization"))
    for x, exactly in enumerate(model().log_marginal().exp().tolist()):
        w = [math.exp(r.log_weight) if r.accepted else 0.0 for r in lab_weights(3, 500) if r.question_id.startswith(f"{x}/")]
        assert len(w) == 1500
        variance = float((p[x] ** 2 / q[x]).sum()) - exactly**2
        assert np.mean(w) == pytest.approx(exactly, abs=4.5 * math.sqrt(variance / 1500))
        assert abs(float(q[x].sum()) - exactly) > 9 * math.sqrt(variance / 1500)  # unweighted, they would say something else


def test_weights_are_those_of_the_prompts_the_draws_came_from(tiny, prompts):
    """Weights on a transformer equal the difference of the two log-likelihoods, each computed by itself, at the temperatures that apply."""
    lm, tokenizer = tiny
    questions = numbers(20)
    hinted = pps_iw(6, temperature=0.8, max_new_tokens=32)
    drawn = list(sample(questions, hinted, InProcessEngine(lm, tokenizer), prompts, tokenizer, seed=1, iteration=0))
    scored = score_weights(drawn, {q.id: q for q in questions}, hinted, prompts, functools.partial(completion_logprobs, lm), 0)
    by_id = {q.id: q for q in questions}
    accepted = [r for r in scored if r.accepted]
    assert accepted
    for r in accepted:
        target, proposal = (prompts.ids(by_id[r.question_id], name) for name in ("question", "rationalization"))
        expected = completion_logprobs(lm, [(target, r.token_ids)])[0] - completion_logprobs(lm, [(proposal, r.token_ids)], 0.8)[0]
        assert r.log_weight == pytest.approx(expected, abs=1e-3)
        assert r.logprob == pytest.approx(completion_logprobs(lm, [(proposal, r.token_ids)])[0], abs=1e-3)  # at temperature 1
    assert all(r.log_weight is None for r in scored if not r.accepted)


def e_step(folder, module, scheme_, **more):
    callback = EStep(scheme_, numbers(10), Journal(folder), seed=1)
    trainer(folder, [callback], 1, **more).fit(module, RationaleDataModule([], []))
    return callback


def test_weights_reach_the_journal_the_m_step_and_a_resumed_run(tmp_path):
    hinted = pps_iw(8, max_new_tokens=24)
    ends, journals = [], []
    for name, cut in (("whole", None), ("resumed", 11)):
        module = em_module(m_step=MStep(batch_size=16, max_grad_norm=None), lr=0.1)
        module.engine = InProcessEngine(module.model, module.tokenizer)
        if cut is not None:  # killed after some attempts, which carry no weights yet
            before = em_module()
            fresh = EStep(hinted, numbers(10), Journal(tmp_path / name), seed=1)
            Journal(tmp_path / name).check(0, fresh.conditions(before))
            with Journal(tmp_path / name).appending(0, 0, 1) as lines:
                by_id = {q.id: q for q in numbers(10)}
                for r in journals[0][:cut]:
                    lines.append({**EStep.journal_record(by_id[r.question_id], r), "weight": 1.0, "log_weight": None})
        callback = e_step(tmp_path / name, module, hinted)
        journals.append(Journal(tmp_path / name).read(0))
        ends.append(torch.cat([p.detach().flatten() for p in module.trainable()]))
        assert callback.record["attempts"] == 80
        assert 1 <= callback.record["effective_sample_size"] <= 8
        assert callback.record["log_marginal_iw"] < 0
        steps = callback._steps[1]
        assert len(steps) == 1
        trained = {r.question_id for r in journals[-1] if r.accepted}
        assert sum(float(b.weights.sum()) for b in steps[0].batches) == pytest.approx(len(trained) / 16, rel=1e-5)  # 1 per question
    for question in {r.question_id for r in journals[0] if r.accepted}:
        mine = [r for r in journals[0] if r.question_id == question and r.accepted]
        assert [r.weight for r in mine] == pytest.approx(normalized(mine, hinted))
    assert [(r.question_id, r.attempt, r.text) for r in journals[0]] == [(r.question_id, r.attempt, r.text) for r in journals[1]]
    assert [r.weight for r in journals[0]] == pytest.approx([r.weight for r in journals[1]], abs=1e-4)
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"keep": 0}, "keep"),
        ({"weigh": "much"}, "weigh"),
        ({"truncate": 0.5}, "truncate"),
        ({"weigh": "importance"}, "keep=4"),
        ({"weigh": "resample", "keep": 4, "top_p": 0.9}, "top_p=1"),
        ({"weigh": "importance", "keep": 4, "distinct": True}, "distinct"),
    ],
)
def test_what_cannot_be_weighed_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        scheme("pps", 4, **change)

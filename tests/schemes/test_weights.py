"""What kept rationales count for: importance weights, truncation, resampling, distinct ones, and their way through E-step and M-step."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEMPLATE, ScriptedEngine, numbers
from test_laboratory import model, pps_iw
from test_module import em_module, trainer
from test_samplers import RIGHT, run, scheme

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.engines.inprocess import InProcessEngine
from emreason.laboratory.tabular import TabularEngine, make_questions
from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal, journal_record
from emreason.schemes.chain import remembered
from emreason.schemes.diagnostics import e_step_record
from emreason.schemes.samplers import sample, training_ids
from emreason.schemes.weights import effective_sample_size, log_mean_weight, normalized, score_weights, weigh
from emreason.scores.likelihood import completion_logprobs
from emreason.types import Demonstration, Rationale, UserError


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


def plain(n, accepted=False, question="q000", iteration=0, reason="answer", proposal="question"):
    return Rationale(question, iteration, n, proposal, f"z{n}", "1", accepted, 3, reason, -1.0, (1, 2, 3))


def test_rloo_weighs_every_draw_against_the_others():
    rloo = scheme("rs", 4, keep=4, weigh="rloo")
    mixed = [plain(1, True), plain(2), plain(3, reason="length"), plain(4, True)]
    assert weights(mixed, rloo) == pytest.approx([(1 - 1 / 3) / 4, -2 / 3 / 4, -2 / 3 / 4, (1 - 1 / 3) / 4])
    alike = [plain(n, True, "q001") for n in (1, 2, 3, 4)] + [plain(n, False, "q002") for n in (1, 2, 3, 4)]
    assert weights(alike, rloo) == [0] * 8  # nothing to tell them apart
    assert weights([plain(1, reason="error", question="q003")], rloo) == [0]
    assert weights(mixed + alike, rloo)[:4] == weights(mixed, rloo)


def test_draws_that_are_not_the_model_s_own_are_not_subtracted():
    """With worked examples, or at another temperature: to subtract them unlearns the form of the answers, as on sums of four."""
    mixed, later = ([plain(n, n in (1, 4), iteration=i) for n in (1, 2, 3, 4)] for i in (0, 1))
    for weigh_, shown, own in (
        ("rloo", [1 / 4, 0, 0, 1 / 4], [1 / 6, -1 / 6, -1 / 6, 1 / 6]),
        ("maxrl", [1 / 2, 0, 0, 1 / 2], [1 / 4, -1 / 4, -1 / 4, 1 / 4]),
    ):
        examples = scheme("rs", 4, keep=4, weigh=weigh_, worked_examples=2, worked_examples_iterations=1)
        assert weights(mixed, examples) == pytest.approx(shown)
        assert weights(later, examples) == pytest.approx(own)
        assert weights(later, replace(examples, temperature=0.6)) == pytest.approx(shown)
    trice = scheme("star", 1, keep=2, weigh="trice", worked_examples=2)
    pairs = [a for q in "ab" for a in (plain(1, q == "a", q), plain(2, True, q, proposal="rationalization"))]
    assert weights(pairs, trice) == [1, 0, 0, 1]


def test_trice_keeps_a_rationale_and_subtracts_the_control_variate():
    trice = scheme("star", 1, keep=2, weigh="trice")
    # iteration 0: of the hinted and the plain draw the plain one stays if it is right, the hinted one is enough to begin
    begun = [
        plain(1, True, "a"), plain(2, True, "a", proposal="rationalization"),
        plain(1, False, "b"), plain(2, True, "b", proposal="rationalization"),
        plain(1, False, "c"), plain(2, False, "c", proposal="rationalization"),
        plain(1, True, "d"), plain(2, False, "d", proposal="rationalization"),
    ]  # fmt: skip
    memory = remembered(begun, {}, 1)
    assert {q: r.attempt for q, r in memory.items()} == {"a": 1, "b": 2, "d": 1}
    # with a rationale: a, b, d; right: a, d. β of a and d is 1/2, of b 1. c has none and is left alone
    assert weights(begun, trice) == pytest.approx([1 / 2, 0, -1, 1, 0, 0, 1 / 2, 0])
    # iteration 1: a draws wrong, b right, c right for the first time, d wrong
    again = [plain(1, right, q, iteration=1) for q, right in (("a", False), ("b", True), ("c", True), ("d", False))]
    weighed = weigh(again, trice, seed=1, iteration=1, memory=memory)
    assert [(r.question_id, r.iteration, r.attempt, r.weight) for r in weighed] == [
        ("a", 1, 1, pytest.approx(-2 / 3)),
        ("b", 1, 1, pytest.approx(1 - 1 / 3)),
        ("c", 1, 1, pytest.approx(1 - 1 / 3)),
        ("d", 1, 1, pytest.approx(-2 / 3)),
        ("a", 0, 1, 1.0),
        ("d", 0, 1, 1.0),
    ]
    assert {q: r.iteration for q, r in remembered(again, memory, 1).items()} == {"a": 0, "b": 1, "c": 1, "d": 0}


def test_what_is_made_less_likely_is_what_was_sampled():
    """The EOS that ends an answer line was not sampled: a model must not unlearn to end."""
    wrong = plain(1)
    assert training_ids(replace(wrong, weight=1.0), 9) == (1, 2, 3, 9)
    assert training_ids(replace(wrong, weight=-0.5), 9) == (1, 2, 3)


def test_rloo_raises_right_and_lowers_wrong_completions(tmp_path):
    """Through E-step and M-step on a transformer: after one step of plain SGD the right draws are likelier, the wrong ones less likely."""
    rloo, questions = scheme("rs", 4, keep=4, weigh="rloo"), numbers(6)
    module = em_module(m_step=MStep(batch_size=6, max_grad_norm=None), lr=0.02)
    said = {1: "abc\nAnswer: {}\n", 2: "def\nAnswer: 27\n", 3: "ghi", 4: "jkl\nAnswer: {}\n"}
    gold = {q.id: q.answer for q in questions}

    def script(request):
        question, attempt = request.key
        return said[attempt].format(gold[question]), "length" if attempt == 3 else "answer"

    module.engine = ScriptedEngine(module.tokenizer, script)
    callback = EStep(rloo, questions, Journal(tmp_path), seed=1)
    prompt = {q.id: module.prompts.ids(q) for q in questions}

    def scores():
        return {(r.question_id, r.attempt): completion_logprobs(module.model, [(prompt[r.question_id], r.token_ids)])[0] for r in drawn}

    steps = callback.pull
    before: dict = {}

    def spy(*arguments):
        made = steps(*arguments)
        nonlocal drawn
        drawn = Journal(tmp_path).read(0)
        before.update(before or scores())
        return made

    drawn: list = []
    callback.pull = spy
    trainer(tmp_path, [callback], 1).fit(module, RationaleDataModule([], []))
    after = scores()
    gain = {n: sum(after[q.id, n] - before[q.id, n] for q in questions) / 6 for n in (1, 2, 3, 4)}
    assert min(gain[1], gain[4]) > 0 > max(gain[2], gain[3])
    assert (callback.record["rationales"], callback.record["rejected_trained"]) == (12, 12)
    (step,) = callback._steps[1]
    assert sum(float(b.weights.sum()) for b in step.batches) == pytest.approx(0, abs=1e-6)  # advantages of a question add up to 0
    assert sum(float(b.weights.abs().sum()) for b in step.batches) == pytest.approx(6 * 4 * (2 / 3) / 4 / 6, rel=1e-5)


def test_nothing_to_tell_apart_is_no_error(tmp_path):
    """All draws of all questions right: no gradient, and not "none was answered correctly"."""
    questions = numbers(3)
    module = em_module()
    gold = {q.id: q.answer for q in questions}
    module.engine = ScriptedEngine(module.tokenizer, lambda r: RIGHT.format(gold[r.key[0]]))
    start = [p.detach().clone() for p in module.trainable()]
    callback = EStep(scheme("rs", 2, keep=2, weigh="rloo"), questions, Journal(tmp_path), seed=1)
    trainer(tmp_path, [callback], 2).fit(module, RationaleDataModule([], []))
    assert callback.record["accepted"] == 3
    assert all(torch.equal(a, b) for a, b in zip(start, module.trainable(), strict=True))


@functools.cache
def lab_weights(k, copies):
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


def test_weights_are_those_of_the_prompts_the_draws_came_from(tiny):
    """Weights on a transformer equal the difference of the two log-likelihoods, each computed by itself, at the temperatures that apply."""
    lm, tokenizer = tiny
    questions = numbers(20)
    prompts = Prompts(tokenizer, TEMPLATE, [Demonstration(numbers(1)[0], "so")])
    hinted = pps_iw(6, temperature=0.8, max_new_tokens=32, worked_examples=1)
    drawn = list(sample(questions, hinted, InProcessEngine(lm, tokenizer), prompts, tokenizer, seed=1, iteration=0))
    scored = score_weights(drawn, {q.id: q for q in questions}, hinted, prompts, functools.partial(completion_logprobs, lm), 0)
    by_id = {q.id: q for q in questions}
    accepted = [r for r in scored if r.accepted]
    assert accepted
    for r in accepted:
        target = prompts.ids(by_id[r.question_id])
        proposal = prompts.ids(by_id[r.question_id], "rationalization", n_examples=1)
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
                    lines.append({**journal_record(by_id[r.question_id], r), "weight": 1.0, "log_weight": None})
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
        ({"weigh": "importance"}, "keep=4"),
        ({"weigh": "resample", "keep": 4, "top_p": 0.9}, "top_p=1"),
        ({"weigh": "importance", "keep": 4, "distinct": True}, "distinct"),
        ({"weigh": "rloo", "keep": 4}, "plain prompt"),  # hinted
        ({"weigh": "trice", "keep": 2}, "question: 1, rationalization: 1"),
    ],
)
def test_what_cannot_be_weighed_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        scheme("pps", 4, **change)


@pytest.mark.parametrize(("name", "budget", "keep"), [("rs", 4, 3), ("rs", 1, 1), ("star", 4, 5)])
def test_rloo_needs_all_of_several_plain_draws(name, budget, keep):
    with pytest.raises(UserError, match="weigh=rloo"):
        scheme(name, budget, keep=keep, weigh="rloo")

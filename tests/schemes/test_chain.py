"""Rationales that persist: what takes their place, under which prompts it is weighed, and their way through journals and resumed runs."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
from conftest import TEMPLATE, numbers
from hypothesis import given
from hypothesis import strategies as st
from test_samplers import scheme
from test_weights import plain

from emreason.engines.inprocess import InProcessEngine
from emreason.questions.prompts import Prompts
from emreason.schemes.chain import acceptance_ratios, draws_the_model, remembered, weigh_chain
from emreason.schemes.diagnostics import e_step_record
from emreason.schemes.samplers import sample
from emreason.scores.likelihood import completion_logprobs
from emreason.types import Demonstration, UserError

PPS, STAR = scheme("pps", weigh="mh"), scheme("star", weigh="mh")


def hinted(n, accepted=True, question="q000", iteration=1, log_weight=None):
    return replace(plain(n, accepted, question, iteration, proposal="rationalization"), log_weight=log_weight)


@given(log_weight=st.floats(-3, 3), first=st.booleans(), right=st.booleans())
def test_a_right_draw_takes_the_place_with_its_ratio(log_weight, first, right):
    kept = {} if first else {"q000": hinted(1, iteration=0)}
    drawn = hinted(1, right, log_weight=None if first else log_weight)
    share = sum(remembered([drawn], kept, seed).get("q000") == drawn for seed in range(400)) / 400
    expected = float(right) if first else right * min(1.0, math.exp(log_weight))
    assert share == pytest.approx(expected, abs=4.5 * math.sqrt(expected * (1 - expected) / 400) + 1e-9)
    assert remembered([drawn], kept, 7) == remembered([drawn], kept, 7)


def test_only_the_plain_prompt_at_temperature_1_draws_the_model():
    shown = scheme("star", weigh="mh", worked_examples=2, worked_examples_iterations=1)
    assert draws_the_model(plain(1, iteration=0), STAR)
    assert not draws_the_model(hinted(1), STAR)
    assert not draws_the_model(plain(1), replace(STAR, temperature=0.9))
    assert not draws_the_model(plain(1, iteration=0), shown)
    assert draws_the_model(plain(1, iteration=1), shown)


def test_a_chain_s_weights_by_hand():
    """a: plain draw right; b: wrong, then a hinted one that is not taken; c: has no rationale yet, its plain draw is right; d: nothing."""
    memory = {q: plain(1, True, q, iteration=0) for q in "ab"}
    drawn = [
        plain(1, True, "a", 1),
        plain(1, False, "b", 1),
        hinted(2, True, "b", log_weight=-99.0),
        plain(1, True, "c", 1),
        plain(1, False, "d", 1),
    ]
    weighed = weigh_chain(drawn, memory, STAR, seed=1, iteration=1)
    # β of a is the share of right draws among b alone, of b among a alone; c and d are no part of the control variate
    assert [(r.question_id, r.iteration, r.attempt, r.weight) for r in weighed] == [
        ("a", 1, 1, 1.0), ("b", 1, 1, -1.0), ("b", 1, 2, 0.0), ("c", 1, 1, 1.0), ("d", 1, 1, 0.0), ("b", 0, 1, 1.0)
    ]  # fmt: skip
    without = weigh_chain(drawn, memory, replace(STAR, temperature=0.9), seed=1, iteration=1)
    assert [r.weight for r in without] == [1, 0, 0, 1, 0, 1]


def test_ratios_are_of_the_present_model_and_of_the_draw_s_own_prompt(tiny):
    """Hinted draws against rationales that came from the plain prompt, under another model: each of the four likelihoods by itself."""
    lm, tokenizer = tiny
    questions = numbers(24)
    by_id = {q.id: q for q in questions}
    prompts = Prompts(tokenizer, TEMPLATE, [Demonstration(numbers(1)[0], "so")])
    plan = replace(PPS, temperature=0.8, worked_examples=1, max_new_tokens=32)
    parts = (InProcessEngine(lm, tokenizer), prompts, tokenizer)
    memory = {
        r.question_id: r for r in sample(questions, replace(scheme("rs", 12), max_new_tokens=32), *parts, seed=2, iteration=0) if r.accepted
    }
    drawn = list(sample(questions, replace(plan, proposals={"rationalization": 12}), *parts, seed=3, iteration=1))
    score = functools.partial(completion_logprobs, lm)
    weighed = acceptance_ratios(drawn, memory, by_id, plan, prompts, score, 1)
    moved = [r for r in weighed if r.log_weight is not None]
    assert {r.question_id for r in moved} == {r.question_id for r in drawn if r.accepted} & memory.keys()
    assert len(moved) >= 3

    def weight(question, ids):
        prompt, shown = prompts.ids(question), prompts.ids(question, "rationalization", 1)
        return completion_logprobs(lm, [(prompt, ids)])[0] - completion_logprobs(lm, [(shown, ids)], 0.8)[0]

    for r in moved:
        question = by_id[r.question_id]
        assert r.log_weight == pytest.approx(weight(question, r.token_ids) - weight(question, memory[question.id].token_ids), abs=1e-3)
    assert (
        acceptance_ratios(drawn[::-1], memory, by_id, plan, prompts, score, 1) == weighed[::-1]
    )  # to the last bit: the order is a resume's
    record = e_step_record(1, questions, weighed, plan, 1.0)
    assert record["move_rate"] == pytest.approx(sum(min(1, math.exp(r.log_weight)) for r in moved) / len(moved))


@pytest.mark.parametrize("change", [{"keep": 2}, {"top_p": 0.9}, {"temperature": 0.0}, {"distinct": True}, {"choose": "adaptive"}])
def test_what_a_chain_cannot_be_made_of_is_refused(change):
    with pytest.raises(UserError, match="weigh=mh"):
        replace(STAR, **change)

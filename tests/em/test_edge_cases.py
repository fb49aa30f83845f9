"""Edges of the E-step: all accepted, one question, a question longer than the context, an answer that does not fit. N in = N accounted for.

All wrong: `test_module`; a duplicate id and an empty split: `test_datasets`, `test_bad_input`.
"""

from __future__ import annotations

import dataclasses

import pytest
from conftest import TEMPLATE, numbers
from test_module import em_module, fit, gold_script, trainer
from test_samplers import scheme

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.engines.inprocess import InProcessEngine
from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal
from emreason.types import Demonstration, UserError


def accounted(record) -> bool:
    return record["accepted"] + record["rejected"] + record["errored"] == record["questions"]


def test_all_accepted(tmp_path):
    questions = numbers(5)
    _, e_step = fit(tmp_path, questions, gold_script(questions), epochs=1)
    assert (e_step.record["accepted"], e_step.record["attempts"], e_step.record["acceptance_rate"]) == (5, 5, 1.0)
    assert accounted(e_step.record)


def test_one_question(tmp_path):
    questions = numbers(1)
    module, e_step = fit(tmp_path, questions, gold_script(questions), epochs=2)
    assert e_step.record["accepted"] == 1
    assert module.m_step_record == {} or module.m_step_record["steps"] == 1
    assert accounted(e_step.record)


def test_a_question_longer_than_the_context_sits_out_and_is_said(tmp_path, caplog):
    questions = numbers(4)
    questions[2] = dataclasses.replace(questions[2], text="long " * 300)
    module = em_module(m_step=MStep(on_zero_accepted="skip"))
    module.engine = InProcessEngine(module.model, module.tokenizer)
    e_step = EStep(scheme("rs"), questions, Journal(tmp_path), seed=1)
    trainer(tmp_path, [e_step], 1).fit(module, RationaleDataModule([], []))
    assert e_step.record["errored"] == 1
    assert accounted(e_step.record)
    assert "E-step 0: 1 of 4 questions do not fit the model's context and sit out: q002" in caplog.messages
    (attempt,) = [r for r in Journal(tmp_path).read(0) if r.question_id == "q002"]
    assert (attempt.finish_reason, attempt.accepted, attempt.n_tokens) == ("error", False, 0)
    score, predictions = module.evaluate(questions, "Validation")
    assert (score["n"], score["errored"]) == (4, 1)
    assert not predictions[2].correct


def test_an_answer_that_does_not_fit_is_rejected_and_said(tmp_path):
    questions = numbers(3)
    gold = gold_script(questions)
    _, e_step = fit(tmp_path, questions, lambda r: (gold(r), "length"), MStep(on_zero_accepted="skip"), epochs=1, scheme_=scheme("pps"))
    assert e_step.record["truncated_rate"] == 1
    assert (e_step.record["accepted"], e_step.record["rejected"]) == (0, 3)
    assert accounted(e_step.record)
    with pytest.raises(UserError, match=r"none of 3 questions .* 100% were truncated.*sampler\.max_new_tokens"):
        fit(tmp_path / "error", questions, lambda _: ("too long", "length"))


@pytest.mark.parametrize(("silent", "examples"), [(2, 0), (1, 0), (2, 1)])
def test_where_most_draws_have_no_answer_worked_examples_are_proposed(tmp_path, capfd, silent, examples):
    """Not where the answers are wrong, nor where examples are shown already."""
    questions = numbers(3)
    gold, names = gold_script(questions), [q.id for q in questions[:silent]]
    module = em_module()
    module.prompts = Prompts(module.tokenizer, TEMPLATE, [Demonstration(numbers(4)[-1], "so")])
    chosen = scheme("rs", 1, worked_examples=examples)
    fit(tmp_path, questions, lambda r: "Hm." if r.key[0] in names else gold(r), epochs=1, scheme_=chosen, module=module)
    told = "E-step 0: 67% had no answer line, 0% were truncated; worked examples show the form (dataset.demonstrations, "
    assert (told in capfd.readouterr().err) == (silent == 2 and not examples)

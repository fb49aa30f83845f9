"""The E-step over iterations: what a journal is bound to, orders of training, and what is remembered of earlier iterations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ScriptedEngine, letters, numbers
from test_module import em_module, fit, gold_script, trainer
from test_samplers import WRONG, scheme
from test_weights import plain

from emreason.em.datamodule import RationaleDataModule
from emreason.em.e_step import EStep
from emreason.em.m_step import MStep
from emreason.engines.drawing import draw_seed
from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal
from emreason.schemes.diagnostics import e_step_record
from emreason.scores.likelihood import completion_logprobs
from emreason.types import UserError


def test_a_journal_is_bound_to_all_that_its_draws_depend_on(tmp_path):
    questions, module = letters(2), em_module()

    def conditions(module=module, seed=1, questions=questions, **more):
        return EStep(scheme("rs", 2, **more), questions, Journal(tmp_path), seed).conditions(module)

    other = em_module()
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    worded = em_module()
    worded.prompts = Prompts(worded.tokenizer, replace(module.prompts.template, hint="ANOTHER {answer}"), ())
    first = questions[0]
    edits = [{"id": "x"}, {"text": "x"}, {"answer": "B"}, {"choices": (*first.choices[:3], "x")}]
    changed = {
        "weights": [conditions(other)],
        "prompts": [conditions(worded)],
        "seed": [conditions(seed=2)],
        "questions": [conditions(questions=[replace(first, **edit), questions[1]]) for edit in edits] + [conditions(questions=[first])],
        "sampler.temperature": [conditions(temperature=0.9)],
        "sampler.max_new_tokens": [conditions(max_new_tokens=9)],
        "sampler.reward": [conditions(reward="emreason.schemes.rewards.well_formed")],
    }
    assert conditions() == conditions(em_module())
    for key, found in changed.items():
        for values in found:
            assert [k for k in values if values[k] != conditions()[k]] == [key]


def test_a_question_that_was_edited_in_place_is_not_replayed(tmp_path):
    questions = numbers(3)
    fit(tmp_path, questions, gold_script(questions), epochs=1)
    questions[1] = replace(questions[1], answer="7")
    with pytest.raises(UserError, match="questions differ"):
        fit(tmp_path, questions, gold_script(questions), epochs=1)


def test_draws_have_the_seed_of_their_run_iteration_question_and_attempt(tmp_path):
    questions, module = numbers(3), em_module()
    module.engine = ScriptedEngine(module.tokenizer, gold_script(questions, lambda r: r.key[1] == 2))
    trainer(tmp_path, [EStep(scheme("rs", 2), questions, Journal(tmp_path), seed=5)], 2).fit(module, RationaleDataModule([], []))
    expected = {(k, q.id, n): draw_seed(5, k, q.id, n) for k in range(2) for q in questions for n in (1, 2)}
    halves = module.engine.seen[:6], module.engine.seen[6:]
    assert {(k, *r.key): r.seed for k, seen in enumerate(halves) for r in seen} == expected


def test_a_finished_run_does_not_sample_once_more(tmp_path):
    e_step = EStep(scheme("rs"), numbers(2), Journal(tmp_path), seed=1)
    progress = SimpleNamespace(current=SimpleNamespace(processed=2))
    done = SimpleNamespace(max_epochs=2, fit_loop=SimpleNamespace(epoch_progress=progress))
    assert [step.batches for step in e_step.pull(done, em_module())] == [[]]
    assert not e_step.journal.folder.exists()


def test_the_record_of_an_e_step():
    questions = numbers(4)
    attempts = [
        replace(plain(1, True, "q000"), n_tokens=10),
        replace(plain(1, False, "q001"), n_tokens=3, finish_reason="length", answer=None),
        replace(plain(2, True, "q001"), n_tokens=20),
        replace(plain(1, False, "q002"), n_tokens=5),
        replace(plain(2, False, "q002"), n_tokens=7),
        replace(plain(1, False, "q003"), n_tokens=0, finish_reason="error", answer=None),
    ]
    expected = {
        "iteration": 3, "questions": 4, "accepted": 2, "rejected": 1, "errored": 1, "attempts": 6, "tokens": 45, "seconds": 1.5,
        "acceptance_rate": 2 / 4, "first_try_rate": 1 / 4, "extraction_rate": 4 / 6, "truncated_rate": 1 / 6, "rationale_tokens_mean": 15,
        "chance_acceptance": None, "rationales": 2, "rejected_trained": 0,
    }  # fmt: skip
    attempts = [replace(a, weight=float(a.accepted)) for a in attempts]
    record = e_step_record(3, questions, attempts, scheme("rs", 2), 1.5)
    assert {key: record[key] for key in expected} == expected


def orders(e_step: EStep) -> list[str]:
    return [q for s in e_step._steps[1] for b in s.batches for q in b.question_ids]


def test_every_iteration_trains_in_an_order_of_its_own(tmp_path):
    questions = numbers(12)
    seen = []
    for epochs in (1, 2):  # at a learning rate of 0 the weights, and so the conditions, stay
        _, e_step = fit(tmp_path, questions, gold_script(questions), epochs=epochs, module=em_module(lr=0.0, m_step=MStep(batch_size=1)))
        seen.append(orders(e_step))
    assert sorted(seen[0]) == sorted(seen[1])
    assert seen[0] != seen[1]


def test_trice_remembers_every_earlier_iteration(tmp_path):
    """A question that was right in the first iteration alone is trained on in all."""
    questions = numbers(4)
    gold = gold_script(questions)
    drawn = []

    def script(request):
        drawn.append(request)
        return gold(request) if len(drawn) <= 2 * len(questions) else WRONG

    _, e_step = fit(tmp_path, questions, script, epochs=4, scheme_=scheme("star", keep=2, weigh="trice"))
    assert len(drawn) == (2 + 3) * len(questions)
    remembered = [b.question_ids[i] for s in e_step._steps[1] for b in s.batches for i in (b.weights > 0).nonzero()[:, 0]]
    assert sorted(remembered) == [q.id for q in questions]
    assert (e_step.record["rationales"], e_step.record["kept"]) == (0, len(questions))


class Apart(ScriptedEngine):
    """Has weights of its own: its log-probabilities are off by half a nat a token."""

    rested = 0

    def generate(self, requests):
        for completion in super().generate(requests):
            pair = (completion.request.prompt_ids, completion.token_ids)
            yield replace(completion, logprob=completion_logprobs(self.model, [pair])[0] - 0.5 * len(completion.token_ids))

    def rest(self) -> None:
        self.rested += 1


@pytest.mark.parametrize("name", ["rs", "pps"])
def test_an_engine_apart_is_compared_with_the_model_and_rests_during_the_m_step(tmp_path, monkeypatch, name):
    """Also where a hint was in the prompt."""
    module, questions = em_module(), numbers(20)
    engine = module.engine = Apart(module.tokenizer, gold_script(questions))
    engine.model = module.model
    awake = []
    original = module.training_step
    monkeypatch.setattr(module, "training_step", lambda *step: awake.append(engine.rested) or original(*step))
    e_step = EStep(scheme(name), questions, Journal(tmp_path), seed=1)
    trainer(tmp_path, [e_step], 2).fit(module, RationaleDataModule([], []))
    assert e_step.record["logprob_gap"] == pytest.approx(0.5, abs=1e-4)
    assert set(awake) == {1, 2}
    _, other = fit(tmp_path / "together", questions, gold_script(questions))
    assert "logprob_gap" not in other.record  # an engine on the model's own weights is not scored twice

"""Hinted draws that must lead to the answer without the hint, and those weighed by what a wrong hint would have made of them."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
from conftest import letters, numbers
from hydra.utils import instantiate
from test_config import compose_config
from test_probes import config
from test_samplers import RIGHT, run, scheme
from test_weights import attempt, weights

from emreason.questions.answers import correct
from emreason.runs.journal import Journal
from emreason.schemes.contrast import contrast_weight, contrasts, with_wrong_answer
from emreason.scores.likelihood import completion_logprobs
from emreason.train import train
from emreason.types import UserError

VERIFIED = {"reward": "emreason.schemes.rewards.verified"}
CONTRAST = scheme("pps", 4, keep=4, weigh="contrast")


def test_a_hinted_rationale_must_lead_to_the_answer_under_the_plain_prompt(prompts, tokenizer):
    """Try 3 is the first whose reasoning says so; the model that is asked again reads it off the rationale."""
    questions = numbers(5)
    gold = {q.id: q.answer for q in questions}

    def script(request):
        if len(request.key) == 3:
            return " 3\n" if "three" in tokenizer.decode(request.prompt_ids) else " 19\n"
        said = "three" if request.key[1] == 3 and gold[request.key[0]] == "3" else "nineteen"
        return f"so {said}.{RIGHT.format(gold[request.key[0]])}", "answer"

    found, engine = run(questions, scheme("pps", 4, **VERIFIED), script, prompts, tokenizer)
    for q in questions:
        mine = sorted((r for r in found if r.question_id == q.id), key=lambda r: r.attempt)
        assert [r.accepted for r in mine] == ([False, False, True] if q.answer == "3" else [False] * 4)
        assert all(r.answer == q.answer for r in mine)  # each said the hint's answer
    again = [r for r in engine.seen if len(r.key) == 3]
    assert len(again) == len(found)
    by_id = {q.id: q for q in questions}
    for request in again:
        shown = str(tokenizer.decode(request.prompt_ids))
        assert shown.startswith(str(tokenizer.decode(prompts.ids(by_id[request.key[0]]))))
        assert shown.endswith("\nAnswer:")
        assert "HINT" not in shown
        assert request.params.temperature == 0
    for cut in range(len(found)):  # a killed E-step goes on with the tries that are left
        assert sorted(
            (r.question_id, r.attempt) for r in run(questions, scheme("pps", 4, **VERIFIED), script, prompts, tokenizer, found[:cut])[0]
        ) == sorted((r.question_id, r.attempt) for r in found[cut:])


def test_plain_draws_and_wrong_ones_are_not_asked_again(prompts, tokenizer):
    questions = numbers(4)
    script = lambda r: (RIGHT.format(questions[0].answer) if r.key[1] == 1 else RIGHT.format(99), "answer")  # noqa: E731
    found, engine = run(questions[:1], scheme("star", **VERIFIED), script, prompts, tokenizer)
    assert [r.accepted for r in found] == [True]
    assert len(engine.seen) == 1
    _, engine = run(questions[1:2], scheme("star", **VERIFIED), script, prompts, tokenizer)
    assert {len(r.key) for r in engine.seen} == {2}


def test_what_does_not_fit_the_context_again_is_not_verified(prompts, tokenizer):
    script = lambda r: ("", "error") if len(r.key) == 3 else (RIGHT.format(0), "answer")  # noqa: E731
    (found,), _ = run(numbers(1), scheme("pps", **VERIFIED), script, prompts, tokenizer)
    assert not found.accepted
    assert found.finish_reason == "answer"


def test_the_contrast_is_of_the_reasoning_under_either_hint(tiny, prompts):
    """On a transformer, each of the two likelihoods by itself; the answer line, which any hint makes likely, is no part of it."""
    lm, tokenizer = tiny
    questions = numbers(6)
    by_id = {q.id: q for q in questions}
    script = lambda r: (f"{'' if r.key[0] == 'q005' else 'so it is.'}{RIGHT.format(by_id[r.key[0]].answer)}", "answer")  # noqa: E731
    drawn, _ = run(questions, replace(CONTRAST, keep=1), script, prompts, tokenizer)
    score, seen = functools.partial(completion_logprobs, lm), []
    weighed = contrasts(drawn, by_id, CONTRAST, prompts, lambda pairs: seen.extend(pairs) or score(pairs), 0)
    assert {str(tokenizer.decode(z)).strip() for _, z in seen} == {"so it is.because", "because"}
    for i, r in enumerate(weighed):
        (right, z), (wrong, same) = seen[2 * i : 2 * i + 2]
        question = by_id[r.question_id]
        assert z == same == r.token_ids[: len(z)]
        assert right == prompts.ids(question, "rationalization")
        assert wrong == prompts.ids(with_wrong_answer(question, by_id), "rationalization")
        assert r.log_weight == pytest.approx(score([(right, z)])[0] - score([(wrong, z)])[0], abs=1e-3)
        assert abs(r.log_weight) > 1e-3
    bare, _ = run(questions, replace(CONTRAST, keep=1), lambda r: (f"Answer: {by_id[r.key[0]].answer}", "answer"), prompts, tokenizer)
    assert [r.log_weight for r in contrasts(bare, by_id, CONTRAST, prompts, score, 0)] == [0.0] * 6
    wrong = [replace(r, accepted=False) for r in drawn]
    assert [r.log_weight for r in contrasts(wrong, by_id, CONTRAST, prompts, score, 0)] == [None] * 6


def test_a_contrast_counts_between_0_and_1():
    found = weights([attempt(1, math.log(3)), attempt(2, 0.0), attempt(3, -2.0), attempt(4, None, accepted=False)], CONTRAST)
    assert found == pytest.approx([2 * (3 / 4) - 1, 0, 0, 0])  # σ(log 3) = 3/4
    assert contrast_weight(1000.0) == 1


@pytest.mark.parametrize("questions", [numbers(9), letters(9), [replace(q, answer_as="text") for q in letters(9, 3)]])
def test_the_wrong_hint_is_wrong_and_always_the_same(questions, prompts):
    by_id = {q.id: q for q in questions}
    for q in questions:
        wrong = with_wrong_answer(q, by_id)
        assert not correct(wrong.answer, q)
        assert wrong == with_wrong_answer(q, dict(reversed(by_id.items())))
        assert prompts.ids(q) == prompts.ids(wrong)
        assert prompts.ids(q, "rationalization") != prompts.ids(wrong, "rationalization")
    assert len({with_wrong_answer(q, by_id).answer for q in questions}) > 1


def test_no_wrong_answer_to_hint_at():
    (question,) = numbers(1)
    with pytest.raises(UserError, match="contrast"):
        with_wrong_answer(question, {question.id: question})
    with pytest.raises(UserError, match="contrast weighs hinted draws"):
        scheme("star", weigh="contrast")


def test_the_schemes_of_the_literature():
    found = {
        name: instantiate(compose_config(f"sampler={name}").sampler)
        for name in ("pps_mh", "star_mh", "maxrl", "pps_contrast", "pps_verified")
    }
    assert {s.display: (s.tries, s.keep, s.weigh) for s in found.values()} == {
        "PPS-MH": (("rationalization",), 1, "mh"),
        "STaR-MH": (("question", "rationalization"), 1, "mh"),
        "MaxRL-4": (("question",) * 4, 4, "maxrl"),
        "PPS-contrast": (("rationalization",), 1, "contrast"),
        "PPS-verified-4": (("rationalization",) * 4, 1, "rationales"),
    }
    assert found["pps_verified"].reward == VERIFIED["reward"]


@pytest.mark.parametrize("name", ["pps_contrast", "pps_verified", "pps_mh", "maxrl"])
def test_they_run_end_to_end(tmp_path, name):
    """Through a whole run on the tiny model: every attempt is in the journal, and what it counts for."""
    summary = train(config(f"sampler={name}", "sampler.budget=4", "trainer.max_epochs=2"), tmp_path / name)
    assert summary["status"] == "finished"
    for iteration in summary["iterations"]:
        drawn = Journal(tmp_path / name).read(iteration["iteration"])
        assert iteration["e_step"]["attempts"] == len(drawn)
        assert iteration["e_step"]["accepted"] == len({r.question_id for r in drawn if r.accepted})
        assert all(r.weight == 0 or r.accepted or name == "maxrl" for r in drawn)
        assert all(0 <= r.weight <= 1 for r in drawn if name == "pps_contrast")

"""Sampling schemes: order of proposals, budget accounting, seeds, acceptance."""

from __future__ import annotations

import itertools

import pytest
from conftest import TEMPLATE, ScriptedEngine, letters, numbers
from hypothesis import given
from hypothesis import strategies as st

from emreason.engines.drawing import draw_seed
from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts
from emreason.schemes.diagnostics import e_step_record
from emreason.schemes.samplers import Scheme, is_trivial, sample, training_ids
from emreason.scores.stats import chance_acceptance
from emreason.types import Demonstration, SamplingParams, UserError

RIGHT, WRONG = "because\nAnswer: {}", "because\nAnswer: 99"


def scheme(name: str, budget: int = 1, **more) -> Scheme:
    proposals = {
        "rs": {"question": budget},
        "star": {"question": budget, "rationalization": 1},
        "pps": {"rationalization": budget},
    }[name]
    return Scheme(name=name, display=name, budget=budget, proposals=proposals, **more)


def run(questions, scheme, script, prompts, tokenizer, replayed=(), iteration=0):
    engine = ScriptedEngine(tokenizer, script)
    rationales = list(sample(questions, scheme, engine, prompts, tokenizer, seed=1, iteration=iteration, replayed=replayed))
    return rationales, engine


def success_at(success: dict[str, int], questions):
    gold = {q.id: q.answer for q in questions}

    def script(request):
        question_id, attempt = request.key
        return RIGHT.format(gold[question_id]) if attempt == success[question_id] else WRONG

    return script


@given(data=st.data())
def test_budget_accounting(data):
    """Scripted success at try j costs min(j, M) attempts, and every discarded token is charged."""
    tokenizer = tiny_tokenizer()
    prompts = Prompts(tokenizer, TEMPLATE, ())
    budget = data.draw(st.integers(1, 6))
    questions = numbers(data.draw(st.integers(1, 8)))
    success = {q.id: data.draw(st.integers(1, 9)) for q in questions}
    rationales, engine = run(questions, scheme("rs", budget), success_at(success, questions), prompts, tokenizer)
    for question in questions:
        mine = [r for r in rationales if r.question_id == question.id]
        assert sorted(r.attempt for r in mine) == list(range(1, min(success[question.id], budget) + 1))
        assert sum(r.accepted for r in mine) == (success[question.id] <= budget)
    record = e_step_record(0, questions, rationales, scheme("rs", budget), 1.0)
    assert record["tokens"] == sum(r.n_tokens for r in rationales)
    assert record["attempts"] == len(engine.seen)
    assert record["accepted"] + record["rejected"] + record["errored"] == record["questions"] == len(questions)


def test_the_order_of_proposals(prompts, tokenizer):
    questions = numbers(4)
    for name, budget, expected in [
        ("rs", 3, ["question"] * 3),
        ("star", 1, ["question", "rationalization"]),
        ("star", 2, ["question", "question", "rationalization"]),
        ("pps", 1, ["rationalization"]),
    ]:
        rationales, engine = run(questions, scheme(name, budget), lambda _: WRONG, prompts, tokenizer)
        for question in questions:
            mine = sorted((r for r in rationales if r.question_id == question.id), key=lambda r: r.attempt)
            assert [r.proposal for r in mine] == expected
        for request in engine.seen:
            hinted = expected[request.key[1] - 1] == "rationalization"
            assert ("HINT" in tokenizer.decode(request.prompt_ids)) == hinted


def test_star_rationalizes_only_what_it_failed(prompts, tokenizer):
    questions = numbers(6)
    success = {q.id: 1 if i % 2 else 9 for i, q in enumerate(questions)}
    rationales, _ = run(questions, scheme("star"), success_at(success, questions), prompts, tokenizer)
    hinted = {r.question_id for r in rationales if r.proposal == "rationalization"}
    assert hinted == {q.id for q in questions if success[q.id] == 9}


def test_truncated_is_rejected_even_with_a_right_answer(prompts, tokenizer):
    questions = numbers(3)
    gold = {q.id: q.answer for q in questions}
    rationales, _ = run(questions, scheme("rs"), lambda r: (RIGHT.format(gold[r.key[0]]), "length"), prompts, tokenizer)
    assert [r.answer for r in sorted(rationales, key=lambda r: r.question_id)] == [q.answer for q in questions]
    assert not any(r.accepted for r in rationales)


def test_errored_question_is_accounted_and_not_tried_again(prompts, tokenizer):
    questions = numbers(3)
    rationales, _ = run(questions, scheme("rs", 4), lambda r: ("", "error") if r.key[0] == "q001" else WRONG, prompts, tokenizer)
    assert sum(r.question_id == "q001" for r in rationales) == 1
    record = e_step_record(0, questions, rationales, scheme("rs", 4), 1.0)
    assert (record["accepted"], record["rejected"], record["errored"]) == (0, 2, 1)


def test_replay_draws_only_what_is_missing(prompts, tokenizer):
    questions = numbers(5)
    success = {q.id: i + 1 for i, q in enumerate(questions)}
    whole, _ = run(questions, scheme("rs", 4), success_at(success, questions), prompts, tokenizer)
    for cut in range(len(whole) + 1):
        rest, engine = run(questions, scheme("rs", 4), success_at(success, questions), prompts, tokenizer, replayed=whole[:cut])
        assert sorted((r.question_id, r.attempt) for r in whole[:cut] + rest) == sorted((r.question_id, r.attempt) for r in whole)
        assert len(engine.seen) == len(whole) - cut


def test_a_draw_depends_on_seed_iteration_question_and_attempt_alone():
    seeds = {draw_seed(*key) for key in itertools.product(range(3), range(3), ["a", "b", "1\0a"], range(1, 4))}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_worked_examples_are_shown_in_the_first_iterations_alone(tokenizer):
    shown = numbers(2)
    prompts = Prompts(tokenizer, TEMPLATE, [Demonstration(q, "SHOWN") for q in shown])
    for first, expected in [(None, [2, 2, 2, 2]), (2, [2, 2, 0, 0]), (0, [0] * 4)]:
        wanted = scheme("pps", worked_examples=2, worked_examples_iterations=first)
        engines = [run(numbers(1), wanted, lambda _: WRONG, prompts, tokenizer, iteration=k)[1] for k in range(4)]
        assert [tokenizer.decode(e.seen[0].prompt_ids).count("SHOWN") for e in engines] == expected


def test_requests_carry_the_scheme_s_limits_and_end_at_the_answer_line(prompts, tokenizer):
    said = [tokenizer.encode(text, add_special_tokens=False) for text in ("so\nAnswer: 7\n", "so\nAnswer: yes\n", "so\n")]
    for wanted, ends in [
        (scheme("rs", temperature=0.7, top_p=0.9, max_new_tokens=20), [True, False, False]),
        (scheme("rs", temperature=0.7, top_p=0.9, max_new_tokens=20, stop_at_answer=False), None),
    ]:
        (request,) = run(numbers(1), wanted, lambda _: WRONG, prompts, tokenizer)[1].seen
        assert request.params == SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=20)
        assert (request.stop and [request.stop(ids) for ids in said]) == ends


def test_requests_do_not_depend_on_the_other_questions(prompts, tokenizer):
    questions = numbers(8)
    _, together = run(questions, scheme("rs", 2), lambda _: WRONG, prompts, tokenizer)
    _, half = run(questions[1::2], scheme("rs", 2), lambda _: WRONG, prompts, tokenizer)
    seeds = {r.key: (r.seed, r.prompt_ids) for r in together.seen}
    assert all(seeds[r.key] == (r.seed, r.prompt_ids) for r in half.seen)


def test_eos_is_supervised_exactly_once(prompts, tokenizer):
    questions = numbers(1)
    for reason in ("stop", "answer"):
        (rationale,), _ = run(questions, scheme("rs"), lambda _, reason=reason: (RIGHT.format(0), reason), prompts, tokenizer)
        ids = training_ids(rationale, tokenizer.eos_token_id)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[: len(rationale.token_ids)] == rationale.token_ids


def test_chance_acceptance_of_a_uniform_guesser():
    for tries, percent in [(1, 25), (2, 44), (4, 68), (8, 90)]:
        assert round(100 * chance_acceptance(4, tries)) == percent
    questions = letters(4) + letters(6, choices=3)[4:]
    rationales = []
    record = e_step_record(0, questions, rationales, scheme("rs", 2), 0.0)
    assert record["chance_acceptance"] == pytest.approx((4 * (1 - 0.75**2) + 2 * (1 - (2 / 3) ** 2)) / 6)
    unfiltered = scheme("rs", 2, reward="emreason.schemes.rewards.well_formed")
    assert e_step_record(0, questions, rationales, unfiltered, 0.0)["chance_acceptance"] is None


def test_a_key_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match=r"share=0\.25.*choose=adaptive"):
        scheme("rs", share=0.25)
    with pytest.raises(UserError, match=r"truncate=2.*weigh=importance"):
        scheme("rs", truncate=2)


@pytest.mark.parametrize("text", ["Answer: C", "C", "\nAnswer: 12\n", "The answer is (B).", "As given.\nAnswer: 3", "好的。\nAnswer: A"])
def test_trivial(text):
    assert is_trivial(text)


@pytest.mark.parametrize(
    "text", ["3 + 5 = 8. 8 + 9 = 17.\nAnswer: 17", "Plants need light to grow.\nThe answer is (B).", "植物需要阳光\nAnswer: A"]
)
def test_not_trivial(text):
    assert not is_trivial(text)


def test_trivial_filter_is_an_option(prompts, tokenizer):
    questions = numbers(1)
    for reject, accepted in [(False, True), (True, False)]:
        (rationale,), _ = run(questions, scheme("rs", reject_trivial=reject), lambda _: "Answer: 0", prompts, tokenizer)
        assert rationale.accepted == accepted
    record = e_step_record(0, questions, run(questions, scheme("rs"), lambda _: "Answer: 0", prompts, tokenizer)[0], scheme("rs"), 0.0)
    assert record["trivial_rate"] == 1.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"proposals": {"guess": 1}}, "guess"),
        ({"proposals": {"question": 0}}, "no try"),
        ({"proposals": {"question": -1}}, "proposals.question"),
        ({"temperature": 0.0, "proposals": {"question": 2}}, "temperature"),
    ],
)
def test_bad_schemes_are_refused_by_name(change, word):
    with pytest.raises(UserError, match=word):
        Scheme(**{"name": "rs", "display": "RS", "budget": 1, "proposals": {"question": 1}, **change})


@pytest.mark.parametrize(
    "wrong", [{"weigh": "nope"}, {"choose": "bar"}, {"temperature": -1.0}, {"keep": 0}, {"top_p": 0.0}, {"max_new_tokens": 0}]
)
def test_a_scheme_made_in_python_is_held_to_what_the_command_allows(wrong, prompts):
    with pytest.raises(UserError, match=f"sampler.{next(iter(wrong))}"):
        scheme("rs", **wrong)
    with pytest.raises(UserError, match="no proposal"):
        prompts.ids(numbers(1)[0], "hint")


def test_a_reward_says_why_it_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("import nosuchpackage")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="nosuchpackage"):
        scheme("rs", reward="broken_reward.f")

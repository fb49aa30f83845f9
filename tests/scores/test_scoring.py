"""Evaluation by generation: what is counted, forced answers, accuracy per gold position."""

from __future__ import annotations

import pytest
from conftest import ScriptedEngine, letters, numbers

from emreason.scores.scoring import forced_params, line_said, predict, score
from emreason.types import Question


def answers(tokenizer, prompts, questions, script, **more):
    engine = ScriptedEngine(tokenizer, script)
    predictions = predict(questions, engine, prompts, tokenizer, max_new_tokens=32, **more)
    return predictions, score(predictions, 1.0), engine


def test_every_question_is_counted_in_its_order(prompts, tokenizer):
    questions = numbers(7)
    predictions, values, _ = answers(tokenizer, prompts, questions, lambda r: "so\nAnswer: 0" if r.key != "q003" else ("", "error"))
    assert [p.question_id for p in predictions] == [q.id for q in questions]
    assert values["n"] == 7
    assert values["errored"] == 1
    assert values["accuracy"] == pytest.approx(sum(p.gold == "0" and p.question_id != "q003" for p in predictions) / 7)
    assert values["ci95"][0] <= values["accuracy"] <= values["ci95"][1]


def test_evaluation_is_greedy_under_the_plain_prompt(prompts, tokenizer):
    _, _, engine = answers(tokenizer, prompts, numbers(3), lambda _: "Answer: 1")
    assert all(r.params.temperature == 0 for r in engine.seen)
    assert not any("HINT" in tokenizer.decode(r.prompt_ids) for r in engine.seen)


def test_a_forced_answer_line_separates_format_from_reasoning(prompts, tokenizer):
    """A model that knows every answer but never writes the answer line: accuracy 0, forced accuracy 1."""
    questions = letters(8)
    gold = {q.id: q.answer for q in questions}

    def script(request):
        forced = tokenizer.decode(request.prompt_ids).endswith("\nAnswer:")
        return f" {gold[request.key]}\nand more" if forced else ("I believe it is that one", "length")

    _, values, engine = answers(tokenizer, prompts, questions, script)
    assert values["accuracy"] == 0
    assert values["extraction_rate"] == 0
    assert values["forced_accuracy"] == 1
    assert len(engine.seen) == 16
    _, values, engine = answers(tokenizer, prompts, questions, script, forced=False)
    assert len(engine.seen) == 8


def test_the_cue_follows_what_was_said_without_its_eos(prompts, tokenizer):
    (question,) = numbers(1)
    _, _, engine = answers(tokenizer, prompts, [question], lambda r: ("I stop here", "stop") if len(r.prompt_ids) < 60 else " 0")
    asked, forced = engine.seen
    assert forced.prompt_ids == (*asked.prompt_ids, *tokenizer.encode("I stop here\nAnswer:", add_special_tokens=False))


def test_an_answer_that_was_given_is_not_forced_away(prompts, tokenizer):
    questions = letters(4)
    _, values, engine = answers(tokenizer, prompts, questions, lambda _: "so\nAnswer: A")
    assert len(engine.seen) == 4
    assert values["accuracy"] == values["forced_accuracy"] == 0.25


def test_position_bias_shows(prompts, tokenizer):
    """A model that always says A is right on exactly the questions whose gold position is A."""
    _, values, _ = answers(tokenizer, prompts, letters(12), lambda _: "so\nAnswer: A")
    assert {k: v["accuracy"] for k, v in values["accuracy_by_position"].items()} == {"A": 1.0, "B": 0.0, "C": 0.0, "D": 0.0}
    assert all(v["n"] == 3 for v in values["accuracy_by_position"].values())


def test_numbers_have_no_positions(prompts, tokenizer):
    _, values, _ = answers(tokenizer, prompts, numbers(3), lambda _: "Answer: 1")
    assert values["accuracy_by_position"] == {}


@pytest.mark.parametrize("gold", ["1,450,000", r"\left( 3, \frac{\pi}{2} \right)"])
def test_a_long_answer_has_room_after_the_cue(tokenizer, gold):
    question = Question("q", "Which?", gold.replace(",", "") if gold[0] == "1" else gold, "number" if gold[0] == "1" else "text")
    assert forced_params(question, tokenizer).max_new_tokens >= len(tokenizer.encode(gold, add_special_tokens=False))
    assert forced_params(Question("q", "Which?", "17", "number"), tokenizer).max_new_tokens == 18  # \\(\\frac{34}{2}\\) has room


def test_the_longest_right_spelling_has_room_after_the_cue(tokenizer):
    aliased = Question("q", "Which?", "USSR", "text", aliases=("Союз Советских Социалистических Республик",))
    assert forced_params(aliased, tokenizer).max_new_tokens > len(tokenizer.encode(aliased.aliases[0], add_special_tokens=False))


def test_an_answer_on_the_line_after_the_cue_is_waited_for(tokenizer):
    over = line_said(tokenizer)
    assert [over(tokenizer.encode(text, add_special_tokens=False)) for text in ("\n", "\n\n", "\n4\n", "4\n")] == [False, False, True, True]

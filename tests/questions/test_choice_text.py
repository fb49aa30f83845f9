"""Choices answered by their text: every gold answer of the real datasets, rendered as a completion, is accepted."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import ScriptedEngine
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_datasets import CONF, HUB_NAMES, SPLITS, hub, real  # noqa: F401

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import answer_line_complete, correct, extract
from emreason.questions.prompts import Prompts, render_completion, render_question
from emreason.runs.journal import Journal, journal_record, rationale_from
from emreason.scores.scoring import predict, score
from emreason.tracking.samples import after_e_step
from emreason.types import Question, Rationale


@pytest.mark.real
@pytest.mark.parametrize("name", HUB_NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answer_is_accepted_by_its_text(real, name, split):  # noqa: F811
    for question in real[name]._all(split):
        said = dataclasses.replace(question, answer_as="text")
        completion = render_completion(said, "The answer is (A). No: not A, and not (C) either.")
        assert correct(extract(completion, said), said), said
        assert answer_line_complete(completion + "\n", said), said
        others = {letter: " ".join(choice.split()) for letter, choice in zip(said.letters, said.choices, strict=True)}
        for letter, text in others.items():
            if text != others[said.answer]:
                assert not correct(extract(f"Because.\nAnswer: {text}", said), said), (said, letter)


def test_the_prompt_shows_the_choices_without_letters_and_the_hint_says_the_text():
    question = Question("q", "What gives light?", "B", "choice", ("moon", "the  sun", "sea"), answer_as="text")
    assert render_question(question) == "What gives light?\nChoices: moon; the sun; sea"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        template = instantiate(compose(overrides=["+prompt=choice_text"]).prompt)
    prompts = Prompts(tiny_tokenizer(), template)
    hinted = prompts.text(question, "rationalization")
    assert "the answer is the sun" in hinted
    assert "letter" not in hinted
    assert "A. " not in hinted
    assert "the answer is" not in prompts.text(question)
    assert Prompts(tiny_tokenizer(), template).text(question) == Prompts(tiny_tokenizer(), template).text(
        dataclasses.replace(question, answer="A")
    )


QUESTION = Question("q", "What gives light?", "B", "choice", ("moon", "the  sun", "sea"), answer_as="text")


def test_people_read_words_where_words_are_asked_for(tmp_path, prompts, tokenizer):
    """In the journal, what a run shows of it, and predictions; what a run reads back is what was drawn."""
    drawn = [Rationale("q", 0, n, "question", f"Answer: {x}", x, x == "B", 2, "stop", -1.5, (3, 4)) for n, x in ((1, "C"), (2, "B"))]
    silent = dataclasses.replace(drawn[0], attempt=3, answer=None)
    lines = [journal_record(QUESTION, r) for r in (*drawn, silent)]
    assert [(line["answer"], line["gold"]) for line in lines] == [("sea", "the sun"), ("the sun", "the sun"), (None, "the sun")]
    assert [rationale_from(line) for line in lines] == [*drawn, silent]
    Journal(tmp_path).finalize(0, lines)
    shown = after_e_step(Journal(tmp_path).path(0))
    assert "answer the sun, gold the sun" in shown
    assert "answer sea, gold the sun" in shown

    answers = iter(["I think so.\nAnswer: sea", "Hm.", " the sun"])
    questions = [QUESTION, dataclasses.replace(QUESTION, id="r")]
    found = predict(questions, ScriptedEngine(tokenizer, lambda _: next(answers), 1), prompts, tokenizer, max_new_tokens=32)
    assert [(p.answer, p.forced_answer, p.gold) for p in found] == [("sea", "sea", "the sun"), (None, "the sun", "the sun")]
    assert [(p.correct, p.forced_correct) for p in found] == [(False, False), (False, True)]
    one_letter = dataclasses.replace(QUESTION, choices=("K", "C"))
    (vitamin,) = predict([one_letter], ScriptedEngine(tokenizer, lambda _: "Answer: C"), prompts, tokenizer, max_new_tokens=8)
    assert (vitamin.answer, vitamin.gold) == ("C", "C")
    assert set(score([vitamin], 1.0)["accuracy_by_position"]) == {"B"}  # choices stand in an order without letters, too


def test_letters_stay_letters():
    question = dataclasses.replace(QUESTION, answer_as="letter")
    line = journal_record(question, Rationale("q", 0, 1, "question", "Answer: C", "C", False, 2, "stop", -1.5, (3, 4)))
    assert (line["answer"], line["gold"]) == ("C", "B")
    assert "letter" not in line

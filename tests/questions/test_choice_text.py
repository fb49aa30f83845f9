"""Choices answered by their text: every gold answer of the real datasets, rendered as a completion, is accepted."""

from __future__ import annotations

import dataclasses

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from test_datasets import CONF, HUB_NAMES, SPLITS, hub, real  # noqa: F401

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import answer_line_complete, correct, extract
from emreason.questions.prompts import Prompts, render_completion, render_question
from emreason.types import Question


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

"""Prompts (DESIGN §5.1 and §5.2): the hint in hinted prompts alone, one BOS at most, short prompts."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.prompts import Prompts, PromptTemplate, render_completion, render_question
from emreason.types import Demonstration, Question, UserError

SENTINEL = "SENTINEL-77"
TEMPLATE = PromptTemplate(instruction="Explain.", hint=f"{SENTINEL} {{answer}}", system="")
QUESTION = Question("q", "What gives light?", "B", "choice", ("moon", "sun", "sea"))
EXAMPLES = (
    Demonstration(Question("e1", "What barks?", "A", "choice", ("dog", "cat")), "Dogs bark."),
    Demonstration(Question("e2", "What purrs?", "B", "choice", ("dog", "cat")), "Cats purr."),
)


def chat_tokenizer():
    """A character tokenizer whose chat template, like Llama's, writes BOS itself, and whose encoder adds BOS too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = (
        "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def bos_tokenizer():
    """No chat template; BOS and EOS added by the encoder."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    ends = [(tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return tokenizer


@pytest.fixture(params=[tiny_tokenizer, bos_tokenizer, chat_tokenizer], ids=["plain", "plain-bos", "chat"])
def any_prompts(request):
    return Prompts(request.param(), TEMPLATE, EXAMPLES)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_hint_is_in_hinted_prompts_alone(any_prompts, n):
    decode = any_prompts.tokenizer.decode
    assert SENTINEL not in any_prompts.text(QUESTION, "question", n)
    assert SENTINEL not in decode(any_prompts.ids(QUESTION, n_examples=n))
    hinted = any_prompts.text(QUESTION, "rationalization", n)
    assert hinted.count(SENTINEL) == n + 1  # as in STaR, the examples carry theirs
    assert f"{SENTINEL} {QUESTION.answer}" in hinted


@pytest.mark.parametrize("proposal", ["question", "rationalization"])
def test_at_most_one_bos_and_no_eos_at_the_end(any_prompts, proposal):
    tokenizer = any_prompts.tokenizer
    for n in range(3):
        ids = any_prompts.ids(QUESTION, proposal, n)
        assert ids.count(tokenizer.bos_token_id) <= 1
        assert tokenizer.bos_token_id not in ids[1:]
        assert ids[-1] != tokenizer.eos_token_id


def test_bos_is_there_where_the_model_has_one():
    for make in (bos_tokenizer, chat_tokenizer):
        tokenizer = make()
        assert Prompts(tokenizer, TEMPLATE).ids(QUESTION)[0] == tokenizer.bos_token_id


def test_the_gold_answer_is_not_in_the_plain_prompt():
    """The prompt must not depend on the gold answer at all."""
    for gold in "ABC":
        other = dataclasses.replace(QUESTION, answer=gold)
        for n in range(3):
            prompts = Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES)
            assert prompts.ids(other, n_examples=n) == prompts.ids(QUESTION, n_examples=n)


def test_layout(any_prompts):
    text = any_prompts.text(QUESTION, n_examples=2)
    assert re.search(r"What gives light\?\nA\. moon\nB\. sun\nC\. sea\nExplain\.", text)
    assert text.index("What barks?") < text.index("Dogs bark.\nAnswer: A") < text.index("What purrs?") < text.index("What gives light?")
    assert "D." not in text


def test_rendering():
    assert render_question(Question("n", "What is 3 + 5?", "8", "number")) == "What is 3 + 5?"
    assert render_completion(QUESTION, "It burns.") == "It burns.\nAnswer: B"
    assert render_completion(QUESTION, "") == "Answer: B"


def test_the_prompt_does_not_change_overnight():
    prompts = Prompts(chat_tokenizer(), TEMPLATE)
    assert "26 Jul 2024" in prompts.text(QUESTION)


def test_a_chat_template_without_a_system_role():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    assert Prompts(tokenizer, dataclasses.replace(TEMPLATE, system="Be brief.")).text(QUESTION).startswith("[user]Be brief.\nWhat")
    assert Prompts(tokenizer, TEMPLATE).text(QUESTION).startswith("[user]What")


def test_fingerprint_changes_with_whatever_shapes_a_prompt():
    chat = chat_tokenizer()
    variants = [
        Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES),
        Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES[:1]),
        Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES[::-1]),
        Prompts(tiny_tokenizer(), TEMPLATE, (dataclasses.replace(EXAMPLES[0], rationale="They do."), EXAMPLES[1])),
        Prompts(tiny_tokenizer(), dataclasses.replace(TEMPLATE, instruction="Think."), EXAMPLES),
        Prompts(tiny_tokenizer(), dataclasses.replace(TEMPLATE, hint="{answer}!"), EXAMPLES),
        Prompts(tiny_tokenizer(), dataclasses.replace(TEMPLATE, system=None), EXAMPLES),
        Prompts(chat, TEMPLATE, EXAMPLES),
    ]
    for one, other in itertools.combinations(variants, 2):
        assert one.fingerprint() != other.fingerprint()
    assert variants[0].fingerprint() == Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES).fingerprint()


def test_errors():
    with pytest.raises(UserError, match=r"3 worked examples are asked for, but dataset\.demonstrations has 2"):
        Prompts(tiny_tokenizer(), TEMPLATE, EXAMPLES).ids(QUESTION, n_examples=3)
    with pytest.raises(UserError, match=r"must contain '\{answer\}'"):
        Prompts(tiny_tokenizer(), dataclasses.replace(TEMPLATE, hint="You know it."))


@pytest.mark.real
def test_smollm2(smollm2):
    tokenizer = smollm2[1]
    prompts = Prompts(tokenizer, TEMPLATE, EXAMPLES)
    for proposal, n in itertools.product(("question", "rationalization"), range(3)):
        ids = prompts.ids(QUESTION, proposal, n)
        # its BOS is the opening mark of every turn: system, n examples of two turns, question, answer
        assert ids.count(tokenizer.bos_token_id) == 3 + 2 * n
        assert list(ids[:2]) != [tokenizer.bos_token_id] * 2
        assert tokenizer.decode(ids) == prompts.text(QUESTION, proposal, n)
        assert prompts.text(QUESTION, proposal, n).endswith("<|im_start|>assistant\n")
        assert (SENTINEL in tokenizer.decode(ids)) == (proposal == "rationalization")
    assert "SmolLM" not in prompts.text(QUESTION)  # the default system message
    own = Prompts(tokenizer, dataclasses.replace(TEMPLATE, system=None)).ids(QUESTION)
    assert len(prompts.ids(QUESTION)) <= len(own) - 12
    assert tokenizer.decode(prompts.answer_cue_ids) == "\nAnswer:"


@pytest.mark.parametrize(
    ("hint", "answer", "shown"),
    [
        ("(Hint: the answer is {answer}.)", "It melts.", "(Hint: the answer is It melts.)"),
        ("(Hint: the answer is {answer}.)", "ice", "(Hint: the answer is ice.)"),
        ("(Hint: the answer is {answer}.)", "3.5", "(Hint: the answer is 3.5.)"),
        ("(Hint: the answer is {answer}.)", "Why?", "(Hint: the answer is Why?.)"),
        ("({answer})", "It melts.", "(It melts.)"),
        ("{answer}. So {answer}, then.", "U.S.", "U.S. So U.S., then."),
    ],
)
def test_a_hint_has_one_period_after_an_answer_that_brings_its_own(hint, answer, shown):
    prompts = Prompts(tiny_tokenizer(), dataclasses.replace(TEMPLATE, hint=hint))
    question = dataclasses.replace(QUESTION, answer=answer, kind="text", choices=())
    assert prompts.text(question, "rationalization").split("\n").count(shown) == 1
    assert prompts.text(question) == Prompts(tiny_tokenizer(), TEMPLATE).text(question)

"""Thinking blocks (DESIGN §5.21): what is thought is rationale, never an answer, wherever a completion is read."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import ScriptedEngine, letters, numbers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from emreason.models.tiny import tiny_tokenizer
from emreason.questions.answers import answer_line_complete, extract
from emreason.questions.grammar.thinking import closing_mark, open_mark, opened_by, said, silent_ids, speech_start
from emreason.questions.prompts import Prompts, PromptTemplate
from emreason.schemes.diagnostics import answers_first, mentions_hint, reasoning
from emreason.schemes.samplers import Scheme, is_trivial, sample, training_ids
from emreason.scores.likelihood import cue_ids, rationale_ids
from emreason.scores.scoring import predict

MARKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
]
# written for these tests after the templates of thinking models: earlier thoughts are dropped, a switch closes the block at once
SWITCH = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{%- elif force_thinking is defined %}{{ '<think>\n' }}{%- endif %}{%- endif %}"
)
TEMPLATE = PromptTemplate("Explain.", "HINT {answer}", "")


def chat_tokenizer(special: bool = True):
    """A character tokenizer with Qwen's turns; the thinking marks are tokens of their own, special ones as Mistral's, or not, as Qwen's."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    marks = [AddedToken(mark, special=special, normalized=False) for mark in ("<think>", "</think>")]
    (tokenizer.backend_tokenizer.add_special_tokens if special else tokenizer.backend_tokenizer.add_tokens)(marks)
    tokenizer.chat_template = SWITCH
    return tokenizer


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_a_block_of_any_kind(begin, end):
    question = numbers(1)[0]
    assert extract(f"{begin}Answer: 3{end}\nAnswer: 4", question) == "4"
    assert extract(f"{begin}Answer: 3{end}\nThat is hard.", question) is None
    assert extract(f"{begin}\nAnswer: 3\n", question) is None
    assert extract(f"Answer: 3\n{end}\nAnswer: 4", question) == "4"  # opened by the prompt
    assert not answer_line_complete(f"{begin}\nAnswer: 3\n", question)
    assert answer_line_complete(f"{begin}\nAnswer: 3\n{end}\nAnswer: 4\n", question)
    assert open_mark(f"So {begin} well") == begin
    assert closing_mark(begin) == end


@given(st.lists(st.sampled_from(["<think>", "</think>", "Answer: 3\n", "so ", "\n"]), max_size=12).map("".join))
def test_an_answer_never_comes_from_a_block(text):
    start = speech_start(text)
    assert (start is None) == (text.rfind("<think>") > text.rfind("</think>"))
    found = extract(text, numbers(1)[0])
    assert found is None or "Answer: 3" in text[start:]


def test_the_block_is_rationale_in_every_measure():
    thought = "<think>\nAnswer: 3? Let me add: 1 + 2 = 3.\n</think>\nAnswer: 3"
    assert not is_trivial(thought)
    assert is_trivial("<think>\n\n</think>\n\nAnswer: 3")
    assert is_trivial("<think></think>Answer: 3")
    assert not is_trivial("<think>We add one and two")
    assert reasoning(thought).endswith("</think>")
    assert not answers_first("<think>Answer: 3.\nOne and two are three.\n</think>\nAnswer: 3")
    assert mentions_hint("<think>As given in the hint.</think>\nAnswer: 3")


@pytest.mark.parametrize("special", [True, False])
def test_marks_that_are_tokens_stay_in_the_text(special):
    tokenizer = chat_tokenizer(special)
    ids = tokenizer.encode("<think>Answer: 3</think>Answer: 4<|im_end|>", add_special_tokens=False)
    assert said(ids, (), tokenizer) == "<think>Answer: 3</think>Answer: 4"
    assert tokenizer.eos_token_id in silent_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<think>") not in silent_ids(tokenizer)


def test_a_block_that_the_prompt_opens():
    tokenizer = chat_tokenizer()
    opened = Prompts(tokenizer, dataclasses.replace(TEMPLATE, template={"force_thinking": True}))
    closed = Prompts(tokenizer, dataclasses.replace(TEMPLATE, template={"enable_thinking": False}))
    plain = Prompts(tokenizer, TEMPLATE)
    question = numbers(1)[0]
    assert opened_by(opened.ids(question), tokenizer) == "<think>"
    assert opened_by(closed.ids(question), tokenizer) == opened_by(plain.ids(question), tokenizer) == ""
    assert closed.text(question).endswith("<think>\n\n</think>\n\n")
    assert len({p.fingerprint() for p in (opened, closed, plain)}) == 3
    ids = tokenizer.encode("Answer: 0\n", add_special_tokens=False)
    assert extract(said(ids, opened.ids(question), tokenizer), question) is None
    assert extract(said(ids, closed.ids(question), tokenizer), question) == "0"


def test_sampling_goes_on_in_a_block_and_trains_what_was_sampled():
    """The answer within the block neither stops nor counts; the plain prompt and the sampled ids are what is trained, thoughts included."""
    tokenizer = chat_tokenizer()
    question = dataclasses.replace(numbers(1)[0], answer="4")
    scheme = Scheme("rs", "RS", 1, {"question": 1})
    text = "<think>\nAnswer: 3\nno\n</think>\nAnswer: 4\n"
    engine = ScriptedEngine(tokenizer, lambda _: (text, "answer"))
    prompts = Prompts(tokenizer, TEMPLATE)
    (rationale,) = sample([question], scheme, engine, prompts, tokenizer, seed=1, iteration=0)
    assert rationale.accepted
    assert rationale.answer == "4"
    assert rationale.text == text
    stop = engine.seen[0].stop
    ids = tokenizer.encode(text, add_special_tokens=False)
    within = tokenizer.encode("<think>\nAnswer: 3\n", add_special_tokens=False)
    assert not stop(within)
    assert stop(ids)
    assert training_ids(rationale, tokenizer.eos_token_id) == (*ids, tokenizer.eos_token_id)


def test_sampling_from_a_prompt_that_opens_the_block():
    tokenizer = chat_tokenizer()
    scheme = Scheme("rs", "RS", 1, {"question": 1})
    prompts = Prompts(tokenizer, dataclasses.replace(TEMPLATE, template={"force_thinking": True}))
    question = dataclasses.replace(numbers(1)[0], answer="4")
    engine = ScriptedEngine(tokenizer, lambda _: "\nAnswer: 4\n")
    (unclosed,) = sample([question], scheme, engine, prompts, tokenizer, seed=1, iteration=0)
    assert not unclosed.accepted
    assert unclosed.answer is None
    assert unclosed.text.startswith("<think>")
    engine = ScriptedEngine(tokenizer, lambda _: "1 + 3</think>Answer: 4")
    (closed,) = sample([question], scheme, engine, prompts, tokenizer, seed=1, iteration=0)
    assert closed.accepted


def test_a_forced_answer_closes_the_block_first():
    tokenizer = chat_tokenizer()
    prompts = Prompts(tokenizer, TEMPLATE)
    engine = ScriptedEngine(tokenizer, lambda r: " B\n" if tokenizer.decode(r.prompt_ids).endswith("Answer:") else ("<think>Hm", "length"))
    (prediction,) = predict(letters(1), engine, prompts, tokenizer, max_new_tokens=9)
    assert prediction.answer is None
    assert prediction.forced_answer == "B"
    assert tokenizer.decode(engine.seen[1].prompt_ids).endswith("<think>Hm\n</think>\n\nAnswer:")


def test_the_likelihoods_cue_closes_the_block_first():
    tokenizer = chat_tokenizer()
    prompt_ids = Prompts(tokenizer, dataclasses.replace(TEMPLATE, template={"force_thinking": True})).ids(numbers(1)[0])
    drawn = tokenizer.encode("so\nAnswer: 3\n", add_special_tokens=False)
    z, stated = rationale_ids(drawn, tokenizer, prompt_ids)
    assert (list(z), stated) == (drawn, False)
    assert tokenizer.decode(cue_ids(z, tokenizer, prompt_ids)) == "\n</think>\nAnswer:"
    z, stated = rationale_ids(tokenizer.encode("so</think>\nAnswer: 3", add_special_tokens=False), tokenizer, prompt_ids)
    assert (tokenizer.decode(z), stated) == ("so</think>\n", True)
    assert tokenizer.decode(cue_ids(z, tokenizer, prompt_ids)) == "Answer:"


def test_an_answer_by_its_text_has_room_when_forced():
    tokenizer = chat_tokenizer()
    question = dataclasses.replace(letters(1)[0], choices=("a long choice of many words", "another one"), answer_as="text")
    engine = ScriptedEngine(tokenizer, lambda r: " another one\n" if r.params.max_new_tokens > 20 else ("well", "length"))
    (prediction,) = predict([question], engine, Prompts(tokenizer, TEMPLATE), tokenizer, max_new_tokens=9)
    assert prediction.forced_answer == "another one"

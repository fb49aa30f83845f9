"""Likelihoods: the scoring pass against the engine's own log-probabilities, the bound against its exact value."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from conftest import ScriptedEngine, numbers
from test_laboratory import model

from emreason.engines.inprocess import InProcessEngine
from emreason.laboratory.tabular import TabularEngine, make_questions
from emreason.models.tiny import load_tiny
from emreason.questions.prompts import Prompts
from emreason.scores.likelihood import completion_logprobs, marginal_bounds, rationale_ids, summarize
from emreason.scores.scoring import token_logprobs
from emreason.types import Question, Request, SamplingParams


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_scoring_pass_agrees_with_the_engine(family, temperature, prompts):
    """The journal's `logprob` is at temperature 1 whatever the sampling temperature is. fp32, ≤ 32 tokens: 1e-3 is far above rounding."""
    lm, tokenizer = load_tiny(family)
    lm.train()
    modes: list[bool] = []
    lm.model.embed_tokens.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    params = SamplingParams(temperature=temperature, max_new_tokens=32)
    requests = deque(Request(q.id, prompts.ids(q), params, seed=i) for i, q in enumerate(numbers(12)))
    drawn = list(InProcessEngine(lm, tokenizer, max_batch=5).generate(requests))
    pairs = [(c.request.prompt_ids, c.token_ids) for c in drawn]
    assert completion_logprobs(lm, pairs) == pytest.approx([c.logprob for c in drawn], abs=1e-3)
    assert lm.training
    assert modes
    assert not any(modes)  # no dropout
    assert completion_logprobs(lm, pairs, tokens_per_batch=1) == pytest.approx([c.logprob for c in drawn], abs=1e-3)


def test_the_temperature_of_a_scoring_pass(tiny, prompts):
    lm, tokenizer = tiny
    prompt, said = prompts.ids(numbers(1)[0]), tuple(tokenizer.encode("so it is", add_special_tokens=False))
    logits = lm(torch.tensor([prompt + said])).logits.detach()[0, len(prompt) - 1 : -1]
    expected = (logits / 0.6).log_softmax(-1)[range(len(said)), said].sum()
    assert completion_logprobs(lm, [(prompt, said)], 0.6) == pytest.approx([float(expected)], abs=1e-4)
    assert completion_logprobs(lm, [(prompt, said)], 1.0) != pytest.approx([float(expected)], abs=1e-2)


def test_rows_of_one_prompt_are_scored_together(tiny, prompts, monkeypatch):
    """So that the prompt passes the layers once; in the caller's order again afterwards."""
    lm, tokenizer = tiny
    said = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("no", "so it is", "so it must be, then", "a b")]
    asked = [prompts.ids(q) for q in numbers(2)]
    pairs = [(asked[i % 2], ids) for i, ids in enumerate(said)]
    alone = [completion_logprobs(lm, [pair])[0] for pair in pairs]
    batches: list[list[list[int]]] = []

    def watched(model, input_ids, *rest, **more):
        batches.append(input_ids.tolist())
        return token_logprobs(model, input_ids, *rest, **more)

    monkeypatch.setattr("emreason.scores.likelihood.token_logprobs", watched)
    room = 2 * max(len(prompt) + len(ids) for prompt, ids in pairs)
    assert completion_logprobs(lm, pairs, tokens_per_batch=room) == pytest.approx(alone, abs=1e-4)
    assert [{next(p for p in asked if tuple(row[: len(p)]) == p) for row in batch} for batch in batches] in (
        [{p} for p in asked],
        [{p} for p in asked[::-1]],
    )


def lab_bounds(lab, prompts, tokenizer, k, copies, seed=5):
    questions = make_questions(lab, copies)
    engine = TabularEngine(lab, questions, prompts, tokenizer)
    return marginal_bounds(questions, engine, prompts, tokenizer, engine.score, k=k, max_new_tokens=8, seed=seed)


def test_the_bound_has_its_exact_expectation(prompts, tokenizer):
    """E[log ½ (π(y*|z₁) + π(y*|z₂))] by enumeration of all pairs; the mean of 800 draws of it within 4.5 exact standard errors."""
    lab, copies = model(), 800
    bounds = lab_bounds(lab, prompts, tokenizer, k=2, copies=copies)
    pz = lab.z_logits.softmax(1)
    for x in range(3):
        said = lab.y_logits.softmax(1)[:, lab.gold[x]]
        values = [
            (float(pz[x, a] * pz[x, b]), math.log(float(said[a] + said[b]) / 2)) for a, b in itertools.product(range(len(said)), repeat=2)
        ]
        mean = sum(p * v for p, v in values)
        deviation = math.sqrt(sum(p * (v - mean) ** 2 for p, v in values))
        drawn = [b.value for b in bounds if b.question_id.startswith(f"{x}/")]
        assert sum(drawn) / copies == pytest.approx(mean, abs=4.5 * deviation / math.sqrt(copies))
        assert mean < float(lab.log_marginal()[x])
        assert 4.5 * deviation / math.sqrt(copies) < float(lab.log_marginal()[x]) - mean  # the test can tell the bound from its limit


def test_the_bound_rises_to_the_marginal_likelihood(prompts, tokenizer):
    """At K = 1,000 within 4.5 of its own standard errors, the bias −Var/2Kp² being far below one: so the error is right as well."""
    lab = model()
    for bound, exactly in zip(lab_bounds(lab, prompts, tokenizer, k=1000, copies=1), lab.log_marginal().tolist(), strict=True):
        assert bound.error is not None
        assert 0.001 < bound.error < 0.05
        assert bound.value == pytest.approx(exactly, abs=4.5 * bound.error)
        assert bound.answered == 1.0
        p = lab.y_logits.softmax(1)[:, lab.gold[int(bound.question_id[0])]]
        weight = lab.z_logits.softmax(1)[int(bound.question_id[0])]
        variance = float((weight * p.square()).sum() - (weight * p).sum() ** 2)
        assert bound.error == pytest.approx(math.sqrt(variance / 1000) / math.exp(exactly), rel=0.15)


def test_the_summary_over_questions(prompts, tokenizer):
    bounds = lab_bounds(model(), prompts, tokenizer, k=4, copies=5)
    values = torch.tensor([b.value for b in bounds], dtype=torch.float64)
    summary = summarize(bounds)
    assert summary["log_marginal"] == pytest.approx(float(values.mean()))
    assert summary["log_marginal_se"] == pytest.approx(float(values.std() / len(values) ** 0.5))
    assert summarize([replace(b, error=None) for b in bounds])["log_marginal_mc_se"] is None


@pytest.mark.parametrize(
    ("said", "z", "stated"),
    [
        ("3 + 5 = 8.\nAnswer: 8", "3 + 5 = 8.\n", True),
        ("Answer: 8", "", True),
        ("So it is. The answer is 8.", "So it is. ", True),
        ("Answer: 7? No.\nAnswer: 8", "Answer: 7? No.\n", True),
        ("no answer here", "no answer here", False),
    ],
)
def test_the_rationale_ends_where_the_last_statement_begins(tokenizer, said, z, stated):
    ids = (*map(tokenizer.convert_tokens_to_ids, said), tokenizer.eos_token_id)
    found, whether = rationale_ids(ids, tokenizer)
    assert (tokenizer.decode(found), whether) == (z, stated)


def test_an_answer_line_that_is_one_token_is_no_part_of_the_rationale(tokenizer):
    ids = tuple(tokenizer.encode("so\nAnswer: 7\n", add_special_tokens=False))
    assert len(ids) == 3
    assert rationale_ids(ids, tokenizer) == (ids[:2], True)


def test_what_is_scored_is_the_gold_answer_after_the_forced_cue(prompts, tokenizer):
    questions = [Question("q", "What is 3 + 4?", "7", "number")]
    seen = []

    def scorer(pairs, temperature=1.0):  # noqa: ARG001
        seen.extend((tokenizer.decode(p), tokenizer.decode(c)) for p, c in pairs)
        return [math.log(0.25)] * len(pairs)

    engine = ScriptedEngine(tokenizer, lambda r: "so 7\nAnswer: 9" if r.key[1] else "no idea")
    (bound,) = marginal_bounds(questions, engine, prompts, tokenizer, scorer, k=2, max_new_tokens=8, seed=1)
    plain = tokenizer.decode(prompts.ids(questions[0]))
    assert seen == [(plain + z, end) for z in ("no idea\nAnswer:", "so 7\nAnswer:") for end in (" 7\n", " 7<eos>")]
    assert bound.value == pytest.approx(math.log(0.5))  # the two endings exclude each other: their probabilities add
    assert bound.answered == 0.5
    assert all(r.params.temperature == 1 for r in engine.seen)


def test_the_bound_on_a_transformer_is_reproducible(prompts):
    lm, tokenizer = load_tiny()
    own = Prompts(tokenizer, prompts.template, ())
    score = functools.partial(completion_logprobs, lm)
    runs = [
        marginal_bounds(
            numbers(4)[part], InProcessEngine(lm, tokenizer, max_batch=b), own, tokenizer, score, k=3, max_new_tokens=12, seed=1
        )
        for part, b in ((slice(0, 4), 64), (slice(0, 2), 3), (slice(2, 4), 1))
    ]
    assert [b.value for b in runs[0]] == pytest.approx([b.value for b in runs[1] + runs[2]], abs=1e-4)

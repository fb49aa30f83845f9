"""Rewards: what each accepts, and the schemes that use them."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ScriptedEngine, numbers
from hydra.utils import instantiate
from test_config import compose_config
from test_samplers import RIGHT, run, scheme

from emreason.questions.datasets import explain_sum
from emreason.schemes import rewards
from emreason.schemes.samplers import Scheme, sample
from emreason.types import Question, UserError

SUM = Question("q", "What is 3 + 5 + 9?", "17", "number")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 5 = 8. 8 + 9 = 17.", [True, True]),
        ("11 + 9 = 19.", [False]),
        ("3+5=8, 8+9=17", [True, True]),
        ("3 + 5 + 9 = 8 + 9 = 17", [True]),
        ("3 + 5 = 8 + 9 = 17", [False]),  # a running total is no chain of equalities
        ("9 − 2 = 7 and 4 - 6 = -2", [True, True]),
        ("17 = 17", [True]),
        ("there are 3 apples and 5 pears", []),
        ("x = 3", []),
        ("1.5 + 2 = 3.5", []),
        ("4 + 5 = 55", [False]),
    ],
)
def test_equations_are_read_and_checked(text, expected):
    assert rewards.equations(text) == expected


def test_worked_sums_are_valid():
    for terms in ([3, 5, 9], [1, 1], [9, 9, 9, 9]):
        question = Question("q", "?", str(sum(terms)), "number")
        assert rewards.valid_sums(explain_sum(terms), str(sum(terms)), question)


@pytest.mark.parametrize(
    ("text", "answer", "correct", "valid", "formed"),
    [
        ("3 + 5 = 8. 8 + 9 = 17.\nAnswer: 17", "17", True, True, True),
        ("8 + 9 = 18.\nAnswer: 17", "17", True, False, True),  # the hint gave the answer
        ("3 + 5 = 8. 8 + 9 = 18.\nAnswer: 17", "17", True, False, True),
        ("It is known.\nAnswer: 17", "17", True, False, True),
        ("3 + 5 = 8. 8 + 9 = 17.\nAnswer: 18", "18", False, False, True),
        ("3 + 5 = 8. 8 + 9 = 17.", None, False, False, False),
    ],
)
def test_what_each_reward_accepts(text, answer, correct, valid, formed):
    assert rewards.correct(text, answer, SUM) == correct
    assert rewards.valid_sums(text, answer, SUM) == valid
    assert rewards.well_formed(text, answer, SUM) == formed


@pytest.mark.parametrize(("reward", "accepted"), [("correct", [True, True]), ("valid_sums", [True, False]), ("well_formed", [True, True])])
def test_the_sampler_accepts_by_its_reward(prompts, tokenizer, reward, accepted):
    texts = {"q000": "0 + 0 = 0" + RIGHT.format(0), "q001": "1 + 2 = 4" + RIGHT.format(2)}
    found, _ = run(numbers(2), scheme("pps", reward=f"emreason.schemes.rewards.{reward}"), lambda r: texts[r.key[0]], prompts, tokenizer)
    assert [r.accepted for r in sorted(found, key=lambda r: r.question_id)] == accepted


def test_truncated_is_rejected_by_every_reward(prompts, tokenizer):
    unfiltered = scheme("rs", reward="emreason.schemes.rewards.well_formed")
    (found,), _ = run(numbers(1), unfiltered, lambda _: (RIGHT.format(5), "length"), prompts, tokenizer)
    assert not found.accepted


def test_the_further_schemes():
    found = {
        name: instantiate(compose_config(f"sampler={name}").sampler) for name in ("rest_em", "star_m", "pps_m", "pps_valid", "unfiltered")
    }
    assert {s.display: (s.tries, s.keep) for s in found.values()} == {
        "ReST-EM-16": (("question",) * 16, 10),
        "STaR-4": (("question",) * 4 + ("rationalization",), 1),
        "PPS-4": (("rationalization",) * 4, 1),
        "PPS-valid-4": (("rationalization",) * 4, 1),
        "unfiltered": (("question",), 1),
    }
    assert found["rest_em"].distinct
    cfg = compose_config("experiment=rest_em")
    assert (cfg.sampler.name, cfg.m_step.init, cfg.m_step.optimizer) == ("rest_em", "base", "reset")
    weighted = instantiate(compose_config("sampler=pps_iw", "sampler.budget=5").sampler)
    assert (weighted.display, weighted.keep, weighted.tries) == ("PPS-IW-5", 5, ("rationalization",) * 5)


@pytest.mark.parametrize("name", ["nowhere", "emreason.schemes.rewards.perfect", "no.such.module", ""])
def test_an_unknown_reward_is_refused_by_name(name):
    with pytest.raises(UserError, match=r"sampler\.reward"):
        scheme("rs", reward=name)


def nothing(text, answer, question):  # noqa: ARG001
    """As a function does that returns only where the answer is right."""
    return np.True_ if answer == question.answer else None


def test_what_a_reward_of_ones_own_returns_is_true_or_false(prompts, tokenizer):
    questions = numbers(2)
    mine = Scheme("rs", "RS-1", 1, {"question": 1}, reward=f"{__name__}.nothing")
    engine = ScriptedEngine(tokenizer, lambda _: "so\nAnswer: 0")
    drawn = sample(questions, mine, engine, prompts, tokenizer, seed=1, iteration=0)
    assert sorted((r.question_id, r.accepted) for r in drawn) == [("q000", True), ("q001", False)]
    assert all(type(r.accepted) is bool for r in drawn)

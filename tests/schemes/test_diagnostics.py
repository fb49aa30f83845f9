"""What accepted rationales look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import numbers
from test_samplers import scheme
from test_weights import attempt

from emreason.schemes.diagnostics import answers_first, describe, e_step_record, mentions_hint, reasoning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 8\nBecause 3 + 5 is 8.\nAnswer: 8", True),
        ("The answer is 8. First, 3 + 5 = 8.\nAnswer: 8", True),
        ("Answer: 8", False),  # trivial: nothing follows
        ("3 + 5 = 8.\nAnswer: 8", False),
        ("We add both. The answer is 8.\nThat is 3 + 5.\nAnswer: 8", False),
        ("", False),
    ],
)
def test_the_answer_before_the_reasoning(text, expected):
    assert answers_first(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("As the hint says, it is 8.\nAnswer: 8", True),
        ("The given answer fits.\nAnswer: 8", True),
        ("Since the answer was provided, done.\nAnswer: 8", True),
        ("3 + 5 = 8.\nThe correct answer is 8.", False),
        ("We are given 3 and 5.\nAnswer: 8", False),
        ("Leaves hinder light.\nAnswer: 8", False),
    ],
)
def test_the_hint_is_mentioned(text, expected):
    assert mentions_hint(text) == expected


def test_the_shares():
    texts = ["3 + 5 = 8.\nAnswer: 8", "It is so.\nAnswer: 3", "It is so.\nAnswer: 4", "Answer: 5"]
    assert reasoning(texts[1]) == "It is so."
    shares = describe([attempt(i, text=t) for i, t in enumerate(texts)])
    assert shares == {"trivial_rate": 0.25, "answer_first_rate": 0.0, "hint_mention_rate": 0.0, "distinct_rate": 0.75}
    assert set(describe([]).values()) == {None}


def test_all_draws_are_described_and_not_only_the_accepted():
    """Three questions, of whose draws some, all and none are right, and one that does not fit."""
    plan = [("q000", False, 10), ("q000", True, 20), ("q001", True, 30), ("q002", False, 40), ("q002", False, 100)]
    drawn = [replace(attempt(i), question_id=q, accepted=a, n_tokens=n, logprob=-0.5 * n) for i, (q, a, n) in enumerate(plan)]
    drawn.append(replace(attempt(9), question_id="q003", accepted=False, n_tokens=0, logprob=0.0, finish_reason="error"))
    record = e_step_record(0, numbers(4), drawn, scheme("rs"), 1.0)
    assert (record["none_right"], record["some_right"], record["all_right"]) == (2, 1, 1)
    assert record["none_right"] == record["rejected"] + record["errored"]
    assert (record["draw_tokens_p10"], record["draw_tokens_mean"], record["draw_tokens_p90"]) == (14, 40, 76)
    assert record["entropy"] == 0.5
    assert e_step_record(0, numbers(1), [], scheme("rs"), 1.0)["entropy"] is None

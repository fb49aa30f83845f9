"""Sampled evaluation: pass@k and maj@k of given draws, and that the draws are several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import ScriptedEngine, numbers
from test_samplers import scheme

from emreason.evaluate import sampled


def test_pass_and_majority_of_scripted_draws(prompts, tokenizer):
    questions = numbers(3)
    said = {"q000": [0, 0, 5, 5], "q001": [4, 3, 3, 2], "q002": [1, 1, 4, 1]}  # gold: 0, 2, 4; q000 is a tie that the earlier wins
    engine = ScriptedEngine(tokenizer, lambda r: f"so\nAnswer: {said[r.key[0]][r.key[1]]}")
    experiment = SimpleNamespace(engine=engine, prompts=prompts, tokenizer=tokenizer)
    result = sampled(experiment, questions, scheme("rs"), k=4, n_examples=0, seed=1)
    assert result == pytest.approx({"pass@1": (2 + 1 + 1) / 12, "pass@2": (5 / 6 + 1 / 2 + 1 / 2) / 3, "pass@4": 1, "maj@4": 1 / 3})
    assert len({r.seed for r in engine.seen}) == 12
    assert not any("HINT" in tokenizer.decode(r.prompt_ids) for r in engine.seen)

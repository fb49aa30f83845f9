"""Sampled evaluation: pass@k and maj@k of given draws, and that the draws are several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import ScriptedEngine, numbers
from omegaconf import OmegaConf
from test_samplers import scheme

from emreason.evaluate import majority, sampled, with_run
from emreason.runs.experiment import compose
from emreason.types import Question, UserError


def test_pass_and_majority_of_scripted_draws(prompts, tokenizer):
    questions = numbers(3)
    said = {"q000": [0, 0, 5, 5], "q001": [4, 3, 3, 2], "q002": [1, 1, 4, 1]}  # gold: 0, 2, 4; q000 is a tie that the earlier wins
    engine = ScriptedEngine(tokenizer, lambda r: f"so\nAnswer: {said[r.key[0]][r.key[1]]}")
    experiment = SimpleNamespace(engine=engine, prompts=prompts, tokenizer=tokenizer)
    result = sampled(experiment, questions, scheme("rs"), k=4, n_examples=0, seed=1)
    assert result == pytest.approx({"pass@1": (2 + 1 + 1) / 12, "pass@2": (5 / 6 + 1 / 2 + 1 / 2) / 3, "pass@4": 1, "maj@4": 1 / 3})
    assert len({r.seed for r in engine.seen}) == 12
    assert not any("HINT" in tokenizer.decode(r.prompt_ids) for r in engine.seen)


def test_the_majority_is_one_of_values_and_of_the_earliest_draw(prompts, tokenizer):
    (number,), (text,) = numbers(1), [Question("t", "Where?", "Paris", "text")]
    assert majority(["17", "18", "$18.00", None, "18.0", "17"], number) == "18"
    assert majority(["Rome", "Paris", "paris", "Paris.", "Rome"], text) == "Paris"
    assert majority([None, None], number) is None
    engine = ScriptedEngine(tokenizer, lambda r: f"so\nAnswer: {'05'[r.key[1] % 2]}", in_flight=4)  # all four at once, finished in disorder
    experiment = SimpleNamespace(engine=engine, prompts=prompts, tokenizer=tokenizer)
    assert sampled(experiment, numbers(1), scheme("rs"), k=4, n_examples=0, seed=1)["maj@4"] == 1  # 0 and 5 twice each, 0 first
    assert [r.key[1] for r in engine.seen] != [0, 1, 2, 3]


def test_a_runs_evaluation_does_what_the_overrides_say(tmp_path):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    trained, _ = compose(["dataset=arc_challenge", "sampler=star", "data_root=/old", "evaluation.max_new_tokens=33"])
    (run / "config.yaml").write_text(OmegaConf.to_yaml(trained, resolve=True))

    def evaluated(*overrides):
        given = [f"run={run}", *overrides]
        return with_run(compose(given, "evaluate")[0], given)

    plain = evaluated("data_root=null")
    assert (plain.sampler.name, plain.sampler.temperature, plain.dataset.name) == ("star", 1.0, "arc_challenge")
    assert plain.dataset.load.data_root == "/old"
    changed = evaluated(
        "sampler.temperature=0.6",
        "sampler.max_new_tokens=999",
        "data_root=/new",
        "prompt@dataset.prompt=choice_text",
        "dataset.limit.test=7",
    )
    assert (changed.sampler.name, changed.sampler.temperature, changed.sampler.max_new_tokens) == ("star", 0.6, 999)
    assert (changed.dataset.name, changed.dataset.load.data_root, changed.dataset.limit.test) == ("arc_challenge", "/new", 7)
    assert changed.dataset.prompt.instruction != plain.dataset.prompt.instruction
    assert (plain.max_new_tokens, changed.max_new_tokens, evaluated("max_new_tokens=7").max_new_tokens) == (33, 999, 7)
    other = evaluated("dataset=sums_2", "dataset.limit.test=7", "sampler=rs")
    assert (other.dataset.name, other.dataset.limit.test, other.sampler.name) == ("sums", 7, "rs")
    for word in ("model=tiny_llama", "peft=lora", "model.name=x"):
        with pytest.raises(UserError, match="brings its own model"):
            evaluated(word)

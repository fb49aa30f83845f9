"""What `plan=true` says that an iteration takes at most, against what the E-step and the M-step then do."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from conftest import ScriptedEngine, numbers
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from emreason.em.steps import steps_of
from emreason.runs.experiment import CONF
from emreason.runs.journal import write_json
from emreason.runs.plan import at_most, plan
from emreason.schemes.choice import choose
from emreason.schemes.samplers import sample
from emreason.schemes.weights import score_weights, weigh

SCHEMES = sorted(path.stem for path in Path(CONF, "sampler").glob("*.yaml") if path.stem != "base")
MORE = {"unfiltered": ["m_step.normalize=rationales"], "rest_em": ["m_step.normalize=tokens", "m_step.epochs=2"]}


def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("answered", [False, True])
def test_an_iteration_does_what_the_plan_says_at_most(name, answered, prompts, tokenizer):
    """No question answered: every draw at its full length. Every one answered: every optimizer step."""
    cfg = composed(
        "model=tiny_llama", "dataset=sums_2", f"sampler={name}", "sampler.max_new_tokens=5", "m_step.batch_size=4", *MORE.get(name, [])
    )
    scheme, settings = hydra.utils.instantiate(cfg.sampler), hydra.utils.instantiate(cfg.m_step)
    questions = numbers(11)
    gold = {q.id: q.answer for q in questions}

    def script(request):
        if len(request.key) == 3:  # asked again
            return f" {gold[request.key[0]]}"
        return f"{request.key[1]} + 0 = {request.key[1]}, so\nAnswer: {gold[request.key[0]]}" if answered else ("12345", "length")

    chosen = choose(questions, scheme, [], seed=1)
    drawn = list(sample(chosen, scheme, ScriptedEngine(tokenizer, script), prompts, tokenizer, seed=1, iteration=0))
    most = at_most(cfg, scheme, len(questions))
    assert len(chosen) == most["questions"]
    if not answered:
        assert all(r.n_tokens == 5 for r in drawn)
        assert (len(drawn), sum(r.n_tokens for r in drawn)) == (most["draws"], most["tokens"])
        return
    assert len(drawn) <= most["draws"]
    by_id = {q.id: q for q in questions}
    if scheme.needs_scores:
        drawn = score_weights(drawn, by_id, scheme, prompts, lambda given, *_: [-1.0 for _ in given], 0)
    weighed = weigh(drawn, scheme, seed=1, iteration=0, memory={})
    steps = steps_of(weighed, by_id, len(chosen), prompts, settings, seed=1, iteration=0, rank=0, world_size=1)
    if scheme.weigh in ("rloo", "maxrl", "trice", "contrast"):  # where all draws are right, none counts more than another
        assert len(steps) <= most["steps"]
    else:
        assert len(steps) == most["steps"]


def test_an_engine_of_somebodys_own_has_a_plan_too(tmp_path):
    """It need not have the keys of ours."""
    said = plan(composed("model=smollm2_135m", "dataset=sums_2", "~engine.dtype", "~engine.max_batch"), tmp_path)
    assert "Memory at most, estimated in float32: E-step" in said


@pytest.mark.parametrize(
    ("status", "stopped", "says"),
    [
        ("finished", None, "it would go on"),
        ("finished", "token_budget", "nothing to do"),
        ("finished", "callback", "nothing to do"),
        ("interrupted", None, "it would go on"),
    ],
)
def test_a_plan_says_whether_a_run_would_go_on(tmp_path, status, stopped, says):
    iterations = [{"iteration": 0, "e_step": {"tokens": 100}, **({"stopped": stopped} if stopped else {})}]
    write_json(tmp_path / "summary.json", {"status": status, "iterations": iterations})
    budget = ["token_budget=100"] if stopped == "token_budget" else []
    said = plan(composed("model=tiny_llama", "dataset=sums_2", "trainer.max_epochs=2", *budget), tmp_path)
    assert f"{status} after 1 iterations; {says}" in said


@pytest.mark.parametrize("devices", ["auto", "-1"])
def test_all_devices_of_a_cpu_are_one(tmp_path, devices):
    said = plan(composed("model=smollm2_135m", "dataset=sums_2", "trainer.accelerator=cpu", f"trainer.devices={devices}"), tmp_path)
    assert "Memory at most" in said


def test_what_a_run_of_a_sweep_leaves_on_the_disk(tmp_path):
    """`make study` keeps 270 runs and none of their models."""
    kept = plan(composed("model=smollm2_135m", "dataset=sums_2"), tmp_path)
    assert "GB, model/ about 0.5 GB if auto means float32; the journal" in kept
    said = plan(composed("experiment=study_4", "engine.dtype=bfloat16"), tmp_path)
    assert "GB until the run is finished, model/ about 0.3 GB until the run is finished; the journal" in said

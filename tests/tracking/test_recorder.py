"""What the recorder measures before the first iteration and writes after each."""

from __future__ import annotations

import json
import mmap
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPLATE, ScriptedEngine, numbers
from test_module import em_module
from test_samplers import scheme

from emreason.em.e_step import EStep
from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal, read_lines
from emreason.runs.summary import Summary, peak_memory_bytes, phase_memory_bytes, read_summary, scalars
from emreason.tracking.recorder import JsonlLogger, Recorder
from emreason.types import Demonstration

QUESTIONS = numbers(6)
GOLD = {q.id: q.answer for q in QUESTIONS}


@pytest.fixture
def module():
    """Knows the answers where it is shown an example."""
    made = em_module()
    made.prompts = Prompts(made.tokenizer, TEMPLATE, [Demonstration(numbers(1)[0], "SHOWN")])
    shown = lambda request: "SHOWN" in made.tokenizer.decode(request.prompt_ids)  # noqa: E731
    made.engine = ScriptedEngine(made.tokenizer, lambda r: f"Answer: {GOLD[r.key]}" if shown(r) else "Answer: 99")
    return made


def recorder(folder, **splits):
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(questions={"test": QUESTIONS, "validation": QUESTIONS[:2]} | splits),
        global_rank=0, world_size=1, is_global_zero=True, current_epoch=1, should_stop=False,
        callbacks=[EStep(scheme("rs"), QUESTIONS, Journal(folder), seed=1)],
    )  # fmt: skip
    return Recorder(Summary(folder, {}), folder, ("test", "validation"), few_shot=1), trainer


def test_baselines_with_and_without_examples_are_two_measurements(tmp_path, module):
    record, trainer = recorder(tmp_path)
    found = record._baseline(trainer, module)
    assert {k: (v["accuracy"], v["n"]) for k, v in found.items()} == {"zero_shot": (0, 6), "few_shot": (1, 6), "validation": (0, 2)}
    for name, right in [("zero_shot", False), ("few_shot", True)]:
        lines = read_lines(tmp_path / f"predictions/baseline_{name}_test.jsonl")
        assert [line["correct"] for line in lines] == [right] * 6
    asked = len(module.engine.seen)
    assert record._baseline(trainer, module) == found
    assert len(module.engine.seen) == asked  # a sweep's next job with this model does not measure again
    with torch.no_grad():
        module.model.model.norm.weight[0] += 1
    record._baseline(trainer, module)
    assert len(module.engine.seen) == 2 * asked  # other weights do


def test_an_iteration_that_is_repeated_replaces_its_record(tmp_path, module):
    """Killed between the summary and the checkpoint."""
    record, trainer = recorder(tmp_path)
    earlier = [{"iteration": k, "e_step": {"tokens": 5}, "m_step": {}, "validation": None} for k in (0, 1)]
    record.summary.update(iterations=earlier)
    trainer.callbacks[0].record = {"iteration": 1, "tokens": 7}
    module.m_step_record = {"steps": 1}
    record.on_train_epoch_end(trainer, module)
    iterations = read_summary(tmp_path)["iterations"]
    assert [(r["iteration"], r["e_step"]["tokens"]) for r in iterations] == [(0, 5), (1, 7)]


def test_a_resumed_run_counts_the_tokens_and_seconds_of_the_iterations_it_goes_on_from(tmp_path, module):
    record, trainer = recorder(tmp_path)
    earlier = [{"iteration": k, "e_step": {"tokens": 5}, "m_step": {}, "validation": None} for k in (0, 1)]
    record.summary.update(iterations=earlier, peak_memory_bytes=2**60)
    spent = read_summary(tmp_path)
    spent["seconds"] = 100.0
    (tmp_path / "summary.json").write_text(json.dumps(spent))
    record = Recorder(Summary(tmp_path, {}), tmp_path, (), few_shot=0, token_budget=12)
    trainer.fit_loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=1)))
    trainer.loggers = [JsonlLogger(tmp_path)]
    record.on_train_start(trainer, module)
    assert not (tmp_path / "metrics.jsonl").exists()  # the base model's line is there since the beginning
    trainer.callbacks[0].record = {"iteration": 1, "tokens": 6}  # iteration 1 is done again: 5 + 6
    module.m_step_record = {"steps": 1}
    record.on_train_epoch_end(trainer, module)
    assert not trainer.should_stop
    trainer.callbacks[0].record, trainer.current_epoch = {"iteration": 2, "tokens": 1}, 2
    record.on_train_epoch_end(trainer, module)
    assert trainer.should_stop
    summary = read_summary(tmp_path)
    assert 100 <= summary["seconds"] < 130
    assert summary["peak_memory_bytes"] == 2**60


def test_metrics_of_an_iteration_that_is_done_again_go(tmp_path):
    first = JsonlLogger(tmp_path)
    for iteration in range(3):
        first.log_metrics({"m_step/nll": 1.0, "iteration": float(iteration)}, step=iteration)
    first.finalize("killed")
    again = JsonlLogger(tmp_path, keep_below=2)
    again.log_metrics({"m_step/nll": 2.0, "iteration": 2.0}, step=2)
    again.finalize("success")
    assert [(line["iteration"], line["m_step/nll"]) for line in read_lines(again.path)] == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_a_phase_has_a_peak_of_its_own_and_the_run_keeps_the_highest():
    phase_memory_bytes()
    with mmap.mmap(-1, 2**28) as held:  # freed for good, which `free` need not do
        held.write(b"x" * 2**28)
    high = phase_memory_bytes()
    low = phase_memory_bytes()
    assert high - low > 200e6
    assert peak_memory_bytes() >= high


def test_numbers_have_the_names_that_loggers_get():
    record = {
        "iteration": 1,
        "stopped": "callback",
        "validation": {"accuracy": 0.5, "ci95": [0.4, 0.6], "accuracy_by_position": {"A": {"n": 2, "accuracy": 1.0}}},
    }
    record["e_step"] = {"tokens": 12, "accepted": 3, "chance_acceptance": None}
    assert scalars(record | {"m_step": None}) == {
        "validation/accuracy": 0.5, "validation/ci95/low": 0.4, "validation/ci95/high": 0.6, "validation/accuracy_by_position/A": 1.0,
        "e_step/tokens": 12, "e_step/accepted": 3, "e_step/tokens_per_accepted": 4.0,
    }  # fmt: skip
    assert "tokens_per_accepted" not in record["e_step"]  # the record is left as it is


def test_a_run_begun_anew_reads_nothing_of_the_one_before(tmp_path):
    """Another rank may still be removing it."""
    Summary(tmp_path, {}).update(baseline={"zero_shot": None}, dtype="bfloat16", iterations=[{"iteration": 0}])
    assert Summary(tmp_path, {}).values["baseline"] == {"zero_shot": None}
    anew = Summary(tmp_path, {}, anew=True).values
    assert (anew["baseline"], anew["dtype"], anew["iterations"]) == (None, None, [])

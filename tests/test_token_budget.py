"""`token_budget`: runs stop at equal generation cost, stay finished, and a resumed one does not go on past it."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf
from peft import PromptTuningConfig, get_peft_model
from test_config import compose_config

from emreason.models.tiny import load_tiny
from emreason.runs.plan import plan
from emreason.runs.summary import read_summary
from emreason.train import train
from emreason.types import UserError

SMALL = ["dataset.limit.train=40", "dataset.limit.validation=2", "dataset.limit.test=2", "evaluation.baseline=[]", "engine.dtype=float32"]


def config(*overrides):
    cfg = compose_config("experiment=smoke", "m_step.on_zero_accepted=skip", "trainer.max_epochs=9", *SMALL, *overrides)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def test_a_run_stops_at_its_token_budget_and_stays_there(tmp_path):
    first = train(config("token_budget=1"), tmp_path)
    assert (first["status"], len(first["iterations"])) == ("finished", 1)
    tokens = first["iterations"][0]["e_step"]["tokens"]
    more = config(f"token_budget={tokens + 1}")
    second = train(more, tmp_path)  # a larger budget goes on, by one iteration
    assert [r["iteration"] for r in second["iterations"]] == [0, 1]
    assert train(more, tmp_path)["iterations"] == second["iterations"]
    # killed between its last iteration and the test: the same command must test it, not train it further
    summary = read_summary(tmp_path) | {"status": "running", "test": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    third = train(more, tmp_path)
    assert (third["status"], third["test"]["n"]) == ("finished", 2)
    assert third["iterations"] == second["iterations"]


def test_a_run_that_a_callback_has_ended_stays_finished(tmp_path):
    """Killed between its last iteration and the test, too."""
    early = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=1"]
    first = train(config(*early), tmp_path)
    assert [record.get("stopped") for record in first["iterations"]] == [None, "callback"]
    assert train(config(*early), tmp_path)["iterations"] == first["iterations"]
    (tmp_path / "summary.json").write_text(json.dumps(read_summary(tmp_path) | {"status": "running", "test": None}))
    again = train(config(*early), tmp_path)
    assert (again["status"], again["iterations"]) == ("finished", first["iterations"])


def test_a_metric_that_nothing_logs_may_be_mended(tmp_path):
    early = ["callbacks=early_stopping", "trainer.max_epochs=2", "callbacks.early_stopping.patience=1"]
    with pytest.raises(UserError, match=r"nothing logs val_acc, .* may be one of [^`]*validation/accuracy"):
        train(config(*early, "callbacks.early_stopping.monitor=val_acc"), tmp_path)
    assert len(train(config(*early), tmp_path)["iterations"]) == 2
    with pytest.raises(UserError, match="patience"):
        train(config(*early, "callbacks.early_stopping.patience=2", "trainer.max_epochs=3"), tmp_path)


def test_a_finished_run_cannot_be_merged_and_says_so(tmp_path):
    adapter = ["peft=lora", "trainer.max_epochs=1", "dataset.limit.train=8"]
    train(config(*adapter), tmp_path)
    with pytest.raises(UserError, match=r"peft\.merge=True: this run is finished"):
        train(config(*adapter, "peft.merge=true"), tmp_path)


def test_other_data_under_a_begun_run_is_refused(tmp_path, monkeypatch):
    """A file that has changed between two calls would mix what was learned from with what is tested on."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"question": f"What is {a} + {b}?", "answer": str(a + b)}) for a in range(5) for b in range(5)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    given = ["dataset=file", "dataset.path=mine.jsonl", "evaluation.few_shot=0", "sampler.worked_examples=0"]
    first = train(config(*given, "trainer.max_epochs=1"), tmp_path / "run")
    assert first["data"].keys() == {"train", "validation", "test"}
    more = config(*given, "trainer.max_epochs=2")
    (tmp_path / "mine.jsonl").write_text("\n".join([*rows[:-1], '{"question": "What is 9 + 9?", "answer": "18"}']))
    for again in (more, config(*given, "trainer.max_epochs=1")):  # the second has nothing left to do: its old result is not the answer
        with pytest.raises(UserError, match=r"data of this run .* has changed since it began"):
            train(again, tmp_path / "run")
        assert "would be refused: The data" in plan(again, tmp_path / "run")
    assert read_summary(tmp_path / "run")["status"] == "finished"  # a refused one is left as it is
    (tmp_path / "mine.jsonl").unlink()  # a finished run can be looked at without its data
    assert train(config(*given, "trainer.max_epochs=1"), tmp_path / "run")["test"] == first["test"]
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        train(more, tmp_path / "run")
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    assert len(train(more, tmp_path / "run")["iterations"]) == 2


def test_a_server_that_is_lost_is_not_told_as_another_rank(tmp_path, monkeypatch):
    def lost(*_):
        raise UserError("engine.server=…: the connection was lost (Connection reset by peer).")

    monkeypatch.setattr("emreason.train._run", lost)
    with pytest.raises(UserError, match="the connection was lost"):
        train(config(), tmp_path)


def test_an_adapter_that_is_a_prompt_is_not_trained(tmp_path):
    """Its virtual tokens are in what the engine draws, and were in no log-probability."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_tiny("llama", seed=0)[0], prompt).save_pretrained(tmp_path / "prompt")
    add = f"{{_target_: emreason.models.loading.load_adapter, _partial_: true, folder: {tmp_path / 'prompt'}}}"
    with pytest.raises(UserError, match="prefix tuning"):
        train(config(f"+peft.add={add}"), tmp_path / "run")


def test_a_bad_budget_is_refused(tmp_path):
    with pytest.raises(UserError, match="token_budget"):
        train(config("token_budget=0"), tmp_path)

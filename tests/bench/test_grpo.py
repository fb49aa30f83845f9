"""TRL's GRPO beside the schemes: budgets and reward with a trainer of scripted draws, and the run folder that the report reads."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from emreason.bench.grpo import __main__ as grpo
from emreason.bench.grpo import train
from emreason.reports.reading import collect, read_predictions
from emreason.scores.scoring import predict
from emreason.types import Question, UserError

OVERRIDES = ["experiment=smoke", "model=tiny_llama", "engine.dtype=float32", "token_budget=40", "seed=3"]


class Config:
    def __init__(self, **settings):
        self.settings = settings


class Trainer:
    """Draws for one question a step: the gold answer, then a wrong one, of five tokens each."""

    def __init__(self, model, reward_funcs, args, train_dataset, processing_class, callbacks):  # noqa: ARG002
        self.model, self.reward, self.settings, self.rows, self.callbacks = model, reward_funcs, args.settings, train_dataset, callbacks
        self.state, self.rewards = SimpleNamespace(global_step=0), []
        last.append(self)

    def train(self):
        control = SimpleNamespace(should_training_stop=False)
        while not control.should_training_stop:
            row = self.rows[self.state.global_step % len(self.rows)]
            gold = json.loads(row["question"])["answer"]
            said = [[{"role": "assistant", "content": f"Thinking.\nAnswer: {answer}"}] for answer in (gold, "-77")]
            ids = [[0] * 5] * 2
            self.rewards.append(
                self.reward(completions=said, completion_ids=ids, question=[row["question"]] * 2, prompts=[row["prompt"]] * 2)
            )
            self.state.global_step += 1
            for callback in self.callbacks:
                callback.on_step_end(None, self.state, control)


last: list[Trainer] = []


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOConfig=Config, GRPOTrainer=Trainer))
    monkeypatch.setattr(grpo, "train", lambda work, envs, scratch: train.main(json.loads(json.dumps(work))))  # noqa: ARG005
    monkeypatch.setattr(sys, "argv", ["grpo", *OVERRIDES, "--generations", "2", "--lr", "1e-5", "--trl", "beta=0.1"])


@pytest.mark.usefixtures("scripted")
def test_a_run_folder_that_the_report_reads(tmp_path, capsys):
    grpo.main()
    (run,) = collect([tmp_path / "outputs"])
    assert run.problem is None
    assert (run.sampler, run.scheme, run.seed) == ("grpo", "TRL grpo-2, lr 1e-05", 3)
    assert run.iterations[0].tokens == 40  # four steps of ten
    assert run.iterations[0].acceptance == 1
    assert len(read_predictions(run, "test")) == run.test.n > 0
    assert "40 tokens" in capsys.readouterr().out
    trainer = last[-1]
    assert trainer.rewards == [[1.0, 0.0]] * 4
    assert trainer.settings["beta"] == 0.1
    assert trainer.settings["top_p"] == 1.0
    assert trainer.settings["learning_rate"] == 1e-5
    assert trainer.rows[0]["prompt"][-1]["role"] == "user"
    assert "hint" not in trainer.rows[0]["prompt"][-1]["content"].lower()


@pytest.mark.usefixtures("scripted")
def test_seconds_end_it_too(tmp_path):
    sys.argv += ["--seconds", "1e-9"]
    grpo.main()
    (run,) = collect([tmp_path / "outputs"])
    assert run.iterations[0].tokens == 10


@pytest.mark.usefixtures("scripted")
def test_worked_examples_are_in_the_prompts_that_train_and_in_those_that_test(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(grpo, "predict", lambda *a, n_examples, **k: shown.append(n_examples) or predict(*a, n_examples=n_examples, **k))
    sys.argv += ["--examples", "1"]
    grpo.main()
    (run,) = collect([tmp_path / "outputs"])
    assert run.scheme == "TRL grpo-2,examples=1, lr 1e-05"
    assert shown == [1]
    assert [turn["role"] for turn in last[-1].rows[0]["prompt"]] == ["user", "assistant", "user"]


@pytest.mark.usefixtures("scripted")
def test_a_training_without_an_end_is_refused(capsys):
    sys.argv[:] = [a.replace("token_budget=40", "token_budget=null") for a in sys.argv]
    with pytest.raises(SystemExit):
        grpo.main()
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.usefixtures("scripted")
def test_a_reward_that_trl_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr("emreason.questions.datasets.Dataset.questions", lambda self, split: [verified])  # noqa: ARG005
    with pytest.raises(UserError, match="verifier of its own"):
        grpo.main()


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("other", ["peft=lora", "sampler=pps_valid", "+dataset.prompt.template={enable_thinking: false}"])
def test_what_is_not_carried_over_is_refused(other):
    sys.argv.insert(1, other)
    with pytest.raises(UserError, match="leave it out"):
        grpo.main()


verified = Question("1", "2 + 2?", "4", "number", verify=lambda answer: answer == "4")

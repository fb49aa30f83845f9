"""What a checkpoint holds: everything where training may go on from it, no optimizer where it will not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hydra.utils import instantiate
from kills import metrics
from omegaconf import OmegaConf
from test_config import compose_config
from test_train import assert_same, learned
from transformers import AutoModelForCausalLM

from emreason.em.checkpoints import AtomicCheckpointIO, iterations_in
from emreason.em.module import EMModule
from emreason.models import loading
from emreason.runs.summary import Summary, read_summary
from emreason.tracking.recorder import Checkpoints
from emreason.train import train
from emreason.types import UserError

SMALL = ["dataset.limit.train=40", "dataset.limit.validation=3", "dataset.limit.test=2", "evaluation.baseline=[]"]


def config(*overrides):
    cfg = compose_config("experiment=smoke", "m_step.on_zero_accepted=skip", "trainer.max_epochs=2", *SMALL, *overrides)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def killed(monkeypatch, folder, cfg):
    """Run until the export, which does not happen."""

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emreason.models.loading.export", kill)
        with pytest.raises(KeyboardInterrupt):
            train(cfg, folder)
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_checkpoint_of_all_has_no_optimizer_and_still_ends_the_run(tmp_path, monkeypatch, dtype):
    cfg = config("keep_checkpoints=false", f"engine.dtype={dtype}")
    checkpoint = killed(monkeypatch, tmp_path / "run", cfg)
    assert checkpoint["optimizer_states"] == []
    assert "master_weights" not in checkpoint
    with pytest.raises(UserError, match=r"after 2 iterations.*trainer\.max_epochs=2"):
        train(config("keep_checkpoints=false", f"engine.dtype={dtype}", "trainer.max_epochs=3"), tmp_path / "run")
    ended, whole = train(cfg, tmp_path / "run"), train(cfg, tmp_path / "whole")
    assert (ended["status"], len(ended["iterations"])) == ("finished", 2)
    assert ended["test"]["accuracy"] == whole["test"]["accuracy"]
    assert not (tmp_path / "run/checkpoints").exists()


def test_earlier_checkpoints_and_kept_ones_have_it(tmp_path, monkeypatch):
    assert killed(monkeypatch, tmp_path / "kept", config("engine.dtype=bfloat16")).keys() >= {"master_weights", "optimizer_states"}
    sizes = []
    save = AtomicCheckpointIO.save_checkpoint

    def saved(self, checkpoint, *rest, **options):
        sizes.extend(len(s["state"]) for s in checkpoint.get("optimizer_states", []))
        save(self, checkpoint, *rest, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", saved)
    train(config("keep_checkpoints=false"), tmp_path / "run")
    assert len(sizes) == 1  # of two iterations
    assert sizes[0] > 0


def test_a_budget_ends_a_run_like_max_epochs_does(tmp_path, monkeypatch):
    checkpoint = killed(monkeypatch, tmp_path, config("keep_checkpoints=false", "token_budget=1", "trainer.max_epochs=9"))
    assert checkpoint["optimizer_states"] == []
    assert len(read_summary(tmp_path)["iterations"]) == 1


def test_an_optimizer_that_is_reset_is_not_saved_and_nothing_changes(tmp_path, monkeypatch):
    """And a precision that was measured is kept."""
    asked: list[str] = []
    monkeypatch.setattr(loading, "choose_dtype", lambda name, _: asked.append(name) or torch.bfloat16)
    reset = ["m_step.optimizer=reset", "engine.dtype=auto"]
    train(config(*reset, "trainer.max_epochs=1"), tmp_path / "parts")
    assert torch.load(tmp_path / "parts/checkpoints/last.ckpt", weights_only=True)["optimizer_states"] == []
    parts, whole = train(config(*reset), tmp_path / "parts"), train(config(*reset), tmp_path / "whole")
    assert asked == ["auto", "bfloat16", "auto"]
    assert parts["iterations"][1]["m_step"]["nll"] == whole["iterations"][1]["m_step"]["nll"]


def test_more_iterations_continue_a_finished_run(tmp_path):
    """As if it had not been interrupted: weights, rationales, scores and metrics; what was done is not done again."""
    more = ["trainer.max_epochs=4", "m_step.warmup_steps=60", "engine.dtype=float32"]  # of 80 optimizer steps
    begun = train(config(*more, "trainer.max_epochs=2"), tmp_path / "parts")
    with (tmp_path / "parts/metrics.jsonl").open("a") as lines:  # as if it had then been killed in the third
        lines.write('{"iteration": 2, "step": 41, "m_step/nll": 9.9}\n')
    (tmp_path / "parts/evaluation_test.json").write_text("{}")
    parts = train(config(*more), tmp_path / "parts")
    assert not (tmp_path / "parts/evaluation_test.json").exists()  # of the model that was
    train(config(*more), tmp_path / "whole")
    assert parts["iterations"][:2] == begun["iterations"]
    assert [r["iteration"] for r in parts["iterations"]] == [0, 1, 2, 3]
    one, other = (learned(tmp_path / name) for name in ("parts", "whole"))
    assert_same(one, other)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert {r["question_id"] for r in one[1]} == {q.id for q in instantiate(config().dataset).questions("train")}
    assert (parts["iterations"][0]["validation"]["n"], parts["test"]["n"]) == (3, 2)


ACCURACIES = [0.25, 0.75, 0.5, 0.75]  # of iterations 0 …: the best is neither the first nor the last


@pytest.fixture
def scripted_validation(monkeypatch):
    """Validation accuracies as above; the score of the test is the real one."""
    evaluate = EMModule.evaluate

    def scripted(self, questions, label, n_examples=0):
        score, predictions = evaluate(self, questions, label, n_examples)
        return score | ({"accuracy": ACCURACIES[self.current_epoch]} if label.startswith("Validation") else {}), predictions

    monkeypatch.setattr(EMModule, "evaluate", scripted)


def exported_is(folder, iteration):
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert read_summary(folder)["best_iteration"] == best["epoch"] == iteration
    assert all(torch.equal(exported[k.removeprefix("model.")], v) for k, v in best["state_dict"].items())


@pytest.mark.usefixtures("scripted_validation")
def test_a_run_folder_that_was_moved_goes_on_with_the_best_it_had(tmp_path, monkeypatch):
    """Moved where it had been killed before the test, then moved again and extended."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    killed(monkeypatch, first, config())
    for path in first.rglob("*"):
        if path.is_file() and path.name != "config.yaml":  # W&B's folder, which may change
            assert str(first).encode() not in path.read_bytes(), path
    first.rename(second)
    assert train(config(), second)["status"] == "finished"
    exported_is(second, 1)
    second.rename(third)
    weights = torch.load(third / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert len(train(config("trainer.max_epochs=4"), third)["iterations"]) == 4
    exported_is(third, 1)
    after = torch.load(third / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[k], after[k]) for k in weights)


def test_an_e_step_that_was_interrupted_counts_its_seconds_before(tmp_path, monkeypatch):
    """Killed in its M-step: what is replayed took time, too."""
    killed(monkeypatch, tmp_path, config("trainer.max_epochs=1"))
    for name in ("summary.json", "checkpoints"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    journal = tmp_path / "rationales/iteration=000.jsonl"
    lines = [json.loads(line) for line in journal.open()]
    assert lines[0]["seconds"] > 0
    journal.write_text("".join(json.dumps(line | {"seconds": 1000.0 + n}) + "\n" for n, line in enumerate(lines)))
    (record,) = train(config("trainer.max_epochs=1"), tmp_path)["iterations"]
    assert 1000 + len(lines) - 1 < record["e_step"]["seconds"] < 1100 + len(lines)


def test_a_kill_between_two_checkpoints_leaves_the_best_one_there_is(tmp_path):
    """`next.ckpt` is the best once the iteration that it is of is done, and nothing before."""
    checkpoints = Checkpoints(Summary(tmp_path, {}), tmp_path)
    assert checkpoints.restore() == 0
    checkpoints.best.parent.mkdir()

    def write(path, processed):
        torch.save({"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": processed}}}}}, path)

    write(checkpoints.best, 1)
    write(checkpoints.last, 2)
    write(checkpoints.next, 3)  # killed while `last` was written: the third iteration is repeated
    assert checkpoints.restore() == 2
    assert iterations_in(checkpoints.best) == 1
    assert not checkpoints.next.exists()  # it could be taken for the third once that is done
    write(checkpoints.next, 2)  # killed after that
    assert checkpoints.restore() == 2
    assert iterations_in(checkpoints.best) == 2
    assert not checkpoints.next.exists()


def test_a_finished_run_gives_up_its_checkpoints_when_asked_to(tmp_path):
    train(config("trainer.max_epochs=1"), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    train(config("trainer.max_epochs=1", "keep_checkpoints=false"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "model").exists()


def test_a_resumed_run_drops_the_units_that_it_would_have_dropped(tmp_path):
    overrides = ["engine.dtype=float32", "peft=lora", "peft.add.dropout=0.5"]
    train(config(*overrides, "trainer.max_epochs=1"), tmp_path / "run")
    resumed, whole = (train(config(*overrides), tmp_path / folder) for folder in ("run", "whole"))
    plain = train(config(*overrides, "peft.add.dropout=0"), tmp_path / "plain")
    told = [[r["m_step"]["nll"] for r in summary["iterations"]] for summary in (resumed, whole, plain)]
    assert told[0] == told[1] != told[2]


def test_a_resumed_run_in_bfloat16_ends_at_the_same_bits(tmp_path):
    overrides = ["engine.dtype=bfloat16", "peft=none"]
    train(config(*overrides), tmp_path / "run")
    for folder in ("run", "whole"):
        train(config(*overrides, "trainer.max_epochs=3"), tmp_path / folder)
    resumed, whole = (torch.load(tmp_path / f / "checkpoints/last.ckpt", weights_only=True) for f in ("run", "whole"))
    for a, b in zip(resumed["master_weights"], whole["master_weights"], strict=True):
        assert torch.equal(a, b)
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    assert all(torch.equal(resumed["state_dict"][key], value) for key, value in whole["state_dict"].items())
    assert any(not torch.equal(m.bfloat16(), p) for m, p in zip(whole["master_weights"], whole["state_dict"].values(), strict=False))

"""What a checkpoint holds: everything where training may go on from it, no optimizer where it will not."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from test_config import compose_config

from emreason.em.checkpoints import AtomicCheckpointIO
from emreason.runs.summary import read_summary
from emreason.train import train
from emreason.types import UserError

SMALL = ["dataset.limit.train=40", "dataset.limit.validation=2", "dataset.limit.test=2", "evaluation.baseline=[]"]


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


def test_an_optimizer_that_is_reset_is_not_saved_and_nothing_changes(tmp_path):
    reset = ["m_step.optimizer=reset", "engine.dtype=bfloat16"]
    train(config(*reset, "trainer.max_epochs=1"), tmp_path / "parts")
    assert torch.load(tmp_path / "parts/checkpoints/last.ckpt", weights_only=True)["optimizer_states"] == []
    parts, whole = train(config(*reset), tmp_path / "parts"), train(config(*reset), tmp_path / "whole")
    assert parts["iterations"][1]["m_step"]["nll"] == whole["iterations"][1]["m_step"]["nll"]


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

"""Every config composes and resolves; what is installed finds its configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from emreason.evaluate import result_file
from emreason.runs.checks import check_values
from emreason.runs.experiment import CONF
from emreason.schemes.samplers import Scheme
from emreason.types import UserError

GROUPS = [(p.parent.name, p.stem) for p in sorted(Path(CONF).glob("*/*.yaml")) if p.stem != "base" and p.parent.name != "prompt"]


def compose_config(*overrides: str, name: str = "train"):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name, overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = "out"
        return cfg


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_composes_and_resolves(group, option):
    extra = ["model.load.path=x.gguf"] if option == "gguf" else []
    cfg = compose_config(f"{group}={option}", *extra)
    OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)


def test_the_three_schemes():
    tries = {}
    for name in ("rs", "star", "pps"):
        scheme = instantiate(compose_config(f"sampler={name}").sampler)
        assert isinstance(scheme, Scheme)
        tries[scheme.display] = scheme.tries
    assert tries == {
        "RS-4": ("question",) * 4,
        "STaR": ("question", "rationalization"),
        "PPS": ("rationalization",),
    }
    assert instantiate(compose_config("sampler=rs", "sampler.budget=2").sampler).display == "RS-2"


def test_run_folders_differ_where_runs_do():
    folders = {
        compose_config(*overrides).hydra.run.dir
        for overrides in (["seed=1"], ["seed=2"], ["sampler=pps"], ["sampler=rs"], ["sampler=rs", "sampler.budget=1"], ["tag=x"])
    }
    assert len(folders) == 6


def test_the_evaluation_config_composes():
    cfg = compose_config(name="evaluate")
    assert cfg.split == "test"


def test_results_of_one_run_do_not_replace_each_other(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset: {name: sums}\n")
    asked = [[], ["split=validation"], ["method=loglikelihood"], ["dataset=arc_easy"], ["dataset=arc_easy", "method=loglikelihood"]]
    names = [result_file(compose_config(f"run={tmp_path}", *overrides, name="evaluate")) for overrides in asked]
    assert names[0] == "evaluation_test.json"
    assert len(set(names)) == len(asked)


@pytest.mark.parametrize(
    "override",
    [
        "sampler.budget=0", "sampler.budget=1.5", "sampler.temperature=-1.0", "sampler.top_p=0.0", "sampler.max_new_tokens=0",
        "sampler.worked_examples=-1", "sampler.keep=0", "sampler.weigh=much", "sampler.truncate=0.5", "sampler.choose=some",
        "sampler.share=0", "m_step.epochs=0", "m_step.batch_size=0", "m_step.tokens_per_batch=-1", "m_step.init=zero",
        "m_step.normalize=mean", "m_step.max_grad_norm=0.0", "m_step.optimizer=drop", "m_step.on_zero_accepted=stop",
        "m_step.warmup_steps=-1",
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=key):
        check_values(compose_config(override))

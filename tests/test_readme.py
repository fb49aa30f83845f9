"""The front page: its commands compose and pass the checks, its links lead somewhere, and it is short."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from conftest import REPO
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from emreason.runs import experiment, keys
from emreason.runs.checks import check_values, quoted

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE) if not kind]
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]


def jobs(words):
    """The jobs of a sweep: one for each choice of `a,b`; the flags left out."""
    parsed = OverridesParser.create().parse_overrides([quoted(word) for word in words if word != "-m"])
    options = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line] for o in parsed
    ]
    return product(*options)


@pytest.mark.parametrize("line", [line for line in LINES if re.match(r"emreason(-eval)? ", line) and "--config-dir" not in line])
def test_a_command_composes_and_is_accepted(line, monkeypatch):
    """But for what this machine lacks: GPUs, vLLM."""
    monkeypatch.setattr(keys, "EXTRAS", {})
    command, *words = shlex.split(line)
    name = "evaluate" if command == "emreason-eval" else "train"
    cpu = ["trainer.accelerator=auto", "trainer.devices=1"] if name == "train" else []
    for overrides in jobs(words):
        with initialize_config_dir(experiment.CONF, version_base="1.3"):
            cfg = compose(name, overrides=[*overrides, *cpu], return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        check_values(cfg)


def test_targets_of_make_exist():
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)", README)
    assert len(named) > 3
    assert set(named) <= set(targets)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("https://")]
    assert len(links) > 8
    assert [link for link in links if not (REPO / link).exists()] == []


def test_it_is_short():
    assert len(README.splitlines()) <= 150
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 900


def test_the_outsiders_scheme_is_the_one_that_is_run():
    shown = re.search(r"```yaml\n#.*\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown[1] in (REPO / "tests/outsider/conf/sampler/patient.yaml").read_text()


def test_a_file_of_ones_own_as_it_is_shown(tmp_path, monkeypatch):
    """The five questions and the YAML with worked examples of `conf/README.md`."""
    shown = (REPO / "conf" / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```\n(\{\"question\".*?)^```$", shown, re.DOTALL | re.MULTILINE)
    (written,) = re.findall(r"^```yaml\n(defaults: \[file\].*?)^```$", shown, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(lines)
    Path("my/dataset").mkdir(parents=True)
    Path("my/dataset/mine.yaml").write_text(written)
    dataset = instantiate(experiment.compose(["dataset=mine"], config_dir="my")[0].dataset)
    assert sum(len(dataset.questions(split)) for split in ("train", "validation", "test")) == 5
    assert [(example.question.answer, example.question.kind) for example in dataset.worked_examples()] == [("5", "number")] * 2

"""`--help` for people; every key there is: `--cfg job`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from emreason.runs.experiment import CONF

GROUPS = {
    "model": "the language model",
    "dataset": "its questions",
    "sampler": "the E-step's sampling scheme",
    "engine": "what generates",
    "peft": "train adapters instead of all weights",
    "logger": "beside metrics.jsonl, [several]",
    "callbacks": "of Lightning, [several]",
    "experiment": "settings that belong together",
    "hydra/launcher": "with -m: jobs side by side or on a cluster",
    "hydra/sweeper": "with -m: a search over settings",
}

TRAIN = """\
emreason: a language model learns to reason from questions and answers alone, by
expectation maximization (arXiv:2512.20169).

  emreason experiment=smoke                    the whole loop, tiny, in seconds
  emreason dataset=sums sampler=pps seed=2     a run; again: resumes it
  emreason -m sampler=rs,star,pps seed=1,2,3   a sweep; ends with the comparison
  emreason-eval run=outputs/…                  a finished run or a base model
  emreason-report outputs/…                    tables, figures over run folders

Groups, GROUP=OPTION; the first is the default (experiment, hydra/…: none is):
{groups}
Keys, KEY=VALUE: plan (=true: what it would do) seed tag data_root overwrite
  quiet token_budget dataset.limit.train sampler.budget sampler.temperature
  optimizer.lr trainer.max_epochs (EM iterations) hydra.run.dir (run folder)
Every key: emreason --cfg job; meanings: conf/train.yaml; more: --hydra-help.
Completion by TAB: eval "$(emreason -sc install=bash)"; also zsh and fish.
"""

EVALUATE = """\
emreason-eval: the accuracy of a base model or of a finished run on a split.

  emreason-eval run=outputs/runs/sums/…/seed=1          a finished run, its test
  emreason-eval model=qwen25_0_5b split=validation      a base model
  emreason-eval run=… samples=8                         also pass@k and maj@k

Groups, GROUP=OPTION; the first is the default:
{groups}
Keys, KEY=VALUE: split method examples samples bound seed data_root predictions
  dataset.limit.test max_new_tokens
Every key: emreason-eval --cfg job; meanings: conf/evaluate.yaml.
"""


def asked_for(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(argument in ("-h", "--help") for argument in arguments)


def text(config: str) -> str:
    """The help of `emreason` (`train`) or `emreason-eval` (`evaluate`), as wide as the terminal."""
    template, groups = (TRAIN, list(GROUPS)) if config == "train" else (EVALUATE, ["model", "dataset", "engine"])
    return template.format(groups="\n".join(map(_group, groups, [_defaults(config)] * len(groups))))


def _group(group: str, defaults: dict[str, str]) -> str:
    options = sorted(file.stem for file in Path(CONF, group).glob("*.yaml") if file.stem != "base")  # `base`: what the others share
    options.sort(key=lambda option: option != defaults.get(group))
    line = f"  {group:<15} {GROUPS[group]}: {' '.join(options)}"
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    return textwrap.fill(line, width, subsequent_indent=" " * 18, break_on_hyphens=False)


def _defaults(config: str) -> dict[str, str]:
    listed = yaml.safe_load(Path(CONF, f"{config}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: str(option) for item in listed if isinstance(item, dict) for group, option in item.items()}

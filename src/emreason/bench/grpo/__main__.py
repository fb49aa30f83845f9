"""`python -m emreason.bench.grpo experiment=study_words seed=1 [--lr 1e-6] [--seconds 300] [--trl bf16=False …]`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict

import emreason
from emreason.bench.contenders import python_of
from emreason.progress import bar
from emreason.runs.experiment import build, compose, on
from emreason.runs.journal import write_json
from emreason.runs.summary import git_commit
from emreason.schemes.samplers import CORRECT
from emreason.scores.scoring import Stopwatch, predict, score
from emreason.tracking.recorder import write_predictions
from emreason.types import UserError


def work_of(cfg: DictConfig, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The base model in `scratch`, and what `train.py` reads: prompts as chats, questions, budgets, settings of `GRPOConfig`.

    Raises:
        UserError: the run has what is not carried over: adapters, a reward or verifier of its own, arguments of the chat template.
    """
    aside = {"peft": "add" in cfg.peft, "sampler.reward": cfg.sampler.get("reward", CORRECT) != CORRECT}
    if other := [key for key, there in (aside | {"dataset.prompt.template": bool(cfg.dataset.prompt.get("template"))}).items() if there]:
        raise UserError(f"{other[0]}: GRPO here trains all weights on right answers under the plain chat; leave it out.")
    start = build(cfg)
    model: Any = start.model
    model.to(torch.float32).save_pretrained(scratch / "base")
    start.tokenizer.save_pretrained(scratch / "base")
    questions = start.dataset.questions("train")
    if any(q.verify for q in questions):
        raise UserError(f"Dataset {cfg.dataset.name} has a verifier of its own, which TRL's process does not have; choose another.")
    prompts = [start.prompts.messages(q, options.examples) for q in questions]
    asked = [json.dumps(dataclasses.asdict(q) | {"verify": None}) for q in questions]
    rows = [{"prompt": prompt, "question": question} for prompt, question in zip(prompts, asked, strict=True)]
    settings = {
        "learning_rate": options.lr,
        "num_generations": options.generations,
        "per_device_train_batch_size": options.generations * options.questions,
        "max_completion_length": cfg.sampler.max_new_tokens,
        "temperature": cfg.sampler.temperature,
        "top_p": cfg.sampler.top_p,
        "seed": cfg.seed,
        **{key: ast.literal_eval(value) for key, value in (text.split("=", 1) for text in options.trl)},
    }
    work = {"model": str(scratch / "base"), "trained": str(scratch / "trained"), "device": on(cfg), "train": rows}
    return work | {"tokens": cfg.token_budget or math.inf, "seconds": options.seconds or math.inf, "options": settings}


def train(work: dict[str, Any], envs: Path, scratch: Path) -> dict[str, Any]:
    """What TRL's process has drawn and spent; the model is in `work["trained"]`. Raises CalledProcessError."""
    given, result = scratch / "work.json", scratch / "result.json"
    given.write_text(json.dumps(work), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(Path(emreason.__file__).parents[1]), "TOKENIZERS_PARALLELISM": "false"}
    python = python_of("trl", envs.resolve(), work["device"])
    subprocess.run([python, "-P", str(Path(__file__).with_name("train.py")), str(given), str(result)], check=True, env=env)
    drawn: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return drawn


def test(cfg: DictConfig, trained: str, folder: Path, n_examples: int) -> dict[str, Any]:
    """The trained model's score on the test split, as a run's, under the prompt it was trained with; its predictions go into `folder`."""
    with open_dict(cfg):
        cfg.model.load = {"_target_": "emreason.models.loading.load_pretrained", "path": trained}
    ended = build(cfg)
    ended.model.to(ended.device)
    questions = ended.dataset.questions("test")
    watch, forced = Stopwatch(), cfg.evaluation.forced
    with bar("Test", len(questions), "questions") as progress:
        parts = (ended.engine, ended.prompts, ended.tokenizer)
        limit = cfg.evaluation.max_new_tokens
        found = predict(questions, *parts, max_new_tokens=limit, n_examples=n_examples, forced=forced, bar=progress)
    write_predictions(folder, "test", found)
    return score(found, watch.seconds, forced=forced)


def main() -> None:
    """Trains and tests, both under the plain prompt or both with worked examples. Raises CalledProcessError if TRL fails."""
    parser = argparse.ArgumentParser(prog="emreason.bench.grpo", description="TRL's GRPO on a run's questions, with its reward.")
    parser.add_argument("overrides", nargs="+", help="of a run; the scheme's proposals are not looked at")
    parser.add_argument("--envs", type=Path, default=Path(".venvs"), help="where TRL's environment is made")
    parser.add_argument("--lr", type=float, default=1e-6, help="TRL's default")
    parser.add_argument("--generations", type=int, default=8, help="completions of a question; TRL's default")
    parser.add_argument("--questions", type=int, default=4, help="of an optimizer step")
    parser.add_argument("--examples", type=int, default=0, help="worked examples in every prompt, the test's included")
    parser.add_argument("--seconds", type=float, help="of training, after which it ends though tokens are left")
    parser.add_argument("--trl", nargs="*", default=[], metavar="KEY=VALUE", help="of GRPOConfig")
    options = parser.parse_args()
    cfg, _ = compose(options.overrides)
    if not cfg.token_budget and not options.seconds:
        parser.error("nothing ends the training: give token_budget=N, an experiment that has one, or --seconds N")
    name = f"grpo-{options.generations}" + (f",examples={options.examples}" if options.examples else "")
    folder = Path("outputs", cfg.tag, cfg.dataset.name, cfg.model.name, f"{name},lr={options.lr:g}", f"seed={cfg.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = work_of(cfg, options, Path(scratch))
        drawn = train(work, options.envs, Path(scratch))
        scores = test(cfg, work["trained"], folder, options.examples)
    e_step = {"acceptance_rate": drawn["groups_with_right"] / drawn["groups"], "tokens": drawn["tokens"], "seconds": drawn["seconds"]}
    summary = {"dataset": cfg.dataset.name, "model": cfg.model.name, "sampler": "grpo", "scheme": f"TRL {name}, lr {options.lr:g}"}
    summary |= {"seed": cfg.seed, "status": "finished", "test": scores, "git_commit": git_commit(), "seconds": drawn["seconds"]}
    write_json(folder / "summary.json", summary | {"iterations": [{"iteration": 0, "e_step": e_step}], "trl": drawn | work["options"]})
    print(f"test {scores['accuracy']:.3f}, {drawn['tokens']:,} tokens, {drawn['seconds']:.0f} s. Written: {folder}")


if __name__ == "__main__":
    try:
        main()
    except (UserError, HydraException) as error_:
        sys.exit(f"error: {error_}")

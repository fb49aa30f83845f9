"""`emreason-eval [overrides]`: evaluate a base model or a finished run on a dataset's split."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emreason.progress import bar
from emreason.questions.answers import correct, extract, gold_text, in_words, same, stop_at_answer
from emreason.questions.grammar.thinking import said
from emreason.runs import help
from emreason.runs.console import report_errors
from emreason.runs.experiment import CONF, Experiment, build, compose, load_libraries
from emreason.runs.journal import write_json
from emreason.runs.keys import MAY_CHANGE, flatten, within
from emreason.runs.summary import read_config, read_summary
from emreason.schemes.samplers import Scheme
from emreason.types import Question, Request, UserError, plain

if TYPE_CHECKING:
    import torch


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate as `conf/evaluate.yaml` says; writes `result_file(cfg, folder)` and returns its content.

    Raises:
        UserError: a value is not allowed, or data or model cannot be loaded.
    """
    load_libraries(cfg)
    from emreason.scores.likelihood import completion_logprobs, marginal_bounds, summarize
    from emreason.scores.scoring import Stopwatch, predict, score
    from emreason.scores.stats import wilson
    from emreason.tracking.recorder import write_predictions

    scheme: Scheme = hydra.utils.instantiate(cfg.sampler)
    experiment = build(cfg, read_summary(Path(cfg.run)).get("dtype") if cfg.run else None)  # the weights that the run has tested
    if next(experiment.model.parameters()).device.type != experiment.device.type:  # a quantised one is there and may not be moved
        experiment.model.to(experiment.device)  # in training Lightning moves it
    experiment.model.requires_grad_(False)
    parts = (experiment.engine, experiment.prompts, experiment.tokenizer)
    questions = experiment.dataset.questions(cfg.split)
    watch, written = Stopwatch(), result_file(cfg, folder)
    result: dict[str, Any] = {"dataset": cfg.dataset.name, "model": cfg.model.name, "split": cfg.split, "method": cfg.method}
    if cfg.method == "loglikelihood":
        choices = letter_logprobs(experiment, questions, cfg.examples)
        hits = sum(correct(choice, question) for choice, question in zip(choices, questions, strict=True))  # alike texts are one answer
        result |= {"accuracy": hits / len(questions), "n": len(questions), "ci95": list(wilson(hits, len(questions)))}
        result["answers"] = {question.id: in_words(question, choice) for choice, question in zip(choices, questions, strict=True)}
    else:
        with bar(f"Evaluation, {cfg.split}", len(questions), "questions") as progress:
            predictions = predict(questions, *parts, max_new_tokens=cfg.max_new_tokens, n_examples=cfg.examples, bar=progress)
        result |= score(predictions, watch.seconds)
        if cfg.predictions:
            write_predictions(folder, written.stem, predictions)
    if cfg.samples:
        result |= sampled(experiment, questions, scheme, k=cfg.samples, n_examples=cfg.examples, seed=cfg.seed)
    if cfg.bound:
        limits = {"k": cfg.bound, "max_new_tokens": scheme.max_new_tokens, "seed": cfg.seed, "n_examples": cfg.examples}
        label = f"Evaluation, {cfg.bound} draws"
        score_given = functools.partial(completion_logprobs, experiment.model, label=f"{label}, scoring")
        result |= summarize(marginal_bounds(questions, *parts, score_given, **limits, label=label))
    result |= {"seconds": watch.seconds, "config": OmegaConf.to_container(cfg, resolve=True)}
    write_json(written, result)
    return result


def result_file(cfg: DictConfig, folder: Path) -> Path:
    """`folder/evaluation_<split>.json`; the dataset, where it is not the run's own, and the method stand in the name, too.

    Where a result of other settings (its `config`) lies there, the name gets a number: `evaluation_<split>-2.json`.
    """
    own = cfg.run is None or read_config(Path(cfg.run) / "config.yaml").dataset.name == cfg.dataset.name
    parts = [cfg.split, *([] if own else [cfg.dataset.name]), *(["loglikelihood"] if cfg.method == "loglikelihood" else [])]
    name, asked = f"evaluation_{'_'.join(parts)}".replace("/", "-"), _settings(OmegaConf.to_container(cfg, resolve=True))
    for number in itertools.count(1):
        path = folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json")
        before = _settings(read_summary(folder, path.name).get("config"))
        if not before or before == asked:
            break
    return path


def _settings(config: Any) -> dict[str, Any]:
    """What a result depends on, key by key."""
    if not config:
        return {}
    aside = (*MAY_CHANGE, "predictions", *(("run", "model.load", "peft") if config.get("run") else ()))
    return {key: value for key, value in flatten(config).items() if not within(key, aside)}


def sampled(
    experiment: Experiment, questions: Sequence[Question], scheme: Scheme, *, k: int, n_examples: int, seed: int
) -> dict[str, float | None]:
    """pass@1 … pass@k (unbiased, Chen et al. 2021) and maj@k from k draws per question under the plain prompt."""
    from emreason.engines.drawing import draw_seed
    from emreason.scores.scoring import mean
    from emreason.scores.stats import pass_at_k

    by_id = {question.id: question for question in questions}
    answers: dict[str, list[str | None]] = {question.id: [None] * k for question in questions}
    tokenizer = experiment.tokenizer
    asked = ((q, experiment.prompts.ids(q, "question", n_examples)) for q in questions)
    queue = deque(
        Request((q.id, i), ids, scheme.params, draw_seed(seed, -1, q.id, i), stop_at_answer(q, tokenizer, ids))
        for q, ids in asked
        for i in range(k)
    )
    with bar(f"Evaluation, {k} samples", len(queue), "samples") as progress:
        for completion in experiment.engine.generate(queue):
            key: Any = completion.request.key
            question_id, draw = key
            text = said(completion.token_ids, completion.request.prompt_ids, tokenizer)
            answers[question_id][draw] = extract(text, by_id[question_id])
            progress.update(1, len(completion.token_ids))
    hits = {key: sum(correct(a, by_id[key]) for a in given) for key, given in answers.items()}
    sizes = sorted({*(2**i for i in range(k.bit_length())), k})
    result = {f"pass@{i}": mean(pass_at_k(k, c, i) for c in hits.values()) for i in sizes}
    result[f"maj@{k}"] = mean(float(correct(majority(given, by_id[key]), by_id[key])) for key, given in answers.items())
    return result


def majority(answers: Sequence[str | None], question: Question) -> str | None:
    """The most frequent answer, however it is written; the earliest of equals; None only if there is none."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda one: sum(n for other, n in counts.items() if same(other, one, question)), default=None)


def letter_logprobs(experiment: Experiment, questions: Sequence[Question], n_examples: int = 0) -> list[str]:
    """For each multiple-choice question the letter with the highest log π(" A" | prompt + "Answer:"); no reasoning.

    Where the choice's text is the answer, its text takes the letter's place. The ids are those that follow the prompt in one encoding.

    Raises:
        UserError: a question has no choices.
    """
    import numpy as np
    import torch

    from emreason.engines.prefixes import common_prefix

    experiment.model.eval()
    best = []
    with bar("Evaluation, log-likelihood", len(questions), "questions") as progress:
        for question in questions:
            if not question.choices:
                raise UserError("method=loglikelihood compares answer letters, but this dataset has no choices; use method=generate.")
            said_by = {letter: gold_text(replace(question, answer=letter)) for letter in question.letters}
            ids = functools.partial(experiment.prompts.ids, question, "question", n_examples)
            prompt = ids(tail="Answer:")
            whole = [ids(tail=f"Answer: {text}") for text in said_by.values()]
            begin = min(len(prompt), *(common_prefix(np.asarray(prompt), np.asarray(one)) for one in whole))
            letters = [one[begin:] for one in whole]
            prompt = prompt[:begin]
            with torch.no_grad():
                best.append(question.letters[int(continuation_logprobs(experiment.model, prompt, letters).argmax())])
            progress.update(1, len(prompt))
    return best


def continuation_logprobs(model: torch.nn.Module, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> torch.Tensor:
    """log π(continuation | prompt), nats, of each; single tokens share one forward pass of the prompt alone."""
    import torch

    from emreason.scores.likelihood import completion_logprobs

    if all(len(ids) == 1 for ids in continuations):
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits.float().log_softmax(-1)[[ids[0] for ids in continuations]]
    return torch.tensor(completion_logprobs(model, [(tuple(prompt), tuple(ids)) for ids in continuations]))


def with_run(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with model, dataset and decoding of the finished run `cfg.run`, but for what the overrides say of the last two.

    Raises:
        UserError: the folder holds no finished run; or the overrides name another model.
    """
    folder = Path(cfg.run)
    if not (folder / "config.yaml").is_file() or not (folder / "model").is_dir():
        why = "no finished run with its model is there (config.yaml or model/ is missing)"
        mend = "finish it with `emreason` first, or one that kept none (keep_model=false) again with keep_model=true overwrite=true"
        raise UserError(f"run={cfg.run}: {why}; {mend}.")
    keys = [override.lstrip("+").partition("=")[0].rpartition("@")[2] for override in overrides]  # `prompt@dataset.prompt=` sets the latter
    if other := [key for key in keys if key.split(".")[0] in ("model", "peft")]:
        raise UserError(f"run={cfg.run} brings its own model; leave {other[0]}=… out, or run=….")
    trained = read_config(folder / "config.yaml")
    given = {key: OmegaConf.select(cfg, key) for key in keys if key.split(".")[0] in ("dataset", "sampler")}
    with open_dict(cfg):
        if not {"max_new_tokens", "sampler.max_new_tokens"} & set(keys):
            cfg.max_new_tokens = trained.evaluation.max_new_tokens
        cfg.sampler, cfg.dataset, cfg.model.name = trained.sampler, trained.dataset, trained.model.name
        for key, value in given.items():
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        if cfg.data_root is not None and "data_root" in cfg.dataset.get("load", {}):
            cfg.dataset.load.data_root = cfg.data_root
        if (folder / "model" / "adapter_config.json").exists():
            cfg.model.load = trained.model.load
            cfg.peft = {
                "name": "trained",
                "add": {"_target_": "emreason.models.loading.load_adapter", "_partial_": True, "folder": f"{folder}/model"},
            }
        else:
            cfg.model.load = {"_target_": "emreason.models.loading.load_pretrained", "path": str(folder / "model")}
    return cfg


def launch(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """`emreason.evaluation`: what the command `emreason-eval` does with these overrides, from Python; returns the scores."""
    cfg, folder = compose(overrides, "evaluate", config_dir)
    if cfg.run is not None:
        cfg, folder = with_run(cfg, overrides), Path(cfg.run)
    return evaluate(cfg, folder)


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def _task(cfg: DictConfig) -> float:
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.run is not None:
        cfg, folder = with_run(cfg, HydraConfig.get().overrides.task), Path(cfg.run)
    result = evaluate(cfg, folder)
    table = Table(title=Text(plain(f"{cfg.model.name} on {cfg.dataset.name}, {cfg.split}")))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, value in result.items():
        if isinstance(value, float):
            table.add_row(key, f"{value:.3f}")
    if result.get("errored"):
        table.add_row("too long for the model's window", str(result["errored"]))
    table.add_row("n", str(result["n"]))
    table.add_row("95 % interval of accuracy", "{:.3f} – {:.3f}".format(*result["ci95"]))
    Console().print(table)
    print(f"Written: {result_file(cfg, folder)}")
    return float(result["accuracy"])


def main() -> None:
    """Console script `emreason-eval`."""
    if help.asked_for(sys.argv[1:]):
        print(help.text("evaluate"), end="")
    else:
        report_errors(_task, again="begins again")


if __name__ == "__main__":
    main()

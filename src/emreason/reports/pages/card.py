"""The model card of a finished run: `model/README.md`, as the Hub shows it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from emreason.reports.forms import Entry, Table, escape_markdown, markdown
from emreason.reports.tables import percent
from emreason.scores.stats import wilson

PAPER = "2512.20169"
ABOUT_THE_PLACE = ("hydra.", "hub.", "overwrite=", "quiet=", "logger", "data_root=")
"""Overrides that say where a run lies and who hears of it, not what it is."""


def model_card(config: Mapping[str, Any], summary: Mapping[str, Any], arguments: list[str]) -> str:
    """The card in Markdown, with the Hub's keys at its head.

    Args:
        config: the run's, resolved.
        summary: of the run, with its test score.
        arguments: those of `emreason` that it was started with.
    """
    adapter = "add" in config["peft"] and not config["peft"].get("merge")
    rows = [[Entry(name), Entry(str(score["n"])), *map(Entry, _shares(score))] for name, score in _scores(summary)]
    scores = Table("Scores", ["", "questions", "accuracy (%) [95 %]", "with a forced answer line (%) [95 %]"], rows, (1, 2, 3))
    last = summary["iterations"][-1]["e_step"]
    kept = [_public(argument) for argument in arguments if not argument.lstrip("+~").startswith(ABOUT_THE_PLACE)]
    sampler, load = config["sampler"], config["model"]["load"]
    tries = ", ".join(f"{proposal} × {n}" for proposal, n in sampler["proposals"].items())
    what = "An adapter of" if adapter else "A fine-tuned copy of"
    lines = [
        _head(config, adapter),
        f"# {escape_markdown(summary['model'])}, {escape_markdown(summary['scheme'])} on {escape_markdown(summary['dataset'])}",
        f"{what} `{_base(load)}` that learned to reason from questions and answers alone, by expectation maximization "
        f"([arXiv:{PAPER}](https://arxiv.org/abs/{PAPER})), with emreason.",
        "## Scores",
        markdown(scores).rstrip(),
        "Greedy answers under the plain zero-shot prompt unless said; [low, high] are 95 % Wilson intervals over questions of one run. "
        f"The iteration ({summary['best_iteration'] + 1} of {len(summary['iterations'])}) was chosen by validation accuracy; the test was "
        "looked at once.",
        "## How it was made",
        f"- Data: `{summary['dataset']}`{_data(config)}, {last['questions']} questions an iteration; rationales are the model's own.",
        f"- Scheme: {escape_markdown(summary['scheme'])}, proposals in order: {tries}; temperature {sampler['temperature']}, "
        f"at most {sampler['max_new_tokens']} tokens.",
        f"- Last E-step: {percent(last['acceptance_rate'])} % of the questions accepted"
        + (f" (a uniform guesser: {percent(last['chance_acceptance'])} %)." if last.get("chance_acceptance") is not None else "."),
        f"- Seed {summary['seed']}, {summary['dtype']}, {summary['seconds'] / 60:.0f} min, commit `{summary['git_commit'] or 'unknown'}`, "
        + ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
        + ".",
        f"```\n{shlex.join(['emreason', *kept])}\n```",
        "## How to use it",
        f"```python\n{_usage(adapter, _base(load))}\n```",
        "It was trained to end with a line `Answer: …`. One seed says little about a scheme, and nothing here was tested for safety.",
    ]
    return "\n\n".join(lines) + "\n"


def write_card(folder: Path) -> None:
    """Write the card of the run in `folder` into its `model/`."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    given, about = folder / ".hydra" / "overrides.yaml", folder / ".hydra" / "hydra.yaml"
    arguments = [str(each) for each in OmegaConf.load(given)] if given.exists() else []
    sources = OmegaConf.select(OmegaConf.load(about), "hydra.runtime.config_sources") if about.exists() else []
    arguments = [f"--config-dir={Path(source.path).name}" for source in sources or [] if source.provider == "command-line"] + arguments
    assert isinstance(config, dict)
    (folder / "model" / "README.md").write_text(model_card(config, summary, arguments), encoding="utf-8", errors="replace")  # type: ignore[arg-type]


def _public(argument: str) -> str:
    """Without the folders that a file of this machine lies in: cards are passed on, home folders are not."""
    key, is_set, value = argument.partition("=")
    path = value.strip("'\"")
    return f"{key}={Path(path).name}" if is_set and path.startswith(("/", "~", ".")) and len(Path(path).parts) > 1 else argument


def _head(config: Mapping[str, Any], adapter: bool) -> str:
    base, data = _base(config["model"]["load"]), _repository(config)
    keys: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    keys["tags"] = ["emreason", "expectation-maximization", "reasoning", config["sampler"]["name"]]
    if _on_hub(base):
        keys["base_model"] = base
    if _on_hub(data):
        keys["datasets"] = [data]
    return f"---\n{yaml.safe_dump(keys, sort_keys=False).rstrip()}\n---"


def _scores(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    baseline = summary["baseline"] or {}
    for name, score in [
        ("test, this model", summary["test"]),
        ("test, base model", baseline.get("zero_shot")),
        ("test, base model with worked examples", baseline.get("few_shot")),
        ("validation, base model", baseline.get("validation")),
        *((f"validation, iteration {record['iteration'] + 1}", record["validation"]) for record in summary["iterations"]),
    ]:
        if score:
            yield name, score


def _shares(score: Mapping[str, Any]) -> Iterator[str]:
    for share in (score["accuracy"], score["forced_accuracy"]):
        low, high = wilson(round((share or 0) * score["n"]), score["n"])
        yield "—" if share is None else f"{percent(share)} [{percent(low)}, {percent(high)}]"


def _base(load: Mapping[str, Any]) -> str:
    named = load.get("path") or load.get("package") or str(load["_target_"]).rpartition(".")[2]
    return Path(named).name if Path(named).expanduser().exists() else str(named)  # a folder here is nothing to others


def _on_hub(name: object) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _repository(config: Mapping[str, Any]) -> object:
    load = config["dataset"].get("load")
    return load.get("path") if isinstance(load, Mapping) else None


def _data(config: Mapping[str, Any]) -> str:
    path = _repository(config)
    return f" ([{path}](https://huggingface.co/datasets/{path}))" if _on_hub(path) else ""


def _usage(adapter: bool, base: str) -> str:
    loading = 'AutoModelForCausalLM.from_pretrained("THIS FOLDER")'
    if adapter:
        loading = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS FOLDER")'
    imports = ["from peft import PeftModel"] if adapter else []
    imports.append("from transformers import AutoModelForCausalLM, AutoTokenizer")
    return "\n".join([*imports, "", f"model = {loading}", 'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'])

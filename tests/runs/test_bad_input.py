"""Bad input of every kind through the real commands: one clear sentence, a non-zero exit, never a traceback.

Most cases run in this process through the console script's own function, a few as real subprocesses.
With EMREASON_BAD_INPUT_TABLE=FILE the messages are written down as a Markdown table.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emreason import evaluate, report, train
from emreason.models.tiny import load_tiny
from emreason.runs.journal import locked

SMOKE = ["experiment=smoke", "engine.dtype=float32", "hydra.run.dir=run"]
COMMANDS = {"emreason": train.main, "emreason-eval": evaluate.main, "emreason-report": report.main}
GOOD = {"question": "Which is red?", "answer": "A", "choices": ["blood", "grass", "sky"]}


def lines(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def a_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def a_model(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """A saved model in `m`, then spoilt."""

    def make(folder: Path) -> None:
        model, tokenizer = load_tiny("llama", seed=0)
        model.save_pretrained(folder / "m")
        tokenizer.save_pretrained(folder / "m")
        spoil(folder / "m")

    return make


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def without_eos(folder: Path) -> None:
    for path in folder.glob("token*config.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def garbled_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def small_vocabulary(folder: Path) -> None:
    model, tokenizer = load_tiny("llama", seed=0)
    model.resize_token_embeddings(len(tokenizer) - 20)
    model.save_pretrained(folder)


def other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def pickled_checkpoint(folder: Path) -> None:
    a_file("run/checkpoints/last.ckpt", pickle.dumps(Evil()))(folder)


def begun(config: str) -> Callable[[Path], None]:
    """A run with attempts, and this config."""

    def make(folder: Path) -> None:
        a_file("run/config.yaml", config)(folder)
        a_file("run/rationales/iteration=000.jsonl", "")(folder)

    return make


def parquet(name: str, rows: list[dict]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)

    return make


ARC = "hub/allenai/ai2_arc/ARC-Challenge"
ARC_ARGS = ["model=tiny_llama", "dataset=arc_challenge", "trainer.accelerator=cpu", "hydra.run.dir=run"]
FILE_ARGS = ["model=tiny_llama", "dataset=file", "trainer.accelerator=cpu", "hydra.run.dir=run"]


def data(name: str, *extra: str) -> list[str]:
    return [*FILE_ARGS, *(f"dataset.load.{split}={name}" for split in ("train", "validation", "test")), *extra]


def model(*extra: str) -> list[str]:
    return ["dataset=sums", "trainer.accelerator=cpu", "hydra.run.dir=run", "model=qwen25_0_5b", "engine.dtype=float32", *extra]


def nothing(folder: Path) -> None:
    """Prepare nothing."""


# name: (command, its arguments, what is prepared in the working folder, words that the message must hold)
Case = tuple[str, list[str], Callable[[Path], None], list[str]]


def smoke(*overrides: str, words: list[str], prepare: Callable[[Path], None] = nothing) -> Case:
    return "emreason", [*SMOKE, *overrides], prepare, words


def sweep(*overrides: str, words: list[str]) -> Case:
    return "emreason", ["experiment=smoke", *overrides, "-m"], nothing, words


CASES: dict[str, Case] = {
    # --- what is typed
    "misspelt group": smoke("smapler=rs", words=["smapler"]),
    "misspelt key": smoke("seeed=1", words=["seeed"]),
    "misspelt key in a group": smoke("sampler.bugdet=3", words=["bugdet"]),
    "misspelt key of the trainer": smoke("trainer.max_epoch=3", words=["max_epoch"]),
    "added key that nothing takes": smoke("+sampler.bugdet=3", words=["sampler", "bugdet"]),
    "added key that the trainer does not take": smoke("+trainer.max_epoch=3", words=["trainer", "max_epoch"]),
    "added key that nothing reads": smoke("+nosuchkey=1", words=["nosuchkey", "nothing reads"]),
    "added key that is like another": smoke("+sed=1", words=["sed: nothing reads", "did you mean seed"]),
    "added key that the sampler does not take": smoke("+sampler.nosuch=1", words=["sampler", "nosuch"]),
    "added key that the dataset does not take": smoke("+dataset.nosuch=1", words=["dataset", "nosuch"]),
    "added key that the loader does not take": smoke("+dataset.load.nosuch=1", words=["dataset.load", "nosuch"]),
    "added key that the prompt does not take": smoke("+dataset.prompt.nosuch=1", words=["dataset.prompt", "nosuch"]),
    "added key that the limits do not take": smoke("+dataset.limit.dev=1", words=["dataset.limit.dev", "nothing reads"]),
    "added key that is like a split": smoke("+dataset.limit.trian=5", words=["dataset.limit.trian", "did you mean train"]),
    "added key that the M-step does not take": smoke("+m_step.nosuch=1", words=["m_step", "nosuch"]),
    "added key that the model does not take": smoke("+model.nosuch=1", words=["model.nosuch", "nothing reads"]),
    "added key that the engine does not take": smoke("+engine.nosuch=1", words=["engine", "nosuch"]),
    "added key that the evaluation does not take": smoke("+evaluation.nosuch=1", words=["evaluation", "nosuch"]),
    "added key of another command": ("emreason-eval", ["+m_step.epochs=1", "hydra.run.dir=e"], nothing, ["m_step", "nothing reads"]),
    "added key of another experiment": (
        "emreason", ["experiment=exact", "+nosuchkey=1", "hydra.run.dir=run"], nothing, ["nosuchkey", "nothing reads"],
    ),
    "key of another dataset": smoke("dataset=mmlu", "dataset.load.terms=2", words=["dataset.load.terms"]),
    "worked examples that a file does not bring": (
        "emreason", data("d.jsonl", "sampler.worked_examples=1"), a_file("d.jsonl", lines(GOOD)), ["1 worked examples", "has 0"],
    ),
    "gradient accumulation": smoke("+trainer.accumulate_grad_batches=2", words=["accumulate_grad_batches", "m_step.batch_size"]),
    "gradient clipping": smoke("+trainer.gradient_clip_val=1", words=["gradient_clip_val", "m_step.max_grad_norm"]),
    "rarer validation": smoke("+trainer.check_val_every_n_epoch=2", words=["check_val_every_n_epoch", "dataset.limit.validation"]),
    "limited validation": smoke("+trainer.limit_val_batches=0", words=["limit_val_batches", "dataset.limit.validation"]),
    "fast run": smoke("+trainer.fast_dev_run=true", words=["fast_dev_run", "experiment=smoke"]),
    "mixed precision": smoke("+trainer.precision=16-mixed", words=["trainer.precision", "engine.dtype"]),
    "steps in place of iterations": smoke("+trainer.max_steps=3", words=["max_steps", "trainer.max_epochs"]),
    "folder of the trainer": smoke("+trainer.default_root_dir=x", words=["default_root_dir", "hydra.run.dir"]),
    "profiler of the trainer's": smoke("+trainer.profiler=simple", words=["trainer.profiler", "callback"]),
    "added key that the optimizer does not take": smoke("+optimizer.momentun=3", words=["optimizer", "momentun"]),
    "unknown sampler": smoke("sampler=sr", words=["sampler/sr", "star"]),
    "unknown dataset": smoke("dataset=arc", words=["dataset/arc", "arc_easy"]),
    "unknown model": smoke("model=llama", words=["model/llama", "llama32_1b"]),
    "unknown experiment": smoke("experiment=smke", words=["experiment/smke", "smoke"]),
    "override without a value": smoke("sampler.budget", words=["sampler.budget"]),
    "override without a key": smoke("=3", words=["=3"]),
    "group of nothing": smoke("logger=null", words=["logger=null", "by name", "--help"]),
    "number for a section": smoke("dataset.limit=5", words=["dataset.limit=5", "dataset.limit.…=…"]),
    "word for a worked example": (
        "emreason", data("d.jsonl", "dataset.demonstrations=[foo]"), a_file("d.jsonl", lines(GOOD)), ["demonstrations[0]", "'foo'"],
    ),
    "word for a flag of an engine": smoke("engine.cuda_graphs=no", words=["engine.cuda_graphs=no", "true, false"]),
    "word for a flag of a logger": smoke("logger=wandb", "logger.wandb.artifacts=no", words=["logger.wandb.artifacts=no", "true, false"]),
    "reward of another shape": smoke("sampler.reward=builtins.len", words=["sampler.reward", "(text, answer, question)"]),
    "metric that nothing logs": smoke(
        "callbacks=early_stopping", "callbacks.early_stopping.monitor=val_acc", "trainer.max_epochs=1",
        words=["callbacks", "validation/accuracy"],
    ),
    "plan with a key that nothing reads": smoke("plan=true", "+nosuchkey=1", words=["nosuchkey", "nothing reads"]),
    "plan with an argument of the trainer's": smoke("plan=true", "+trainer.max_steps=3", words=["max_steps", "trainer.max_epochs"]),
    "upload of a sweep to one place": sweep("seed=1,2", "hub.push=me/mine", words=["hub.push=me/mine", "me/mine-${sampler.name}"]),
    "launcher that is not installed": sweep("hydra/launcher=cluster", words=["pip install 'emreason[ray]'"]),
    "sweep into one folder": sweep("optimizer.lr=1e-3,1e-4", words=["optimizer.lr differs", "'tag=smoke-${optimizer.lr}'"]),
    "sweep of groups into one folder": sweep("seed=1,2", "peft=none,lora", words=["peft differs", "a sweep for each", "tag=…"]),
    "sweep with the folder of a run": sweep("seed=1,2", "hydra.run.dir=run", words=["hydra.run.dir", "hydra.sweep.dir"]),
    "broken list": smoke("evaluation.baseline=[test", words=["evaluation.baseline=[test"]),
    "unknown interpolation": smoke("tag=${sampler.nme}", words=["sampler.nme"]),
    "unknown target": smoke("optimizer._target_=torch.optim.Adamm", words=["torch.optim.Adamm"]),
    "unknown option of the command": smoke("--sweep", words=["--sweep"]),
    # --- values
    "seed that is a word": smoke("seed=one", words=["seed=one", "whole number"]),
    "negative seed": smoke("seed=-1", words=["seed=-1", "from 0"]),
    "budget 0": smoke("sampler.budget=0", words=["sampler.budget=0", "at least 1"]),
    "negative budget": smoke("sampler.budget=-2", words=["sampler.budget=-2", "at least 1"]),
    "half a budget": smoke("sampler.budget=1.5", words=["sampler.budget=1.5", "whole number"]),
    "budget that is a word": smoke("sampler.budget=many", words=["sampler.budget=many", "whole number"]),
    "budget that is a flag": smoke("sampler.budget=true", words=["sampler.budget=True", "whole number"]),
    "temperature 0 with a budget above 1": smoke("sampler.temperature=0", words=["sampler.temperature=0", "single try"]),
    "negative temperature": smoke("sampler.temperature=-1", words=["sampler.temperature=-1", "at least 0"]),
    "temperature that is a word": smoke("sampler.temperature=hot", words=["sampler.temperature=hot", "a number"]),
    "infinite temperature": smoke("sampler.temperature=inf", words=["sampler.temperature=inf", "a number"]),
    "top_p 0": smoke("sampler.top_p=0", words=["sampler.top_p=0", "above 0"]),
    "top_p above 1": smoke("sampler.top_p=1.5", words=["sampler.top_p=1.5", "at most 1"]),
    "no new tokens": smoke("sampler.max_new_tokens=0", words=["sampler.max_new_tokens=0", "at least 1"]),
    "more worked examples than there are": smoke("sampler.worked_examples=9", words=["9 worked examples", "has 4"]),
    "unknown proposal": smoke("+sampler.proposals.hint=1", words=["sampler.proposals", "hint", "rationalization"]),
    "no batch": smoke("m_step.batch_size=0", words=["m_step.batch_size=0", "at least 1"]),
    "no pass": smoke("m_step.epochs=0", words=["m_step.epochs=0", "at least 1"]),
    "unknown normalisation": smoke("m_step.normalize=mean", words=["m_step.normalize", "questions"]),
    "negative gradient norm": smoke("m_step.max_grad_norm=-1", words=["m_step.max_grad_norm=-1", "above 0"]),
    "tokens_per_batch that is a word": smoke("m_step.tokens_per_batch=all", words=["m_step.tokens_per_batch=all", "whole number"]),
    "negative learning rate": smoke("optimizer.lr=-1", words=["optimizer.lr=-1", "at least 0"]),
    "learning rate that is a word": smoke("optimizer.lr=fast", words=["optimizer.lr=fast", "a number"]),
    "learning rate that is no number": smoke("optimizer.lr=nan", words=["optimizer.lr=nan", "a number"]),
    "betas out of range": smoke("optimizer.betas=[2,0]", words=["optimizer.betas", "[0, 1)"]),
    "no iteration": smoke("trainer.max_epochs=0", words=["trainer.max_epochs=0", "at least 1"]),
    "endless iterations": smoke("trainer.max_epochs=-1", words=["trainer.max_epochs=-1", "at least 1"]),
    "no device": smoke("trainer.devices=0", words=["trainer.devices=0", "number of devices"]),
    "more devices than there are": smoke("trainer.devices=4000", words=["trainer.devices=4000", "at most"]),
    "unknown accelerator": smoke("trainer.accelerator=abacus", words=["trainer.accelerator=abacus", "gpu"]),
    "DeepSpeed": smoke("trainer.strategy=deepspeed_stage_3", words=["trainer.strategy=deepspeed_stage_3", "ddp", "shard", "hybrid"]),
    "model parallel": smoke(
        "trainer.strategy={_target_: lightning.pytorch.strategies.ModelParallelStrategy}", words=["trainer.strategy", "it must be auto"]
    ),
    "unknown precision": smoke("engine.dtype=float7", words=["engine.dtype=float7", "bfloat16"]),
    "no row to decode": smoke("engine.max_batch=0", words=["engine.max_batch=0", "at least 1"]),
    "negative limit": smoke("dataset.limit.train=-3", words=["dataset.limit.train=-3", "at least 1"]),
    "limit that is a word": smoke("dataset.limit.test=all", words=["dataset.limit.test=all", "null"]),
    "sums of one term": smoke("dataset.load.terms=1", words=["dataset.load.terms", "at least 2"]),
    "unknown split of the baseline": smoke("evaluation.baseline=[tset]", words=["evaluation.baseline", "test"]),
    "hint without the answer": smoke("dataset.prompt.hint=Think", words=["dataset.prompt.hint", "{answer}"]),
    "few-shot baseline of too many": smoke("evaluation.few_shot=8", words=["evaluation.few_shot=8", "dataset.demonstrations"]),
    "no for false": smoke("+model.load.trust_remote_code=no", words=["model.load.trust_remote_code=no", "true, false"]),
    "flag that is a word": smoke("overwrite=maybe", words=["overwrite=maybe", "true, false"]),
    "LoRA of rank 0": smoke("peft=lora", "peft.add.r=0", words=["peft.add.r=0", "at least 1"]),
    "LoRA on layers that are not there": smoke("peft=lora", "peft.add.target_modules=[nope]", words=["peft", "nope"]),
    "secret on the command line": smoke("+logger.api_key=abc", words=["logger.api_key", "environment"]),
    "W&B online without a key": smoke("logger=wandb", "logger.wandb.offline=false", words=["logger.wandb.offline=false", "WANDB_API_KEY"]),
    # --- a data set of one's own
    "file that is not named": ("emreason", FILE_ARGS, nothing, ["dataset.load.train=FILE"]),
    "file that is not there": ("emreason", data("absent.jsonl"), nothing, ["absent.jsonl", "there is no file"]),
    "folder in place of a file": ("emreason", data("d.jsonl"), lambda f: (f / "d.jsonl").mkdir(), ["d.jsonl", "there is no file"]),
    "file of another kind": ("emreason", data("d.txt"), a_file("d.txt", "hello"), ["d.txt", ".jsonl", "or .parquet"]),
    "empty file": ("emreason", data("d.jsonl"), a_file("d.jsonl", ""), ["d.jsonl", "empty"]),
    "not JSON": ("emreason", data("d.jsonl"), a_file("d.jsonl", lines(GOOD, "{oops")), ["d.jsonl, line 2", "not JSON"]),
    "no object": ("emreason", data("d.jsonl"), a_file("d.jsonl", "[1, 2]\n"), ["d.jsonl, line 1", "expected an object"]),
    "missing gold answer": (
        "emreason", data("d.jsonl"), a_file("d.jsonl", lines(GOOD, {**GOOD, "answer": None})), ["line 2", "`answer` is missing"],
    ),
    "gold answer outside the choices": (
        "emreason", data("d.jsonl"), a_file("d.jsonl", lines(GOOD, {**GOOD, "answer": "D"})), ["d.jsonl, line 2", "'D'", "ABC"],
    ),
    "two choices alike": (
        "emreason", data("d.jsonl"), a_file("d.jsonl", lines({**GOOD, "choices": ["a", "a "]})), ["d.jsonl, line 1", "alike"],
    ),
    "one choice": ("emreason", data("d.jsonl"), a_file("d.jsonl", lines({**GOOD, "choices": ["a"]})), ["line 1", "2 to 26"]),
    "duplicate id": (
        "emreason", data("d.jsonl"), a_file("d.jsonl", lines({**GOOD, "id": 1}, {**GOOD, "id": 1})), ["line 2", "already that of line 1"],
    ),
    "number that is a word": (
        "emreason",
        data("d.jsonl", "dataset.load.kind=number", "prompt@dataset.prompt=number"),
        a_file("d.jsonl", lines({"question": "?", "answer": "many"})),
        ["d.jsonl, line 1", "not a number"],
    ),
    "unknown kind": ("emreason", data("d.jsonl", "dataset.load.kind=letter"), a_file("d.jsonl", ""), ["dataset.load.kind", "choice"]),
    "CSV without its columns": (
        "emreason", data("d.csv"), a_file("d.csv", "q,a\n1,2\n"), ["d.csv", "no column holds the question", "dataset.columns.question"],
    ),
    "CSV with a NUL or an open quote": (
        "emreason", data("d.csv"), a_file("d.csv", 'question,answer,choices\n"' + "x" * 200_000), ["d.csv"],
    ),
    "not Parquet": ("emreason", data("d.parquet"), a_file("d.parquet", "PAR1 no"), ["d.parquet", "not a Parquet file"]),
    "not UTF-8": ("emreason", data("d.jsonl"), a_file("d.jsonl", '{"question": "Ä"}'.encode("latin-1")), ["d.jsonl", "not UTF-8"]),
    "bad worked example": (
        "emreason", data("d.jsonl", "dataset.demonstrations=[{id: x}]"), a_file("d.jsonl", lines(GOOD)),
        ["dataset.demonstrations[0]", "rationale"],
    ),
    # --- the Hub and its mirror
    "no network and no mirror": ("emreason", [*ARC_ARGS, "data_root=null"], nothing, ["allenai/ai2_arc", "data_root=DIR", "make data"]),
    "data_root without the data set": ("emreason", [*ARC_ARGS, "data_root=hub"], nothing, ["data_root=hub", "make data"]),
    "data_root with a broken file": (
        "emreason", [*ARC_ARGS, "data_root=hub"], a_file(f"{ARC}/train-0.parquet", "PAR1"), ["train-0.parquet", "not a Parquet file"],
    ),
    "data_root with other columns": (
        "emreason", [*ARC_ARGS, "data_root=hub"],
        lambda f: [parquet(f"{ARC}/{split}-0.parquet", [{"a": 1}])(f) for split in ("train", "validation", "test")],
        ["allenai/ai2_arc", "no column holds the question", "there are a"],
    ),
    # --- models
    "model that is not there": ("emreason", model("model.load.path=nobody/nothing"), nothing, ["model.load.path", "nobody/nothing"]),
    "empty model folder": ("emreason", model("model.load.path=m"), lambda f: (f / "m").mkdir(), ["model.load.path='m'", "tokenizer"]),
    "model without tokenizer": ("emreason", model("model.load.path=m"), a_model(without_tokenizer), ["model.load.path='m'", "tokenizer"]),
    "tokenizer without EOS": ("emreason", model("model.load.path=m"), a_model(without_eos), ["model.load.path='m'", "EOS"]),
    "safetensors cut short": ("emreason", model("model.load.path=m"), a_model(cut_weights), ["model.load.path='m'", "weights"]),
    "safetensors of noise": ("emreason", model("model.load.path=m"), a_model(garbled_weights), ["model.load.path='m'", "weights"]),
    "weights of other shapes": ("emreason", model("model.load.path=m"), a_model(other_shapes), ["model.load.path='m'", "weights"]),
    "pickled weights": ("emreason", model("model.load.path=m"), a_model(pickled_weights), ["model.load.path='m'", "safetensors"]),
    "tokenizer of another model": ("emreason", model("model.load.path=m"), a_model(small_vocabulary), ["model.load.path='m'", "tokens"]),
    "code of its own": (
        "emreason", model("model.load.path=m"),
        a_model(lambda m: (m / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "x.C"}}))),
        ["model.load.path='m'"],
    ),
    "GGUF without a path": ("emreason", ["model=gguf", "hydra.run.dir=run"], nothing, ["model.load.path"]),
    "GGUF that is not there": ("emreason", ["model=gguf", "model.load.path=m.gguf", "hydra.run.dir=run"], nothing, ["m.gguf", "not exist"]),
    "corrupted GGUF": (
        "emreason", ["model=gguf", "model.load.path=m.gguf", "hydra.run.dir=run"], a_file("m.gguf", b"GGUF" + b"\7" * 400),
        ["m.gguf", "could not be read"],
    ),
    # --- the run folder
    "file in place of the run folder": smoke(prepare=a_file("run", ""), words=["run", "exists"]),
    "folder that cannot be written": smoke("hydra.run.dir=/proc/emreason/run", words=["/proc/emreason"]),
    "file in place of a folder inside": smoke(prepare=a_file("run/rationales", ""), words=["run/rationales"]),
    "pickle as a checkpoint": smoke(prepare=pickled_checkpoint, words=["checkpoints/last.ckpt", "overwrite=true"]),
    "checkpoint cut short": smoke(prepare=a_file("run/checkpoints/best.ckpt", b"PK\3\4"), words=["best.ckpt", "overwrite=true"]),
    "checkpoint of something else": smoke(
        prepare=lambda f: ((f / "run/checkpoints").mkdir(parents=True), torch.save({"a": 1}, f / "run/checkpoints/last.ckpt")),
        words=["checkpoints/last.ckpt", "overwrite=true"],
    ),
    "broken config.yaml": smoke(prepare=begun("a: [1"), words=["run/config.yaml", "overwrite=true"]),
    "run of another config": smoke(prepare=begun("seed: 7\n"), words=["seed", "overwrite=true", "tag"]),
    "broken journal": smoke(prepare=a_file("run/rationales/iteration=000.jsonl", "oops\n{}\n"), words=["iteration=000.jsonl, line 1"]),
    "journal of something else": smoke(prepare=a_file("run/rationales/iteration=000.jsonl", "{}\n"), words=["iteration=000.jsonl"]),
    "broken metrics": smoke(prepare=a_file("run/metrics.jsonl", "oops\n"), words=["metrics.jsonl, line 1"]),
    # --- evaluation and report
    "evaluation of no run": ("emreason-eval", ["run=nowhere", "hydra.run.dir=e"], nothing, ["run=nowhere", "no finished run"]),
    "evaluation of an unknown split": ("emreason-eval", ["split=tset", "hydra.run.dir=e"], nothing, ["split=tset", "validation"]),
    "evaluation by an unknown method": ("emreason-eval", ["method=guess", "hydra.run.dir=e"], nothing, ["method=guess", "loglikelihood"]),
    "evaluation of a key that it has not": ("emreason-eval", ["plan=true", "hydra.run.dir=e"], nothing, ["emreason-eval --cfg job"]),
    "evaluation with negative samples": ("emreason-eval", ["samples=-1", "hydra.run.dir=e"], nothing, ["samples=-1", "at least 0"]),
    "evaluation with too many examples": (
        "emreason-eval", ["examples=9", "model=tiny_llama", "trainer.accelerator=cpu", "hydra.run.dir=e"], nothing, ["examples", "has 4"],
    ),
    "letters of a data set without choices": (
        "emreason-eval", ["method=loglikelihood", "model=tiny_llama", "trainer.accelerator=cpu", "hydra.run.dir=e"], nothing,
        ["method=loglikelihood", "no choices"],
    ),
    "report without a path": ("emreason-report", [], nothing, ["PATH"]),
    "report over nothing": ("emreason-report", ["nowhere"], nothing, ["nowhere", "does not exist"]),
    "report over a folder without runs": ("emreason-report", ["."], nothing, ["no run folder"]),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, no network, no keys."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "EMREASON_DATA_ROOT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes; this one has read it long ago
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("EMREASON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def told(code: int | None, output: str, words: list[str], name: str) -> None:
    """The requirements on one message."""
    message = next((line for line in reversed(output.splitlines()) if "error:" in line or "emreason-report:" in line), output)
    if table := os.environ.get("EMREASON_BAD_INPUT_TABLE"):
        with Path(table).open("a") as file:
            file.write(f"| {name} | {code} | {message.replace('|', chr(92) + '|')} |\n")
    assert code not in (0, None), output
    assert "Traceback" not in output
    assert "InstantiationException" not in output
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_sentence(name, place, capfd, monkeypatch):
    command, arguments, prepare, words = CASES[name]
    prepare(place)
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command]()
    code = stopped.value.code
    leaving = "" if isinstance(code, int) else str(code)  # which Python prints at its end
    told(code if isinstance(code, int) else 1, capfd.readouterr().err + leaving, words, name)
    assert not (place / "owned").exists()  # a pickle from elsewhere was not run


def command(name: str, *arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).parent / name, *arguments], capture_output=True, text=True, check=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report over nothing"])
def test_bad_input_as_a_real_process(name, place):
    script, arguments, prepare, words = CASES[name]
    prepare(place)
    done = command(script, *arguments)
    told(done.returncode, done.stderr, words, f"{name} (process)")


def test_two_runs_in_one_folder(place, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emreason", *SMOKE])
    with locked(place / "run"), pytest.raises(SystemExit) as stopped:
        train.main()
    told(int(stopped.value.code or 0), capfd.readouterr().err, [f"in use by process {os.getpid()}", "tag="], "two runs in one folder")


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_full_disk():
    """No file may grow beyond 20,000 bytes: the journal's write fails as it does on a full disk."""
    done = command("emreason", *SMOKE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    told(done.returncode, done.stderr, ["run/", "File too large", "make room"], "full disk (process)")

"""EM contender: the script that one would write with TRL and `generate`, or with vLLM in a process of its own.

`python iterate_others.py WORK RESULT generate|vllm DTYPE seed=N [key=value of SFTConfig …] [interpreter that has vLLM]`
"""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS = 64
"""Prompts that `generate` takes at once."""

Sample = Callable[[Sequence[list[int]], float], list[list[int]]]
"""(prompts, temperature) -> completions, ids up to and with EOS."""


def answer(text: str) -> str | None:
    """The number after the last `Answer:`."""
    found = re.findall(r"Answer:\s*(-?\d+)", text)
    return found[-1] if found else None


def star(questions: Sequence[dict[str, Any]], sample: Sample, temperature: float, decode: Callable[[list[int]], Any]) -> list[Any]:
    """STaR's E-step: the plain prompt, then the hinted one for those that failed -> [(prompt, completion)] to train on."""
    accepted, left = [], list(questions)
    for proposal in ("plain", "hinted"):
        drawn = sample([q[proposal] for q in left], temperature) if left else []
        right = [answer(decode(ids)) == q["answer"] for q, ids in zip(left, drawn, strict=True)]
        accepted += [(q["prompt"], ids) for q, ids, ok in zip(left, drawn, right, strict=True) if ok]
        left = [q for q, ok in zip(left, right, strict=True) if not ok]
    return accepted


def accuracy(questions: Sequence[dict[str, Any]], sample: Sample, decode: Callable[[list[int]], Any]) -> float:
    """Share of `questions` answered correctly: greedy, zero-shot."""
    drawn = sample([q["prompt"] for q in questions], 0.0)
    return sum(answer(decode(ids)) == q["answer"] for q, ids in zip(questions, drawn, strict=True)) / len(questions)


def with_generate(model: Any, tokenizer: Any, max_new_tokens: int) -> Sample:
    """Batches of ROWS prompts, padded on the left."""
    import torch

    eos = tokenizer.eos_token_id

    def sample(prompts: Sequence[list[int]], temperature: float) -> list[list[int]]:
        how: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        )
        drawn = []
        for begin in range(0, len(prompts), ROWS):
            inputs = tokenizer.pad({"input_ids": prompts[begin : begin + ROWS]}, padding_side="left", return_tensors="pt").to(model.device)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **how)
            for row in out[:, inputs["input_ids"].shape[1] :].tolist():
                drawn.append(row[: row.index(eos) + 1] if eos in row else row)
        return drawn

    return sample


def with_vllm(path: str, dtype: str, seed: int, max_new_tokens: int, device: str) -> tuple[Sample, Any]:
    """vLLM on the weights in `path`, and its tokenizer; on a CPU uncompiled, which is slower to decode but much faster to start."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=path, dtype=dtype, max_model_len=1024, seed=seed, enforce_eager=device == "cpu", max_num_seqs=64)

    def sample(prompts: Sequence[list[int]], temperature: float) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, max_tokens=max_new_tokens)
        out = engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in out]

    return sample, engine.get_tokenizer()


def vllm_stage(iteration: dict[str, Any], stage: str, path: str, dtype: str, seed: int, device: str) -> dict[str, Any]:
    """What a vLLM process does between its start and its end: the E-step, or the evaluation."""
    sample, tokenizer = with_vllm(path, dtype, seed, iteration["max_new_tokens"], device)
    start = time.perf_counter()
    made: dict[str, Any] = {}
    if stage == "sample":
        made["accepted"] = star(iteration["train"], sample, iteration["temperature"], tokenizer.decode)
    else:
        made["accuracy"] = accuracy(iteration["validation"], sample, tokenizer.decode)
    return made | {"seconds": time.perf_counter() - start}


def train(model: Any, tokenizer: Any, accepted: Sequence[Any], iteration: dict[str, Any], device: str, options: dict[str, Any]) -> int:
    """Fine-tune `model` on what was accepted; returns the optimizer steps."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = {"input_ids": [p + c for p, c in accepted], "completion_mask": [[0] * len(p) + [1] * len(c) for p, c in accepted]}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": iteration["batch"],
            "num_train_epochs": 1,
            "learning_rate": iteration["lr"],
            "lr_scheduler_type": "constant",
            "max_length": None,
            "completion_only_loss": True,  # otherwise the mask of tokenised data is ignored
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": device == "cpu",
        }
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**(settings | options)), train_dataset=Dataset.from_dict(data), processing_class=tokenizer
        )
        trainer.train()
        return int(trainer.state.global_step)


def main(work: dict[str, Any], how: str, dtype: str, options: dict[str, Any], vllm: str | None) -> dict[str, Any]:
    """EM iterations up to the accuracy asked for. Sampling is in `dtype` (of a copy, where the trained weights are fp32); training keeps
    fp32 weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    iteration, device, seed = work["iteration"], work["device"], options["seed"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])

    def stage(name: str) -> dict[str, Any]:
        """What vLLM makes of today's weights, in a process of its own."""
        assert vllm is not None
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            result = Path(folder) / "result.json"
            subprocess.run([vllm, "-P", __file__, sys.argv[1], str(result), "vllm-stage", dtype, str(seed), name, folder], check=True)
            made: dict[str, Any] = json.loads(result.read_text())
            return made

    def sampler() -> Sample:
        copied = model if dtype == "float32" else copy.deepcopy(model).to(getattr(torch, dtype))
        return with_generate(copied.eval(), tokenizer, iteration["max_new_tokens"])

    row: dict[str, Any] = {"work": iteration["name"], "accepted": [], "steps": [], "accuracies": []}
    row |= {f"{phase}_seconds": 0.0 for phase in ("e_step", "m_step", "evaluation")}
    while len(row["accuracies"]) < iteration["most_iterations"] and max(row["accuracies"], default=0.0) < iteration["target"]:
        start = time.perf_counter()
        if how == "vllm":
            made = stage("sample")
            accepted, seconds = made["accepted"], made["seconds"]
        else:
            accepted = star(iteration["train"], sampler(), iteration["temperature"], tokenizer.decode)
            seconds = time.perf_counter() - start
        row["e_step_seconds"] += seconds
        start = time.perf_counter()
        row["steps"].append(train(model, tokenizer, accepted, iteration, device, options) if accepted else 0)
        row["m_step_seconds"] += time.perf_counter() - start
        row["accepted"].append(len(accepted))
        start = time.perf_counter()
        if how == "vllm":
            made = stage("evaluate")
            right, seconds = made["accuracy"], made["seconds"]
        else:
            right = accuracy(iteration["validation"], sampler(), tokenizer.decode)
            seconds = time.perf_counter() - start
        row["evaluation_seconds"] += seconds
        row["accuracies"].append(right)
    return {"rows": [row], "dtype": dtype}


if __name__ == "__main__":
    read, how_, dtype_, rest = json.loads(Path(sys.argv[1]).read_text()), sys.argv[3], sys.argv[4], sys.argv[5:]
    if how_ == "vllm-stage":
        result = vllm_stage(read["iteration"], rest[1], rest[2], dtype_, int(rest[0]), read["device"])
    else:
        pairs = dict(text.split("=", 1) for text in rest if "=" in text)
        python = next((text for text in rest if "=" not in text), None)
        result = main(read, how_, dtype_, {key: ast.literal_eval(value) for key, value in pairs.items()}, python)
    Path(sys.argv[2]).write_text(json.dumps(result))

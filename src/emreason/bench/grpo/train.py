"""What one would pick instead of EM: TRL's GRPO, in an environment of its own. `python train.py WORK RESULT`.

The reward is the right answer, read as everywhere here, also in a text that was cut at its limit; for it emreason's folder must be on the
path. Whatever `work["options"]` does not name is TRL's default.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(work: dict[str, Any]) -> dict[str, Any]:
    """Train until `work["tokens"]` are drawn or `work["seconds"]` spent; the model is left in `work["trained"]`.

    Returns tokens and draws, how many were right, the groups and those with a right draw, optimizer steps, seconds, and the curve:
    tokens so far, share right, seconds so far of each call of the reward.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from emreason.questions.answers import correct, extract
    from emreason.types import Question

    drawn: dict[str, Any] = {"tokens": 0, "draws": 0, "right": 0, "groups": 0, "groups_with_right": 0, "curve": []}
    size = work["options"]["num_generations"]

    def reward(completions: list[Any], completion_ids: list[list[int]], question: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        asked = [Question(**json.loads(text)) for text in question]
        right = [float(correct(extract(text, q), q)) for text, q in zip(texts, asked, strict=True)]
        groups = [right[i : i + size] for i in range(0, len(right), size)]
        new = {"tokens": sum(map(len, completion_ids)), "draws": len(right), "right": sum(right), "groups": len(groups)}
        for key, value in {**new, "groups_with_right": sum(map(any, groups))}.items():
            drawn[key] += value
        drawn["curve"].append([drawn["tokens"], sum(right) / len(right), time.perf_counter() - start])
        return right

    class Budget(TrainerCallback):
        """Ends the training after the step that met a budget."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            spent = time.perf_counter() - start
            control.should_training_stop = drawn["tokens"] >= work["tokens"] or spent >= work["seconds"]

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": 10_000,  # a budget ends it
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": work["device"] == "cpu",
        }
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work["model"])
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**(settings | work["options"])),
            train_dataset=Dataset.from_list(work["train"]),
            processing_class=tokenizer,
            callbacks=[Budget()],
        )
        start = time.perf_counter()
        trainer.train()
        drawn["seconds"] = time.perf_counter() - start
        drawn["steps"] = int(trainer.state.global_step)
        trainer.model.save_pretrained(work["trained"])
        tokenizer.save_pretrained(work["trained"])
    return drawn


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

"""M-step contender: TRL's SFTTrainer, in an environment of its own. `python train_trl.py WORK RESULT [key=value …]`."""

from __future__ import annotations

import ast
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(work: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same optimizer steps on the same sequences; `options` go to `SFTConfig`, everything else is TRL's default."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds after the first optimizer step: see `train_ours.Clock`."""

        start = seconds = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.start = self.start or time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    sequences = work["sequences"]
    data = Dataset.from_dict(
        {"input_ids": [p + c for p, c in sequences], "completion_mask": [[0] * len(p) + [1] * len(c) for p, c in sequences]}
    )
    dtype = options.pop("dtype", "float32")
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "per_device_train_batch_size": work["batch"],
            "num_train_epochs": 1,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "max_length": None,
            "completion_only_loss": True,  # otherwise the mask of tokenised data is ignored
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": work["device"] == "cpu",
        }
        if options.get("packing"):  # rows that each hold about as much as an optimizer step of the others
            total = sum(len(p) + len(c) for p, c in sequences)
            steps = -(-len(sequences) // work["batch"])
            settings |= {"per_device_train_batch_size": 1, "max_length": int(1.05 * total / steps) + 1}
        config = SFTConfig(**(settings | options))
        clock = Clock()
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(work["model"])
        adapter: dict[str, Any] = {}
        if lora := work["lora"]:
            from peft import LoraConfig

            wrapped = LoraConfig(
                r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            adapter = {"peft_config": wrapped}
        trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock], **adapter)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    timed = sequences[work["batch"] :]
    if options.get("packing"):  # steps of about the same length
        timed = sequences[len(sequences) // len(losses) :]
    tokens = sum(len(p) + len(c) for p, c in timed)
    shown = f"{dtype}, bf16 autocast" if config.bf16 else dtype
    return {"rows": [{"work": "M-step", "tokens": tokens, "seconds": clock.seconds, "losses": losses}], "dtype": shown}


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[3:])
    settings = {key: ast.literal_eval(value) for key, value in pairs}
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), settings)))

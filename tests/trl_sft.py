"""Run by TRL's environment: `SFTTrainer` on the chats in FOLDER/accepted.jsonl, with the model in FOLDER/model."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder = Path(sys.argv[1])
dataset = load_dataset("json", data_files=str(folder / "accepted.jsonl"), split="train", cache_dir=str(folder / "cache"))
config = SFTConfig(
    str(folder / "sft"), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False, max_length=None
)
trainer = SFTTrainer(
    str(folder / "model"), train_dataset=dataset, args=config, processing_class=AutoTokenizer.from_pretrained(folder / "model")
)
expected = json.loads((folder / "expected.json").read_text())
prompts = sorted(map(tuple, expected.values()))
for row in trainer.train_dataset:  # the prompt is the run's own, token by token, and not trained on
    length = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert tuple(row["input_ids"][:length]) in prompts, row
    assert row["labels"][length:] == row["input_ids"][length:]
assert len(trainer.train_dataset) == len(dataset)
trainer.train()
print(f"trained on {len(dataset)}")

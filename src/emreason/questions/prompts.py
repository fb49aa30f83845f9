"""Prompts: the plain one, which is trained and evaluated, and the hinted one, which only rationalization may see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jinja2

from emreason.types import AnswerKind, Demonstration, Proposal, Question, UserError

ANSWER_CUE = "\nAnswer:"


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a question. `hint` must contain `{answer}`, which becomes the gold answer.

    `instruction` is one for all questions, or one for each kind of answer: `{choice: …, number: …, text: …}`. `system` is the system
    message: a string (may be empty) replaces the chat template's own, null keeps it (SmolLM2's and Qwen's cost about 20 tokens in every
    prompt).
    """

    instruction: str | Mapping[AnswerKind, str]
    hint: str
    system: str | None = ""

    def instruct(self, kind: AnswerKind) -> str:
        """The instruction of questions of this kind."""
        return self.instruction if isinstance(self.instruction, str) else self.instruction[kind]


def render_question(question: Question) -> str:
    """The question and, one a line, its choices under letters: `A. …`."""
    lines = [question.text, *(f"{letter}. {choice}" for letter, choice in zip(question.letters, question.choices, strict=True))]
    return "\n".join(lines)


def render_completion(question: Question, rationale: str) -> str:
    """What a perfect completion looks like: the rationale, then `Answer: X` on a line of its own."""
    return f"{rationale}\nAnswer: {question.answer}" if rationale else f"Answer: {question.answer}"


@dataclass(frozen=True)
class Prompts:
    """Questions to prompts, for one tokenizer, template and list of worked examples.

    With a chat template, worked examples are earlier user/assistant turns; without one the prompt is plain text.
    """

    tokenizer: Any
    template: PromptTemplate
    demonstrations: Sequence[Demonstration] = ()

    def __post_init__(self) -> None:
        if "{answer}" not in self.template.hint:
            raise UserError(
                f"dataset.prompt.hint must contain '{{answer}}', the place of the correct answer; it is {self.template.hint!r}."
            )

    def text(self, question: Question, proposal: Proposal = "question", n_examples: int = 0) -> str:
        """The prompt as text, special tokens included where a chat template writes them.

        Raises:
            UserError: `n_examples` exceeds the worked examples there are.
        """
        if not 0 <= n_examples <= len(self.demonstrations):
            raise UserError(
                f"{n_examples} worked examples are asked for, but dataset.demonstrations has {len(self.demonstrations)}; "
                "lower the sampler's number or add examples."
            )
        turns: list[tuple[str, str]] = []
        for example in self.demonstrations[:n_examples]:
            # As in STaR, the examples of a hinted prompt carry hints too.
            turns.append(("user", self._ask(example.question, proposal, question.kind)))
            turns.append(("assistant", render_completion(example.question, example.rationale)))
        turns.append(("user", self._ask(question, proposal, question.kind)))
        return self._chat(turns) if self._has_chat_template else self._plain(turns)

    def ids(self, question: Question, proposal: Proposal = "question", n_examples: int = 0) -> tuple[int, ...]:
        """The prompt as token ids, `(n,)`, with at most one BOS and no EOS at the end."""
        text = self.text(question, proposal, n_examples)
        if self._has_chat_template:  # the template has written BOS itself, where the model has one
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return tuple(ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids)

    @cached_property
    def answer_cue_ids(self) -> tuple[int, ...]:
        """Ids of `"\\nAnswer:"`: appended to a completion (without its EOS) they force an answer line."""
        return tuple(self.tokenizer.encode(ANSWER_CUE, add_special_tokens=False))

    def fingerprint(self) -> str:
        """Hash of all that shapes a prompt besides the question: template, worked examples, chat template."""
        examples = [[e.question.text, e.question.choices, e.question.answer, e.rationale] for e in self.demonstrations]
        chat = self.tokenizer.chat_template if self._has_chat_template else None
        parts = json.dumps([asdict(self.template), examples, chat], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _ask(self, question: Question, proposal: Proposal, kind: AnswerKind) -> str:
        parts = [render_question(question)]
        if proposal == "rationalization":
            parts.append(self.template.hint.replace("{answer}", question.answer))
        if instruction := self.template.instruct(kind):
            parts.append(instruction)
        return "\n".join(parts)

    def _chat(self, turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        system = self.template.system
        if system is None:
            return self._apply(messages)
        try:
            return self._apply([{"role": "system", "content": system}, *messages])
        except jinja2.TemplateError:  # Gemma's template knows no system role
            first = {"role": "user", "content": f"{system}\n{messages[0]['content']}".lstrip("\n")}
            return self._apply([first, *messages[1:]])

    def _apply(self, messages: list[dict[str, str]]) -> str:
        # Llama 3's template writes today's date unless it is given one: a prompt must not change overnight.
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")

    def _plain(self, turns: list[tuple[str, str]]) -> str:
        parts = [self.template.system + "\n\n"] if self.template.system else []
        for role, content in turns:
            parts.append(f"Question: {content}\nReasoning:" if role == "user" else f" {content}\n\n")
        return "".join(parts)

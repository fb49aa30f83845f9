"""Prompts: the plain one, which is trained and evaluated, and the hinted one, which only rationalization may see."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, get_args

import jinja2

from emreason.questions.answers import gold_text
from emreason.types import AnswerKind, Demonstration, Proposal, Question, UserError

ANSWER_CUE = "\nAnswer:"


@dataclass(frozen=True)
class PromptTemplate:
    """The words around a question. `hint` must contain `{answer}`, which becomes the gold answer.

    `instruction` is one for all questions, or one for each kind of answer: `{choice: …, number: …, text: …}`. `system` is the system
    message: a string (may be empty) replaces the chat template's own, null keeps it (SmolLM2's and Qwen's cost about 20 tokens in every
    prompt). `template`: what the model's chat template is told besides the messages, e.g. `{enable_thinking: false}`.
    """

    instruction: str | Mapping[AnswerKind, str]
    hint: str
    system: str | None = ""
    template: Mapping[str, Any] = field(default_factory=dict)

    def instruct(self, kind: AnswerKind) -> str:
        """The instruction of questions of this kind."""
        return self.instruction if isinstance(self.instruction, str) else self.instruction[kind]

    def hinted(self, answer: str) -> str:
        """The hint with an answer, which may bring its own period: then none follows."""
        hint = self.hint.replace("{answer}.", "{answer}") if answer.endswith(".") else self.hint
        return hint.replace("{answer}", answer)


def render_question(question: Question) -> str:
    """The question and its choices: one a line under letters, `A. …`; where the choice's text is the answer, on one line without."""
    if question.answer_as == "text" and question.choices:
        return f"{question.text}\nChoices: {'; '.join(' '.join(choice.split()) for choice in question.choices)}"
    lines = [question.text, *(f"{letter}. {choice}" for letter, choice in zip(question.letters, question.choices, strict=True))]
    return "\n".join(lines)


def render_completion(question: Question, rationale: str) -> str:
    """What a perfect completion looks like: the rationale, then `Answer: X` on a line of its own."""
    return f"{rationale}\nAnswer: {gold_text(question)}" if rationale else f"Answer: {gold_text(question)}"


def following(tokenizer: Any, before: str, after: str) -> tuple[int, ...]:
    """The ids of `after` where it comes right after `before`: by themselves some tokenizers would begin them with a space of their own."""
    head = tokenizer.encode(before, add_special_tokens=False)
    whole = tokenizer.encode(before + after, add_special_tokens=False)
    return tuple(whole[len(head) :] if whole[: len(head)] == head else tokenizer.encode(after, add_special_tokens=False))


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
        return self._render(self._turns(question, proposal, n_examples))

    def ids(self, question: Question, proposal: Proposal = "question", n_examples: int = 0, tail: str = "") -> tuple[int, ...]:
        """The prompt as token ids, `(n,)`, with at most one BOS and no EOS at the end; `tail` comes right after it.

        Control tokens in a question's text are text: they are encoded as the characters they are written with.
        """
        turns = self._turns(question, proposal, n_examples)
        text = self._render(turns) + tail
        bos = not self._has_chat_template  # a template has written BOS itself, where the model has one
        marks = [mark for mark in control_marks(self.tokenizer) if any(mark in content for _, content in turns)]
        ids = self._encode_around(turns, tail, marks, bos) if marks else list(self.tokenizer.encode(text, add_special_tokens=bos))
        return tuple(ids[:-1] if bos and ids[-1] == self.tokenizer.eos_token_id else ids)

    def messages(self, question: Question, n_examples: int = 0) -> list[dict[str, str]]:
        """The plain prompt as chat messages, `{role, content}`: with a system message where the model's template takes one."""
        turns = self._turns(question, "question", n_examples)
        if turns[0][0] == "system":
            system, first, rest = turns[0][1], turns[1][1], turns[2:]
            try:
                taken = self._has_chat_template and system in chat(self.tokenizer, [("system", system), ("user", first)], {}, merge=False)
            except UNRENDERED:
                taken = False
            if not taken:
                turns = [("user", f"{system}\n{first}".lstrip("\n")), *rest]
        return [{"role": role, "content": content} for role, content in turns]

    @cached_property
    def answer_cue_ids(self) -> tuple[int, ...]:
        """Ids of `"\\nAnswer:"`: appended to a completion (without its EOS) they force an answer line."""
        return following(self.tokenizer, "a", ANSWER_CUE)

    def check(self) -> None:
        """Render one prompt of each kind and see that the chat template shows all that it was given, and nothing twice.

        Raises:
            UserError: it does not, or it cannot be rendered.
        """
        if not self._has_chat_template:
            return
        kind: AnswerKind = "text" if isinstance(self.template.instruction, str) else next(iter(self.template.instruction))
        question = Question("check", "Which word comes after \u201cseventeen\u201d in this list?", "eighteen", kind)
        hint = self.template.hinted(question.answer)
        kinds: tuple[Proposal, ...] = ("question", "rationalization")
        for proposal, n in itertools.product(kinds, {0, len(self.demonstrations)}):
            turns = self._turns(question, proposal, n)
            try:
                text = self._render(turns)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"The model's chat template has an error in its line {error.lineno} ({error.message}); mend chat_template in its "
                    "tokenizer_config.json (or chat_template.jinja)."
                ) from None
            except UNRENDERED as error:
                raise UserError(
                    f"The model's chat template cannot be rendered ({error}); mend it, or the keys in dataset.prompt.template, "
                    "or use a model whose template knows user and assistant turns."
                ) from None
            given = "\n".join(content for _, content in turns)
            parts = {
                "question": question.text,
                "system text": self.template.system or "",
                "hint": hint if proposal == "rationalization" else "",
            }
            for name, part in parts.items():
                if (part := part.strip()) and (seen := text.count(part)) != given.count(part):
                    mend = (
                        "set dataset.prompt.system='' and put its words into dataset.prompt.instruction"
                        if name == "system text"
                        else "use a model whose template shows user turns as they are, or mend chat_template in its tokenizer_config.json"
                    )
                    often = "does not show" if seen < given.count(part) else "repeats"
                    raise UserError(f"The model's chat template {often} the {name} ({part[:60]!r}): {mend}.")

    def fingerprint(self) -> str:
        """Hash of all that shapes a prompt besides the question: template, worked examples, chat template."""
        examples = [[e.question.text, e.question.choices, gold_text(e.question), e.rationale] for e in self.demonstrations]
        chat = self.tokenizer.chat_template if self._has_chat_template else None
        parts = json.dumps([asdict(self.template), examples, chat], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _ask(self, question: Question, proposal: Proposal, kind: AnswerKind) -> str:
        parts = [render_question(question)]
        if proposal == "rationalization":
            parts.append(self.template.hinted(gold_text(question)))
        if instruction := self.template.instruct(kind):
            parts.append(instruction)
        return "\n".join(parts)

    def _turns(self, question: Question, proposal: Proposal, n_examples: int) -> list[tuple[str, str]]:
        if proposal not in get_args(Proposal):
            raise UserError(f"{proposal!r} is no proposal; there are {' and '.join(get_args(Proposal))}.")
        if not 0 <= n_examples <= len(self.demonstrations):
            raise UserError(
                f"{n_examples} worked examples are asked for, but dataset.demonstrations has {len(self.demonstrations)}; "
                "lower the sampler's number or add examples."
            )
        turns: list[tuple[str, str]] = [] if self.template.system is None else [("system", self.template.system)]
        for example in self.demonstrations[:n_examples]:
            # As in STaR, the examples of a hinted prompt carry hints too.
            turns.append(("user", self._ask(example.question, proposal, question.kind)))
            turns.append(("assistant", render_completion(example.question, example.rationale)))
        return [*turns, ("user", self._ask(question, proposal, question.kind))]

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        return chat(self.tokenizer, turns, self.template.template) if self._has_chat_template else plain_text(turns)

    def _encode_around(self, turns: Sequence[tuple[str, str]], tail: str, marks: Sequence[str], bos: bool) -> list[int]:
        """Ids of a prompt whose turns hold control tokens: these are put in as characters, one piece at a time."""
        longest_first = sorted(marks, key=len, reverse=True)
        written = [content for _, content in turns]
        for i, mark in enumerate(longest_first):
            written = [content.replace(mark, chr(PLACEHOLDER + i)) for content in written]
        text = self._render([(role, content) for (role, _), content in zip(turns, written, strict=True)]) + tail
        ids: list[int] = []
        for piece in re.split(f"([{chr(PLACEHOLDER)}-{chr(PLACEHOLDER + len(marks) - 1)}])", text):
            if piece and PLACEHOLDER <= ord(piece[0]) < PLACEHOLDER + len(marks):
                mark = longest_first[ord(piece[0]) - PLACEHOLDER]
                ids += [*following(self.tokenizer, "a", mark[0]), *following(self.tokenizer, mark[0], mark[1:])]
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=True) if bos and not ids else following(self.tokenizer, "a", piece)
        return ids


UNRENDERED = (jinja2.TemplateError, TypeError, AttributeError, ValueError, LookupError, ArithmeticError)
"""What a chat template that is wrong, or wrongly used, raises."""
PLACEHOLDER = 0xF0000
"""First of the private characters that stand for control tokens while a prompt is rendered."""


def control_marks(tokenizer: Any) -> list[str]:
    """The tokens that a tokenizer finds in any text before it looks at the words: `<|im_end|>`, `<think>`, `[INST]`."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [str(t) for t in added if len(str(t)) > 1 and (t.special or re.fullmatch(r"<\S+>|\[\S+\]", str(t)))]


def chat(tokenizer: Any, turns: Sequence[tuple[str, str]], keys: Mapping[str, Any], reply: bool = True, merge: bool = True) -> str:
    """The turns under the tokenizer's chat template; `reply`: it ends where the model begins to speak.

    A system message goes to the head of the first question where the template knows no such role (unless `merge` is False), and content
    becomes a list of parts where it wants one.

    Raises:
        One of UNRENDERED: the template cannot be rendered in any of these forms.
    """
    # Llama 3's template writes today's date unless it is given one: a prompt must not change overnight.
    options = {"date_string": "26 Jul 2024", **keys, "tokenize": False, "add_generation_prompt": reply}

    def render(turns: Sequence[tuple[str, str]], parts: bool) -> str:
        messages = [{"role": role, "content": [{"type": "text", "text": said}] if parts else said} for role, said in turns]
        return str(tokenizer.apply_chat_template(messages, **options))

    forms = [turns]
    if merge and turns[0][0] == "system":
        forms.append([("user", f"{turns[0][1]}\n{turns[1][1]}".lstrip("\n")), *turns[2:]])
    failure: Exception | None = None
    text = None
    for parts in (False, True):
        for form in forms:
            try:
                text = render(form, parts)
            except UNRENDERED as error:
                failure = failure or error
            else:
                if form[-1][1].strip() in text:
                    return text
    if text is None and failure is not None:
        raise failure
    return text or ""


def plain_text(turns: Sequence[tuple[str, str]]) -> str:
    """The turns without a chat template."""
    forms = {"system": "{}\n\n", "user": "Question: {}\nReasoning:", "assistant": " {}\n\n"}
    return "".join(forms[role].format(content) for role, content in turns if content or role != "system")


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a reply, the one that the chat template writes first: what a model of this family has learned to end with."""
    return tuple(dict.fromkeys((*end_of_turn_ids(tokenizer), tokenizer.eos_token_id)))


def end_of_turn_ids(tokenizer: Any) -> frozenset[int]:
    """The control token that the chat template writes after an assistant's words (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`), if any."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    said = "Seventeen"
    try:
        text = chat(tokenizer, [("user", "How many?"), ("assistant", said)], {}, reply=False)
    except UNRENDERED:
        return frozenset()  # `Prompts.check` tells
    added = getattr(tokenizer, "added_tokens_decoder", {})
    after = tokenizer.encode(text.rpartition(said)[2].lstrip(), add_special_tokens=False) if said in text else []
    return frozenset(i for i in after[:1] if i in added)

"""The `Dataset` that the config builds around a loader `(split) -> list[Question]`, and the loaders of generated questions."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from emreason.questions.answers import check, check_types, gold_text
from emreason.questions.cells import as_text
from emreason.questions.grammar.numbers import parse_number
from emreason.questions.grammar.typeset import normalise
from emreason.questions.options import Option, position
from emreason.questions.prompts import PromptTemplate
from emreason.types import LETTERS, AnswerKind, Demonstration, Question, Split, UserError, plain

log = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass
class Dataset:
    """A dataset as the config describes it.

    Args:
        name: as in tables.
        load: the whole split, `(split) -> list[Question]`.
        prompt: the words around its questions.
        demonstrations: worked examples: `{id, rationale}` of a training question, `{question, answer, rationale, choices?}`,
            or a `Demonstration`.
        limit: questions per split, null for all. Limited sets are nested, and the same for every seed of a run.
        drop_overlap: drop training questions that are also in validation or test.
        answer_as: how a choice question is answered, by the letter or by the text of the choice.
        max_choice_words: leave out choice questions of which a choice has more words; null keeps all.
    """

    name: str
    load: Callable[[Split], list[Question]]
    prompt: PromptTemplate
    demonstrations: Sequence[Mapping[str, Any] | Demonstration] = ()
    limit: Mapping[str, int | None] = field(default_factory=dict)
    drop_overlap: bool = False
    answer_as: Literal["letter", "text"] = "letter"
    max_choice_words: int | None = None
    _loaded: dict[Split, list[Question]] = field(default_factory=dict, init=False, repr=False)
    _told: set[Split] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        words = self.prompt.instruction
        if self.answer_as == "text" and not isinstance(words, str):
            self.prompt = replace(self.prompt, instruction={**words, "choice": words["text"]})
        elif self.answer_as == "text" and "letter" in words:
            log.warning("dataset.answer_as=text, but dataset.prompt asks for the letter; add prompt@dataset.prompt=choice_text")

    def questions(self, split: Split) -> list[Question]:
        """The questions of a split, in an order that depends on their ids alone.

        Raises:
            UserError: data absent or malformed, a bad limit, or nothing left.
        """
        limit = self._limit(split)
        questions = self._all(split)
        if split == "train":
            shown = {identity(example.question) for example in self.worked_examples()}
            drop = shown | (self._asked("validation") | self._asked("test") if self.drop_overlap else set())
            questions = [question for question in questions if identity(question) not in drop]
        if not questions:
            raise UserError(f"dataset {self.name}: the {split} split is empty.")
        if limit is not None and limit > len(questions) and split not in self._told:
            self._told.add(split)
            log.warning("dataset.limit.%s is %d, but %s has %d: all are taken", split, limit, self.name, len(questions))
        return sorted(questions, key=lambda question: rank(question.id))[:limit]

    def worked_examples(self) -> list[Demonstration]:
        """The worked examples; their questions are not in `questions("train")`."""
        return [self._example(number, example) for number, example in enumerate(self.demonstrations)]

    def fingerprint(self) -> dict[Split, str]:
        """16 hexadecimal digits of each split's questions: other digits, other data."""
        shown = {split: [(q.id, q.text, q.answer, q.choices, q.aliases) for q in self.questions(split)] for split in SPLITS}
        return {split: rank(repr(questions))[:16] for split, questions in shown.items()}

    def overlap(self) -> dict[str, int]:
        """Contamination: questions that two whole splits share, and worked examples that are in the test split."""
        train, test = self._asked("train"), self._asked("test")
        examples = {identity(example.question) for example in self.worked_examples()}
        return {
            "train_test": len(train & test),
            "train_validation": len(train & self._asked("validation")),
            "examples_test": len(examples & test),
        }

    def _all(self, split: Split) -> list[Question]:
        if split not in self._loaded:
            loaded, where = self.load(split), f"dataset {self.name}, {split} split"
            if not isinstance(loaded, Iterable):
                raise UserError(f"{where}: its loader must return a list of emreason.Question, not {loaded!r}.")
            loaded = list(loaded)
            for question in loaded:
                check_types(question, where)
            most = self.max_choice_words or math.inf
            questions = [self._answered(q) for q in loaded if all(len(choice.split()) <= most for choice in q.choices)]
            seen: set[str] = set()
            for question in questions:
                check(question, f"{where}, question {question.id!r}")
                if question.id in seen:
                    raise UserError(
                        f"dataset {self.name}: two questions of the {split} split have the id {question.id!r}; ids must differ."
                    )
                seen.add(question.id)
            self._loaded[split] = questions
        return self._loaded[split]

    def _answered(self, question: Question) -> Question:
        if self.answer_as not in ("letter", "text"):
            raise UserError(f"dataset.answer_as must be letter or text, not {self.answer_as!r}.")
        return replace(question, answer_as=self.answer_as) if question.kind == "choice" else question

    def understood(self) -> str:
        """What the data is, in one line: `1,000 questions (600 train, …), kind number, e.g. 'Ann buys …' → 8`."""
        sizes = {split: len(self._all(split)) for split in SPLITS}
        example = self.questions("train")[0]
        lettered = example.kind == "choice" and example.answer_as == "letter"
        answer = f"{example.answer} ({example.choices[LETTERS.index(example.answer)]})" if lettered else gold_text(example)
        kinds = sorted({question.kind for split in SPLITS for question in self._all(split)})
        return plain(
            f"{self.name}: {sum(sizes.values()):,} questions ({', '.join(f'{n:,} {split}' for split, n in sizes.items())}), "
            f"kind {' and '.join(kinds)}, e.g. {_short(example.text, 60)!r} → {_short(answer, 40)}"
        )

    def _asked(self, split: Split) -> set[str]:
        return {identity(question) for question in self._all(split)}

    def _limit(self, split: Split) -> int | None:
        limit = self.limit.get(split)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise UserError(f"dataset.limit.{split} must be a positive integer or null, not {limit!r}.")
        return limit

    def _example(self, number: int, example: Mapping[str, Any] | Demonstration) -> Demonstration:
        if isinstance(example, Demonstration):
            return example
        where = f"dataset.demonstrations[{number}]"
        if not isinstance(example, Mapping):
            raise UserError(f"{where} must be {{question, answer, rationale}} or {{id, rationale}}, not {example!r}.")
        rationale = str(example.get("rationale") or "").strip()
        if not rationale:
            raise UserError(f"{where} needs a `rationale`.")
        if "id" in example:
            for question in self._all("train"):
                if question.id == str(example["id"]):
                    return Demonstration(question, rationale)
            raise UserError(f"{where}: the training split of {self.name} has no question with the id {example['id']!r}.")
        if example.get("question") is None or example.get("answer") is None:
            raise UserError(f"{where} needs the `id` of a training question, or a `question` and its `answer`.")
        choices = tuple(as_text(choice, where, "choices") for choice in example.get("choices") or ())
        answer = as_text(example["answer"], where, "answer")
        place = position(answer, [Option(None, choice) for choice in choices], "text")
        if place is not None and answer not in tuple(LETTERS[: len(choices)]):
            answer = LETTERS[place]
        kind: AnswerKind = "choice" if choices else "text" if parse_number(answer) is None else "number"
        question = Question(f"example-{number}", str(example["question"]), answer, kind, choices)
        check(question, where)
        return Demonstration(self._answered(question), rationale)


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


# --- generated questions ----------------------------------------------------------------------------------------------


def make_sums(split: Split, terms: int = 3, seed: int = 0) -> list[Question]:
    """Sums of `terms` one-digit numbers (1–9), STaR's first domain in words. The three splits share no question."""
    return [question for _, question in _sums(terms, seed)[split]]


def sum_examples(terms: int = 3, seed: int = 0, count: int = 4) -> list[Demonstration]:
    """Worked sums, `3 + 5 = 8. 8 + 9 = 17.`, that are in no split."""
    examples = _sums(terms, seed)["examples"]
    if not 0 <= count <= len(examples):
        raise UserError(f"dataset.demonstrations.count must be between 0 and {len(examples)}, not {count!r}.")
    return [Demonstration(question, explain_sum(numbers)) for numbers, question in examples[:count]]


def explain_sum(numbers: Sequence[int]) -> str:
    """The running sum, one step a sentence."""
    totals = list(itertools.accumulate(numbers))
    return " ".join(f"{before} + {term} = {after}." for before, term, after in zip(totals, numbers[1:], totals[1:], strict=False))


def _sums(terms: int, seed: int) -> dict[str, list[tuple[tuple[int, ...], Question]]]:
    if not isinstance(terms, int) or terms < 2:
        raise UserError(f"dataset.load.terms must be an integer of at least 2, not {terms!r}.")
    rng = random.Random(f"sums-{terms}-{seed}")
    pool = min(9**terms, 20_000)
    drawn: list[tuple[tuple[int, ...], Question]] = []
    for code in rng.sample(range(9**terms), pool):
        numbers = tuple(code // 9**place % 9 + 1 for place in range(terms))
        shown = " + ".join(map(str, numbers))
        drawn.append((numbers, Question(shown.replace(" ", ""), f"What is {shown}?", str(sum(numbers)), "number")))
    examples, rest = drawn[:8], drawn[8:]
    trained = len(rest) * 3 // 5
    validated = trained + (len(rest) - trained) * 2 // 5
    return {"examples": examples, "train": rest[:trained], "validation": rest[trained:validated], "test": rest[validated:]}


def load_reasoning_gym(
    split: Split, task: str, kind: AnswerKind, sizes: Mapping[str, int], seed: int = 0, params: Mapping[str, Any] | None = None
) -> list[Question]:
    """Questions of a task of the reasoning-gym library, judged by the task's own scorer.

    `sizes` are the questions generated per split, before equal ones are dropped; `params` are the task's own settings.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("dataset=reasoning_gym needs the library of that name: pip install 'emreason[gym]'.") from None
    if not {"train", "validation", "test"} <= set(sizes):
        raise UserError("dataset.load.sizes must name train, validation and test.")
    try:
        source = reasoning_gym.create_dataset(task, seed=seed, size=sum(sizes[name] for name in SPLITS), **(params or {}))
    except Exception as error:  # the library's asserts and ValueErrors
        raise UserError(f"reasoning_gym cannot make the task dataset.load.task={task!r} with {dict(params or {})}: {error}.") from error
    start = sum(sizes[name] for name in SPLITS[: SPLITS.index(split)])
    seen: set[str] = set()
    questions = []
    for number, entry in enumerate(itertools.islice(source, start + sizes[split])):
        if entry["question"] in seen:
            continue  # small tasks repeat themselves; a question belongs to the first split that has it
        seen.add(entry["question"])
        if number >= start:
            answer = "" if entry["answer"] is None else str(entry["answer"]).strip()
            questions.append(Question(f"{task}-{number}", entry["question"].strip(), answer, kind, verify=partial(_score, source, entry)))
    return questions


def _score(source: Any, entry: dict[str, Any], answer: str) -> bool:
    try:
        return bool(source.score_answer(answer, entry) >= 1.0)
    except Exception:  # a task's scorer may choke on nonsense; nonsense is wrong
        return False


# --- shared -----------------------------------------------------------------------------------------------------------


def identity(question: Question) -> str:
    """What makes two questions one: their text and, in any order, their choices ("Which statement is true?" is many questions)."""
    return "\n".join([normalise(question.text), *sorted(map(normalise, question.choices))])


def cut(questions: Sequence[Question], splits: Sequence[Split], where: str, held_out: float = 0.2) -> dict[Split, list[Question]]:
    """One set of questions for several splits: `held_out` of the different texts for each but the first, in the order of their hashes.

    Raises:
        UserError: there are too few.
    """
    alike: dict[str, dict[str, list[Question]]] = {}
    for question in questions:
        alike.setdefault(normalise(question.text), {}).setdefault(identity(question), []).append(question)
    places = {rank(key if len(same) > 1 else text): group for text, same in alike.items() for key, group in same.items()}
    if len(places) < len(splits):
        raise UserError(
            f"{where} has {len(places)} different question{'' if len(places) == 1 else 's'}; at least {len(splits)} are needed, "
            f"one each to {_joined([_PURPOSE[split] for split in splits])}."
        )
    groups = [places[key] for key in sorted(places)]
    held = max(1, round(len(groups) * held_out))
    parts: dict[Split, list[Question]] = {}
    for split in reversed(splits[1:]):
        parts[split] = [question for group in groups[:held] for question in group]
        groups = groups[held:]
    return parts | {splits[0]: [question for group in groups for question in group]}


_PURPOSE: dict[Split, str] = {"train": "train", "validation": "validate", "test": "test"}


def _joined(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def rank(name: str) -> str:
    """A name's place in an order that has nothing to do with it, the same everywhere."""
    return hashlib.sha256(name.encode()).hexdigest()

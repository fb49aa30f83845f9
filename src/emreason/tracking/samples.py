"""What a run shows of its texts: after an E-step an accepted and a rejected rationale, at the end a test question before and after."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from emreason.em.module import EMModule
from emreason.progress import say
from emreason.runs.journal import Journal, read_lines
from emreason.types import plain

LINES, WIDTH = 4, 110


class Samples(Callback):
    """Prints them on the first rank; left out by `quiet=true`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        if trainer.is_global_zero:
            say(after_e_step(Journal(self.folder).path(trainer.current_epoch)))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EMModule)
        if trainer.is_global_zero:
            before = read_lines(self.folder / "predictions" / "baseline_zero_shot_test.jsonl")
            say(before_and_after(before, [dataclasses.asdict(p) for p in pl_module.predictions["test"]]))


def after_e_step(journal: Path) -> str:
    """The first accepted and the first rejected attempt of an iteration's journal; what there is of the two."""
    found: dict[bool, dict[str, Any]] = {}
    with journal.open(encoding="ascii") as file:
        for line in file:
            attempt = json.loads(line)
            if attempt["finish_reason"] != "error":
                found.setdefault(attempt["accepted"], attempt)
            if len(found) == 2:
                break
    shown = []
    for accepted in sorted(found, reverse=True):
        a = found[accepted]
        drawn = "the plain question" if a["proposal"] == "question" else "the question with the answer as a hint"
        shown += [f"  {'Accepted' if accepted else 'Rejected'}, drawn from {drawn}; answer {cut(str(a['answer']))}, gold {cut(a['gold'])}"]
        shown += [*excerpt(a["question"], "? "), *excerpt(a["text"], "| ")]
    return "\n".join(shown)


def before_and_after(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str:
    """A test question as the base model and as the trained one answer it: the first that went from wrong to right, else the first that
    changed, else the first. Nothing where no baseline was measured."""
    was = {p["question_id"]: p for p in before}
    pairs = [(was[p["question_id"]], p) for p in after if p["question_id"] in was]
    if not pairs:
        return ""
    old, new = min(pairs, key=lambda pair: (pair[0]["correct"], not pair[1]["correct"], pair[0]["text"] == pair[1]["text"]))
    shown = [f"  A test question before and after; gold {cut(new['gold'])}", *excerpt(new["question"], "? ")]
    for name, p in (("Before", old), ("After", new)):
        verdict = "right" if p["correct"] else "wrong" if p["answer"] is not None else "no answer"
        shown += [f"  {name}: {verdict}", *excerpt(p["text"], "| ")]
    return "\n".join(shown)


def excerpt(text: str, mark: str) -> list[str]:
    """The first lines of `text`, each cut and without control characters; how many more there are."""
    lines = [cut(line) for line in text.strip().splitlines() if line.strip()] or ["(nothing)"]
    more = [f"… {len(lines) - LINES} more lines"] if len(lines) > LINES + 1 else []
    return [f"    {mark}{line}" for line in [*lines[: LINES if more else LINES + 1], *more]]


def cut(text: str) -> str:
    """At most `WIDTH` characters of one line."""
    text = plain(text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"

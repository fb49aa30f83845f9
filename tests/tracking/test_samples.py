"""The texts that a run shows: an accepted and a rejected rationale, a test question before and after; plain, whatever they hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from emreason import progress
from emreason.tracking.samples import LINES, WIDTH, Samples, after_e_step, before_and_after

EVIL = "[red]x[/blue] :smile: \x1b[31m\x07\r{{7*7}} \ud83d"


def attempt(accepted: bool, text: str = "because", **more):
    base = {"question": "What is 1 + 2?", "gold": "3", "answer": "3" if accepted else None, "proposal": "question", "finish_reason": "stop"}
    return {**base, "accepted": accepted, "text": text, **more}


def journal(folder, *attempts):
    path = folder / "rationales" / "iteration=000.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(a) + "\n" for a in attempts))
    return path


def prediction(name: str, correct: bool, text: str = "said", question: str = "What?"):
    return {"question_id": name, "question": question, "gold": "3", "correct": correct, "answer": "4", "text": text}


def test_the_first_accepted_and_the_first_rejected_are_shown(tmp_path):
    text = after_e_step(
        journal(
            tmp_path,
            attempt(False, "not sampled", finish_reason="error"),
            attempt(False, "wrong one"),
            attempt(False, "wrong two"),
            attempt(True, "right one", proposal="rationalization"),
            attempt(True, "right two"),
        )
    )
    lines = [line.strip() for line in text.splitlines()]
    assert lines == [
        "Accepted, drawn from the question with the answer as a hint; answer 3, gold 3",
        "? What is 1 + 2?",
        "| right one",
        "Rejected, drawn from the plain question; answer None, gold 3",
        "? What is 1 + 2?",
        "| wrong one",
    ]


def test_only_accepted_or_nothing_at_all(tmp_path):
    assert "Rejected" not in after_e_step(journal(tmp_path / "a", attempt(True)))
    assert after_e_step(journal(tmp_path / "b")) == ""


def test_a_long_text_is_cut(tmp_path):
    text = after_e_step(journal(tmp_path, attempt(True, "\n".join(["word " * 90] * 20))))
    shown = [line for line in text.splitlines() if line.startswith("    | ")]
    assert len(shown) == LINES + 1
    assert shown[-1] == "    | … 16 more lines"
    assert all(len(line) <= WIDTH + 6 for line in text.splitlines())


@pytest.mark.parametrize(
    ("before", "after", "chosen"),
    [
        ([True, False, False, True], [True, False, True, False], "c"),  # from wrong to right, if there is any
        ([True, True, False, True], [True, False, False, True], "c"),  # else one that is still wrong
        ([True, True, True, True], [True, True, True, False], "a"),
    ],
)
def test_the_question_shown_is_the_one_that_was_learned(before, after, chosen):
    names = "abcd"
    text = before_and_after(
        [prediction(n, c, "before", question=n) for n, c in zip(names, before, strict=True)],
        [prediction(n, c, "after", question=n) for n, c in zip(names, after, strict=True)],
    )
    assert f"    ? {chosen}" in text.splitlines()
    assert text.index("| before") < text.index("| after")


def test_without_a_baseline_nothing_is_compared():
    assert before_and_after([], [prediction("a", True)]) == ""


def test_hostile_texts_stay_texts(tmp_path, capfd):
    journal(tmp_path, attempt(True, EVIL, question=EVIL, gold=EVIL, answer=EVIL))
    Samples(tmp_path).on_train_epoch_start(SimpleNamespace(is_global_zero=True, current_epoch=0), None)
    progress.say(before_and_after([prediction("a", False, EVIL, EVIL)], [prediction("a", True, EVIL, EVIL)]))
    shown = capfd.readouterr().err
    assert shown.count("[red]x[/blue] :smile:  [31m") == 7
    assert all(line.isprintable() for line in shown.splitlines())
    assert "\x1b" not in shown


def test_the_other_ranks_show_nothing(tmp_path, capfd):
    journal(tmp_path, attempt(True))
    Samples(tmp_path).on_train_epoch_start(SimpleNamespace(is_global_zero=False, current_epoch=0), None)
    assert capfd.readouterr().err == ""

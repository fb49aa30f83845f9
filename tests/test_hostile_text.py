"""Text from models, data sets and file names is shown as text; secrets are in no file. Report and page: `test_report`."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import wandb
from conftest import numbers
from test_journal import rationale

from emreason import evaluate, train
from emreason.runs.console import one_sentence
from emreason.runs.journal import JsonLines, journal_record
from emreason.tracking import dashboard
from emreason.tracking.dashboard import Iterations, WandbRun
from emreason.types import UserError

EVIL = "[red]x[/blue] \x1b[31m\x07\r<script>alert(1)</script> {{7*7}} $x$ | \\input{x} \ud83d"


def test_an_error_message_moves_no_cursor():
    assert one_sentence(UserError(EVIL)).isprintable()
    assert one_sentence(OSError(2, "gone", "a\x1b[2Jb")).isprintable()


def run(main, monkeypatch, capfd, *arguments: str) -> tuple[str, int]:
    monkeypatch.setattr(sys, "argv", ["emreason", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)  # as the interpreter does
    shown = capfd.readouterr()
    return shown.out + shown.err, code


def test_a_hostile_file_name(monkeypatch, capfd, tmp_path):
    place = f"hydra.run.dir={tmp_path / 'r'}"
    shown, code = run(train.main, monkeypatch, capfd, "dataset=file", "dataset.load.train='a\x1b[2Jb.jsonl'", "model=tiny_llama", place)
    assert code == 1
    assert "there is no file" in shown
    assert "\x1b[2J" not in shown


def test_a_hostile_name_of_a_data_set(monkeypatch, capfd, tmp_path):
    tiny = ["model=tiny_llama", "trainer.accelerator=cpu", "engine.dtype=float32", "dataset.limit.test=2", "sampler.max_new_tokens=4"]
    name = "dataset.name='[red]x[/blue]\x1b[31m'"
    shown, code = run(evaluate.main, monkeypatch, capfd, *tiny, name, f"hydra.run.dir={tmp_path / 'e'}")
    assert code == 0
    assert "[red]x[/blue]" in shown
    assert "\x1b[31m" not in shown


def test_wandb_gets_names_that_it_takes_and_texts_as_they_are(monkeypatch, tmp_path):
    given = {}

    class Run:
        logged: ClassVar[dict[str, Any]] = {}

        def log(self, values, **_):
            self.logged.update(values)

    monkeypatch.setattr(dashboard, "_start", lambda *_, **about: given.update(about) or Run())
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    logger = WandbRun(str(tmp_path), "p", group=EVIL * 9, job_type=EVIL * 9, offline=True, tags=[EVIL * 9, "a"])
    assert all(text.isprintable() for text in [given["group"], given["job_type"], *given["tags"]])
    assert (len(given["group"]), len(given["tags"][0])) == (128, 64)

    lines = JsonLines(tmp_path / "rationales" / "iteration=000.jsonl")
    lines.append(journal_record(numbers(1)[0], rationale(EVIL)))
    lines.close()
    record = {"iteration": 0, "e_step": {"accepted": 1, "tokens": 9}, "m_step": {"steps": 1}, "validation": None}
    summary = SimpleNamespace(values={"iterations": [record]})
    monkeypatch.setattr(dashboard, "wandb_runs", lambda _: [logger])
    Iterations(summary, tmp_path, "RS", rows=5).on_train_epoch_end(None, None)
    assert isinstance(Run.logged["rationales"], wandb.Table)  # cells are data there, not markup
    assert EVIL in Run.logged["rationales"].data[0]


@pytest.mark.parametrize("key", ["logger.api_key", "model.load.token", "logger.wandb.password"])
def test_a_secret_is_refused_before_anything_is_saved(monkeypatch, capfd, tmp_path, key):
    shown, code = run(train.main, monkeypatch, capfd, f"+{key}=hush", "logger=wandb", f"hydra.run.dir={tmp_path / 'r'}")
    assert code == 1
    assert key in shown
    assert not list(tmp_path.rglob("*"))


def test_a_secret_in_a_config_file_is_refused_before_anything_is_saved(monkeypatch, capfd, tmp_path):
    (tmp_path / "c" / "logger").mkdir(parents=True)
    (tmp_path / "c" / "logger" / "mine.yaml").write_text("api_key: hush\n")
    arguments = ["--config-dir", str(tmp_path / "c"), "logger=mine", f"hydra.run.dir={tmp_path / 'r'}"]
    shown, code = run(train.main, monkeypatch, capfd, *arguments)
    assert code == 1
    assert "logger.api_key" in shown
    assert not (tmp_path / "r").exists()

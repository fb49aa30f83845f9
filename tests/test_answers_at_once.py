"""Help, plans, completion and slips are answered without what takes seconds to import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LARGE = ("torch", "lightning", "transformers", "datasets", "pandas", "scipy", "matplotlib", "wandb", "peft")


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code`; at its end, whatever that is, the large packages that were imported go to stderr."""
    ending = "import atexit, sys; atexit.register(lambda: print('LARGE', [m for m in %r if m in sys.modules], file=sys.stderr))\n"
    return subprocess.run(
        [sys.executable, "-c", ending % (LARGE,) + code, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "140", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    "module", ["emreason.train", "emreason.evaluate", "emreason.report", "emreason.reproduce", "emreason.reports.sweep"]
)
def test_an_entry_point_imports_nothing_large(module):
    done = python(f"import {module}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "LARGE []"


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("train", ["--help"], ["experiment=smoke", "sampler", "emreason --cfg job"]),
        ("train", ["-h"], ["experiment=smoke"]),
        ("evaluate", ["--help"], ["emreason-eval", "split"]),
        ("train", ["smapler=rs"], ["error: ", "smapler", "emreason --cfg job"]),
        ("train", ["sampler=nosuch"], ["error: ", "nosuch", "star"]),
        ("train", ["seed=x"], ["error: seed=x", "whole number"]),
        ("evaluate", ["splt=test"], ["error: ", "splt"]),
        ("train", ["experiment=smoke", "plan=true"], ["320 draws"]),
        ("train", ["-m", "seed=1,2", "plan=true"], ["error: plan=true", "-m"]),
        ("train", ["experiment=smoke", "plan=true", "sampler.budget=0"], ["error: sampler.budget=0"]),
    ],
)
def test_an_answer_imports_nothing_large(module, arguments, words, tmp_path):
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv[0] = 'emreason'; from emreason.{module} import main; main()"
    done = python(code, *arguments)
    assert "Traceback" not in done.stderr
    assert all(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr
    assert (done.returncode == 0) == ("error: " not in words[0])
    assert "LARGE []" in done.stderr


def test_completion_imports_nothing_large(tmp_path):
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.argv[0] = 'emreason'; from emreason.train import main; main()"
    done = python(code, "-sc", "query=bash", COMP_LINE="emreason sampler=sta", COMP_POINT="20", COMP_TYPE="9")
    assert done.stdout.split() == ["sampler=star", "sampler=star_m", "sampler=star_mh"]
    assert "LARGE []" in done.stderr


def test_the_help_is_short_and_names_every_option_that_one_can_choose():
    done = python("from emreason.runs import help; print(help.text('train'))")
    assert len(done.stdout.splitlines()) <= 31
    narrow = python("from emreason.runs import help; print(help.text('train'), help.text('evaluate'))", COLUMNS="80")
    assert max(map(len, narrow.stdout.splitlines())) <= 80
    conf = Path(__file__).resolve().parents[1] / "conf"
    listed = done.stdout.split()
    for group in ("model", "dataset", "sampler", "engine", "peft", "logger", "callbacks", "experiment"):
        options = {file.stem for file in (conf / group).glob("*.yaml")} - {"base"}
        assert options <= set(listed), group
    schemes = done.stdout.partition("sampling scheme: ")[2].partition("engine")[0].split()
    assert schemes[0] == "star"  # the default
    assert "base" not in schemes

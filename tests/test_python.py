"""The package from Python: what `import emreason` offers, the README's examples, the notebook."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from conftest import REPO
from lightning.pytorch.callbacks import Callback

import emreason
from emreason.runs.experiment import CONF
from emreason.types import UserError

PACKAGE = REPO / "src" / "emreason"
EXAMPLES = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_importing_the_package_imports_nothing():
    code = "import sys; before = set(sys.modules); import emreason; dir(emreason); print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "hydra", "lightning", "omegaconf"}.isdisjoint(ast.literal_eval(done.stdout))


def test_every_name_is_there_for_people_and_for_type_checkers():
    assert (PACKAGE / "py.typed").is_file()
    assert all(getattr(emreason, name) is not None for name in emreason.__all__)
    assert set(emreason.__all__) <= set(dir(emreason))
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {a.asname or a.name: (n.module, a.name) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == {name: (f"emreason.{module}", attribute) for name, (module, attribute) in emreason._PLACES.items()}
    assert set(typed) == set(emreason.__all__)
    with pytest.raises(AttributeError, match="nosuch"):
        emreason.nosuch  # noqa: B018


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_readme_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_examples_show_every_name():
    shown = set(re.findall(r"\w+", " ".join(EXAMPLES)))
    results = {"Completion", "Rationale", "UserError"}  # what comes back
    assert set(emreason.__all__) - shown <= results | {"Dataset", "Demonstration"}


def test_a_run_from_python_is_that_of_the_command(tmp_path, monkeypatch):
    """Also inside a program that uses Hydra itself."""
    monkeypatch.chdir(tmp_path)
    job = ["experiment=smoke", "seed=3", "tag=mine", "trainer.max_epochs=1", "dataset.limit.test=4", "evaluation.baseline=[]", "logger=csv"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        summary = emreason.run(*job)
        assert hydra.compose("train").seed == 1
    folder = tmp_path / "outputs/mine/sums/tiny_llama/rs-8/seed=3"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["seed"], summary["test"]["n"]) == ("finished", 3, 4)
    assert list(folder.glob("csv/*/metrics.csv"))
    before = (folder / "summary.json").stat().st_mtime_ns
    assert emreason.run(*job) == summary  # nothing is done again
    assert (folder / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"config_dir=nowhere: there is no such folder"):
        emreason.run(*job, config_dir="nowhere")
    for odd in (job, "-m"):
        with pytest.raises(UserError, match="is no override"):
            emreason.run(odd)
    for wrong, words in [("plan=true", "plan=true is for the command"), ("experiment=exact", "laboratory"), ("api_key=x", "secret")]:
        with pytest.raises(UserError, match=words):
            emreason.run(wrong)


class CtrlC(Callback):
    """As if somebody pressed it after the first iteration."""

    def on_train_epoch_end(self, trainer, pl_module):  # noqa: ARG002
        raise KeyboardInterrupt


def test_ctrl_c_in_a_notebook_ends_the_run_and_not_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        emreason.run("experiment=smoke", "evaluation.baseline=[]", "+callbacks.mine._target_=test_python.CtrlC")
    assert signal.getsignal(signal.SIGINT) is before  # the next one is heard, too
    summary = json.loads((tmp_path / "outputs/smoke/sums/tiny_llama/rs-8/seed=1/summary.json").read_text())
    assert summary["status"] == "interrupted"


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell by cell, on the tiny model."""
    cells = json.loads((REPO / "outputs" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    small = 'EXPERIMENT, MORE = "smoke", ["trainer.max_epochs=1", "m_step.on_zero_accepted=skip", "dataset.limit.train=16"]'
    assert code[0].startswith("EXPERIMENT, MORE = ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for cell in [code[0], small, *code[1:]]:
        exec(compile(cell, "demo.ipynb", "exec"), names)
    assert {s["status"] for s in names["summaries"].values()} == {"finished"}
    assert Path("outputs").is_dir()
    assert all(not cell.get("outputs") for cell in cells)  # results belong into a run folder

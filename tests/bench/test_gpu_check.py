"""`make gpu-check` on a CPU, small: every part says what it found; one that fails or takes too long does not keep the next from running."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from emreason.bench import gpu_check, gpu_parts

WITHOUT = """
import importlib.abc, importlib.metadata, importlib.util, sys
HIDDEN = ("datasets", "gguf", "wandb", "pandas", "matplotlib")
found = importlib.util.find_spec
def hidden(function):
    def asked(name, *more):
        if name in HIDDEN:
            raise importlib.metadata.PackageNotFoundError(name)
        return function(name, *more)
    return asked
importlib.metadata.version = hidden(importlib.metadata.version)
importlib.metadata.distribution = hidden(importlib.metadata.distribution)
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
def spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = spec
"""
"""What is promised: torch, transformers, lightning, peft, hydra-core and what these need."""


@pytest.mark.slow
def test_all_parts_run_without_what_is_not_promised(tmp_path):
    code = (
        f"{WITHOUT}\nfrom emreason.bench.gpu_check import main\nsys.exit(main(['--device', 'cpu', '--out', {str(tmp_path / 'lines')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["part"] for line in lines] == list(gpu_parts.PARTS), done.stderr[-2000:]
    assert [line["wrong"] for line in lines] == [[]] * len(lines)
    assert done.returncode == 0
    assert (tmp_path / "lines").read_text().splitlines() == [line for line in done.stdout.splitlines() if line.startswith("{")]
    by_part = {line["part"]: line for line in lines}
    assert by_part["engine"]["greedy_rows_equal"] == 6
    assert by_part["runs"]["resumed_differs_by"] == 0
    assert "halved to 32" in by_part["out_of_memory"]["in a step"]
    assert by_part["decoding"]["kernels_of_a_step"] > 20
    assert by_part["m_step"]["256"]["tokens_per_s"] > 0


def test_a_part_that_fails_says_so_and_the_next_goes_on(monkeypatch, capsys):
    def breaks(found):
        found.values["got"] = 1
        raise RuntimeError("no kernel image")

    def slow(_):
        while True:
            torch.ones(3).sum()

    parts = {
        "breaks": breaks,
        "wrong": lambda found: found.expect(False, "too slow"),
        "fine": lambda _: None,
        "slow": slow,
        "last": lambda _: None,
    }
    monkeypatch.setattr(gpu_parts, "PARTS", parts)
    assert gpu_check.main(["--device", "cpu", "--seconds", "2"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ok"] for line in lines] == [False, False, True, False, False]
    assert lines[0]["wrong"] == ["RuntimeError: no kernel image"]
    assert lines[0]["got"] == 1
    assert lines[1]["wrong"] == ["too slow"]
    assert "no time is left" in lines[3]["wrong"][0]
    assert gpu_check.main(["--device", "cpu", "--only", "fine"]) == 0


def test_a_wrong_engine_and_wrong_gradients_are_seen(monkeypatch):
    """Of the parts' own eyes."""
    make = gpu_parts.make_decoder

    def off(model):
        made = make(model)
        decode = made.decode
        made.decode = lambda *given: decode(*given) * 1.01
        return made

    monkeypatch.setattr(gpu_parts, "make_decoder", off)
    found = gpu_parts.Findings("cpu")
    gpu_parts.engine(found)
    assert found.wrong == ["logits differ by over 1e-3"]
    accumulate, calls = gpu_parts.accumulate, []

    def drifts(score, *rest):
        accumulate(score, *rest)
        calls.append([p.grad.mul_(1 + 1e-3 * len(calls)) for p in score.args[0].parameters()])

    monkeypatch.setattr(gpu_parts, "accumulate", drifts)
    found = gpu_parts.Findings("cpu")
    gpu_parts.gradients(found)
    assert found.wrong


@pytest.mark.parametrize("part", ["out_of_memory"])
def test_on_a_gpu_memory_is_capped(part, monkeypatch):
    """The cap is set to what is in use, and lifted whatever happens."""
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", asked.append)
    found = gpu_parts.Findings("cpu")
    found.on_gpu = True
    with pytest.raises(MemoryError), gpu_parts.little_memory(found, (None, part)):
        raise MemoryError
    assert asked == pytest.approx([0.25, 1.0], abs=1e-3)

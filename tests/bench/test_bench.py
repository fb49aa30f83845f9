"""`make bench`: rows, ratios, growth, failures; the contenders that need no environment of their own on a tiny model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections import deque

import hub
import pytest
import torch
from gguf_file import write_gguf
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from test_config import compose_config
from transformers import LlamaConfig, LlamaForCausalLM

from emreason.bench import __main__ as bench
from emreason.bench import contenders, results
from emreason.bench.contenders import EXACT, OURS, Contender
from emreason.bench.peak import matmul_peak
from emreason.bench.runners import iterate_others, train_ours
from emreason.bench.work import make_work, of_model
from emreason.em.module import EMModule
from emreason.engines.inprocess import InProcessEngine
from emreason.models.loading import load_pretrained, weights_fingerprint
from emreason.models.sizes import gguf_cache
from emreason.types import Request, SamplingParams, UserError


def printed(tables):
    console = Console(width=200, record=True)
    for table in tables:
        console.print(table)
    return console.export_text()


def test_a_contender_that_cannot_run_is_a_row_that_says_why(tmp_path):
    work = tmp_path / "work.json"
    work.write_text('{"dtype": "float32"}')
    broken = Contender("E-step", "broken", "sample_ours.py")
    result = contenders.run(broken, work, tmp_path, "cpu", timeout=120)
    assert "KeyError" in result["error"]
    rows = results.rows_of(broken, result, ["a", "b"])
    assert [row["work"] for row in rows] == ["a", "b"]
    results.finish(rows, 10, 1.0)
    made = {"device": "cpu", "model": "m", "peak_gflops": {"float32": 1.0}, "rows": rows, "growth": results.growth(rows)}
    assert printed(results.tables_of(made)).count("cannot run: KeyError") == 2
    assert results.markdown_of(made).count("cannot run: KeyError") == 2


def test_an_environment_that_cannot_be_made_is_a_row_too(tmp_path, monkeypatch):
    def fails(*_):
        raise subprocess.CalledProcessError(1, ["pip"], stderr="ERROR: No matching distribution found for vllm\n")

    monkeypatch.setattr(contenders, "python_of", fails)
    result = contenders.run(Contender("E-step", "vLLM", "sample_vllm.py", (), ("vllm",)), tmp_path / "work.json", tmp_path, "cpu", 10)
    assert "No matching distribution" in result["error"]


def test_the_reason_is_the_childs_error_not_that_a_child_failed():
    said = "RuntimeError: no kernel\nsubprocess.CalledProcessError: Command [...] returned non-zero exit status 1."
    assert contenders.reason(said) == "RuntimeError: no kernel"
    assert contenders.reason("one\ntwo") == "two"


def test_a_process_is_measured_and_a_timeout_ends_its_children():
    measured = contenders._run([sys.executable, "-c", "x = bytearray(300_000_000)"], timeout=60)
    assert measured["peak_memory_bytes"] > 300_000_000
    assert measured["process_seconds"] > 0
    holder = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    read, start = subprocess.PIPE, time.perf_counter()
    with pytest.raises(subprocess.TimeoutExpired):
        contenders._run([sys.executable, "-c", holder], timeout=1, stdout=read)
    assert time.perf_counter() - start < 20


def row(contender, work="w", phase="M-step", **values):
    return {"phase": phase, "contender": contender, "work": work, **values}


def test_ratios_shares_and_losses():
    rows = [
        row("slow", tokens=100, seconds=4.0, losses=[1.0, 2.0005], dtype="float32"),
        row(OURS, tokens=100, seconds=2.0, losses=[1.01, 2.02], dtype="bfloat16"),
        row(EXACT, tokens=100, seconds=2.0, losses=[1.0, 2.0], dtype="float32"),
        row("float32 may not round", tokens=100, seconds=1.0, losses=[1.01, 2.02], dtype="float32"),
        row("other losses", tokens=100, seconds=1.0, losses=[1.0, 2.1], dtype="bfloat16"),
        row("fewer steps", tokens=100, seconds=1.0, losses=[1.0], dtype="float32"),
    ]
    results.finish(rows, parameters=10**6, peak=1.0)
    assert [r["ours_is_faster_by"] for r in rows] == [2.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert rows[1]["share_of_limit"] == pytest.approx(50 * 6e6 / 1e9)
    assert [r["same_work"] for r in rows[:3]] == ["yes", "yes, rounded", "yes"]
    assert [r["same_work"].split(":")[0] for r in rows[3:]] == ["no", "no", "no"]
    assert rows[4]["loss_difference"] == pytest.approx(0.1)


def test_an_iteration_is_compared_by_the_time_of_its_whole_process():
    parts = {"work": "w", "e_step_seconds": 3.0, "m_step_seconds": 2.0, "evaluation_seconds": 1.0}
    rows = [
        *results.rows_of(Contender("iteration", "theirs", ""), {"rows": [parts], "process_seconds": 60.0}, []),
        *results.rows_of(Contender("iteration", OURS, ""), {"rows": [parts], "process_seconds": 10.0}, []),
    ]
    results.finish(rows, 1, 1.0)
    assert rows[0]["ours_is_faster_by"] == 6.0
    assert rows[0]["other_seconds"] == 54.0


def test_seeds_are_one_row_of_means_with_what_was_learned():
    def ran(seconds, accuracies):
        row = {"work": "w", "e_step_seconds": seconds / 2, "accepted": [9, 9], "accuracies": accuracies}
        return {"rows": [row], "dtype": "float32", "process_seconds": seconds, "peak_memory_bytes": int(seconds)}

    made = results.over_seeds([ran(10.0, [0.7]), ran(20.0, [0.1, 0.5]), ran(30.0, [0.0, 0.1, 0.4])])
    (one,) = made["rows"]
    assert (made["process_seconds"], made["peak_memory_bytes"], one["e_step_seconds"]) == (20.0, 30, 10.0)
    assert (one["reached"], one["seeds"], one["iterations"]) == (2, 3, [1, 2, 3])
    assert one["accuracy"] == pytest.approx(0.8 / 3)
    assert results.over_seeds([ran(1.0, [1.0]), {"error": "no"}]) == {"error": "no"}


def test_growth_is_the_slope_in_logarithms():
    rows = [
        row(OURS, f"{n}", "growth", questions=n, seconds=0.1 * n**1.2, peak_memory_bytes=100 + 5 * i, tokens=n)
        for i, n in enumerate((64, 256, 1024))
    ]
    rows.append(row(OURS, "full fine-tuning", "growth", seconds=1.0, peak_memory_bytes=3e9))
    results.finish(rows, 1, 1.0)
    found = results.growth(rows)
    assert found["exponent"] == pytest.approx(1.2)
    assert found["memory_ratio"] == pytest.approx(1.1)
    assert found["m_step_peak_bytes"] == 3e9
    assert "1.20" in results.growth_line(found)
    assert results.growth_line(found).endswith("; full fine-tuning takes 3.00 GB of the host's memory.")
    assert results.growth([]) == {}


def test_parts_of_the_benchmark_bring_ours_along():
    assert contenders.chosen([]) == contenders.CONTENDERS
    assert {(c.phase, c.name) for c in contenders.chosen(["growth"])} == {("growth", OURS), ("E-step", OURS)}
    some = contenders.chosen(["M-step: TRL, default"])
    assert {c.phase for c in some} == {"E-step", "M-step"}  # ours samples what is trained on
    assert [c.name for c in some if c.name not in (OURS, EXACT)] == ["TRL, default"]
    assert contenders.chosen(["nobody"]) == []


def test_all_draw_in_the_dtype_that_is_fastest_here():
    """Ours does; only rows that are named by their precision, or whose compiler is slow, have one of their own."""
    drawing = [c for c in contenders.CONTENDERS if c.phase in ("E-step", "iteration")]
    own = {c.name for c in drawing if {"bfloat16", "float32"} & set(c.given("x"))}
    assert own == {"vLLM, eager", "generate + TRL, defaults"}
    assert sum("x" in c.given("x") for c in drawing) == 6


def test_a_bad_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for asked, words in (["--model", str(tmp_path)], "no .gguf file"), (["--questions", "8"], "at least 16"):
        monkeypatch.setattr(sys, "argv", ["bench", *asked])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(bench.__file__, run_name="__main__")
        said = str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err  # as Python and argparse print it
        assert words in said.splitlines()[-1]


def test_the_limit_is_a_rate():
    assert all(rate > 0 for rate in matmul_peak("cpu", size=64, repeats=2).values())


def test_the_straightforward_script_is_star():
    """What is trained on is the plain zero-shot prompt; only what failed is drawn again, with the hint."""
    questions = [{"plain": [i], "hinted": [10 + i], "prompt": [100 + i], "answer": str(i)} for i in range(3)]
    asked = []

    def sample(prompts, temperature):
        asked.append((prompts, temperature))
        return [[p[0]] for p in prompts]

    said = {0: "0. Answer: 0", 1: "Answer: 7", 2: "I do not know", 11: "Answer: 3\nAnswer: 1", 12: "Answer: -2"}
    accepted = iterate_others.star(questions, sample, 0.6, lambda ids: said[ids[0]])
    assert asked == [([[0], [1], [2]], 0.6), ([[11], [12]], 0.6)]
    assert accepted == [([100], [0]), ([101], [11])]


def test_our_contenders_do_the_same_work(tmp_path, monkeypatch):
    """The whole command on the tiny model: our sampler's sequences are what is trained on, and transformers runs beside it."""

    def run_here(contender, work, *more):
        result = work.with_name("result.json")
        script = contenders.RUNNERS / contender.script
        monkeypatch.setattr(sys, "argv", [str(script), str(work), str(result), *contender.given("float32"), *more[3:]])
        start = time.perf_counter()
        runpy.run_path(str(script), run_name="__main__")
        return json.loads(result.read_text()) | {"process_seconds": time.perf_counter() - start, "peak_memory_bytes": 1}

    monkeypatch.setenv("EMREASON_DATA_ROOT", str(hub.find_or_build_hub()))
    monkeypatch.setattr(bench, "run", run_here)
    monkeypatch.setattr(bench, "matmul_peak", lambda _: {"float32": 1.0})
    monkeypatch.setattr(contenders, "CONTENDERS", [c for c in contenders.CONTENDERS if "1024" not in c.options])
    names = [f"E-step: {OURS}", "generate, 64 rows", f"M-step: {OURS}", f"iteration: {OURS}", "growth"]
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--model", "tiny_llama", "--seeds", "1", "2", "--only", *names])
    bench.main()
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = result["rows"]
    assert [r["contender"] for r in rows if r["phase"] == "E-step"].count(OURS) == 2
    drawn = {r["contender"]: r["tokens"] for r in rows if r["work"] == "4 samples of 16 questions"}
    assert len(drawn) > 1
    assert len(set(drawn.values())) == 1  # all draw completions as long as ours
    assert all(r["tokens"] > 0 for r in rows if r["phase"] != "iteration")
    trained = [r for r in rows if r["phase"] == "M-step"]
    assert [len(r["losses"]) for r in trained] == [4, 4]
    assert all(r["same_work"].startswith("yes") for r in trained)
    assert trained[0]["losses"][0] > 0
    (iteration,) = [r for r in rows if r["phase"] == "iteration"]
    assert 0 < iteration["accepted"] <= 128
    assert iteration["seeds"] == 2
    assert iteration["iterations"] == [3, 3]  # the tiny model never gets there
    assert iteration["reached"] == 0
    assert [r["questions"] for r in rows if "questions" in r] == [64, 256]
    assert result["growth"]["exponent"] > 0.5
    assert "of limit" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_may_be_a_file(tmp_path, monkeypatch, lora):
    """A GGUF's copy in the precision of the work is what all contenders read; of a large model an adapter is trained."""
    monkeypatch.setenv("EMREASON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EMREASON_DATA_ROOT", str(hub.find_or_build_hub()))
    monkeypatch.setattr("emreason.bench.work.choose_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr("emreason.bench.work.LARGE", 1e3 if lora else 1e9)
    file = write_gguf(tmp_path / "a b.gguf")
    work = make_work(tmp_path, str(file), "cpu", questions=16)
    assert work["model"] == str(gguf_cache(file, "bfloat16"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [gguf_cache(file, "bfloat16").name]
    assert [(name, len(prompts), samples) for name, (prompts, samples) in work["shapes"].items()] == [
        ("1 sample of 16 questions", 16, 1),
        ("4 samples of 4 questions", 4, 4),
    ]
    assert work["steps"] == 2
    trained = []
    monkeypatch.setattr(train_ours, "EMModule", lambda model, *more: trained.append(model) or EMModule(model, *more))
    work["sequences"] = [[prompt[:20], prompt[20:30]] for prompt in work["shapes"]["1 sample of 16 questions"][0]]
    (row,) = train_ours.main(work)["rows"]
    assert len(row["losses"]) == 2
    names = [name for name, p in trained[0].named_parameters() if p.requires_grad]
    assert all(("lora_" in name) == lora for name in names)
    rows = [row | {"phase": "M-step", "contender": OURS}]
    results.finish(rows, 10, 1.0, lora=lora)
    assert rows[0]["share_of_limit"] == pytest.approx(rows[0]["tokens_per_second"] * 10 * (4 if lora else 6) / 1e9)


def test_a_model_that_is_neither_an_option_nor_a_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"MODEL=.*no \.gguf file"):
        of_model(str(tmp_path))
    assert of_model("smollm2_135m") == ["model=smollm2_135m"]


def test_the_random_model_has_the_shape_of_the_real_one():
    shape = OmegaConf.to_container(compose_config("model=llama32_3b_random").model.load.shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    assert sum(p.numel() for p in model.parameters()) == 3_212_749_824  # Llama-3.2-3B's


@pytest.mark.real
def test_a_random_model_is_as_any_other(tmp_path):
    small = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    cfg = compose_config("model=llama32_3b_random", *(f"model.load.shape.{key}={value}" for key, value in small.items()))
    model, tokenizer = instantiate(cfg.model.load, _partial_=True)(dtype=torch.bfloat16)
    again, _ = instantiate(cfg.model.load, _partial_=True)(dtype=torch.bfloat16)
    assert weights_fingerprint(model) == weights_fingerprint(again)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert weights_fingerprint(loaded) == weights_fingerprint(model)
    requests = deque([Request(0, tuple(tokenizer.encode("What is 3 + 5?")), SamplingParams(1.0, 1.0, 4), seed=0)])
    assert len(next(iter(InProcessEngine(model, tokenizer).generate(requests))).token_ids) in range(1, 5)

"""What a run is said to take of memory: against models' own sizes, a table made by hand, and a measured peak."""

from __future__ import annotations

import inspect
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_file import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from emreason.engines.decoder import PREFILL_TOKENS
from emreason.engines.inprocess import InProcessEngine
from emreason.models.footprint import GIB, HEAD_CHUNK, KEPT_PREFIXES, PREFILL, Shape, Work, footprint, read_shape, trained
from emreason.models.loading import add_lora
from emreason.models.sizes import config, parameters
from emreason.scores.scoring import token_logprobs

WORK = Work("cuda", "bfloat16", "inprocess", None, True, 128, 192, 256, 16_384, True)
LLAMA = {
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 128_256, True),
    "3B": Shape(3072, 8192, 28, 24, 8, 128, 128_256, True),
    "8B": Shape(4096, 14_336, 32, 32, 8, 128, 128_256, False),
}
TABLE = {  # GiB on a GPU by hand: bfloat16 weights, masters, moments, gradients, K/V of 128 rows × 448; the phases without activations
    "1B": (2.3, 4.6, 9.2, 4.6, 1.8, 20, 21),
    "3B": (6.0, 12.0, 23.9, 12.0, 6.1, 52, 54),
    "8B": (15.0, 29.9, 59.8, 29.9, 7.0, 121, 135),
}
PACKED = {"1B": 1.2, "3B": 3.4, "8B": 8.5}
"""Of that table: q, k, v, gate and up copied side by side; they are views of one storage now."""
ACTIVATIONS = {"1B": 3, "3B": 5, "8B": 8}


@pytest.mark.parametrize("name", LLAMA)
def test_a_table_made_by_hand(name):
    shape, (weights, masters, moments, gradients, cache, e_step, m_step) = LLAMA[name], TABLE[name]
    e, m = ({k: v / GIB for k, v in footprint(shape, WORK)[phase].items()} for phase in ("E-step", "M-step"))
    kept = shape.kv_bytes(4096, 2) / GIB  # prefixes, which the table leaves out
    head = 6 * shape.table / GIB  # the head's gradient beside that of all, likewise
    assert [e["weights"], e["masters"], e["moments"]] == pytest.approx([weights, masters, moments], abs=0.06)
    assert e["K/V"] - kept == pytest.approx(cache, abs=0.06)
    assert m["gradients"] - head == pytest.approx(gradients, abs=0.06)
    assert sum(e.values()) - kept == pytest.approx(e_step - PACKED[name], rel=0.03)
    assert sum(m.values()) - m["activations"] - head - m["libraries"] == pytest.approx(m_step, rel=0.02)
    assert "packed copy" not in e
    assert m["activations"] == pytest.approx(ACTIVATIONS[name], rel=0.6)  # there of one layer, here of the one that is computed again, too


def test_what_is_written_here_again_is_what_the_engine_and_the_m_step_do():
    """Nothing large may be imported for an estimate."""
    assert PREFILL == PREFILL_TOKENS
    assert inspect.signature(InProcessEngine).parameters["prefix_tokens"].default == KEPT_PREFIXES
    assert inspect.signature(token_logprobs).parameters["chunk"].default == HEAD_CHUNK


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "olmo2", "phi3", "granite", "smollm3"])
def test_parameters_are_the_models(family):
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0}
    asked = AutoConfig.for_model(family, **shape, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(asked)
    found = read_shape(json.loads(asked.to_json_string(use_diff=False)))
    assert found is not None
    assert found.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)
    if family != "phi3":  # its products are stacked
        adapted = add_lora(model, r=3, alpha=6)
        work = Work("cpu", "float32", "inprocess", (3, "all-linear"), True, 1, 1, 1, 1, False)
        assert trained(found, work) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_what_is_not_made_like_that_is_not_guessed():
    for family in ("gpt2", "mixtral", "mamba", "qwen3_moe"):
        assert read_shape(json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))) is None


def test_a_ggufs_header_says_what_its_converted_copy_does(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    load = {"path": str(file)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert parameters(load) == sum(p.numel() for p in model.parameters())
    assert read_shape(config(load) or {}) == read_shape(model.config.to_dict())


@pytest.mark.real
def test_a_measured_peak_is_within_a_tenth():
    """bfloat16 with adapters; the other ways: `python tests/models/peaks.py float32`, and so on."""
    script = Path(__file__).with_name("peaks.py")
    done = subprocess.run([sys.executable, str(script), "bfloat16", "lora"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print({phase: {k: round(v / GIB, 2) for k, v in found[phase].items()} for phase in ("E-step", "M-step")})
    for phase in ("E-step", "M-step"):
        assert found[phase]["measured"] == pytest.approx(found[phase]["estimated"], rel=0.1)


@pytest.mark.parametrize("rest", [struct.pack("<IQQ", 3, 0, 0), b"\xff" * 400, b"\7" * 400, b""])
def test_a_gguf_that_is_not_whole_says_nothing_of_its_size(tmp_path, rest):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + rest)
    load = {"path": str(tmp_path / "m.gguf")}
    assert (config(load), parameters(load)) == (None, None)

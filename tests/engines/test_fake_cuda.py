"""What the engine asks of a GPU in a decoding step: kernels, copies, waits; on tensors that only say they are there."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import Counted, Looks, fake_cuda, on_the_gpu
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import LlamaConfig, LlamaForCausalLM

from emreason.engines import inprocess
from emreason.engines.decoder import FusedDecoder
from emreason.engines.ops import TorchOps
from emreason.models import families
from emreason.models.families import read_facts
from emreason.models.tiny import tiny_tokenizer
from emreason.types import Request, SamplingParams

ROWS = 16
SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
A_LAYER, THE_REST = 41, 91


def a_step(params: SamplingParams, steps: int, monkeypatch: pytest.MonkeyPatch, layers: int = 2) -> tuple[Counted, Counted]:
    """Of `steps` steps of 16 rows up to the host's look: what is counted in all, and in the first of them, when the rows have changed."""
    with fake_cuda(), torch.no_grad():  # under inference mode operations are seen before they fall into kernels
        model = on_the_gpu(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval())
        monkeypatch.setattr(families, "_offset", lambda _: 0.0)  # read from values, once per decoder
        engine = inprocess.InProcessEngine.__new__(inprocess.InProcessEngine)
        engine.prefix_tokens, engine.context, engine.look_every = 256, 2048, steps
        engine.stats, engine.model, engine.recorder = inprocess.EngineStats(), model, lambda: None  # as with graphs, kernel by kernel
        batch = inprocess._Batch(engine, FusedDecoder(model, read_facts(model)))
        batch.rows = [inprocess._Row(Request(i, tuple(range(9 + i)), params, i), 20, inprocess.np.arange(8 + i)) for i in range(ROWS)]
        batch.decoder.reserve(ROWS, 64)
        uploaded, counted = Counted(), Counted()
        with uploaded:
            batch._upload()
        with counted:
            drawn = [batch._advance(9 + ROWS + i) for i in range(steps)]
            torch.stack([torch.stack([ids.double(), logprobs.double()]) for ids, logprobs in drawn]).cpu()
    return counted, uploaded


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7), SamplingParams(1.0, 0.9), SamplingParams(0)])
def test_several_steps_copy_nothing_and_wait_once(params, monkeypatch):
    counted, uploaded = a_step(params, 4, monkeypatch)
    assert (counted.up, counted.down) == (0, 1)
    assert (uploaded.up, uploaded.waited, uploaded.down) == (2, 0, 0)


def test_kernels_of_a_step(monkeypatch):
    """Those of norms and attention are more here than on a GPU, where each is a kernel of its own."""
    two, four = (sum(a_step(SamplingParams(), 1, monkeypatch, layers)[0].kernels.values()) for layers in (2, 4))
    a_layer = (four - two) // 2
    print(f"kernels a layer: {a_layer}, of the rest of a step: {two - 2 * a_layer}")
    assert a_layer <= A_LAYER
    assert two - 2 * a_layer <= THE_REST


def test_an_engine_draws_as_the_device_wants_that_the_model_has_moved_to(monkeypatch):
    """Lightning moves it after the engine is made."""
    monkeypatch.setattr(inprocess, "cuda_recorder", lambda: lambda _: None)
    monkeypatch.setattr(families, "_offset", lambda _: 0.0)
    tokenizer = tiny_tokenizer()
    shape = SHAPE | {"vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)).eval()
    engines = [inprocess.InProcessEngine(model, tokenizer, cuda_graphs=wanted) for wanted in (True, False)]
    here = inprocess._Batch(engines[0], FusedDecoder(model, read_facts(model)))
    assert (here.look_every, here.graphs) == (1, None)
    with fake_cuda(), torch.no_grad():
        on_the_gpu(model)
        recorded, plain = (inprocess._Batch(engine, FusedDecoder(model, read_facts(model))) for engine in engines)
    assert (recorded.look_every, plain.look_every) == (8, 8)
    assert recorded.graphs is not None
    assert plain.graphs is None


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, 0.9), SamplingParams(0)])
def test_on_real_tensors_nothing_is_looked_at_between_two_looks(params):
    """By the operations that a GPU runs."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2)).eval()
    engine = inprocess.InProcessEngine.__new__(inprocess.InProcessEngine)
    engine.prefix_tokens, engine.context, engine.stats, engine.model = 256, 2048, inprocess.EngineStats(), model
    engine.recorder, engine.look_every = (lambda: None), None
    facts = read_facts(model)
    with torch.no_grad():
        batch = inprocess._Batch(engine, FusedDecoder(model, facts, ops=TorchOps(facts)))
        batch.rows = [inprocess._Row(Request(i, tuple(range(9 + i)), params, i), 20, inprocess.np.arange(8 + i)) for i in range(ROWS)]
        batch.decoder.reserve(ROWS, 64)
        with Looks() as looks:
            batch._upload()
            for i in range(3):
                batch._advance(9 + ROWS + i)
    assert dict(looks.found) == {}


@pytest.mark.parametrize("planted", ["mask", "look", "arange"])
def test_what_a_gpu_would_suffer_from_is_noticed(planted, monkeypatch):
    attend, plan = TorchOps.attend, TorchOps.plan

    def on_the_host(self, *args):
        made = plan(self, *args)
        on_cpu = torch.empty(ROWS, 1, 1, 1, dtype=torch.bool)
        made.chunks = {window: [(part, live, on_cpu) for part, live, _ in found] for window, found in made.chunks.items()}
        return made

    def looks(self, plan, *args):
        int(plan.at[0])
        return attend(self, plan, *args)

    def counts_anew(self, plan, *args):
        for _ in range(8):
            torch.arange(ROWS, device=plan.at.device)
        return attend(self, plan, *args)

    monkeypatch.setattr(TorchOps, *{"mask": ("plan", on_the_host), "look": ("attend", looks), "arange": ("attend", counts_anew)}[planted])
    if planted == "arange":
        with pytest.raises(AssertionError):
            test_kernels_of_a_step(monkeypatch)
    else:
        with pytest.raises((RuntimeError, DataDependentOutputException)):
            a_step(SamplingParams(), 1, monkeypatch)

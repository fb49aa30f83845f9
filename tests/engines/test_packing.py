"""Where a device wants no packed copies (GPUs), the engine multiplies by the training weights themselves; tried on a CPU."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from fake_cuda import Counted, fake_cuda, on_the_gpu
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from emreason.engines import packing
from emreason.engines.decoder import FusedDecoder
from emreason.engines.inprocess import InProcessEngine
from emreason.engines.packing import PackedLinear, side_by_side
from emreason.models import families
from emreason.models.families import base_causal_lm, read_facts
from emreason.models.loading import export
from emreason.models.tiny import load_tiny
from emreason.types import Request, SamplingParams

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def drawn(model, tokenizer, n=6):
    requests = deque(Request(i, tuple(range(5, 9 + i)), SamplingParams(max_new_tokens=12), i) for i in range(n))
    return {c.request.key: (c.token_ids, c.logprob) for c in InProcessEngine(model, tokenizer).generate(requests)}


def storages(model) -> int:
    """Bytes that all parameters take, each storage once."""
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("adapters", [False, True])
def test_the_training_weights_are_the_engines_and_stay_trainable(adapters, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = load_tiny("qwen2", seed=0)  # with biases
    model = get_peft_model(model, LORA) if adapters else model
    copied, bytes_before = drawn(model, tokenizer), storages(model)
    monkeypatch.setattr(packing, "COPIES", ())
    shared = drawn(model, tokenizer)
    assert {k: ids for k, (ids, _) in shared.items()} == {k: ids for k, (ids, _) in copied.items()}
    assert all(abs(shared[k][1] - copied[k][1]) < 1e-4 for k in shared)
    assert storages(model) == bytes_before
    layer = base_causal_lm(model).model.layers[0].self_attn
    q, k = (getattr(m, "base_layer", m).weight for m in (layer.q_proj, layer.k_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() != 0
    places = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    after = drawn(model, tokenizer)
    assert [p.data_ptr() for p in model.parameters()] == places  # nothing moved a second time
    assert after != shared
    monkeypatch.setattr(packing, "COPIES", ("cpu",))
    assert {k: ids for k, (ids, _) in after.items()} == {k: ids for k, (ids, _) in drawn(model, tokenizer).items()}
    if not adapters:
        export(model, tokenizer, tmp_path / "model")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_adapters_branch_enters_the_sum_before_it_is_rounded(monkeypatch):
    """What is below half a bfloat16 step of each activation still moves the product, as in the M-step."""
    monkeypatch.setattr(packing, "COPIES", ())
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 32, bias=False).to(torch.bfloat16)
    model = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))
    module = model.base_model.model[0]
    x = torch.randn(4, 64).to(torch.bfloat16)
    with torch.no_grad():
        module.lora_B["default"].weight.normal_(std=1e-2)
        a, b = (
            packing.in_precision(torch.bfloat16, w).double()
            for w in (module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"])
        )
        inner = (x.double() @ a.T).to(torch.bfloat16).double()
        exact = x.double() @ base.weight.double().T + (inner @ b.T).to(torch.bfloat16).double()
        assert torch.equal(PackedLinear([module], torch.bfloat16)(x), exact.to(torch.bfloat16))


def test_side_by_side_moves_once():
    whole = torch.arange(24.0).view(6, 4)
    apart = [torch.nn.Parameter(part.clone()) for part in whole.split([1, 3, 2])]
    with torch.inference_mode():
        together = side_by_side(apart)
    assert torch.equal(together, whole)
    assert not any(p.is_inference() for p in apart)
    assert side_by_side(apart).data_ptr() == together.data_ptr() == apart[0].data_ptr()
    assert torch.equal(side_by_side(apart[1:]), whole[1:])  # a part of what lies together
    assert side_by_side(apart[::-1]).data_ptr() != together.data_ptr()  # another order is another tensor


@pytest.mark.parametrize("adapters", [False, True])
def test_on_a_gpu_a_decoder_takes_no_memory_for_weights(adapters, monkeypatch):
    shape = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    monkeypatch.setattr(families, "_offset", lambda _: 0.0)
    model = LlamaForCausalLM(shape).eval()
    model = get_peft_model(model, LORA) if adapters else model
    with fake_cuda(), torch.no_grad():
        on_the_gpu(model)
        base, before = base_causal_lm(model), storages(model)
        decoder = FusedDecoder(base, read_facts(base))
        with Counted() as counted:
            decoder.decode(torch.zeros(3, dtype=torch.long, device="cuda"), torch.zeros(3, dtype=torch.long, device="cuda"), 0)
    assert storages(model) == before
    held = {p.untyped_storage()._cdata for p in model.parameters()}
    products = [getattr(layer, name) for layer in decoder.layers for name in ("qkv", "o", "gate_up", "down")]
    assert all(product.weight.untyped_storage()._cdata in held for product in products)
    assert (counted.up, counted.down) == (0, 0)
    assert (sum(counted.kernels[name] for name in ("addmm", "mm")) == 2 * 4 * 3 + 1) if adapters else True

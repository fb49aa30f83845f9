"""A training step's products against peft, autograd and torch's own operations; what rows share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from emreason.models.families import logit_factor
from emreason.models.kernels import library
from emreason.models.training import products
from emreason.models.training.packed import prefix_tree
from emreason.models.training.products import head_logprobs, product

needs_compiler = pytest.mark.skipif(library(torch.bfloat16) is None, reason="no C compiler here: torch's operations are used")


def adapted(dtype=torch.float32, bias=True, dropout=0.0, b=0.1):
    """A linear layer [48 -> 32] with adapters, B [32, 4] normal with deviation `b`."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(48, 32, bias=bias)).to(dtype)
    module = get_peft_model(block, LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(module.lora_B["default"].weight, std=b)
    return module


def results(function, *inputs, module=None):
    """The output, and the gradients of inputs and of what is trained, under a loss that is not linear."""
    leaves = [*(t.detach().requires_grad_() for t in inputs)]
    out = function(*leaves)
    trained = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    return [out, *torch.autograd.grad(out.float().sin().sum(), [*leaves, *trained])]


def close(ours, theirs, tolerance):
    return all(float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["adapters", "adapters and bias", "trained"])
@pytest.mark.parametrize("gated", ["", "silu", "gelu"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_product_and_its_gradients_are_the_module_s(kind, gated, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(products, "library", lambda _: None)
    module = nn.Linear(48, 32) if kind == "trained" else adapted(bias="bias" in kind)
    x, up = torch.randn(20, 48) * 3, torch.randn(20, 48)
    if not gated:
        assert close(results(lambda x: product(module, x), x, module=module), results(module, x, module=module), 1e-5)
        return
    act = F.silu if gated == "silu" else (lambda x: F.gelu(x, approximate="tanh"))
    ours = results(lambda x, up: product(module, x, up, gated == "gelu"), x, up, module=module)
    assert close(ours, results(lambda x, up: module(act(x) * up), x, up, module=module), 1e-5)


@needs_compiler
@pytest.mark.parametrize("gelu", [False, True])
def test_the_compiled_gate_is_torch_s_in_bfloat16(gelu, monkeypatch):
    gate, up = (torch.randn(64, 300).mul_(8).bfloat16() for _ in range(2))  # far into both tails
    ways = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(products, "library", lambda _: None)
        ways.append([products._gated(gate, up, gelu), *products._gated_backward(gate, up, gate.clone(), gelu)])
    assert close(*ways, 2**-6)


def test_an_update_below_half_a_grid_step_is_not_lost():
    """It is there in the mean; of peft's own bfloat16 forward most is lost."""
    module, x = adapted(torch.bfloat16, bias=False), torch.randn(4000, 48).bfloat16()
    nn.init.constant_(module.lora_A["default"].weight, 0.02)
    nn.init.constant_(module.lora_B["default"].weight, 5e-4)
    with torch.no_grad():
        base = module.get_base_layer()(x).float()
        wanted = (x.float() @ module.lora_A["default"].weight.T @ module.lora_B["default"].weight.T) * 3
        shares = [float(((y.float() - base) * wanted).sum() / wanted.square().sum()) for y in (product(module, x), module(x))]
    assert float(wanted.abs().mean()) < float(base.abs().mean()) * 2**-8
    assert shares[0] == pytest.approx(1, abs=0.1)
    assert shares[1] < 0.9


def test_dropout_is_left_to_peft():
    module, x = adapted(dropout=0.5), torch.randn(20, 48)
    drawn = []
    for function in (module, lambda x: product(module, x)):
        torch.manual_seed(1)
        drawn.append(function(x))
    assert torch.equal(*drawn)
    module.eval()
    assert torch.allclose(product(module, x), module(x), atol=1e-5)
    assert not torch.allclose(module(x), drawn[0], atol=1e-2)


class Lm(nn.Module):
    """A head, and what a causal LM's forward does to its products."""

    base_model_prefix = "model"

    def __init__(self, head, after=lambda logits: logits):
        super().__init__()
        self.model, self.lm_head, self.after = nn.Module(), head, after

    @property
    def base_model(self):
        return self.model

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.after(self.lm_head(self.model(input_ids, use_cache=use_cache).last_hidden_state)))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["plain", "divided", "multiplied", "capped"])
def test_the_head_s_log_probabilities_and_their_gradients(frozen, chunk, compiled, kind, monkeypatch):
    if not compiled:
        monkeypatch.setattr(products, "library", lambda _: None)
    torch.manual_seed(0)
    head = nn.Linear(16, 70, bias=False).requires_grad_(not frozen)
    x, targets = torch.randn(23, 16) * 4, torch.randint(70, (23,))
    after = {"plain": lambda x: x, "divided": lambda x: x / 3, "multiplied": lambda x: x * 1.7, "capped": lambda x: 2 * torch.tanh(x / 2)}
    lm = Lm(head, after[kind])
    before = torch.get_rng_state()
    assert logit_factor(lm) == pytest.approx({"plain": 1, "divided": 1 / 3, "multiplied": 1.7, "capped": None}[kind])
    assert torch.equal(before, torch.get_rng_state())
    assert lm.lm_head is head

    def expected(x):
        return (after[kind](head(x)) / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    ours = results(lambda x: head_logprobs(lm, x, targets, chunk, 0.7), x, module=head)
    assert close(ours, results(expected, x, module=head), 1e-5)


@needs_compiler
def test_a_head_that_has_diverged_stays_not_finite():
    head, x = nn.Linear(16, 70, bias=False).bfloat16(), torch.randn(3, 16).bfloat16()
    x[1, 2] = torch.nan
    found = head_logprobs(Lm(head), x, torch.tensor([1, 2, 3]), 256, 1.0)
    assert found.isfinite().tolist() == [True, False, True]


rows_of_tokens = st.lists(st.lists(st.integers(0, 1), max_size=7), min_size=1, max_size=7)


@given(rows_of_tokens, st.integers(1, 4))
def test_a_tree_of_prefixes_holds_every_row_and_shares_what_is_long_enough(rows, least):
    segments, paths = prefix_tree(rows, least)
    for path, row in zip(paths, rows, strict=True):
        assert [t for i in path for t in rows[segments[i].row][segments[i].begin : segments[i].end]] == row
        assert all(segments[i].before == path[:n] for n, i in enumerate(path))
    used = [sum(i in path for path in paths) for i in range(len(segments))]
    assert all(n == 1 or s.end - s.begin >= least for n, s in zip(used, segments, strict=True))
    if least == 1:  # every prefix once
        assert sum(s.end - s.begin for s in segments) == len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})


def test_a_question_s_rationales_share_its_prompt_and_all_share_the_instruction():
    rows = [[0] * 9 + [q] * 10 + [7, 8, 9][z : z + 1] * 5 for q in (1, 2) for z in range(3)]
    segments, _ = prefix_tree(rows, 8)
    assert sorted(s.end - s.begin for s in segments) == [5] * 6 + [9, 10, 10]


def test_the_heads_gradient_is_summed_in_float32_over_many_chunks():
    """In bfloat16 what 64 chunks add is rounded 64 times."""
    torch.manual_seed(0)
    head, states, targets = nn.Linear(64, 300, bias=False), torch.randn(2048, 64) / 8, torch.randint(300, (2048,))

    def gradient(dtype, chunk):
        model = head.to(dtype)
        model.weight.grad = None
        head_logprobs(Lm(head), states.to(dtype), targets, chunk, 1.0).sum().backward()
        return model.weight.grad.double()

    exact = gradient(torch.float32, 2048)
    errors = [float((gradient(torch.bfloat16, chunk) - exact).norm() / exact.norm()) for chunk in (2048, 32)]
    print(f"relative error of a gradient in bfloat16: {errors[0]:.4f} in one chunk, {errors[1]:.4f} in 64")
    assert errors[1] < 1.3 * errors[0]

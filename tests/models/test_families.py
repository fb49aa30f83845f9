"""Every family of models through the fused decoder and the packed M-step, against transformers' own forward and generate."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from emreason.engines import decoder, ops
from emreason.engines.decoder import FusedDecoder, make_decoder
from emreason.engines.forward import BatchedDecoder
from emreason.engines.inprocess import InProcessEngine
from emreason.models import families
from emreason.models.families import base_causal_lm
from emreason.models.loading import add_lora, export
from emreason.models.tiny import tiny_tokenizer
from emreason.models.training import packed
from emreason.models.training.packed import can_pack_rows
from emreason.scores.scoring import token_logprobs
from emreason.types import Request, SamplingParams

WINDOW = 5
SHAPE = {
    "vocab_size": 150,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 149,  # as Qwen has it, beyond the ids that are checked
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, **SLIDING},
    "Qwen3": {},
    "Gemma2": {**SLIDING, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 40},
    "Gemma3": {
        **SLIDING,
        "query_pre_attn_scalar": 40,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "Olmo2": {},
    "Phi3": {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "SmolLM3": {"no_rope_layer_interval": 2, "use_sliding_window": True, **SLIDING},
    "Granite": {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5},
}


def made(family, **changes):
    """A random model of `family` whose norms and biases are random too."""
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**(SHAPE | FAMILIES[family] | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.eval()


def close(ours, reference):
    """Within 1e-4 of the largest."""
    return torch.allclose(ours, reference, rtol=0, atol=1e-4 * reference.abs().max().item())


def prompts(n, longest=4 * WINDOW):
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, longest, (n,), generator=draw).tolist()
    return [tuple(torch.randint(2, SHAPE["vocab_size"], (length,), generator=draw).tolist()) for length in lengths]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_fused_decoder_are_the_models(family, compiled, monkeypatch):
    """Prefilled in two parts, decoded beside another row."""
    if not compiled:
        monkeypatch.setattr(ops, "library", lambda _: None)
    model, (ids, other) = made(family), prompts(2, 40)
    ids = ids + other + ids
    with torch.inference_mode():
        own = model(torch.tensor([ids])).logits[0]
        decoder = make_decoder(model)
        assert isinstance(decoder, FusedDecoder)
        decoder.prefill([(0, 0, ids[:3]), (1, 0, ids[:8])])
        decoder.prefill([(0, 3, ids[3:14])])
        for i in range(14, len(ids)):
            decoder.reserve(2, i + 1)
            both = decoder.decode(torch.tensor([ids[i], ids[i - 6]]), torch.tensor([i, i - 6]), i)
            assert close(both, own[[i, i - 6]])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_equal_generates(family):
    model, new = made(family), 3 * WINDOW
    work = [Request(i, ids, SamplingParams(temperature=0, max_new_tokens=new)) for i, ids in enumerate(prompts(5))]
    for done in InProcessEngine(model, tiny_tokenizer(), max_batch=3).generate(deque(work)):
        ids = torch.tensor([done.request.prompt_ids])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        assert done.token_ids == tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_packed_m_step_are_the_models(family, lora, tmp_path):
    """Against the whole model's logits on padded rows; with adapters on all linear layers, which are exported and loaded again."""
    model = adapted(made(family)) if lora else made(family)
    begin, *rows = prompts(4, 25)
    begin = begin + tuple(range(2, 12))  # what all rows share is longer than the window
    rows = [begin + row for row in rows]
    length = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (length - len(row)) for row in rows])
    marked = torch.tensor([[len(begin) < i < len(row) for i in range(length)] for row in rows])
    assert can_pack_rows(base_causal_lm(model))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def of(logprobs):
        return logprobs, torch.cat([g.flatten() for g in torch.autograd.grad(logprobs.square().sum(), parameters)])

    ours, gradient = of(token_logprobs(model, ids, marked))
    own, own_gradient = of(own_logprobs(model, ids, marked))
    assert len(ours) == int(marked.sum()) > 20
    assert close(ours, own)
    assert close(gradient, own_gradient)
    export(model, tiny_tokenizer(), tmp_path / "model")
    load = AutoModelForCausalLM.from_pretrained
    loaded = PeftModel.from_pretrained(made(family), tmp_path / "model") if lora else load(tmp_path / "model", dtype=torch.float32)
    assert close(own_logprobs(loaded.eval(), ids, marked), own)


def own_logprobs(model, ids, marked):
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0][marked[:, 1:]]


def adapted(model):
    wrapped = add_lora(model, r=4, alpha=8).eval()
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():  # B starts at zero
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


MISREAD = {
    "Gemma2": ({"offset": 0.0}, {"cap": None}, {"gelu": False}, {"scale": 0.25}, {"embedding_multiplier": 1.1}),
    "Granite": ({"residual_multiplier": 1.0}, {"embedding_multiplier": 1.0}, {"scale": 0.25}, {"eps": 0.01}),
    "Qwen3": ({"layers.q_norm": None, "layers.k_norm": None},),
    "Olmo2": ({"layers.after_mlp": None}, {"layers.after_attention": None}),
    "Mistral": ({"layers.window": None},),
    "SmolLM3": ({"layers.rotary": ""},),
}


@pytest.mark.parametrize(("family", "changes"), [(family, changes) for family, several in MISREAD.items() for changes in several])
def test_what_was_misread_is_noticed_and_not_computed(family, changes, monkeypatch, caplog):
    def misread(base):
        facts = read(base)
        of_layers = {key.removeprefix("layers."): value for key, value in changes.items() if "." in key}
        layers = tuple(replace(layer, **of_layers) for layer in facts.layers)
        return replace(facts, layers=layers, **{key: value for key, value in changes.items() if "." not in key})

    read = families.read_facts
    for module in (families, packed, decoder):
        monkeypatch.setattr(module, "read_facts", misread)
    model = made(family)
    assert isinstance(make_decoder(model), BatchedDecoder)
    assert isinstance(make_decoder(model), BatchedDecoder)
    assert len(caplog.records) == 1
    assert family in caplog.text
    assert not can_pack_rows(model)
    assert len(caplog.records) == 2


def test_a_model_in_bfloat16_is_checked_in_float32_and_kept():
    model = made("Gemma3").to(torch.bfloat16).train()
    before = {name: (p.dtype, p.clone()) for name, p in model.named_parameters()}
    assert isinstance(make_decoder(model), FusedDecoder)
    assert can_pack_rows(model)
    assert all(p.dtype == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert model.config.sliding_window == WINDOW
    assert model.config.num_hidden_layers == len(model.model.layers) == 3

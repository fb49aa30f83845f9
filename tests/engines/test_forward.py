"""Any causal LM, all rows at once: the ids of `generate`, whatever the batch; where a cache takes no batch, row by row and it is told."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from emreason.engines import forward
from emreason.engines.forward import BatchedDecoder, RowDecoder, disagrees, forward_decoder
from emreason.engines.inprocess import InProcessEngine
from emreason.scores.scoring import token_logprobs
from emreason.types import Request, SamplingParams, UserError

VOCABULARY, EOS = 90, 1

PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "pad_token_id": EOS,
}
EXPERTS = PLAIN | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3, "eos_token_id": EOS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 48, "attention_hidden_size": 48, "num_hidden_layers": 2, "context_length": 128}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": PLAIN,
    "phi": PLAIN | {"num_key_value_heads": 4},
    "stablelm": PLAIN | {"partial_rotary_factor": 0.5},
    "cohere": PLAIN,
    "glm": PLAIN | {"head_dim": 12},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "eos_token_id": EOS},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.3},
    "opt": PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": 48, "init_std": 0.3},
    "cohere2": PLAIN | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": EXPERTS | {"sliding_window": 8, "head_dim": 12},
    "mixtral": EXPERTS | {"sliding_window": 8},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS | {"head_dim": 12},
    "olmoe": EXPERTS,
    "granitemoe": EXPERTS,
    "deepseek_v3": EXPERTS | LATENT | {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "lfm2": PLAIN | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "qwen3_next": EXPERTS | DELTA | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 12},
    "granitemoehybrid": EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"]},
    "falcon_h1": PLAIN | MAMBA | {"mamba_d_ssm": 96, "lm_head_multiplier": 0.2},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.15},
}
HEADS: dict[str, dict[str, Any]] = {  # what is made of the last states is not a product alone
    "hyperclovax": PLAIN | {"logits_scaling": 0.25},
    "modernbert-decoder": PLAIN | {"local_attention": 8},
    "gemma2": PLAIN | {"final_logit_softcapping": 3.0, "head_dim": 12, "sliding_window": 8},
}
SLOW: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_neo": (PLAIN | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}, "row by row"),
    "rwkv": (RWKV, "row by row and without a cache"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models spend their time in thread barriers otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Plain:
    """A tokenizer without newlines."""

    eos_token_id = EOS
    chat_template = None

    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)


@cache
def tiny(name: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**(SHAPES.get(name) or HEADS.get(name) or SLOW[name][0]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gpt_oss" else None).eval()
    for parameter in model.parameters():  # so that attention is far from uniform
        if parameter.ndim > 1 and parameter.std() < 0.1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = EOS
    return model


def requests(n: int, temperature: float = 0.0, new: int = 9) -> list[Request]:
    """Prompts of 1 to 40 tokens; the second has one token only, the last ones come when rows have been used."""
    generator = torch.Generator().manual_seed(3)
    lengths = [5, 1, 40, 12, 12, 1, *torch.randint(1, 30, (n,), generator=generator).tolist()][:n]
    prompts = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Request(i, tuple(p), SamplingParams(temperature, 1.0, new - i % 3), seed=70 + i) for i, p in enumerate(prompts)]


def complete(model: Any, work: list[Request], batch: int) -> dict[Any, tuple[int, ...]]:
    return {c.request.key: c.token_ids for c in InProcessEngine(model, Plain(), max_batch=batch).generate(deque(work))}


def generated(model: Any, request: Request) -> tuple[int, ...]:
    ids = torch.tensor([request.prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.params.max_new_tokens, pad_token_id=EOS
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_ids_are_those_of_generate_and_draws_do_not_depend_on_the_batch(name: str) -> None:
    model = tiny(name)
    work = requests(7)
    assert complete(model, work, 3) == {r.key: generated(model, r) for r in work}
    assert isinstance(forward_decoder(model), BatchedDecoder)
    drawn = requests(8, temperature=1.0)
    alone = complete(model, drawn, 1)
    assert len(set(alone.values())) > 5
    assert complete(model, drawn, 8) == complete(model, drawn[::-1], 3) == alone


@pytest.mark.parametrize("name", [*SHAPES, *HEADS])
def test_log_probabilities_of_rows_that_begin_alike_are_the_model_s_own(name: str) -> None:
    """Of the M-step and of scoring passes."""
    model = tiny(name)
    ids = torch.randint(2, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(5))
    ids[1:, :10] = ids[0, :10]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 9:] = True
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[:, 8:-1].gather(2, ids[:, 9:, None]).flatten()
        found = token_logprobs(model, ids, mask)
    assert torch.allclose(found, own, atol=1e-3)


@pytest.mark.parametrize("name", SLOW)
def test_a_cache_that_takes_no_batch_is_told_once_and_the_ids_are_right(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(name)
    work = requests(5)
    for _ in range(2):
        assert complete(model, work, 3) == {r.key: generated(model, r) for r in work}
    assert [SLOW[name][1] + ", which is slow" in r.message for r in caplog.records if r.levelno == logging.WARNING] == [True]


def test_a_model_that_fails_every_way_is_an_error_of_one_sentence() -> None:
    model = torch.nn.Module()
    model.config = tiny("gpt_neox").config
    model.weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="Module cannot be decoded"):
        forward_decoder(model)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_come_before_every_row(kind: Any) -> None:
    base = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**PLAIN))
    model = get_peft_model(base, kind(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    drawn = complete(model, requests(6), 3)
    assert isinstance(forward_decoder(model), BatchedDecoder)
    for request in requests(6):
        ids = list(request.prompt_ids)
        for token in drawn[request.key]:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("name", ["gpt_neox", "cohere2", "lfm2", "granitemoehybrid"])
def test_a_prompt_continues_what_its_row_holds(name: str) -> None:
    """Also where it was moved to, and beyond a sliding window."""
    model = tiny(name)
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(5))
    row = ids[0].tolist()
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0]
        for decoder in (BatchedDecoder(model), RowDecoder(model), RowDecoder(model, cached=False)):
            decoder.prefill([(1, 0, row[:20]), (0, 0, row[:3])])
            decoder.move(1, 0, 20)
            decoder.prefill([(0, 20, row[20:39]), (1, 0, row[:9])])
            decoder.reserve(2, 40)
            logits = decoder.decode(ids[0, [39, 9]], torch.tensor([39, 9]), 39)
            torch.testing.assert_close(logits, expected[[39, 9]], atol=1e-4, rtol=1e-4)


def test_the_check_sees_a_wrong_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_neox")
    assert not disagrees(model, BatchedDecoder(model))
    monkeypatch.setattr(BatchedDecoder, "move", lambda *_: None)
    assert disagrees(model, BatchedDecoder(model))


def test_a_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt_neox")
    forward_decoder(model)
    monkeypatch.setattr(forward, "disagrees", None)
    assert isinstance(forward_decoder(model), BatchedDecoder)


def test_experts_in_bfloat16_decode_all_rows_at_once() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**SHAPES["qwen3_moe"]), dtype=torch.bfloat16).eval()
    assert isinstance(forward_decoder(model), BatchedDecoder)


class Waits(TorchDispatchMode):
    """Counts what a device would have to be waited for: values that come to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "cohere2", "lfm2"])
def test_a_step_waits_for_nothing(name: str) -> None:
    decoder = BatchedDecoder(tiny(name))
    with torch.inference_mode():
        decoder.prefill([(0, 0, [5, 6, 7]), (1, 0, [5, 6])])
        with Waits() as waits:
            decoder.reserve(2, 4)
            decoder.decode(torch.tensor([3, 4]), torch.tensor([3, 2]), 3)
    assert waits.count == 0

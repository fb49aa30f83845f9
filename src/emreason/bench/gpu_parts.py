"""The parts of `gpu_check.py`: each puts numbers into `Findings`, and what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from emreason.bench.gpu_runs import runs
from emreason.bench.peak import matmul_peak
from emreason.em import ranks
from emreason.em.checkpoints import AtomicCheckpointIO
from emreason.em.m_step import accumulate, scorer
from emreason.engines import inprocess
from emreason.engines.decoder import FusedDecoder, make_decoder
from emreason.engines.drawing import Shaping, counter_uniforms, draw
from emreason.engines.gpu import graphs
from emreason.engines.inprocess import InProcessEngine
from emreason.models.batches import Example, Step, collate
from emreason.models.families import read_facts
from emreason.models.footprint import Work, footprint, read_shape
from emreason.models.loading import random_model
from emreason.models.memory import release_memory
from emreason.models.tiny import load_tiny, tiny_tokenizer
from emreason.runs.experiment import prepare_cuda
from emreason.types import Request, SamplingParams, UserError

COMMON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
SMALL = COMMON | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 2048}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_3B = COMMON | {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
LLAMA_3B |= {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}


class Findings:
    """What a part has found, and what of it is not as it should be."""

    def __init__(self, device: str):
        self.device, self.on_gpu = torch.device(device), device == "cuda"
        self.values: dict[str, Any] = {}
        self.wrong: list[str] = []

    def expect(self, holds: bool, words: str) -> None:
        """`words`: what is wrong unless it holds."""
        if not holds:
            self.wrong.append(words)

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Of one `work`, the median of some, the device waited for."""
        taken = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        release_memory()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def model(self, shape: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
        """Random weights, made on the device."""
        with self.device:
            return nn.Module.to(random_model(shape, dtype=dtype), self.device).eval()


def machine(found: Findings) -> None:
    """Versions, attention, the price of an operation, the best matrix product."""
    import lightning
    import peft
    import transformers

    modules = (torch, transformers, lightning, peft)
    found.values |= {"versions": {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()}}
    if found.on_gpu:
        prepare_cuda(expandable=True)
        found.values |= {"gpu": torch.cuda.get_device_name(), "memory_gib": torch.cuda.mem_get_info()[1] / 2**30}
        found.expect(not torch.backends.cuda.cudnn_sdp_enabled(), "cuDNN's attention is on")
    names = ("flash", "mem_efficient", "math", "cudnn")
    found.values["attention"] = [name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    x = torch.ones(8, device=found.device)
    n = 10_000 if found.on_gpu else 1000
    found.values["us_per_operation"] = 1e6 * found.seconds(lambda: [x.add_(1) for _ in range(n)]) / n
    found.values["matmul_tflops"] = {k: v / 1e3 for k, v in matmul_peak(found.device.type, 512, 3).items()}


def engine(found: Findings) -> None:
    """Logits and greedy ids of the model's own forward; draws by their probabilities."""
    model, tokenizer = found.model(SMALL), tiny_tokenizer()
    prompts = [[(7 * i + j) % 500 + 4 for j in range(5 + 9 * i)] for i in range(6)]
    with torch.inference_mode():
        decoder = make_decoder(model)
        found.expect(isinstance(decoder, FusedDecoder), f"a Llama is decoded by {type(decoder).__name__}")
        decoder.prefill([(row, 0, ids[:-1]) for row, ids in enumerate(prompts)])
        decoder.reserve(len(prompts), 64)
        last, at = (torch.tensor(x, device=found.device) for x in ([p[-1] for p in prompts], [len(p) - 1 for p in prompts]))
        logits = decoder.decode(last, at, int(at.max()))
        own = torch.cat([model(input_ids=torch.tensor([p], device=found.device)).logits[:, -1] for p in prompts])
    found.values["logits_differ_by"] = difference = float((logits - own).abs().max() / own.abs().max())
    found.expect(difference <= 1e-3, "logits differ by over 1e-3")
    mine = sampled(model, tokenizer, prompts, 16)
    their = [generated(model, [prompt], 16)[0] for prompt in prompts]
    found.values["greedy_rows_equal"] = equal = sum(a == b for a, b in zip(mine, their, strict=True))
    found.expect(equal == len(prompts), f"greedy ids of {len(prompts) - equal} of {len(prompts)} rows differ from generate's")
    with mock.patch.object(graphs.log, "warning", lambda words, *about: found.expect(False, words % about)):
        recorded, stepwise = (sampled(model, tokenizer, prompts, 100, 1.0, way) for way in (True, False))
    found.expect(recorded == stepwise, "CUDA graphs draw something else")
    n, probabilities = 20_000, torch.linspace(1, 5, 20, device=found.device).double()
    probabilities /= probabilities.sum()
    rows = probabilities.log().float().expand(n, -1).clone()
    counters = torch.arange(n, device=found.device)
    ids, _ = draw(rows, counter_uniforms(torch.full_like(counters, 12345), counters), Shaping.of([SamplingParams()] * n, found.device))
    expected = n * probabilities
    found.values["chi_squared_of_19"] = statistic = float(((ids.bincount(minlength=20) - expected).square() / expected).sum())
    found.expect(statistic < 50, "draws do not have their probabilities")  # one in 10⁴ by luck


def sampled(
    model: Any, tokenizer: Any, prompts: list[list[int]], new: int, temperature: float = 0.0, with_graphs: bool = True
) -> list[list[int]]:
    """Our engine's tokens, `new` of each prompt."""
    ours = InProcessEngine(model, tokenizer, max_batch=256, cuda_graphs=with_graphs)
    ours.eos_ids = frozenset()
    requests = deque(Request(i, tuple(p), SamplingParams(temperature, max_new_tokens=new), i) for i, p in enumerate(prompts))
    done = {c.request.key: list(c.token_ids) for c in ours.generate(requests)}
    return [done[i] for i in range(len(prompts))]


def generated(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Those of transformers' generate, greedy; the prompts are of one length."""
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    )
    return list(out[:, ids.shape[1] :].tolist())


def gradients(found: Findings) -> None:
    """A step's gradient on the device beside a CPU's."""
    examples = [Example(str(i), tuple(range(4, 30 + i)), tuple(range(40, 60 - i))) for i in range(5)]
    step, got = Step([collate(examples, [0.2] * 5, 0)]), []
    for device in (torch.device("cpu"), found.device):
        model = nn.Module.to(load_tiny("llama", seed=0)[0], device)
        accumulate(scorer(model), step.batches, device, 0)
        got.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    found.values["gradients_differ_by"] = apart = float((got[0] - got[1]).norm() / got[0].norm())
    found.expect(apart <= 1e-4, "gradients differ from a CPU's by over 1e-4")


@contextlib.contextmanager
def little_memory(found: Findings, where: tuple[Any, str]) -> Iterator[None]:
    """Inside, memory runs out: on a GPU in truth, by a cap; on a CPU the first call of the function at `where` says so."""
    if found.on_gpu:
        release_memory()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / torch.cuda.mem_get_info()[1])
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    real, calls = getattr(*where), []

    def full(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("planted")
        return real(*arguments, **named)

    with mock.patch.object(*where, full):
        yield


def out_of_memory(found: Findings) -> None:
    """In the E-step the batch is halved until it goes or a sentence says what to do."""
    model = found.model(SMALL | {"hidden_size": 512, "intermediate_size": 2048})
    tokenizer, prompts = tiny_tokenizer(), [[5, 6, 7]] * 64
    step = Step([collate([Example("a", (5, 6, 7), tuple(range(4, 400)))], [1.0], 0)])
    accumulate(scorer(model), step.batches, found.device, 0)
    make_decoder(model.eval())  # what is checked once of each forward pass is not what shall run out of memory
    ours = InProcessEngine(model, tokenizer, max_batch=64)
    requests = deque(Request(i, tuple(p), SamplingParams(max_new_tokens=4), i) for i, p in enumerate(prompts))
    for name, where in {"in a step": (FusedDecoder, "decode"), "making a decoder": (inprocess, "make_decoder")}.items():
        ours.max_batch = 64
        try:
            with little_memory(found, where):
                done = len(list(ours.generate(deque(requests))))
            found.values[name] = f"halved to {ours.max_batch}, {done} done"
            found.expect(ours.max_batch < 64 and done == 64, f"{name}: nothing was halved")
        except UserError as error:
            found.values[name] = str(error)
            found.expect("smaller model" in str(error), f"{name}: another advice")
    try:
        with little_memory(found, (torch.nn.functional, "linear")):
            accumulate(scorer(model.train()), step.batches, found.device, 0)
        found.expect(False, "the M-step went on without memory")
    except RuntimeError as error:
        found.values["in the M-step"] = type(error).__name__
        found.expect(isinstance(error, torch.OutOfMemoryError), f"in the M-step: {error}")
    accumulate(scorer(model), step.batches, found.device, 0)  # and afterwards it goes on


def decoding(found: Findings) -> None:
    """A decoding step by rows, with cuDNN's attention and without; prompts, an E-step, `generate`."""
    model, live = found.model(LLAMA_3B if found.on_gpu else SMALL, torch.bfloat16), 300 if found.on_gpu else 60
    vocabulary, many = model.config.vocab_size, 256 if found.on_gpu else 8
    with torch.inference_mode():
        facts = read_facts(model)
        assert facts is not None
        decoder = FusedDecoder(model, facts)
        decoder.reserve(many, live + 64)
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for rows in (1, 8, 32, 128, 256) if found.on_gpu else (1, many):
                step = functools.partial(one_step, decoder, rows, live, found)
                step()
                found.values[f"step_ms_{rows}{'_cudnn' if cudnn else ''}"] = 1e3 * found.seconds(step, 9)
        if found.on_gpu:
            found.expect(found.values["step_ms_128"] <= 10, "a step of 128 rows takes over 10 ms")
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if found.on_gpu else activity.CPU]) as profile:
            one_step(decoder, min(128, many), live, found)
            found.wait()
        events = sorted(profile.key_averages(), key=lambda e: getattr(e, "device_time_total", 0) or e.cpu_time_total, reverse=True)
        found.values["kernels_of_a_step"] = sum(e.count for e in events)
        found.values["longest"] = {e.key[:60]: round((getattr(e, "device_time_total", 0) or e.cpu_time_total) / 1e3, 3) for e in events[:8]}
        prompts = [[(i + j) % (vocabulary - 4) + 4 for j in range(live // 3)] for i in range(many)]
        jobs = [(row, 0, prompt) for row, prompt in enumerate(prompts[: many // 2])]
        found.values["prefill_ms"] = 1e3 * found.seconds(functools.partial(decoder.prefill, jobs), 2)
    del decoder
    release_memory()
    new = 256 if found.on_gpu else 8
    for way in ("", "_without_graphs"):
        work = functools.partial(sampled, model, tiny_tokenizer(), prompts, new, 1.0, not way)
        found.values["e_step_tokens_per_s" + way] = many * new / found.seconds(work)
    found.values["generate_tokens_per_s"] = many // 2 * 32 / found.seconds(lambda: generated(model, prompts[: many // 2], 32))


def one_step(decoder: Any, rows: int, live: int, found: Findings) -> None:
    """A decoding step and its draw."""
    tokens = torch.full((rows,), 5, device=found.device)
    logits = decoder.decode(tokens, torch.full_like(tokens, live - 1), live - 1)
    draw(logits, counter_uniforms(tokens, tokens), Shaping.of([SamplingParams()] * rows, found.device))


def m_step(found: Findings) -> None:
    """Tokens/s, the share of the machine's products (6 N a token), the peak of memory beside what `footprint` says."""
    shape = LLAMA_3B if found.on_gpu else SMALL
    model = found.model(shape, torch.bfloat16).train()
    counted = read_shape(shape)
    assert counted is not None
    limit = max(matmul_peak(found.device.type, 512, 3).values()) * 1e9
    for again in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": False}) if again else model.gradient_checkpointing_disable()
        for tokens in (2048, 8192, 16384) if found.on_gpu else (256,):
            name = f"{tokens}{'_checkpointed' if again else ''}"
            examples = [Example(str(i), tuple(range(5 + i, 133 + i)), tuple(range(5, 133))) for i in range(tokens // 256)]
            step = Step([collate(examples, [1 / len(examples)] * len(examples), 0)])
            try:
                accumulate(scorer(model), step.batches, found.device, 0)
                found.clear()
                seconds = found.seconds(functools.partial(accumulate, scorer(model), step.batches, found.device, 0))
            except torch.OutOfMemoryError:
                found.values[name] = "out of memory"
                release_memory()
                continue
            mfu = 6 * counted.parameters * tokens / seconds / limit
            found.values[name] = {"tokens_per_s": tokens / seconds, "mfu": mfu}
            if found.on_gpu:
                work = Work("cuda", "bfloat16", "inprocess", None, True, 1, 1, 1, tokens, again, 0)
                parts = footprint(counted, work)["M-step"]
                estimate = sum(parts.values()) - parts["masters"] - parts["libraries"] - 2 * counted.parameters  # gradients in bfloat16
                peak = torch.cuda.max_memory_allocated()
                found.values[name] |= {"peak_gib": peak / 2**30, "estimated_gib": estimate / 2**30}
                found.expect(abs(peak / estimate - 1) <= 0.1, f"{name}: the estimated peak is off by over 10 %")
                found.expect(mfu >= 0.35 or tokens != 8192 or again, f"{name}: {mfu:.0%} of the machine's products")


def several(found: Findings) -> None:
    """A group of one rank: sums, lists, and a model sharded over it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.HashStore()
    dist.init_process_group("nccl" if found.on_gpu else "gloo", store=store, rank=0, world_size=1)
    try:
        ranks._patient.cache_clear()
        found.expect(ranks.gather([1, "a"]) == [1, "a"], "gather")
        found.expect(float(ranks.total(torch.ones(1, device=found.device))) == 1, "a sum over ranks")
        model: Any = nn.Module.to(load_tiny("llama", seed=0)[0], found.device)
        ids = torch.arange(5, 30, device=found.device)[None]
        loss = float(model(input_ids=ids, labels=ids).loss)
        for layer in model.model.layers:
            fully_shard(layer, mesh=dist.init_device_mesh(found.device.type, (1,)))
        fully_shard(model, mesh=dist.init_device_mesh(found.device.type, (1,)))
        sharded = model(input_ids=ids, labels=ids).loss
        sharded.backward()
        found.values["fsdp_loss_differs_by"] = apart = abs(float(sharded) - loss)
        found.expect(apart < 1e-5, "a sharded model has another loss")
    finally:
        dist.destroy_process_group()
        ranks._patient.cache_clear()


def checkpoint(found: Findings) -> None:
    """How fast a checkpoint is written."""
    size = 2**31 if found.on_gpu else 2**23
    state = {"state_dict": {"w": torch.zeros(size // 4, device=found.device)}}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        seconds = found.seconds(lambda: AtomicCheckpointIO().save_checkpoint(state, Path(folder, "last.ckpt")))
    found.values["gb_per_s"] = rate = size / seconds / 1e9
    found.expect(rate >= 1 or not found.on_gpu, "a checkpoint is written at less than 1 GB/s")


PARTS: dict[str, Callable[[Findings], None]] = {
    "machine": machine,
    "engine": engine,
    "runs": runs,
    "gradients": gradients,
    "out_of_memory": out_of_memory,
    "decoding": decoding,
    "m_step": m_step,
    "several": several,
    "checkpoint": checkpoint,
}

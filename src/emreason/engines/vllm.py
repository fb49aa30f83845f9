"""vLLM as the engine: for models and GPUs where its kernels beat the in-process engine (extra `[vllm]`).

vLLM runs in a process of its own beside the trainer, one per rank, or as a server that all ranks share. It is given the training weights
(`handover.py`) when they have changed since it had them last, and then forgets its prefix cache. It stays awake from one `generate` to the
next; `rest`, before an M-step, hands the GPU memory of its weights and K/V back.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emreason.engines.handover import TakeWeights, hand_over, version
from emreason.engines.inprocess import eos_token_ids, longest_context
from emreason.engines.server import Drawn, Server
from emreason.models.families import base_causal_lm
from emreason.models.loading import drop_quantization
from emreason.models.memory import release_memory
from emreason.models.sizes import cache_root
from emreason.types import Completion, Request, UserError

PREFILL_TOKENS = 4096
"""Prompt tokens of a step on a CPU, where prompts are not cut: at least a whole context."""

SPARE = 0.08
"""Share of a GPU left for CUDA's contexts and for the trainer's scoring passes while vLLM is awake."""

HIDDEN = re.compile(
    r"TORCHELASTIC_\w+|GROUP_\w+|ROLE_\w+|(?:LOCAL_)?(?:RANK|WORLD_SIZE)|NODE_RANK|MASTER_(?:ADDR|PORT)|PYTORCH_(?:CUDA_)?ALLOC_CONF"
)
"""What vLLM must not see: it would join torchrun's ranks, and its sleep does not work with the allocator's expandable segments."""


class VllmEngine:
    """Draws completions with vLLM from the weights the model has when `generate` is called.

    Args:
        max_batch: requests in flight; a failed question's next attempt waits for a free one of them.
        dtype: precision of vLLM's copy (None: the model's own).
        memory: share of the GPU's memory that vLLM may take while it samples (None: what training leaves).
        max_length: prompt + completion, tokens (None: the model's context).
        options: further arguments of `vllm.LLM`.
        server: URL of a vLLM server to use instead; `server.py` says how it must have been started.
        shared: a folder that trainer and server both see, where weights pass (None: they are on one machine).

    Raises:
        UserError: vLLM is not installed, the model is quantised, or the server does not answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int = 256,
        dtype: torch.dtype | None = None,
        memory: float | None = None,
        max_length: int | None = None,
        options: dict[str, Any] | None = None,
        server: str | None = None,
        shared: str | None = None,
    ):
        if any(not p.is_floating_point() or p.element_size() < 2 for p in model.parameters()):
            # merged into 4 or 8 bits an adapter would lose its digits (trl#3466)
            raise UserError("engine=vllm cannot take the weights of a quantised model; load it in bfloat16, or use engine=inprocess.")
        self.model, self.tokenizer, self.max_batch, self.memory, self.shared = model, tokenizer, max_batch, memory, shared
        self.dtype = dtype or next(model.parameters()).dtype
        self.eos_ids = eos_token_ids(base_causal_lm(model), tokenizer)
        self.context = min((n for n in (max_length, longest_context(base_causal_lm(model).config)) if n), default=2048)
        self.options = {"max_num_seqs": max_batch, **(options or {})}
        self.pieces = 1
        self._vllm: Server | LocalVllm | None = None
        self._held: int | None = None
        self._newline: dict[int, bool] = {}
        if server is not None:
            self._vllm = Server(server, max_batch)
            self.context = min(self.context, self._vllm.context)
            return
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise UserError("engine=vllm needs vLLM: pip install 'emreason[vllm]', or use engine=inprocess.") from error

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        """Yield a completion per request as soon as it is drawn; see `types.Engine`.

        A draw depends on its seed through vLLM's per-request generator. Prompts that leave no room in the context come back with no
        tokens and finish reason `error`.
        """
        engine = self._ready()
        running: dict[str, tuple[Request, int]] = {}  # and how many tokens have been looked at
        number = 0
        try:
            while requests or running:
                while requests and len(running) < self.max_batch:
                    request = requests.popleft()
                    room = min(request.params.max_new_tokens, self.context - len(request.prompt_ids))
                    if not request.prompt_ids or room < 1:
                        empty = request.prompt_ids and request.params.max_new_tokens < 1
                        yield Completion(request, (), 0.0, "length" if empty else "error")
                        continue
                    name, number = str(number), number + 1
                    running[name] = request, 0
                    engine.add(name, list(request.prompt_ids), self._params(request, room))
                for drawn in engine.step() if running else []:
                    request, seen = running[drawn.name]
                    completion = self._finished(request, seen, drawn)
                    running[drawn.name] = request, len(drawn.ids)
                    if completion is not None:
                        if drawn.ended is None:
                            engine.abort([drawn.name])
                        del running[drawn.name]
                        yield completion
        finally:
            engine.abort(list(running))

    def rest(self) -> None:
        """Hand back the GPU memory of vLLM's weights and K/V until the next `generate`; nothing where vLLM has a GPU of its own."""
        if self._vllm is not None and self._vllm.sleep():
            self._held = None  # the weights are gone

    def _params(self, request: Request, room: int) -> dict[str, Any]:
        return {
            "temperature": request.params.temperature,
            "top_p": request.params.top_p,
            "top_k": 0,
            "max_tokens": room,
            "seed": request.seed % 2**63,
            "stop_token_ids": sorted(self.eos_ids),
            "logprobs": 0,  # of the token drawn; vLLM's are those at temperature 1
        }

    def _finished(self, request: Request, seen: int, drawn: Drawn) -> Completion | None:
        """The completion, if it has ended: by vLLM, or here at its answer line; tokens after that, drawn ahead, are dropped."""
        for n in range(seen + 1, len(drawn.ids) + 1) if request.stop is not None else ():
            token, ids = drawn.ids[n - 1], drawn.ids[:n]
            if token not in self.eos_ids and self._has_newline(token) and request.stop(ids):  # type: ignore[misc]
                return Completion(request, tuple(ids), float(sum(drawn.logprobs[:n])), "answer")
        if drawn.ended is None:
            return None
        return Completion(request, tuple(drawn.ids), float(sum(drawn.logprobs)), "length" if drawn.ended == "length" else "stop")

    def _has_newline(self, token: int) -> bool:
        if token not in self._newline:
            self._newline[token] = "\n" in self.tokenizer.decode([token])
        return self._newline[token]

    def _ready(self) -> Server | LocalVllm:
        """vLLM, awake, with today's weights and nothing cached of earlier ones."""
        if self._vllm is None:
            self._vllm = LocalVllm(self._start())
        held = version(self.model)
        with self._vllm.awake():  # its weights' memory first: no room is needed for K/V while they are loaded (vllm#29341)
            if (held != self._held or not self._vllm.holds()) and self._vllm.wants(self.model):
                hand_over(self.model, self.dtype, self._vllm.call, on_device=self._through_gpu(), folder=self.shared)
                self._vllm.took(self.model)
        self._held = held
        return self._vllm

    def _through_gpu(self) -> bool:
        return isinstance(self._vllm, LocalVllm) and next(self.model.parameters()).is_cuda

    def _start(self) -> Any:
        """vLLM's own engine, with random weights; from a folder of a fixed name, which is part of its compile cache's key (vllm#53193)."""
        import vllm
        from vllm.platforms import current_platform

        base = base_causal_lm(self.model)
        drop_quantization(base)
        config = base.config.to_json_string()
        folder = cache_root() / "vllm" / hashlib.blake2b(config.encode(), digest_size=8).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:  # another rank may be reading there
            base.config.save_pretrained(made)
            for file in Path(made).iterdir():
                file.replace(folder / file.name)
        on_gpu = current_platform.is_cuda_alike()
        options: dict[str, Any] = {"enable_sleep_mode": on_gpu, "gpu_memory_utilization": 0.5 if self.memory is None else self.memory}
        if not on_gpu:  # 0.32 fails on a seeded prompt cut in two: "CPU Generator does not use offset"
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(self.context, self.max_batch, PREFILL_TOKENS)}
        gpu = next(self.model.parameters()).device
        if gpu.type == "cuda":
            release_memory()
            options |= {} if self.memory is not None else {"gpu_memory_utilization": share(self.model, self.dtype, gpu, self.pieces)}
        with apart(gpu, int(self.options.get("tensor_parallel_size", 1))):
            return vllm.LLM(
                model=str(folder),
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self.context,
                seed=0,
                worker_extension_cls=f"{TakeWeights.__module__}.{TakeWeights.__name__}",
                **(options | self.options),
            )


class LocalVllm:
    """A `vllm.LLM` of this rank's own."""

    def __init__(self, llm: Any):
        self.llm, self.asleep = llm, False

    def add(self, name: str, prompt_ids: list[int], params: dict[str, Any]) -> None:
        import vllm

        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt_ids}, vllm.SamplingParams(**params, detokenize=False))

    def step(self) -> list[Drawn]:
        found = []
        for output in self.llm.llm_engine.step():
            one = output.outputs[0]
            ids = list(one.token_ids)
            logprobs = [entry[token].logprob for entry, token in zip(one.logprobs, ids, strict=True)]
            found.append(Drawn(output.request_id, ids, logprobs, (one.finish_reason or "stop") if output.finished else None))
        return found

    def abort(self, names: list[str]) -> None:
        if names:
            self.llm.llm_engine.abort_request(names)

    def call(self, name: str, *arguments: Any) -> None:
        self.llm.collective_rpc(name, args=arguments)

    def wants(self, model: nn.Module) -> bool:  # noqa: ARG002
        return True

    def holds(self) -> bool:
        return True

    def took(self, model: nn.Module) -> None:  # noqa: ARG002
        self.llm.reset_prefix_cache()  # it outlives a change of weights

    def sleep(self) -> bool:
        """Whether memory was handed back."""
        if not self.asleep and self.llm.llm_engine.model_config.enable_sleep_mode:
            self.llm.sleep(level=2)
            self.asleep = True
        return self.asleep

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside there is memory for the weights, afterwards for K/V too."""
        if self.asleep:
            release_memory()
            self.llm.wake_up(tags=["weights"])
        yield
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False


def share(model: nn.Module, dtype: torch.dtype, gpu: torch.device, pieces: int = 1) -> float:
    """The share of a GPU's memory that training leaves: what is free or ours, less weights, fp32 masters and Adam's moments.

    Gradients and activations are not there while vLLM is awake. Of `pieces` that the M-step trains over ranks this GPU has one.

    Raises:
        UserError: it does not hold vLLM's weights.
    """
    free, whole = torch.cuda.mem_get_info(gpu)
    ours = free + torch.cuda.memory_reserved(gpu)
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = sum(p.nbytes for p in model.parameters())
    if pieces == 1:
        kept += sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in trained)
    else:
        kept += sum(12 * p.numel() if p.requires_grad else p.nbytes for p in model.parameters()) // pieces
    left = ours - kept - SPARE * whole
    needed = 1.1 * sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if left < needed:
        gib = 2**30
        raise UserError(
            f"engine=vllm: of the GPU's {whole / gib:.0f} GiB training keeps {kept / gib:.0f} between its steps and leaves "
            f"{max(left, 0) / gib:.0f} to vLLM, which needs over {needed / gib:.0f}; use peft=lora, trainer.strategy=shard, "
            "engine=inprocess or a smaller model."
        )
    return int(100 * left / whole) / 100


@contextmanager
def apart(gpu: torch.device, gpus: int) -> Iterator[None]:
    """An environment for a vLLM of this rank's own: no ranks to join, this rank's GPU first, then `gpus` - 1 that nobody trains on.

    Raises:
        UserError: there are not so many.
    """
    before = dict(os.environ)
    chosen = ""
    if gpu.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        mine = gpu.index or 0
        told = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE")  # by torchrun, by Lightning, by srun ("4", "4(x2)")
        training = next((int(found[0]) for name in told if (found := re.match(r"\d+", os.environ.get(name, "")))), 1)
        spare = listed[training:][mine * (gpus - 1) :][: gpus - 1]
        if gpus > 1 and training * gpus > len(listed):
            raise UserError(
                f"engine.options.tensor_parallel_size={gpus}: each of the {training} ranks needs {gpus} GPUs, of which it trains on one, "
                f"but there are {len(listed)}; lower it or trainer.devices, or give vLLM its own: engine.server=URL."
            )
        chosen = ",".join([listed[mine], *spare])
    for name in [name for name in before if HIDDEN.fullmatch(name)]:
        del os.environ[name]
    os.environ |= {"CUDA_VISIBLE_DEVICES": chosen} if chosen else {}
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process with threads and CUDA hangs
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

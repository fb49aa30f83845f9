"""vLLM as the engine: for models and GPUs where its kernels beat the in-process engine (extra `[vllm]`).

vLLM runs in a process of its own beside the trainer, one per rank. Before every `generate` it is given the training weights, adapters
merged, through a folder of safetensors in shared memory, and forgets its prefix cache; afterwards it sleeps, which on a GPU hands back the
memory of weights and K/V for the M-step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from emreason.engines.inprocess import eos_token_ids
from emreason.models.families import base_causal_lm
from emreason.models.loading import drop_quantization
from emreason.models.masters import dithered
from emreason.types import Completion, Request, UserError

SHARD_BYTES = 2**31
"""Weights written at once: what the copy of a big model adds to host memory."""

PREFILL_TOKENS = 4096
"""Prompt tokens of a step on a CPU, where prompts are not cut: at least a whole context."""


class TakeWeights:
    """What vLLM's workers learn: to replace their weights in place. A mix-in of vLLM's own worker class."""

    def take_weights(self: Any, folder: str) -> None:
        """Load the checkpoint in `folder` over the weights in use."""
        self.reload_weights(weights_path=folder)
        # a head tied to the embedding is skipped by the loader, and on CPUs it multiplies by a packed copy made when the engine started
        head: Any = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)


class VllmEngine:
    """Draws completions with vLLM from the weights the model has when `generate` is called.

    Args:
        max_batch: requests in flight; a failed question's next attempt waits for a free one of them.
        dtype: precision of vLLM's copy (None: the model's own).
        memory: share of the GPU's memory that vLLM may take while it samples.
        max_length: prompt + completion, tokens (None: the model's context).
        options: further arguments of `vllm.LLM`.

    Raises:
        UserError: vLLM is not installed, or the model is quantised.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int = 256,
        dtype: torch.dtype | None = None,
        memory: float = 0.5,
        max_length: int | None = None,
        options: dict[str, Any] | None = None,
    ):
        if any(not p.is_floating_point() or p.element_size() < 2 for p in model.parameters()):
            # merged into 4 or 8 bits an adapter would lose its digits (trl#3466)
            raise UserError("engine=vllm cannot take the weights of a quantised model; load it in bfloat16, or use engine=inprocess.")
        try:
            import vllm
        except ImportError as error:
            raise UserError("engine=vllm needs vLLM: pip install 'emreason[vllm]', or use engine=inprocess.") from error
        self.vllm: Any = vllm
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.dtype = dtype or next(model.parameters()).dtype
        self.eos_ids = eos_token_ids(base_causal_lm(model), tokenizer)
        config = base_causal_lm(model).config
        self.context = max_length or int(getattr(config, "max_position_embeddings", None) or 2048)
        self.options = {"gpu_memory_utilization": memory, "max_num_seqs": max_batch, **(options or {})}
        self._llm: Any = None
        self._newline: dict[int, bool] = {}

    def generate(self, requests: deque[Request]) -> Iterator[Completion]:
        """Yield a completion per request as soon as it is drawn; see `types.Engine`.

        A draw depends on its seed through vLLM's per-request generator. Prompts that leave no room in the context come back with no
        tokens and finish reason `error`.
        """
        engine = self._ready()
        running: dict[str, Request] = {}
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
                    running[name] = request
                    engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, self._params(request, room))
                for output in engine.step() if running else []:
                    completion = self._finished(running[output.request_id], output)
                    if completion is not None:
                        if not output.finished:
                            engine.abort_request([output.request_id])
                        del running[output.request_id]
                        yield completion
        finally:
            if running:
                engine.abort_request(list(running))
            if self.device_type == "cuda":
                self._llm.sleep(level=2)

    @property
    def device_type(self) -> str:
        return "cuda" if self.vllm.platforms.current_platform.is_cuda_alike() else "cpu"

    def _params(self, request: Request, room: int) -> Any:
        return self.vllm.SamplingParams(
            temperature=request.params.temperature,
            top_p=request.params.top_p,
            top_k=0,
            max_tokens=room,
            seed=request.seed % 2**63,
            stop_token_ids=sorted(self.eos_ids),
            ignore_eos=False,
            logprobs=0,  # of the token drawn; vLLM's are those at temperature 1
            detokenize=False,
        )

    def _finished(self, request: Request, output: Any) -> Completion | None:
        """The completion, if it has ended: by vLLM, or here at its answer line."""
        drawn = output.outputs[0]
        ids = list(drawn.token_ids)
        reason: Any = None
        # at an answer line the tokens after it, which vLLM may have drawn ahead, are dropped
        if request.stop is not None and ids and ids[-1] not in self.eos_ids and self._has_newline(ids[-1]) and request.stop(ids):
            reason = "answer"
        elif output.finished:
            reason = "length" if drawn.finish_reason == "length" else "stop"
        if reason is None:
            return None
        logprob = sum(entry[token].logprob for entry, token in zip(drawn.logprobs, ids, strict=True))
        return Completion(request, tuple(ids), float(logprob), reason)

    def _has_newline(self, token: int) -> bool:
        if token not in self._newline:
            self._newline[token] = "\n" in self.tokenizer.decode([token])
        return self._newline[token]

    def _ready(self) -> Any:
        """vLLM's engine, awake, with today's weights and nothing cached."""
        folder = Path(tempfile.mkdtemp(prefix="emreason-", dir=shared if (shared := Path("/dev/shm")).is_dir() else None))
        try:
            self._write(folder)
            if self._llm is None:
                self._llm = self._start(folder)
            else:
                if self.device_type == "cuda":
                    self._llm.wake_up()
                self._llm.collective_rpc("take_weights", args=(str(folder),))
            self._llm.reset_prefix_cache()  # it outlives a change of weights
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self._llm.llm_engine

    def _start(self, folder: Path) -> Any:
        # a rank's vLLM is its own world: it must not join torchrun's, and sees this rank's GPU only
        hidden = {
            name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name in os.environ
        }
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            listed = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            os.environ["CUDA_VISIBLE_DEVICES"] = listed[device.index or 0]
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork of a process with threads and CUDA hangs
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            make = self.vllm.LLM
            uncut: dict[str, Any] = {}
            if self.device_type == "cpu":  # 0.32 fails on a seeded prompt cut in two: "CPU Generator does not use offset"
                most = max(self.context, self.max_batch, PREFILL_TOKENS)
                uncut = {"enable_chunked_prefill": False, "max_num_batched_tokens": most}
            return make(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=self.context,
                enable_sleep_mode=self.device_type == "cuda",
                seed=0,
                worker_extension_cls=f"{TakeWeights.__module__}.{TakeWeights.__name__}",
                **(uncut | self.options),
            )
        finally:
            os.environ.update(hidden)
            if device.type == "cuda":
                os.environ.pop("CUDA_VISIBLE_DEVICES")
                if visible is not None:
                    os.environ["CUDA_VISIBLE_DEVICES"] = visible

    @torch.no_grad()
    def _write(self, folder: Path) -> None:
        """The model as a checkpoint in `folder`, adapters merged in fp32, at most SHARD_BYTES of copies in memory."""
        base = base_causal_lm(self.model)
        drop_quantization(base)
        base.config.save_pretrained(folder)
        shard: dict[str, torch.Tensor] = {}
        size, number = 0, 0
        for name, tensor in merged_weights(self.model):
            merged = tensor.dtype == torch.float32 and self.dtype == torch.bfloat16
            shard[name] = (dithered(tensor) if merged else tensor).to(device="cpu", dtype=self.dtype).contiguous().clone()
            size += shard[name].nbytes
            if size >= SHARD_BYTES:
                save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})
                shard, size, number = {}, 0, number + 1
        save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})


def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of the transformers model, LoRA adapters merged in fp32; tied parameters once.

    Raises:
        UserError: an adapter that is not a LoRA.
    """
    if not hasattr(model, "peft_config"):
        yield from model.named_parameters()
        return
    for name, module in base_causal_lm(model).named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            weight = module.base_layer.weight.float()
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).float()
            yield f"{name}.weight", weight
            if getattr(module.base_layer, "bias", None) is not None:
                yield f"{name}.bias", module.base_layer.bias
        elif not any(part in name.split(".") for part in ("base_layer", "lora_A", "lora_B", "lora_dropout")):
            for leaf, parameter in module.named_parameters(recurse=False):
                if leaf.startswith("lora_"):
                    raise UserError("engine=vllm can merge LoRA adapters of linear layers only; use engine=inprocess.")
                yield f"{name}.{leaf}" if name else leaf, parameter

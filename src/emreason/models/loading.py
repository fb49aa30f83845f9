"""Model and tokenizer: loading (Hub id, folder, GGUF), precision, LoRA, export."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from emreason.models.families import base_causal_lm, can_pack
from emreason.models.masters import active_adapters, effective_weight
from emreason.models.memory import is_out_of_memory, let_go, release_memory
from emreason.models.sizes import gguf_cache
from emreason.progress import doing
from emreason.types import UserError

LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]

DAY_S, MONTH_S = 86_400, 30 * 86_400
_COPY = re.compile(r".+-[0-9a-f]{12}(-float32|-bfloat16)?(?P<partial>\.partial-\d+)?")
"""Names of de-quantised copies: the folder that holds them may hold other things too."""


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or for `auto` whichever multiplies matrices faster on this device.

    Measured rather than asked: CPUs that advertise bf16 without AMX are often slower in it than in float32.

    Raises:
        UserError: `name` is none of the three.
    """
    if name in ("float32", "bfloat16"):
        return torch.float32 if name == "float32" else torch.bfloat16
    if name != "auto":
        raise UserError(f"engine.dtype={name!r} is not known; use auto, float32 or bfloat16.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = _product_seconds(torch.float32, torch.bfloat16)
    # bf16 needs fp32 master weights and loses digits: it has to win clearly
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else torch.float32


def _product_seconds(*dtypes: torch.dtype) -> dict[torch.dtype, float]:
    """The fastest of several products each, in turn: what else starts on the machine must not fall on one of them alone."""
    pairs = {dtype: (torch.ones(256, 768, dtype=dtype), torch.ones(2048, 768, dtype=dtype)) for dtype in dtypes}
    best = dict.fromkeys(dtypes, float("inf"))
    begun = time.perf_counter()
    for turn in range(64):
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            nn.functional.linear(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if turn >= 7 and time.perf_counter() - begun > 0.3:
            break
    return best


def load_pretrained(
    path: str,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> LoadedModel:
    """A causal LM and its tokenizer from a Hub id or a local folder.

    Weights that are of `dtype` in the file are not read but mapped, privately: what is written to them stays in this process.

    Args:
        quantization: `nf4` (QLoRA's four bits, their scales quantised, too) or `int8`: what the layers' matrices are kept in; products
            are in `dtype`. Such weights are not trained: adapters are.

    Raises:
        UserError: the model or its tokenizer cannot be loaded, do not belong together, or there is no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"model.load.path={path!r}: no tokenizer could be loaded ({_first_line(error)}); {_ways_out(path)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.load.path={path!r}: the tokenizer has no EOS token, so no completion could end; set one and save it again.")
    try:
        how: dict[str, Any] = {} if quantization is None else {"quantization_config": _quantization(quantization, dtype)}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **how)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise  # told by who knows what would take less
        raise UserError(f"model.load.path={path!r}: the weights could not be loaded ({_first_line(error)}); {_ways_out(path)}") from error
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"model.load.path={path!r}: the tokenizer has {len(tokenizer)} tokens, the model {rows}; they do not belong together."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _quantization(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name not in ("nf4", "int8"):
        raise UserError(f"model.load.quantization={name}: it must be nf4, int8 or null.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.load.quantization={name} needs bitsandbytes: pip install 'emreason[quantized]'.")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    four: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four)


def load_package(package: str, gguf_file: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A GGUF model that a Python package carries as data; the package itself is not imported.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"The package {package!r} that carries {gguf_file} is not installed; run `make setup`, or choose another model=….")
    return load_gguf(str(Path(spec.origin).parent / gguf_file), dtype)


def load_random(package: str, gguf_file: str, shape: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A `random_model` of any `shape` with a package's tokenizer: to measure speed with.

    Raises:
        UserError: the package is not installed.
    """
    _, tokenizer = load_package(package, gguf_file)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return random_model(special | dict(shape), seed, dtype), tokenizer


def random_model(shape: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights in a `shape`: `model_type`, a Llama if it is not given, and the arguments of its config."""
    config = AutoConfig.for_model(**{"model_type": "llama"} | shape, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def load_gguf(path: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A local `.gguf` file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"model: {file} does not exist; give the path of a .gguf file.")
    cached = gguf_cache(file, str(dtype).removeprefix("torch."))
    if not (cached / "config.json").is_file():
        with doing(f"Converting {file.name} once; kept in {cached}"):
            _remove_unused(cached.parent)
            _convert(file.parent, file.name, dtype, cached)
    with contextlib.suppress(OSError):  # a cache that somebody else owns
        os.utime(cached)
    return load_pretrained(str(cached), dtype=dtype)


def _convert(folder: Path, gguf_file: str, dtype: torch.dtype, cached: Path) -> None:
    # a name of its own per process: two runs may convert at the same time
    partial = cached.with_name(f"{cached.name}.partial-{os.getpid()}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
        if getattr(model.hf_quantizer, "supported", False) and dtype != torch.float32:
            # of a few families transformers computes the values in `dtype`, which rounds them more than once
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
            nn.Module.to(model, dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"model: {folder / gguf_file} could not be read as GGUF ({_first_line(error)}); download it again.") from error
    drop_quantization(model)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not cached.exists():  # else another process was first
            partial.rename(cached)
    except Exception as error:
        if not cached.exists():
            why = f"the converted copy could not be written to {cached.parent} ({_first_line(error)})"
            raise UserError(f"model: {why}; make room, or set EMREASON_CACHE=FOLDER.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        del model
        release_memory()  # what is mapped next takes the place of what was converted


def _remove_unused(root: Path) -> None:
    """Remove the copies that nothing has loaded for a month, and what conversions that were killed have left.

    Copies made before they were kept per precision, which nothing loads any more, go with them.
    """
    for folder in root.glob("*"):
        copy = _COPY.fullmatch(folder.name)
        with contextlib.suppress(OSError):  # another run removes it too
            if copy and time.time() - folder.stat().st_mtime > (DAY_S if copy["partial"] else MONTH_S):
                shutil.rmtree(folder)


def drop_quantization(model: PreTrainedModel) -> None:
    """Forget that a model came from a GGUF: the weights are plain floats already, but `save_pretrained` would refuse."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return  # these are not
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")


def _ways_out(path: str) -> str:
    if Path(path).exists():
        return "the folder needs config.json, tokenizer files and *.safetensors."
    return "it is neither a local folder nor reachable on the Hub: check the spelling and the network, or set model.load.path=FOLDER."


def add_lora(
    model: PreTrainedModel, r: int, alpha: int, dropout: float = 0.0, target_modules: str | list[str] = "all-linear", seed: int = 0
) -> nn.Module:
    """Wrap `model` with LoRA adapters (fp32, whatever the base's precision); only they are trained."""
    from peft import LoraConfig, get_peft_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"peft.add: {error}") from error


def load_adapter(model: PreTrainedModel, folder: str) -> nn.Module:
    """`model` with the exported adapter in `folder`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


@torch.no_grad()
def merged(model: Any) -> Any:
    """The model with the adapters in its weights, for good: LoRA's as the engine samples from them, what else there is by peft."""
    for module in model.modules():
        if hasattr(module, "lora_A") and can_pack(module):
            weight = module.get_base_layer().weight
            weight.copy_(effective_weight(module, weight.dtype))
            module.merged_adapters += active_adapters(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every layer: "already merged"
        return model.merge_and_unload()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name and bytes, the same on every device."""
    digest = xxhash.xxh3_64()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        let_go(parameter)
    return digest.hexdigest()


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool = False) -> None:
    """Write the model (or its adapter) and tokenizer so that `AutoModelForCausalLM` / `PeftModel` loads the folder as is.

    Args:
        merge: put the adapter into the weights, for good, and write these.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if merge:
        model = merged(model)
    drop_quantization(base_causal_lm(model))
    model.save_pretrained(partial)  # type: ignore[operator]
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

"""How large a model is, from its files alone: nothing is imported, loaded or downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GB = 1e9


def weight_files(load: Mapping[str, Any]) -> list[Path]:
    """The files with the weights that `model.load` reads; none where they are random or not on this machine yet."""
    if "shape" in load:
        return []  # random weights; the package is there for its tokenizer
    if "package" in load:
        spec = importlib.util.find_spec(str(load["package"]))
        files = [Path(spec.origin).parent / str(load["gguf_file"])] if spec and spec.origin else []
    elif "path" not in load:
        files = []
    elif Path(path := str(load["path"])).suffix == ".gguf":
        files = [Path(path)]
    else:
        files = [file for folder in _folders(path) for file in sorted(folder.glob("*.safetensors"))]
    return [file for file in files if file.is_file()]


def _folders(path: str) -> list[Path]:
    """The folder at `path`, or that of the Hub's repository of this name, as far as it has been fetched; or none."""
    if Path(path).is_dir():
        return [Path(path)]
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{path.replace('/', '--')}" / "snapshots"
    return sorted(cache.glob("*"), key=lambda folder: folder.stat().st_mtime)[-1:]


BROKEN = (OSError, ValueError, LookupError, OverflowError, struct.error)
"""What reading a file that is not whole raises."""


def config(load: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The keys of its `config.json` that tell how large a model is; None where it is not on this machine, or no file has it."""
    if "shape" in load:
        return dict(load["shape"])
    files = weight_files(load)
    try:
        if files and files[0].suffix == ".gguf":
            return _gguf_header(files[0])[0]
        for folder in _folders(str(load["path"])) if "path" in load else []:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
    except BROKEN:
        pass
    return None


def parameters(load: Mapping[str, Any]) -> int | None:
    """How many the weights' files hold, by their headers; None where that cannot be told."""
    try:
        return sum(map(_header_parameters, weight_files(load))) or None
    except BROKEN:
        return None


def _header_parameters(file: Path) -> int:
    if file.suffix == ".gguf":
        return _gguf_header(file)[1]
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(data.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


GGUF_NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
}


def _gguf_header(file: Path) -> tuple[dict[str, Any], int]:
    """A GGUF's size under transformers' names, and its parameters; the `gguf` package takes seconds for a vocabulary."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0

        def take(form: str) -> Any:
            nonlocal at
            values = struct.unpack_from(f"<{form}", data, at)
            at += struct.calcsize(f"<{form}")
            return values[0] if len(values) == 1 else values

        def value(kind: int) -> Any:
            nonlocal at
            if kind == 8:  # a string
                begin = at + 8
                at = begin + take("Q")
                return data[begin:at].decode("utf-8", "replace")
            if kind == 9:  # an array, of which only the length is of interest
                inner, n = take("I"), take("Q")
                if inner in (8, 9):
                    for _ in range(n):
                        value(inner)
                else:
                    at += n * struct.calcsize(f"<{_GGUF_TYPES[inner]}")
                return n
            return take(_GGUF_TYPES[kind])

        if data[:4] != b"GGUF":
            raise ValueError(f"{file} is no GGUF")
        at = 8
        tensors, pairs = take("QQ")
        keys = {value(8): value(take("I")) for _ in range(pairs)}
        sizes = {}
        for _ in range(tensors):
            name, dims = value(8), take("I")
            sizes[name] = math.prod([take("Q") for _ in range(dims)])
            take("IQ")
    named = {ours: keys[key] for theirs, ours in GGUF_NAMES.items() if (key := f"{keys['general.architecture']}.{theirs}") in keys}
    named |= {"vocab_size": keys.get("tokenizer.ggml.tokens"), "tie_word_embeddings": "output.weight" not in sizes}
    return named, sum(sizes.values())


_GGUF_TYPES = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}


def describe(name: str, load: Mapping[str, Any]) -> str:
    """The model and its size in words."""
    files, count = weight_files(load), parameters(load)
    if files:
        where = f"{files[0].name if len(files) == 1 else load['path']}, {sum(file.stat().st_size for file in files) / GB:.2f} GB on disk"
    elif "path" in load:
        where = f"{load['path']}, size not known: it is fetched from the Hub if it is not a folder"
    elif "package" in load and "shape" not in load:
        where = f"package {load['package']}, not installed"
    else:
        where = "random weights"
    return f"{name} ({where}{f', {count / 1e6:.0f} million parameters' if count else ''})"


def gguf_cache(file: Path, dtype: str) -> Path:
    """Where the copy of a GGUF de-quantised to `dtype` lives: reading a GGUF takes 45 s for 1.5B parameters, mapping the copy one."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_root() / f"{file.stem}-{key}-{dtype}"


def cache_root() -> Path:
    """The folder of all copies."""
    return Path(os.environ.get("EMREASON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emreason")

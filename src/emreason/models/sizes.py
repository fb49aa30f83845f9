"""How large a model is, from its files alone: nothing is imported, loaded or downloaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
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
    elif Path(path).is_dir():
        files = sorted(Path(path).glob("*.safetensors"))
    else:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{path.replace('/', '--')}" / "snapshots"
        newest = sorted(cache.glob("*"), key=lambda folder: folder.stat().st_mtime)[-1:]
        files = [file for folder in newest for file in sorted(folder.glob("*.safetensors"))]
    return [file for file in files if file.is_file()]


def parameters(load: Mapping[str, Any]) -> int | None:
    """How many the weights' files hold, by their headers; None where that cannot be told: a GGUF before it was converted once."""
    files = weight_files(load)
    if len(files) == 1 and files[0].suffix == ".gguf":
        files = sorted(gguf_cache(files[0]).glob("*.safetensors"))
    try:
        return sum(map(_header_parameters, files)) or None
    except (OSError, ValueError, KeyError):
        return None


def _header_parameters(file: Path) -> int:
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(data.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


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


def gguf_cache(file: Path) -> Path:
    """Where the de-quantised copy of a GGUF lives: reading a GGUF takes ~20 s, the copy 1 s."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_root() / f"{file.stem}-{key}"


def cache_root() -> Path:
    """Where this program keeps what may be deleted."""
    return Path(os.environ.get("EMREASON_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emreason")

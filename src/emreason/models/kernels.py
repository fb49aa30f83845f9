"""`kernels.c`, compiled for this processor at first use."""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_float, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_ARGUMENTS: dict[str, list[Any]] = {
    "add_norm": [c_void_p] * 5 + [c_int64] * 2 + [c_float] * 3,
    "norm_heads": [c_void_p] * 2 + [c_int64] * 5 + [c_float] * 2,
    "gate": [c_void_p] * 2 + [c_int64] * 3,
    "gated": [c_void_p] * 3 + [c_int64] * 2,
    "gated_backward": [c_void_p] * 5 + [c_int64] * 2,
    "target_logprobs": [c_void_p] * 3 + [c_int64] * 2 + [c_float],
    "attend": [c_void_p] * 8 + [c_int64] * 8 + [c_float] * 2,
    "publish": [c_void_p] * 2 + [c_int64, c_uint32],
}


_compiling = ThreadPoolExecutor(1)


def library(dtype: torch.dtype) -> Any:
    """`kernels.c` compiled for this processor and for tensors of `dtype`, or None where that cannot be had."""
    return compile_ahead(dtype).result()


@functools.cache
def compile_ahead(dtype: torch.dtype) -> Future[Any]:
    """Begin with the `library` of `dtype`, which takes a second.

    Nothing is kept on disk, where what one processor compiled could meet another.
    """
    return _compiling.submit(_compile, dtype)


def _compile(dtype: torch.dtype) -> Any:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux" or dtype not in (torch.float32, torch.bfloat16):
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.so"
        # -fopenmp: its threads are torch's, whose libgomp is loaded already
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *(["-DBF16"] if dtype == torch.bfloat16 else [])]
        source = Path(__file__).with_name("kernels.c")
        try:
            subprocess.run([compiler, *options, "-o", str(file), str(source), "-lm"], capture_output=True, text=True, check=True)
            loaded = ctypes.CDLL(str(file))
        except (OSError, subprocess.CalledProcessError) as error:
            log.info("kernels.c cannot be used here; decoding goes on without it: %s", getattr(error, "stderr", None) or error)
            return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded

"""Tensors that say they are on a GPU, where there is none: nothing is computed; devices, shapes and operations are a real run's."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
FREE = {"view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "t", "split"}
FREE |= {
    "split_with_sizes",
    "unbind",
    "alias",
    "detach",
    "as_strided",
    "unflatten",
    "chunk",
    "empty",
    "empty_like",
    "new_empty",
    "lift_fresh",
}
"""Operations that start no kernel."""


@functools.cache
def device_guard() -> None:
    """What a torch without CUDA lacks to make a tensor that says it is there; skips the test where it cannot be had."""
    if torch.cuda.is_available():
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    root = Path(torch.__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="fake-cuda-"))
    (folder / "guard.cpp").write_text(GUARD)
    options = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-O0",
        f"-I{root / 'include'}",
        f"-L{root / 'lib'}",
        "-lc10",
        "-o",
        str(folder / "guard.so"),
    ]
    done = subprocess.run([compiler, str(folder / "guard.cpp"), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"torch's headers do not compile here: {done.stderr[-200:]}")
    ctypes.CDLL(str(folder / "guard.so"))
    shutil.rmtree(folder)


class Looks(TorchDispatchMode):
    """Counts what would make a host wait for a GPU, on tensors of any device: looks at values, and results whose size depends on them."""

    WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave"})

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            by_mask = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
            name = "a mask as index" if by_mask else name
        if name in self.WAITS or name == "a mask as index":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Counts kernels by name, copies from the host (`up`; of these it waits for `waited`), and waits for the device (`down`)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.up, self.waited, self.down = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        given = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor) and {"cpu", "cuda"} == {out.device.type, given[-1]}:
            if not out.numel():
                return out
            if out.device.type == "cuda":
                self.up += 1
                self.waited += not (kwargs or {}).get("non_blocking", False)
            else:
                self.down += 1
        elif isinstance(out, torch.Tensor) and out.device.type == "cuda" and name not in FREE:
            self.kernels[name] += 1
        return out


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Inside, `device="cuda"` works; a tensor on another device, or a look at a value, raises."""
    device_guard()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def on_the_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with all its tensors on the fake device, tied ones tied."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in moved:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = torch.nn.Parameter(there, requires_grad=False) if is_parameter else there
                if tensor is not None:
                    held[name] = moved[id(tensor)]
    return model

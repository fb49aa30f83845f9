"""Memory: kept by the process while a phase runs, given back between phases; and what is said when it runs out."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emreason.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h

MADV_DONTNEED = 4  # mman.h
PAGE_STATE, PAGE_OF_A_FILE = 61, 0b101  # pagemap: bits 61 to 63 are of a file, swapped out, present; a page written to is of none

LARGE = 2**23
"""Bytes from which the M-step's tensors are mapped: its logits, the gradients of the embedding."""


def keep_freed_memory() -> None:
    """Tell glibc to hand freed blocks out again instead of returning them to the kernel at once.

    By default every tensor above a few MB is mapped, zeroed by the kernel page by page, and unmapped when freed; in training that costs a
    quarter of the time on a CPU. Without effect on other C libraries.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def map_large_blocks() -> None:
    """The same for all but the few tensors of `LARGE` bytes or more, until `keep_freed_memory`: the holes that those leave behind are what
    an M-step's memory peaks with (4.04 against 3.90 GB of SmolLM2-135M, at the same speed), while an E-step takes a few in every token.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_MMAP_MAX, 2**16)


def spare_imports() -> None:
    """Take what exists now out of garbage collection, once per process: to visit half a million objects of imports takes .2 s."""
    if not gc.get_freeze_count():
        gc.freeze()


def release_memory() -> None:
    """Return what is free to the system (and cached GPU memory to the driver)."""
    import torch

    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Give the holes between this process's tensors back to the system."""
    if libc := _glibc():
        libc.malloc_trim(0)


def let_go(tensor: Tensor) -> None:
    """Give back the memory of a weight that is mapped from a file and was not written to: what reads it next maps it again.

    Whether that is so is the kernel's word, page by page, not a guess; everywhere else nothing happens.
    """
    page = mmap.PAGESIZE
    begin, end = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    libc = _glibc() if tensor.device.type == "cpu" and tensor.is_contiguous() and begin < end else None
    if libc is None:
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(8 * begin)
            entries = np.frombuffer(pagemap.read(8 * (end - begin)), dtype=np.uint64)
    except OSError:  # hidden in some containers
        return
    if len(entries) == end - begin and np.isin(entries >> PAGE_STATE, (0, PAGE_OF_A_FILE)).all():
        libc.madvise(ctypes.c_void_p(begin * page), ctypes.c_size_t((end - begin) * page), MADV_DONTNEED)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; torch has a class of its own for devices only."""
    import torch

    said = ("allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


@contextmanager
def out_of_memory_told(mend: str) -> Iterator[None]:
    """Turn running out of memory into a sentence that says what to change.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"Out of memory: {mend}.") from error
        raise


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None

"""Memory: kept by the process while a phase runs, given back between phases; and what is said when it runs out."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emreason.types import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to hand freed blocks out again instead of returning them to the kernel at once.

    By default every tensor above a few MB is mapped, zeroed by the kernel page by page, and unmapped when freed; in training that costs a
    quarter of the time on a CPU. Without effect on other C libraries.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def release_memory() -> None:
    """Return what is free to the system (and cached GPU memory to the driver)."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; torch has a class of its own for devices only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


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

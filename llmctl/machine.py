"""The hardware as one process sees it: precision, threads, memory. Knows no other processes and no models."""

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llmctl.tables.dtypes import full_name

BFLOAT16_GAIN = 1.5
"""The speedup of bfloat16 matrix products from which they outweigh the conversions around them."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

LARGE_BLOCK_BYTES = 1 << 20
"""The block size from which `return_large_blocks` returns freed memory to the system."""


def processor_name() -> str:
    """Return the processor's model name as reported by the operating system."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as used in configs, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, *, on_cpu: bool) -> torch.dtype:
    """Return the dtype of matrix products; `auto` is bfloat16 if the hardware is faster with it, else float32."""
    if name != "auto":
        return DTYPES[full_name(name)]
    if on_cpu:
        gain = product_rate(torch.bfloat16) / product_rate(torch.float32)
        return torch.bfloat16 if gain > BFLOAT16_GAIN else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure the rate of a typical matrix product in FLOP/s; takes a few hundredths of a second.

    CPU flags do not predict it: of processors with the same bfloat16 instructions, some are 4 times as fast as with
    float32, others half as fast.
    """
    size = 4096 if device == "cuda" else 512
    a, b = torch.ones(2 * size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")

    def wait() -> None:
        if device == "cuda":  # CUDA kernels are asynchronous
            torch.cuda.synchronize()

    for _ in range(6):
        wait()
        started = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - started)
    return 4 * size**3 / best


def available_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(n_threads: int) -> None:
    """Set the thread count of torch, and of OpenMP libraries loaded later."""
    torch.set_num_threads(n_threads)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)


def available_memory(device: torch.device, n_sharing: int = 1) -> int:
    """Return the free bytes of the GPU, or this process's share of the machine's available memory.

    n_sharing: number of processes that share the machine. A cgroup (container) limit is taken into account.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, which /proc/meminfo does not show; or `max`
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        free = min(free, int(text) - used)
    return free // n_sharing


def peak_memory_bytes(device: torch.device) -> int:
    """Return the process's peak memory: allocated by torch on a GPU, resident set size on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory(device: torch.device) -> bool:
    """Reset the peak-memory counter; return False if the system does not allow it.

    Linux resets the peak resident set size when 5 is written to `/proc/self/clear_refs` (proc(5)).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_since_forgotten(device: torch.device) -> int | None:
    """Return the peak memory in bytes since `forget_peak_memory`; None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def give_back_memory() -> None:
    """Return freed memory to the system, so that the next measurement does not include earlier allocations."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_large_blocks() -> None:
    """Make glibc return freed tensors to the system at once.

    By default glibc raises its mmap threshold to up to 32 MB and keeps such blocks in the heap, which fragments: a step
    then takes up to 2.3 times the memory of its tensors (benchmarks/memory.py). Fresh pages cost time, though: a sixth
    of a step at 20 M parameters, more in a tiny model. Use this only if memory is the limit.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, LARGE_BLOCK_BYTES)  # M_MMAP_THRESHOLD; setting it also disables its dynamic adjustment
        libc.mallopt(-1, 4 * LARGE_BLOCK_BYTES)  # M_TRIM_THRESHOLD


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is torch's out-of-memory error, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def describe_machine() -> dict[str, Any]:
    """Return the properties of the machine that affect results beyond the recipe."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }

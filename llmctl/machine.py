"""The hardware as one process sees it: precision, threads, memory. Knows no other processes and no models."""

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
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

FEWEST_ROUNDS = 3
"""The fewest measurements of what may still be the fastest, after a first call that warms up."""

BEHIND = 2.0
"""How many times slower than the fastest a candidate is measured no more: no noise explains that."""

PRODUCT_SIZES = {64: 4.0, 128: BEHIND, 256: BEHIND, 512: BEHIND}
"""Sizes of matrix products, and how far behind bfloat16 is dropped; small ones pay more for their conversions."""

CLEAR_GAINS = (0.8 * BFLOAT16_GAIN, 1.2 * BFLOAT16_GAIN)
"""Outside of these, the product of the last size but one decides."""

LONGEST_PRODUCT_SECONDS = 0.01
"""`product_rate` takes no larger product than this."""

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
        return torch.bfloat16 if is_bfloat16_faster() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


@cache
def is_bfloat16_faster() -> bool:
    """Tell whether products in bfloat16 are `BFLOAT16_GAIN` times as fast as in float32; takes milliseconds.

    Measured once in a process: near the limit, or on a busy machine, a second measurement may say something else.

    CPU flags do not predict it: of processors with the same bfloat16 instructions, some are 4 times as fast as with
    float32, others half as fast; without any they are up to 100 times slower. So small products come first, and the
    larger ones only if bfloat16 is not far behind.
    """
    gain = 0.0
    for size, behind in PRODUCT_SIZES.items():
        products = {name: matrix_product(DTYPES[name], size) for name in ("float32", "bfloat16")}
        with one_thread():
            seconds = race(products, behind=behind)
        gain = seconds["float32"] / seconds["bfloat16"]
        if gain < 1 / behind:
            return False
        if size == list(PRODUCT_SIZES)[-2] and not CLEAR_GAINS[0] <= gain <= CLEAR_GAINS[1]:
            break
    return gain > BFLOAT16_GAIN


def race(
    calls: Mapping[str, Callable[[], object]],
    *,
    first: Mapping[str, float] | None = None,
    behind: float = BEHIND,
    rounds: int = FEWEST_ROUNDS,
) -> dict[str, float]:
    """Return the fewest seconds of a call of each; those that are far behind after two calls are not called again.

    The calls alternate and the minimum counts: other processes only make a call slower.
    first: the seconds of a first call, if there was one. rounds: calls after the first.
    """
    best = dict(first or {name: seconds_of(call) for name, call in calls.items()})
    limit = float("inf")
    for _ in range(rounds):
        for name, call in calls.items():
            if best[name] <= limit:
                best[name] = min(best[name], seconds_of(call))
        limit = behind * min(best.values())
    return best


def seconds_of(call: Callable[[], object], clock: Callable[[], float] | None = None) -> float:
    """Return the seconds of a call: CPU time of a single thread, else the time that passes.

    CPU time does not count what other processes take. That of several threads would: they wait for each other.
    """
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    started = clock()
    call()
    return max(clock() - started, 1e-9)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, whose CPU time no other process changes."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def matrix_product(dtype: torch.dtype, size: int, device: str = "cpu") -> Callable[[], object]:
    """Return a matrix product of 4 * size^3 FLOPs; the call ends when the product is done."""
    a, b = torch.ones(2 * size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    if device != "cuda":
        return lambda: torch.mm(a, b)

    def product() -> None:
        torch.mm(a, b)
        torch.cuda.synchronize()  # CUDA kernels are asynchronous

    return product


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measure the rate of a typical matrix product in FLOP/s; takes a few hundredths of a second.

    The size is the largest that is fast enough: where products are slow, small ones have the same rate.
    """
    if device == "cuda":
        product = matrix_product(dtype, 4096, device)
        return 4 * 4096**3 / min(seconds_of(product, time.perf_counter) for _ in range(6))
    *sizes, largest = list(PRODUCT_SIZES)[1:]
    for size in sizes:
        product = matrix_product(dtype, size)
        with one_thread():
            seconds = race({"": product})[""]
        if 8 * seconds > LONGEST_PRODUCT_SECONDS:  # the next size
            break
    else:
        size = largest
    product = matrix_product(dtype, size)
    return 4 * size**3 / min(seconds_of(product) for _ in range(6))


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


def share_heap() -> None:
    """Make glibc serve threads to come from the heaps that exist, instead of giving each a heap that keeps what it frees."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-8, 1)  # M_ARENA_MAX


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

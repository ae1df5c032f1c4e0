"""Device, precision and ranks: the only importer of accelerate besides the launcher.

Knows nothing of objectives, optimizers' rules or files. What processes tell each other is numbers and JSON: nothing
that a peer sends is ever unpickled.
"""

import ctypes
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from llmctl.config import ParallelConfig, TrainConfig
from llmctl.engine.ranks import Ranks, join
from llmctl.errors import LlmctlError, MissingExtraError, StoppedError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

BFLOAT16_GAIN = 1.5
"""How much faster bfloat16 products must be to pay for the conversions around them."""

PATIENCE = timedelta(days=2)
"""How long processes wait while the first one prepares data, in which nobody talks."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Runtime:
    """One process's view of the machine and of its peers."""

    accelerator: "Accelerator"
    dtype: torch.dtype
    ranks: Ranks
    parallel: ParallelConfig
    patient: Any = None

    @property
    def device(self) -> torch.device:
        """The device this process trains on."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.ranks.rank == 0

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.ranks.world_size

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it for precision and ranks.

        Raises: LlmctlError if the wrapper is not the one that was asked for.
        """
        if self.dtype == torch.float64:
            module = module.double()
        if self.world_size == 1:
            return self.accelerator.prepare_model(module)
        if self.parallel.strategy == "fsdp":
            return self.shard(module)
        if self.parallel.deterministic:  # gradients are summed by our own tree
            return self.accelerator.prepare_model(module, evaluation_mode=True).train()
        with warnings.catch_warnings():
            # torch 2.13 renames `broadcast_buffers`; 2.11 knows no other name.
            warnings.simplefilter("ignore", FutureWarning)
            module = self.accelerator.prepare_model(module)
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            raise LlmctlError(f"the model was wrapped as {type(module).__name__}, not for {self.world_size} processes")
        return module

    def shard(self, module: nn.Module) -> nn.Module:
        """Share weights, gradients and optimizer state out over the processes, block by block (FSDP2).

        Accelerate's plugin silently trains with DDP on a CPU, so torch's own function is called. Gradients are
        summed, not averaged: the loss is divided by the global count before.
        Source: Zhao et al. 2023, arXiv:2304.11277.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        half = self.dtype == torch.bfloat16
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if half
            else MixedPrecisionPolicy()
        )
        offload = CPUOffloadPolicy() if self.parallel.cpu_offload and self.device.type == "cuda" else OffloadPolicy()
        blocks = [child for child in module.modules() if type(child).__name__ == "Block"]
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
            assert isinstance(part, FSDPModule)
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        return module

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients."""
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def gather(self, obj: Any) -> list[Any]:
        """Return what every process gave, in the order of their numbers; it travels as JSON."""
        if self.world_size == 1:
            return [obj]
        data = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8).to(self.device)
        sizes = self.accelerator.gather(torch.tensor([len(data)], device=self.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        rows = self.accelerator.gather(padded[None]).cpu().numpy()
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def first(self, obj: Any) -> Any:
        """Return what the first process gave."""
        return self.gather(obj if self.is_main else None)[0]

    def wait_for_first(self, problem: LlmctlError | None = None) -> None:
        """Wait, for as long as it takes, until the first process has done its part.

        Raises: the first process's error, in every process.
        """
        if self.world_size == 1:
            if problem is not None:
                raise problem
            return
        import torch.distributed as dist

        if self.patient is None:
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(self.patient)
        if problem is not None:
            self.first([str(problem), problem.hint, problem.exit_code])
            raise problem
        told = self.first(None)
        if told is not None:
            raise retold(*told)

    def probe(self) -> float:
        """Return the milliseconds that summing 4 MiB over all processes takes.

        Raises: LlmctlError if the sum is wrong.
        """
        numbers = torch.full((2**20,), float(self.rank + 1), device=self.device)
        self.sum(numbers)
        begun = time.perf_counter()
        found = float(self.sum(numbers)[-1])
        seconds = time.perf_counter() - begun
        expected = self.world_size * (self.world_size + 1) / 2
        if found != expected:
            raise LlmctlError(f"the processes' sum is {found}, it should be {expected}", "check the network's driver")
        return 1000 * seconds

    def make_trackers(
        self, names: Sequence[str], folder: Path, recipe: Mapping[str, Any], ids: Mapping[str, str]
    ) -> dict[str, "GeneralTracker"]:
        """Start the trackers of these names, through Accelerate; they write into the run folder or to their service.

        `ids` are those that a run which goes on has had at the services.
        Raises: MissingExtraError if a tracker's package is not installed, UsageError for an unknown name.
        """
        if not names or not self.is_main:
            return {}
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
        there = {str(name) for name in get_available_trackers()}
        trackers = {}
        for name in names:
            if name not in known:
                raise UsageError(f"there is no tracker `{name}`", f"known are {', '.join(sorted(known))}")
            if name not in there:
                raise MissingExtraError(f"`--track {name}`", name, name)
            kind = known[name]
            again = {"id": ids[name], "resume": "allow"} if name == "wandb" and ids.get(name) else {}
            places = {"logging_dir": folder} if kind.requires_logging_directory else {}
            tracker = kind(folder.name, **places, **again)
            if hasattr(tracker, "start"):  # newer versions of Accelerate begin later than they are made
                tracker.start()
            tracker.store_init_configuration(flat(recipe))
            trackers[name] = tracker
        return trackers


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested recipe with dotted keys and values that every tracker takes."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return found


def available_memory(device: torch.device, n_sharing: int = 1) -> int:
    """Return the bytes that a process may still take: of its GPU, or its share of the machine's free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        free = min(free, int(text) - used)
    return free // n_sharing


def retold(message: str, hint: str, exit_code: int) -> LlmctlError:
    """Return another process's error."""
    error = LlmctlError(message, hint)
    error.exit_code = exit_code
    return error


def start(config: TrainConfig, parallel: ParallelConfig | None = None) -> Runtime:
    """Join the other processes if there are any, choose device and precision, and start Accelerate.

    Raises: UsageError if a device is asked for that is not there; StoppedError if a peer does not come.
    """
    parallel = parallel or ParallelConfig()
    ranks = join(os.environ)
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UsageError(
            "`train.device` is `cuda`, but no CUDA device is visible", "--device cpu trains on the processor"
        )
    on_cpu = config.device == "cpu" or not has_cuda
    if on_cpu and (config.return_memory or config.micro_batch_size == -1):
        return_large_blocks()
    set_threads(config, parallel, ranks)
    accelerate_says = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":  # an Accelerate config file that asks for it
        parallel = ParallelConfig(**{**vars(parallel), "strategy": "fsdp"})
    if ranks.world_size > 1:
        connect(PartialState, on_cpu=on_cpu, timeout=timedelta(seconds=parallel.timeout_seconds), ranks=ranks)
    dtype = choose_dtype(config.dtype, on_cpu=on_cpu)
    if config.dtype == "auto" and accelerate_says == "bf16":
        dtype = torch.bfloat16
    precision = (
        "bf16" if dtype == torch.bfloat16 and not (parallel.strategy == "fsdp" and ranks.world_size > 1) else "no"
    )
    if ranks.world_size == 1:  # a second run in this process may have another precision than the first
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - there is no public way
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != ranks.world_size:
        raise LlmctlError(
            f"{ranks.world_size} processes were started, but Accelerate sees {accelerator.num_processes}",
            "start with `llmctl ... --nproc N`",
        )
    runtime = Runtime(accelerator, dtype, ranks, parallel)
    try:
        # Every process has measured its own products; what the first one found holds.
        runtime.dtype = DTYPES[runtime.first(str(dtype).removeprefix("torch."))]
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise StoppedError(f"rank {ranks.rank} lost another process at the start", "start all of them again") from error
    return runtime


def connect(state: Any, *, on_cpu: bool, timeout: timedelta, ranks: Ranks) -> None:
    """Meet the other processes.

    Raises: StoppedError if they do not come in time.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state(cpu=on_cpu, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise StoppedError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {address} within "
            f"{timeout.total_seconds():.0f} s ({reason})",
            "llmctl doctor --distributed checks who reaches whom; the interface is that of the route to the master",
        ) from error


LARGE_BLOCK_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Let glibc give tensors back to the system when they are freed.

    By default it learns to keep blocks of up to 32 MB in its heap, where those of different sizes leave holes: a
    step then takes up to 2.3 times the memory of its tensors (benchmarks/memory.py). Fresh pages cost time, though: a
    sixth in a model of 20 M parameters, more in a tiny one. So this is for machines whose memory is the limit.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, LARGE_BLOCK_BYTES)  # M_MMAP_THRESHOLD; setting it ends the learning
        libc.mallopt(-1, 4 * LARGE_BLOCK_BYTES)  # M_TRIM_THRESHOLD


def set_threads(config: TrainConfig, parallel: ParallelConfig, ranks: Ranks) -> None:
    """Share the cores among the processes of this machine; one thread where bits must not depend on their number."""
    n_threads = config.threads
    if not n_threads and ranks.world_size > 1:
        n_threads = max(1, available_cores() // ranks.local_world_size)
    if parallel.deterministic:
        n_threads = config.threads or 1
    if n_threads:
        torch.set_num_threads(n_threads)
        os.environ["OMP_NUM_THREADS"] = str(n_threads)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error means that another process, or the way to it, has gone."""
    import torch.distributed as dist

    text = str(error)
    signs = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset",
        "Timed out",
        "Broken pipe",
        "Failed to recv",
    )
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def leave(exit_code: int) -> NoReturn:
    """End a process of a group: gloo's threads abort one in five ordinary exits (pytorch issue 179291)."""
    import torch.distributed as dist

    if exit_code == 0 and dist.is_initialized():
        with suppress(RuntimeError):  # a peer that dies now has done its part, and so have we
            dist.barrier()
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def choose_dtype(name: str, *, on_cpu: bool) -> torch.dtype:
    """Return the precision of matrix products; auto takes bfloat16 where the hardware is faster with it."""
    if name != "auto":
        return DTYPES[name]
    if on_cpu:
        gain = product_rate(torch.bfloat16) / product_rate(torch.float32)
        return torch.bfloat16 if gain > BFLOAT16_GAIN else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Return the measured rate of a typical matrix product in FLOP/s; takes a few hundredths of a second.

    Capability flags do not tell: of processors with the same bfloat16 instructions some are 4 times faster with
    them than with float32, and some half as fast.
    """
    size = 4096 if device == "cuda" else 512
    a, b = torch.ones(2 * size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")

    def wait() -> None:
        if device == "cuda":  # a GPU's products are only begun when the call returns
            torch.cuda.synchronize()

    for _ in range(6):
        wait()
        begun = time.perf_counter()
        torch.mm(a, b)
        wait()
        best = min(best, time.perf_counter() - begun)
    return 4 * size**3 / best


def describe_environment(runtime: Runtime | None = None) -> dict[str, Any]:
    """Return what a result depends on besides its recipe."""
    import platform

    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if runtime is not None:
        described |= {
            "device": runtime.device.type,
            "dtype": str(runtime.dtype).removeprefix("torch."),
            "world_size": runtime.world_size,
            "strategy": runtime.parallel.strategy if runtime.world_size > 1 else None,
        }
    return described


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, deterministic: bool) -> list[str]:
    """Return what of the environment has changed such that a resumed run is not the same bits, as `name a -> b`."""
    harmless = {"python"} | ({"world_size", "strategy"} if deterministic else set())
    return [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if name in old and name not in harmless and old[name] != new[name]
    ]

"""Device, precision and communication between ranks; the only module that imports accelerate.

Knows nothing about objectives, optimizers or files. Processes exchange numbers and JSON: nothing that a peer sends is
unpickled.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from llmctl.config import ParallelConfig, TrainConfig
from llmctl.distributed.ranks import Ranks, join
from llmctl.distributed.sharding import shard
from llmctl.errors import LlmctlError, MissingExtraError, StoppedError, UsageError
from llmctl.machine import (
    DTYPES,
    available_cores,
    choose_dtype,
    describe_machine,
    name_of,
    return_large_blocks,
    set_threads,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

PATIENCE = timedelta(days=2)
"""How long processes wait while rank 0 prepares data, which involves no communication."""


@dataclass
class Runtime:
    """One process's device, precision, and communication with its peers."""

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
        """Whether this is rank 0, which writes files and progress."""
        return self.ranks.rank == 0

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.ranks.world_size

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it for mixed precision and DDP or FSDP.

        Raises: LlmctlError if Accelerate did not wrap it as requested.
        """
        if self.dtype == torch.float64:
            module = module.double()
        if self.world_size == 1:
            return self.accelerator.prepare_model(module)
        if self.parallel.strategy == "fsdp":
            shard(module, self.device, self.dtype, self.world_size, offloads=self.parallel.cpu_offload)
            return module
        if self.parallel.deterministic:  # TreeGradients sums the gradients: no DDP
            return self.accelerator.prepare_model(module, evaluation_mode=True).train()
        with warnings.catch_warnings():
            # torch 2.13 renamed `broadcast_buffers` and warns about the only name that 2.11 knows.
            warnings.simplefilter("ignore", FutureWarning)
            module = self.accelerator.prepare_model(module)
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            raise LlmctlError(
                f"Accelerate wrapped the model as {type(module).__name__}, not for {self.world_size} processes",
                "start with `llmctl ... --nproc N`",
            )
        return module

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate a loss."""
        self.accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return tensor if self.world_size == 1 else self.accelerator.reduce(tensor, reduction="sum")

    def gather(self, obj: Any) -> list[Any]:
        """Return every process's object, in rank order; it is sent as JSON."""
        if self.world_size == 1:
            return [obj]
        # Collectives need equal shapes, so sizes are exchanged first and the bytes padded.
        data = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8).to(self.device)
        sizes = self.accelerator.gather(torch.tensor([len(data)], device=self.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        rows = self.accelerator.gather(padded[None]).cpu().numpy()
        return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]

    def first(self, obj: Any) -> Any:
        """Return rank 0's object."""
        return self.gather(obj if self.is_main else None)[0]

    def lead(self, action: Callable[[], Any]) -> Any:
        """Run an action on rank 0 while the others wait (up to `PATIENCE`), and return its result on all ranks.

        The result is sent as JSON. Raises: rank 0's error, on every rank.
        """
        if self.world_size == 1:
            return action()
        import torch.distributed as dist

        message, problem = None, None
        if self.is_main:
            try:
                message = [action(), None]
            except Exception as error:  # noqa: BLE001 - the others wait and must learn of any error
                problem = error
                message = [None, [str(error), getattr(error, "hint", ""), getattr(error, "exit_code", 1)]]
        # The default group would time out during a long action, so the barrier uses a group with a longer timeout.
        if self.patient is None:
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(self.patient)
        result, failure = self.first(message)
        if problem is not None:
            raise problem
        if failure is not None:
            raise remote_error(*failure)
        return result

    def probe(self) -> float:
        """Measure the time of an all-reduce of 4 MiB in milliseconds.

        Raises: LlmctlError if the sum is wrong.
        """
        numbers = torch.full((2**20,), float(self.rank + 1), device=self.device)
        self.sum(numbers)  # warm-up: opens the connections
        started = time.perf_counter()
        total = float(self.sum(numbers)[-1])
        seconds = time.perf_counter() - started
        expected = self.world_size * (self.world_size + 1) / 2
        if total != expected:
            raise LlmctlError(f"an all-reduce returned {total} instead of {expected}", "check the network's driver")
        return 1000 * seconds

    def make_trackers(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], ids: Mapping[str, str]
    ) -> dict[str, "GeneralTracker"]:
        """Start experiment trackers through Accelerate; they write to the run folder or to their service.

        ids: the ids that a resumed run already has at the services.
        Raises: MissingExtraError if a tracker's package is not installed, UsageError for an unknown name.
        """
        kinds = tracker_kinds(names)
        if not self.is_main:
            return {}
        trackers = {}
        for name, kind in kinds.items():
            resume = {"id": ids[name], "resume": "allow"} if name == "wandb" and ids.get(name) else {}
            location = {"logging_dir": folder} if kind.requires_logging_directory else {}
            tracker = kind(folder.name, **location, **resume)
            if hasattr(tracker, "start"):  # newer versions of Accelerate do not start in the constructor
                tracker.start()
            tracker.store_init_configuration(
                {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
            )
            trackers[name] = tracker
        return trackers


def tracker_kinds(names: Sequence[str]) -> dict[str, Any]:
    """Return Accelerate's tracker classes by name.

    Raises: MissingExtraError if a tracker's package is not installed, UsageError for an unknown name.
    """
    if not names:
        return {}
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown tracker `{name}`", f"use one of {', '.join(sorted(known))}")
        if name not in installed:
            raise MissingExtraError(f"`--track {name}`", name)
    return {name: known[name] for name in names}


def remote_error(message: str, hint: str, exit_code: int) -> LlmctlError:
    """Rebuild an error that was raised in another process."""
    error = LlmctlError(message, hint)
    error.exit_code = exit_code
    return error


def start(config: TrainConfig, parallel: ParallelConfig | None = None) -> Runtime:
    """Join the other processes if there are any, choose device and precision, and start Accelerate.

    Raises: UsageError if the requested device is unavailable; StoppedError if a peer does not join.
    """
    parallel = parallel or ParallelConfig()
    ranks = join(os.environ)
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, PartialState

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "the Accelerate config selects DeepSpeed, whose engine owns the optimizer and saves pickles",
            "use --parallel fsdp, which shards weights, gradients and optimizer state like ZeRO stage 3",
        )
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UsageError("`train.device` is `cuda`, but no CUDA device is visible", "use --device cpu")
    on_cpu = config.device == "cpu" or not has_cuda
    if on_cpu and (config.return_memory or config.micro_batch_size == -1):
        return_large_blocks()
    n_threads = threads_of(config, parallel, ranks)
    if n_threads:
        set_threads(n_threads)
    # Variables of an Accelerate config file: taken over into our settings, and removed so that Accelerate ignores them.
    accelerate_precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true":
        parallel = ParallelConfig(**{**vars(parallel), "strategy": "fsdp"})
    if ranks.world_size > 1:
        connect(PartialState, on_cpu=on_cpu, timeout=timedelta(seconds=parallel.timeout_seconds), ranks=ranks)
    dtype = choose_dtype(config.dtype, on_cpu=on_cpu)
    if config.dtype == "auto" and accelerate_precision == "bf16":
        dtype = torch.bfloat16
    precision = (
        "bf16" if dtype == torch.bfloat16 and not (parallel.strategy == "fsdp" and ranks.world_size > 1) else "no"
    )
    if ranks.world_size == 1:  # Accelerate's state is global: a second run in this process may need another precision
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
    tracker_kinds(config.track)  # fail now rather than after the text has been encoded
    runtime = Runtime(accelerator, dtype, ranks, parallel)
    try:
        # Every process measured its own speed and may have chosen another dtype: use rank 0's.
        runtime.dtype = DTYPES[runtime.first(name_of(dtype))]
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise StoppedError(f"rank {ranks.rank} lost another process at startup", "start all of them again") from error
    return runtime


def connect(state: Any, *, on_cpu: bool, timeout: timedelta, ranks: Ranks) -> None:
    """Connect to the other processes.

    Raises: StoppedError if they do not join in time.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state(cpu=on_cpu, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise StoppedError(
            f"rank {ranks.rank} of {ranks.world_size} could not connect to the others at {address} within "
            f"{timeout.total_seconds():.0f} s ({reason})",
            "`llmctl doctor --distributed` checks the connections",
        ) from error


def threads_of(config: TrainConfig, parallel: ParallelConfig, ranks: Ranks) -> int:
    """Return this process's thread count, 0 for torch's default: processes of one host share its cores.

    One thread if deterministic: the order of sums within an operation depends on the thread count.
    """
    if config.threads or parallel.deterministic:
        return config.threads or 1
    return max(1, available_cores() // ranks.local_world_size) if ranks.world_size > 1 else 0


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Return what affects results besides the recipe: machine, precision and number of processes."""
    return describe_machine() | {
        "device": runtime.device.type,
        "dtype": name_of(runtime.dtype),
        "world_size": runtime.world_size,
        "strategy": runtime.parallel.strategy if runtime.world_size > 1 else None,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, deterministic: bool) -> list[str]:
    """Return the changes of environment, as `name a -> b`, after which a resumed run is not bitwise the same."""
    harmless = {"python"} | ({"world_size", "strategy"} if deterministic else set())
    return [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if name in old and name not in harmless and old[name] != new[name]
    ]


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error means that another process, or the connection to it, was lost."""
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


def leave(exit_code: int) -> NoReturn:
    """Exit a process of a group with os._exit: gloo's threads abort one in five normal exits (pytorch issue 179291)."""
    import torch.distributed as dist

    if exit_code == 0 and dist.is_initialized():
        with suppress(RuntimeError):  # all work is done, so losing a peer now does not matter
            dist.barrier()
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

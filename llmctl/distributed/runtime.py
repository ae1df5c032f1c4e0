"""Device, precision and ranks: the only importer of accelerate besides the launcher.

Knows nothing of objectives, optimizers' rules or files. What processes tell each other is numbers and JSON: nothing
that a peer sends is ever unpickled.
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
"""How long processes wait while the first one prepares data, in which nobody talks."""


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
            shard(module, self.device, self.dtype, self.world_size, offloads=self.parallel.cpu_offload)
            return module
        if self.parallel.deterministic:  # gradients are summed by our own tree
            return self.accelerator.prepare_model(module, evaluation_mode=True).train()
        with warnings.catch_warnings():
            # torch 2.13 renames `broadcast_buffers`; 2.11 knows no other name.
            warnings.simplefilter("ignore", FutureWarning)
            module = self.accelerator.prepare_model(module)
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            raise LlmctlError(f"the model was wrapped as {type(module).__name__}, not for {self.world_size} processes")
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

    def lead(self, action: Callable[[], Any]) -> Any:
        """Let the first process do something while the others wait, for as long as it takes; return its result to all.

        The result travels as JSON. Raises: the first process's error, in every process.
        """
        if self.world_size == 1:
            return action()
        import torch.distributed as dist

        told, problem = None, None
        if self.is_main:
            try:
                told = [action(), None]
            except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for it
                problem = error
                told = [None, [str(error), getattr(error, "hint", ""), getattr(error, "exit_code", 1)]]
        if self.patient is None:
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.barrier(self.patient)
        result, failure = self.first(told)
        if problem is not None:
            raise problem
        if failure is not None:
            raise retold(*failure)
        return result

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
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], ids: Mapping[str, str]
    ) -> dict[str, "GeneralTracker"]:
        """Start the trackers of these names, through Accelerate; they write into the run folder or to their service.

        `ids` are those that a run which goes on has had at the services.
        Raises: MissingExtraError if a tracker's package is not installed, UsageError for an unknown name.
        """
        kinds = tracker_kinds(names)
        if not self.is_main:
            return {}
        trackers = {}
        for name, kind in kinds.items():
            again = {"id": ids[name], "resume": "allow"} if name == "wandb" and ids.get(name) else {}
            places = {"logging_dir": folder} if kind.requires_logging_directory else {}
            tracker = kind(folder.name, **places, **again)
            if hasattr(tracker, "start"):  # newer versions of Accelerate begin later than they are made
                tracker.start()
            tracker.store_init_configuration(
                {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
            )
            trackers[name] = tracker
        return trackers


def tracker_kinds(names: Sequence[str]) -> dict[str, Any]:
    """Return Accelerate's classes for trackers of these names.

    Raises: MissingExtraError if a tracker's package is not installed, UsageError for an unknown name.
    """
    if not names:
        return {}
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no tracker `{name}`", f"known are {', '.join(sorted(known))}")
        if name not in there:
            raise MissingExtraError(f"`--track {name}`", name, name)
    return {name: known[name] for name in names}


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

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "the Accelerate config asks for DeepSpeed, whose engine owns the optimizer and saves pickles",
            "--parallel fsdp shares weights, gradients and optimizer state out as its ZeRO stage 3 does",
        )
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UsageError(
            "`train.device` is `cuda`, but no CUDA device is visible", "--device cpu trains on the processor"
        )
    on_cpu = config.device == "cpu" or not has_cuda
    if on_cpu and (config.return_memory or config.micro_batch_size == -1):
        return_large_blocks()
    n_threads = threads_of(config, parallel, ranks)
    if n_threads:
        set_threads(n_threads)
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
    tracker_kinds(config.track)  # refused before any work, not after the text is encoded
    runtime = Runtime(accelerator, dtype, ranks, parallel)
    try:
        # Every process has measured its own products; what the first one found holds.
        runtime.dtype = DTYPES[runtime.first(name_of(dtype))]
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


def threads_of(config: TrainConfig, parallel: ParallelConfig, ranks: Ranks) -> int:
    """Return the threads of this process, 0 to leave torch's: the cores are shared among those of a machine.

    One where bits must not depend on the number of processes.
    """
    if config.threads or parallel.deterministic:
        return config.threads or 1
    return max(1, available_cores() // ranks.local_world_size) if ranks.world_size > 1 else 0


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Return what a result depends on besides its recipe: the machine, the precision, and the processes."""
    return describe_machine() | {
        "device": runtime.device.type,
        "dtype": name_of(runtime.dtype),
        "world_size": runtime.world_size,
        "strategy": runtime.parallel.strategy if runtime.world_size > 1 else None,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, deterministic: bool) -> list[str]:
    """Return what of the environment has changed such that a resumed run is not the same bits, as `name a -> b`."""
    harmless = {"python"} | ({"world_size", "strategy"} if deterministic else set())
    return [
        f"{name} {old[name]} -> {new[name]}"
        for name in new
        if name in old and name not in harmless and old[name] != new[name]
    ]


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

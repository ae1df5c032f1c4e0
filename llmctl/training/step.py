"""One optimizer step: load its micro-batches, run forward and backward over them, clip, and apply the gradients."""

import hashlib
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from llmctl.config import OptimConfig, TrainConfig
from llmctl.distributed.gradients import Gradients, lay_out, make_gradients
from llmctl.distributed.runtime import Runtime
from llmctl.distributed.sharding import is_sharded, whole_tensor
from llmctl.runs.journal import Journal
from llmctl.training import optim
from llmctl.training.batch import Batch, BatchSource, idle, to_device
from llmctl.training.master_weights import MasterGradients, Masters
from llmctl.training.state import State


class Stepper:
    """What takes the steps of one call of `fit`.

    module: the objective as prepared for several processes. holder: the module that is optimized: the model itself, or the
    float32 master weights of a bfloat16 one. loader: the thread that makes the next step's batches.
    """

    def __init__(
        self,
        module: nn.Module,
        holder: nn.Module,
        masters: Masters | None,
        source: BatchSource,
        state: State,
        config: TrainConfig,
        optim_config: OptimConfig,
        runtime: Runtime,
        journal: Journal,
    ) -> None:
        self.module, self.masters, self.source = module, masters, source
        self.state, self.config, self.runtime, self.journal = state, config, runtime, journal
        self.parameters = [p for p in holder.parameters() if p.requires_grad]
        self.optimizers = optim.make_optimizers(holder, optim_config, runtime.dtype)
        self.gradients: Gradients = (
            MasterGradients(runtime, module, masters) if masters else make_gradients(runtime, module, self.parameters)
        )
        layout = lay_out(config.batch_size, config.micro_batch_size, runtime.parallel, runtime.world_size)
        self.own_rows = layout[runtime.rank]
        self.first_part = sum(len(parts) for parts in layout[: runtime.rank])
        self.n_parts = sum(len(parts) for parts in layout)
        # Sharded weights are gathered in every forward pass, so all processes must make equally many: idle ones fill up.
        self.is_fsdp = runtime.world_size > 1 and any(is_sharded(p) for p in self.parameters)
        self.n_idle = max(len(parts) for parts in layout) - len(self.own_rows) if self.is_fsdp else 0
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.ahead: tuple[int, Future[list[Batch]]] | None = None

    def load_batches(self) -> tuple[float, list[Batch]]:
        """Return the seconds waited for a step's batches, and the batches; a thread makes the next step's meanwhile."""
        begun = time.perf_counter()
        size = self.config.batch_size
        first = (self.state.step + self.state.skipped_batches) * size
        ahead, self.ahead = self.ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == first else self.make_batches(first)
        seconds = time.perf_counter() - begun
        self.ahead = (first + size, self.loader.submit(self.make_batches, first + size))
        return seconds, batches

    def make_batches(self, first: int) -> list[Batch]:
        """Return this process's micro-batches of the step whose rows begin at `first`."""
        return [self.source.batch(range(first + rows.start, first + rows.stop)) for rows in self.own_rows]

    def accumulate(self, batches: list[Batch], n_labels: int) -> float:
        """Run forward and backward over all micro-batches, and return the mean loss over the labels of all processes.

        Sums are divided once, by the global count: a mean of means would weigh labels of short rows more.
        """
        scale = self.gradients.scale(n_labels)
        losses = torch.zeros(self.n_parts, dtype=torch.float64, device=self.runtime.device)
        for number, batch in enumerate([*batches, *[idle(batches[0])] * self.n_idle]):
            index = self.first_part + number
            self.seed_dropout(self.state.step, index)
            with self.gradients.part(is_last=number == len(batches) - 1):
                loss = self.module(to_device(batch, self.runtime.device))
                self.runtime.backward(loss.sum * scale)
            self.gradients.collect()
            if number < len(batches):
                losses[index] = loss.sum.detach()
        self.gradients.finish()
        # Every micro-batch has a slot of its own, so that the sum does not depend on the number of processes.
        return math.fsum(self.runtime.sum(losses).tolist()) / n_labels

    def seed_dropout(self, step: int, index: int) -> None:
        """Make the random numbers of a forward pass a function of (seed, step, micro-batch), so that none need saving."""
        key = f"{self.config.seed}/{step}/{index}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))

    def clip(self, max_norm: float) -> float:
        """Scale the gradient down to a norm, if that is not 0, and return the norm it had."""
        return float(whole_tensor(nn.utils.clip_grad_norm_(self.parameters, max_norm or float("inf"))))

    def apply(self, loss: float, norm: float) -> None:
        """Step the optimizers, unless loss or gradient are not finite: then skip the step and count it."""
        state = self.state
        # [3] Both numbers are the same in all processes, so all skip together. A spike is only reported, unless
        # `skip_spikes`; too many non-finite steps in a row roll back or end the run.
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        spike = state.spike(loss, norm) if is_finite else ""
        if spike:
            self.journal.event("spike", state.step + 1, f"step {state.step + 1} is a spike: {spike}")
        if is_finite and not (spike and self.config.skip_spikes):
            state.bad_steps = 0
            for optimizer in self.optimizers.values():
                optimizer.step()
            if self.masters:
                self.masters.push()
        else:
            state.skipped_steps += 1
            if not is_finite:
                state.bad_steps += 1
                text = f"step {state.step + 1} skipped: loss {loss}, gradient norm {norm}"
                self.journal.event("not finite", state.step + 1, text)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

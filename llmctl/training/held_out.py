"""Metrics on held-out rows: the same batches on any number of processes, summed exactly."""

import math
from collections.abc import Callable

import torch
from torch import nn

from llmctl.config import TrainConfig
from llmctl.distributed.runtime import Runtime
from llmctl.distributed.sharding import reshard
from llmctl.training.batch import BatchSource, idle, to_device
from llmctl.training.objectives import Objective

EVAL_ROWS = 16
"""Rows per forward pass, unless a micro-batch size is set."""


def rows_of(n_rows: int, max_tokens: int | None, seq_len: int) -> int:
    """Return how many of the held-out rows an evaluation on so many tokens takes; None is all."""
    return n_rows if max_tokens is None else min(n_rows, max(1, max_tokens // seq_len))


def rows_with(source: BatchSource, tokens: int, seq_len: int) -> int:
    """Return how many held-out rows have about so many tokens: rows of pairs and examples are not full.

    The fill of rows is that of a few evenly spaced ones.
    """
    n_rows = source.n_rows
    some = [index * n_rows // min(n_rows, EVAL_ROWS) for index in range(min(n_rows, EVAL_ROWS))]
    batch = source.batch(some)
    name = "decoder_" if "decoder_input_ids_BT" in batch else ""
    ids_BT = batch.get(f"{name}input_ids_BT")
    if ids_BT is None:
        return rows_of(n_rows, tokens, seq_len)
    documents_BT = batch.get(f"{name}documents_BT")
    n_real = ids_BT.size if documents_BT is None else int((documents_BT != 0).sum())
    return min(n_rows, max(1, tokens * len(some) // max(1, n_real)))


def measure(
    module: nn.Module,
    objective: Objective,
    source: BatchSource,
    config: TrainConfig,
    runtime: Runtime,
    max_tokens: int | None,
    give_way: Callable[[], None],
    *,
    sharded: bool,
) -> dict[str, float]:
    """Return an objective's metrics without dropout, on all rows or on evenly spaced ones of `max_tokens`.

    `module`: the wrapped objective. `give_way` is called between batches, in all processes together, and may raise.
    """
    n_rows = source.n_rows
    wanted = rows_of(n_rows, max_tokens, config.seq_len)
    rows = [index * n_rows // wanted for index in range(wanted)]
    size = config.micro_batch_size if config.micro_batch_size > 0 else min(config.batch_size, EVAL_ROWS)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    sums = torch.zeros(len(batches), 2 + len(objective.parts), dtype=torch.float64, device=runtime.device)
    outputs = torch.zeros(len(rows), objective.n_outputs, dtype=torch.float64, device=runtime.device)
    module.eval()
    try:
        # Gathered weights must not be inference tensors, since training uses them again.
        with torch.no_grad() if sharded else torch.inference_mode():
            for start in range(0, len(batches), runtime.world_size):
                give_way()
                index = start + runtime.rank
                if index < len(batches):
                    loss = module(to_device(source.batch(batches[index]), runtime.device))
                    parts = (loss.sum, loss.count, *(loss.parts[name] for name in objective.parts))
                    sums[index] = torch.stack([part.double() for part in parts])
                    if loss.outputs is not None:
                        first = index * size
                        outputs[first : first + len(loss.outputs)] = loss.outputs.double()
                elif sharded:  # each forward pass gathers weights, so all processes must run equally many
                    module(to_device(idle(source.batch(batches[0])), runtime.device))
    finally:
        module.train()
        if sharded:
            reshard(module)
    nats, count, *totals = [math.fsum(column) for column in runtime.sum(sums).T.tolist()]
    if objective.n_outputs:
        outputs = runtime.sum(outputs)
    return objective.figures(nats, count, dict(zip(objective.parts, totals, strict=True)), outputs.cpu().numpy())

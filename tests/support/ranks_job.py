"""One process of a group: trains the tiny model of test_loop in each scenario and writes down what came out.

usage: ranks_job.py FOLDER JOBS   with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set for more than one process
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from llmctl.config import OptimConfig, ParallelConfig
from llmctl.distributed import runtime
from llmctl.errors import InterruptedRunError
from llmctl.runs import checkpoint
from llmctl.runs.progress import Silent
from llmctl.training.loop import fit
from tests.training.test_loop import training

# A large epsilon keeps adamw from magnifying the rounding of gradients near zero.
ADAMW = OptimConfig(name="adamw", eps=1e-2)
SCENARIOS: dict[str, dict] = {
    "float64": {"dtype": "float64", "optim": ADAMW, "dropout": 0.0},
    "float64-muon": {"dtype": "float64", "dropout": 0.0},
    "float64-uneven": {"dtype": "float64", "optim": ADAMW, "dropout": 0.0, "batch_size": 7},
    "float64-micro": {"dtype": "float64", "optim": ADAMW, "dropout": 0.0, "batch_size": 10, "micro_batch_size": 2},
    "float64-masked": {"dtype": "float64", "optim": ADAMW, "dropout": 0.0, "masked": True},
    "float32": {"optim": ADAMW, "dropout": 0.0, "steps": 200, "eval_every": 100},
    "accumulate": {"micro_batch_size": 4},
    "deterministic": {"parallel": ParallelConfig(deterministic=True)},
    "deterministic-uneven": {"parallel": ParallelConfig(deterministic=True), "batch_size": 11},
    "fsdp": {
        "dtype": "float64",
        "optim": ADAMW,
        "dropout": 0.0,
        "parallel": ParallelConfig(strategy="fsdp"),
        "ema": 0.9,
    },
    "fsdp-muon": {"dtype": "float64", "dropout": 0.0, "parallel": ParallelConfig(strategy="fsdp")},
    "fsdp-uneven": {
        "dtype": "float64",
        "optim": ADAMW,
        "dropout": 0.0,
        "batch_size": 5,
        "micro_batch_size": 2,
        "parallel": ParallelConfig(strategy="fsdp", activation_checkpointing=True),
    },
}


class Recorder(Silent):
    """Keeps the losses, unrounded; asks for the end after a step, as a scheduler would."""

    def __init__(self, stop_after: int) -> None:
        self.losses: list[float] = []
        self.stop_after = stop_after

    def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
        self.losses.append(record["loss"])
        if record["step"] == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, settings: dict, stop_after: int) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    job = training(folder, **settings)
    job.progress = recorder = Recorder(stop_after)
    saved = None
    if (folder / "checkpoints").is_dir():
        saved = checkpoint.Store(folder / "checkpoints").load_newest()[0]
    try:
        fitted = fit(job, saved)
    except InterruptedRunError:
        return {"stopped": job.state.step, "losses": recorder.losses}
    digest = hashlib.sha256()
    for name, tensor in sorted(fitted.weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "losses": recorder.losses,
        "before": fitted.before,
        "after": fitted.after,
        "sha256": digest.hexdigest(),
        "tokens": job.state.tokens,
        "threads": torch.get_num_threads(),
    }


def main(folder: Path, jobs: list[dict]) -> None:
    """Run jobs `{"name": scenario, "folder": its folder, "stop_after": step or 0}`."""
    results = {}
    for job in jobs:
        name = job["name"]
        results[name] = run(folder / job.get("folder", name), SCENARIOS[name], job.get("stop_after", 0))
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        runtime.leave(0)

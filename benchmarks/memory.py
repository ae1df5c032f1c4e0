"""Peak memory of training compared with the prediction of `--dry-run`, for one and several processes.

usage: python benchmarks/memory.py [--json]

Every row runs in new processes. Measured is the growth of the resident memory from just before the model is built to
its peak in two optimizer steps (VmHWM, reset through /proc/self/clear_refs), after a warmup of the libraries and with
`train.return_memory` on; the row "freed memory kept" shows what heap fragmentation adds if it is off.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "decoder, one process": {},
    "decoder, adamw": {"optim": "adamw"},
    "decoder, adamw, freed memory kept": {"optim": "adamw", "return_memory": False},
    "decoder, 4 micro-batches": {"micro_batch_size": 2},
    "decoder, recomputed": {"recompute": True},
    "encoder (mlm)": {"objective": "mlm"},
    "decoder, 2 ranks ddp": {"nproc": 2},
    "decoder, 2 ranks fsdp": {"nproc": 2, "strategy": "fsdp"},
    "decoder, 2 ranks fsdp, recomputed": {"nproc": 2, "strategy": "fsdp", "recompute": True},
    "decoder, deterministic": {"deterministic": True},
    "decoder, 2 ranks deterministic": {"nproc": 2, "deterministic": True},
}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def job(row: dict[str, Any]) -> dict[str, float]:
    """Train two steps in this process and return measured and predicted bytes."""
    import ctypes
    import gc

    import numpy as np
    import torch

    from llmctl.config import ModelConfig, OptimConfig, ParallelConfig, TrainConfig
    from llmctl.data.batches import CausalBatches, Ids, MaskedBatches
    from llmctl.data.masking import Masking
    from llmctl.data.stream import PackedRows
    from llmctl.distributed import runtime
    from llmctl.model.flops import Rows
    from llmctl.model.training_memory import memory
    from llmctl.model.transformer import LanguageModel, initialize
    from llmctl.runs.progress import Silent
    from llmctl.training.inputs import Training
    from llmctl.training.loop import fit
    from llmctl.training.objectives import LabelPrediction

    class Memory:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)
            self.texts = [self.rng.integers(8, 4000, 300) for _ in range(200)]
            self.lengths = np.array([len(text) for text in self.texts])

        def document(self, index: int) -> Any:
            return self.texts[index]

    is_mlm = row.get("objective") == "mlm"
    parallel = ParallelConfig(
        strategy=row.get("strategy", "ddp"),
        deterministic=row.get("deterministic", False),
        activation_checkpointing=row.get("recompute", False),
    )

    def train(shape: ModelConfig, batch_size: int, seq_len: int, micro: int) -> None:
        config = TrainConfig(
            steps=2, batch_size=batch_size, micro_batch_size=micro, seq_len=seq_len, dtype="float32", device="cpu",
            eval_tokens=1, eval_every=100, loss_chunk_tokens=1024, return_memory=row.get("return_memory", True),
        )  # fmt: skip
        started = runtime.start(config, parallel)
        model = LanguageModel(shape)
        initialize(model, 0)
        ids = Ids(0, 2, 0, np.zeros(shape.vocab_size, dtype=bool))
        memory_ = Memory()

        def batches(documents: range) -> Any:
            rows = PackedRows(memory_, np.array(documents), seq_len=seq_len, overlap=0 if is_mlm else 1, seed=0)
            if is_mlm:
                masking = Masking(mask_id=3, frac=0.15, special=ids.special)
                return MaskedBatches(rows, ids, masking, seed=0)
            return CausalBatches(rows, ids)

        with tempfile.TemporaryDirectory() as folder:
            shared = Path(started.first(folder))
            fit(
                Training(
                    objective=LabelPrediction(model, torch.ones(shape.vocab_size, dtype=torch.int32), 1024),
                    model=model,
                    train=batches(range(150)),
                    held_out=batches(range(150, 152)),
                    config=config,
                    optim=OptimConfig(name=row.get("optim", "muon")),
                    runtime=started,
                    folder=shared,
                    progress=Silent(),
                    resume_command="",
                )
            )
            started.lead(lambda: None)

    family = "encoder" if is_mlm else "decoder"
    train(ModelConfig(family=family, vocab_size=4096, d_model=64, n_layers=1, mask_id=3), 8, 32, 0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    size = {"d_model": 512, "n_layers": 6, "n_heads": 8} | row.get("size", {})
    shape = ModelConfig(family=family, vocab_size=4096, mask_id=3, **size)
    n_ranks, micro = row.get("nproc", 1), row.get("micro_batch_size", 0)
    train(shape, 8, 512, micro)
    rows = Rows(8, 512, label_frac=0.15 if is_mlm else 1.0, packed=True)
    predicted = memory(
        shape, rows, micro_batch_size=micro, chunk_tokens=1024, optimizer=row.get("optim", "muon"), product_bytes=4,
        n_devices=n_ranks, sharded=row.get("strategy") == "fsdp", n_chunks=4 if parallel.deterministic else 0,
        recompute=parallel.activation_checkpointing,
    )  # fmt: skip
    return {"measured": status("VmHWM") - before, "predicted": predicted.peak, **predicted.parts}


def is_close(row: str, **size: int) -> bool:
    """Return whether the prediction of a row is within 10 % of the measurement; `size` changes the model's shape."""
    figures = measure(ROWS[row] | {"size": size})
    return abs(figures["predicted"] / figures["measured"] - 1) < 0.1


def measure(row: dict[str, Any]) -> dict[str, float]:
    """Run a row in new processes and return the result of rank 0."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    n_ranks = row.get("nproc", 1)
    processes = []
    for rank in range(n_ranks):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        if n_ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_RANK": str(rank)}
            environment |= {"LOCAL_WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(row)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a process failed: {row}")
    return json.loads(outputs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(job(json.loads(arguments.job))), flush=True)
        import torch.distributed as dist

        if dist.is_initialized():
            from llmctl.distributed.runtime import leave

            leave(0)
        return
    results = {name: measure(row) for name, row in ROWS.items()}
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{'layout':<36}{'measured MB':>12}{'predicted MB':>14}{'ratio':>8}")
    for name, figures in results.items():
        measured, predicted = figures["measured"] / 1e6, figures["predicted"] / 1e6
        print(f"{name:<36}{measured:>12,.0f}{predicted:>14,.0f}{predicted / measured:>8.2f}")


if __name__ == "__main__":
    main()

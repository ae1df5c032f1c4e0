"""Build a cache of teacher outputs, and read it instead of running the teacher.

A row's outputs depend only on the row: rows are always batched with the same rows, and samples use random numbers of
(seed, address). So an interrupted cache ends up the same, byte for byte.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.artifacts.with_adapters import identity_of
from llmctl.config import DistillConfig
from llmctl.distilling.draws import draw, uniforms
from llmctl.distilling.settings import read_teacher
from llmctl.distilling.teacher import Teacher, inputs_of
from llmctl.errors import DivergedError, UsageError
from llmctl.files import ensure_writable
from llmctl.formats.safetensors import write_safetensors
from llmctl.formats.teacher_signals import (
    HEAD,
    ROWS_PER_SHARD,
    Arrays,
    SignalStore,
    as_array,
    check_begun,
    differences,
    finished_labels,
    id_dtype,
    pack_sampled,
    write_manifest,
    write_shard,
)
from llmctl.losses.base import IGNORE
from llmctl.losses.logits import cap_, logits
from llmctl.losses.teachers import DenseTeacher
from llmctl.preparing.corpus import Corpus
from llmctl.training.batch import Batch, BatchSource, to_device
from llmctl.training.task_data import TaskData

ROWS_TOGETHER = 8
"""Rows per teacher batch; a divisor of the rows per shard."""

CHUNK_LABELS = 256
"""Labels whose probabilities are in memory at a time."""


@dataclass(frozen=True)
class Spec:
    """What a cache stores: kind, samples per token (`sampled`), tokens (`topk`), seed of the samples, the teacher's dtype."""

    kind: str = "sampled"
    draws: int = 32
    top_k: int = 64
    seed: int = 0
    teacher_dtype: str = "float32"

    def record(self) -> dict[str, Any]:
        """Return the entries of the manifest."""
        entries: dict[str, Any] = {"kind": self.kind, "teacher_dtype": self.teacher_dtype}
        if self.kind == "sampled":
            entries |= {"draws": self.draws, "seed": self.seed}
        return entries | ({"top_k": self.top_k} if self.kind == "topk" else {})


@torch.no_grad()
def build_cache(
    teacher: Teacher,
    source: BatchSource,
    folder: Path,
    spec: Spec,
    identity: Mapping[str, Any],
    *,
    vocab_size: int,
    device: torch.device,
    say: Callable[[str], None],
) -> SignalStore:
    """Write the teacher outputs of all rows, or of those that are missing or damaged.

    source: rows in order, so that a row's number is its address. identity: what the cache depends on, stored in the manifest
    and compared when it is used.
    Raises: UsageError if the folder has a cache of something else; OutputError if writing fails.
    """
    ensure_writable(folder)
    record = {**spec.record(), "vocab_size": vocab_size, "n_rows": source.n_rows, "identity": dict(identity)}
    check_begun(folder, record)
    n_shards = -(-source.n_rows // ROWS_PER_SHARD)
    if spec.kind == "hidden":
        head = teacher.dense(torch.zeros(1, teacher.model.config.d_model, device=device, dtype=teacher.dtype))
        tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
        if head.softcap:
            tensors["softcap"] = torch.tensor([head.softcap])
        write_safetensors(folder / HEAD, tensors, {})
    n_labels = 0
    for number in range(n_shards):
        rows = range(number * ROWS_PER_SHARD, min(source.n_rows, (number + 1) * ROWS_PER_SHARD))
        # A complete shard is kept: its bytes would come out the same.
        finished = finished_labels(folder, number)
        if finished is not None:
            n_labels += sum(finished)
            continue
        counts: list[int] = []
        parts: list[Arrays] = []
        for start in range(rows.start, rows.stop, ROWS_TOGETHER):
            # Fixed batches: padding and kernels, and so the last bits, depend on the rows of a batch.
            some = range(start, min(start + ROWS_TOGETHER, rows.stop))
            batch = source.batch(some)
            row_counts = (batch["labels"] != IGNORE).sum(axis=1).tolist()
            counts += row_counts
            hidden_ND = states_of(teacher, batch, device)
            for row, states_LD in zip(some, hidden_ND.split(row_counts), strict=True):
                parts.append(signals_of(teacher, states_LD, spec, row, vocab_size))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        write_shard(folder, number, counts, joined, record)
        n_labels += sum(counts)
        say(f"cached teacher outputs of {rows.stop:,} of {source.n_rows:,} rows")
    write_manifest(folder, record | {"n_labels": n_labels}, n_shards)
    return SignalStore.open(folder)


def states_of(teacher: Teacher, batch: Batch, device: torch.device) -> Tensor:
    """Return a teacher's hidden states at the labels of a batch (N, D), row by row.

    Raises: DivergedError if they are not finite.
    """
    tensors = to_device(batch, device)
    places = (tensors["labels"].flatten() != IGNORE).nonzero().squeeze(1)
    states_ND = teacher.see(inputs_of(tensors)).hidden_BTD.flatten(0, 1)[places]
    if not states_ND.isfinite().all():
        raise DivergedError(
            "the teacher's hidden states are not finite: they contain nan or inf",
            "teacher.dtype=float32, or another teacher",
        )
    return states_ND


def signals_of(teacher: Teacher, states_LD: Tensor, spec: Spec, row: int, vocab_size: int) -> Arrays:
    """Return the teacher outputs at one row's labels."""
    outputs = teacher.dense(states_LD)
    if spec.kind == "hidden":
        # In the teacher's own dtype: lossless, and half the size in bfloat16.
        hidden_LD = outputs.hidden_ND.cpu()
        return {"hidden": as_array(hidden_LD if hidden_LD.dtype == torch.bfloat16 else hidden_LD.float())}
    numbers_Ln = (
        torch.from_numpy(uniforms(spec.seed, row, len(states_LD), spec.draws)) if spec.kind == "sampled" else None
    )
    parts: list[Arrays] = []
    for start in range(0, max(1, len(states_LD)), CHUNK_LABELS):
        hidden_CD = outputs.hidden_ND[start : start + CHUNK_LABELS]
        weight_VD = outputs.weight_VD[:vocab_size]
        bias_V = None if outputs.bias_V is None else outputs.bias_V[:vocab_size]
        # Probabilities in float32 at least: bfloat16 logits have three digits.
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        out_CV = torch.empty(len(hidden_CD), vocab_size, dtype=wide, device=hidden_CD.device)
        logits(hidden_CD, weight_VD, bias_V, out_CV)
        cap_(out_CV, outputs.softcap)
        log_p_CV = out_CV.log_softmax(dim=1)
        if numbers_Ln is not None:
            numbers_Cn = numbers_Ln[start : start + CHUNK_LABELS].to(log_p_CV.device)
            parts.append(pack_sampled(draw(log_p_CV.exp(), numbers_Cn).cpu().numpy(), vocab_size))
        else:
            logs_CK, ids_CK = log_p_CV.topk(min(spec.top_k, vocab_size), dim=1)
            # Summed over the other tokens: 1 minus the top-k mass would lose precision.
            tail_C = log_p_CV.scatter(1, ids_CK, float("-inf")).logsumexp(dim=1)
            parts.append(
                {
                    "ids": ids_CK.cpu().numpy().astype(id_dtype(vocab_size)),
                    "logs": logs_CK.half().cpu().numpy(),
                    "tail": tail_C.clamp(min=-60000).half().cpu().numpy(),
                }
            )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class InOrder:
    """The rows of a source by address, for one epoch."""

    def __init__(self, source: Any) -> None:
        self.source, self.n_rows = source, source.n_rows
        self.numbers = {source.address(number): number for number in range(source.n_rows)}

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows at these addresses."""
        return self.source.batch([self.numbers[number] for number in numbers])


class CachedBatches:
    """The batches of a source with cached teacher outputs, in the order of the labels."""

    def __init__(self, source: Any, store: SignalStore) -> None:
        self.source, self.store, self.n_rows = source, store, source.n_rows

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        addresses = [self.source.address(number) for number in numbers]
        return self.source.batch(numbers) | self.store.signals(addresses)


def content_of(corpus: Corpus) -> str:
    """Return the sha256 of a corpus's training data: tokens, targets, and the selection of documents."""
    digest = hashlib.sha256(corpus.train.astype("<i8").tobytes())
    for shards in (corpus.documents, corpus.targets):
        digest.update(b"none" if shards is None else shards.content_sha256().encode())
    return digest.hexdigest()


def check_cache(store: SignalStore, identity: Mapping[str, Any], n_rows: int) -> None:
    """Refuse a cache of another teacher, tokenizer, corpus or packing.

    Raises: UsageError naming what differs, with both values.
    """
    made_of = {**store.record["identity"], "rows": store.n_rows}
    wanted = {**json.loads(json.dumps(identity)), "rows": n_rows}
    if differing := differences(made_of, wanted):
        raise UsageError(
            f"the cache `{store.folder}` does not match this run: {differing}",
            "make one with the same teacher, data and row settings: llmctl distill cache",
        )


def fixed_batches(data: TaskData) -> Any:
    """Return the training batches over rows that stay the same in every epoch."""
    return data.batches(data.base.model.config, shuffle=True, fixed=True)


def cache_identity(config: DistillConfig, data: TaskData) -> dict[str, Any]:
    """Return what cached outputs depend on: teachers, tokenizer, text, and how it is cut into rows."""
    corpus = data.corpus
    more = [identity_of(read_teacher(config, name)) for name in config.teacher.more]
    masks = [config.data.mask_frac, config.data.whole_word, config.data.mean_span_tokens, config.train.seed]
    is_masked = data.text is not None and data.base.model.config.family != "decoder"
    return {
        "teacher": "+".join([corpus.provenance["teacher"]["sha256"], *more]),
        "tokenizer": corpus.tokenizer.sha256,
        "data": content_of(corpus),
        "task": config.task,
        "seq_len": config.train.seq_len,
        "isolate": config.data.isolate,
        "masks": masks if is_masked else None,
    }


def open_cache(config: DistillConfig, data: TaskData) -> SignalStore | None:
    """Return the cached teacher outputs of these very rows; None without `teacher.cache`.

    Raises: UsageError for a cache of another teacher, tokenizer, corpus or packing; ArtifactError for a damaged one.
    """
    if not config.teacher.cache:
        return None
    store = SignalStore.open(Path(config.teacher.cache))
    check_cache(store, cache_identity(config, data), fixed_batches(data).n_rows)
    return store


def dense_head(store: SignalStore, device: torch.device) -> DenseTeacher | None:
    """Return the teacher's head, for a cache of hidden states; None for other kinds."""
    if store.kind != "hidden":
        return None
    head = {name: tensor.to(device) for name, tensor in store.head().items()}
    softcap = float(head["softcap"]) if "softcap" in head else 0.0
    return DenseTeacher(head["weight"].new_zeros(0), head["weight"], head.get("bias"), softcap)

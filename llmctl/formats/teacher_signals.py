"""Cached teacher outputs (signals) for every label of a corpus: safetensors shards of rows and a manifest.

Signals are addressed by row of the packed corpus, so they do not depend on order, batch size or number of processes.
Shards are written atomically; each records what it was made of and the sha256 of its content, so that resuming can
verify it. The manifest, written last, has the sha256 of every file.

Kinds: `sampled` stores samples from the teacher's distribution as (token, count); `topk` the k most likely tokens with
log-probabilities and the total probability of all others; `hidden` the teacher's last hidden states and its head.
Source of `sampled`: Anshumann et al. 2025, arXiv:2503.16870.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.files import file_sha256, parse_json, write_json
from llmctl.formats.safetensors import read_header, read_tensors, tensor_bytes, write_safetensors

KINDS = ("sampled", "topk", "hidden")
ROWS_PER_SHARD = 256
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
VERSION = 2
OPEN_SHARDS = 64
"""The number of shards kept memory-mapped."""

Arrays = dict[str, NDArray[Any]]


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"signals-{number:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the narrowest dtype for token ids."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def pack_sampled(samples_LN: NDArray[np.int64], vocab_size: int) -> Arrays:
    """Compress sampled tokens (labels, samples): the number of distinct tokens per label, the tokens, their counts."""
    ordered = np.sort(samples_LN, axis=1)
    # Sorted, equal tokens are adjacent: runs that start where the token changes give the counts.
    is_new = np.ones(ordered.shape, dtype=bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(is_new.ravel())
    counts = np.diff(np.append(starts, ordered.size))
    return {
        "n_ids": is_new.sum(axis=1).astype(np.uint8),
        "ids": ordered[is_new].astype(id_dtype(vocab_size)),
        "counts": counts.astype(np.uint8),
    }


def unpack_sampled(arrays: Arrays, n_samples: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return tokens (L, K) and probabilities (L, K), padded with the label's first token at probability 0."""
    n_ids = arrays["n_ids"].astype(np.int64)
    width = int(n_ids.max(initial=1))
    filled = np.arange(width) < n_ids[:, None]
    ids = np.zeros((len(n_ids), width), dtype=np.int64)
    probs = np.zeros((len(n_ids), width), dtype=np.float32)
    ids[filled], probs[filled] = arrays["ids"], arrays["counts"] / np.float32(n_samples)
    return np.where(filled, ids, ids[:, :1]), probs


def write_shard(folder: Path, number: int, n_labels: Sequence[int], arrays: Arrays, made_of: Mapping[str, Any]) -> None:
    """Write the signals of a shard's rows; `n_labels` is per row, `made_of` the provenance recorded in the manifest."""
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    tensors["n_labels"] = torch.tensor(n_labels, dtype=torch.int32)
    metadata = {
        "made_of": json.dumps({"version": VERSION, **made_of}, sort_keys=True),
        "sha256": content_sha256(tensors),
    }
    write_safetensors(folder / shard_name(number), tensors, metadata)


def finished_labels(folder: Path, number: int) -> list[int] | None:
    """Return the number of labels of each row of a shard; None if the shard is missing or damaged."""
    path = folder / shard_name(number)
    try:
        tensors = read_tensors(path)
        if content_sha256(tensors) != read_header(path).metadata.get("sha256"):
            return None
        return [int(count) for count in tensors["n_labels"]]
    except (NotFoundError, ArtifactError, KeyError):
        return None


def check_begun(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Check that the shards in a folder, finished or not, were made with the same teacher, data and settings.

    Raises: UsageError naming what differs, with both values.
    """
    for path in sorted(folder.glob("signals-*.safetensors")):
        try:
            existing = parse_json(read_header(path).metadata.get("made_of", "{}"))
        except (ArtifactError, ValueError):  # ValueError: the metadata is not JSON
            continue  # a damaged shard will be made again
        if differing := differences(flat(existing), flat({"version": VERSION, **made_of})):
            raise UsageError(
                f"the teacher cache in `{folder}` was made with other settings: {differing}",
                "choose another folder with -o",
            )


def flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the nested `identity` into the top level; a JSON round trip makes the types comparable."""
    values = json.loads(json.dumps(made_of))
    identity = values.pop("identity", {}) if isinstance(values, dict) else None
    return {**values, **identity} if isinstance(identity, dict) else {}


def differences(existing: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Describe the keys of `expected` whose values differ, with both values; empty if none does."""
    mismatches = [name for name in expected if existing.get(name) != expected[name]]
    return "; ".join(f"{name} {str(existing.get(name))[:16]}, not {str(expected[name])[:16]}" for name in mismatches)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Convert an array for storage; NumPy has no bfloat16, so hidden states arrive as int16 bit patterns."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if array.ndim == 2 and array.dtype == np.int16 else tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    """View a stored tensor as an array; bfloat16 becomes int16 bit patterns."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def write_manifest(folder: Path, record: Mapping[str, Any], n_shards: int) -> None:
    """Write the manifest with the sha256 of every file, which completes the cache."""
    names = [shard_name(number) for number in range(n_shards)]
    names += [HEAD] if record["kind"] == "hidden" else []
    files = {name: {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    write_json(folder / MANIFEST, {"version": VERSION, **record, "files": files})


class SignalStore:
    """A complete, verified cache of teacher outputs."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder, self.record = folder, record
        self.kind, self.n_rows = str(record["kind"]), int(record["n_rows"])
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._read)

    @classmethod
    def open(cls, folder: Path) -> "SignalStore":
        """Open a cache and verify every file's sha256.

        Raises: NotFoundError if it does not exist or is unfinished; ArtifactError naming a damaged file.
        """
        try:
            record = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            has_shards = any(folder.glob("signals-*.safetensors"))
            message = f"the teacher cache `{folder}` is unfinished" if has_shards else f"`{folder}` is no teacher cache"
            raise NotFoundError(
                message, "create or finish it with `llmctl distill cache TEACHER -d DATA -o FOLDER`"
            ) from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"`{folder / MANIFEST}` is damaged: {error}", "make the cache again") from error
        if not isinstance(record, dict) or record.get("version") != VERSION:
            version = record.get("version") if isinstance(record, dict) else None
            raise ArtifactError(
                f"`{folder / MANIFEST}` has format version {version!r:.20}, but this program reads version {VERSION}",
                "make the cache again",
            )
        if problem := manifest_problem(record):
            raise ArtifactError(f"`{folder / MANIFEST}` is damaged: {problem}", "make the cache again")
        for name, entry in record["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
                raise ArtifactError(
                    f"`{path}` is damaged: it does not match its sha256 in the manifest",
                    "run `llmctl distill cache` with the same settings and folder: it rewrites damaged files only",
                )
        return cls(folder, record)

    @property
    def n_labels(self) -> int:
        """The number of labels in the cache."""
        return int(self.record["n_labels"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per label, not counting the head of `hidden`."""
        total = sum(entry["bytes"] for name, entry in self.record["files"].items() if name != HEAD)
        return total / max(1, self.n_labels)

    def head(self) -> dict[str, Tensor]:
        """Return the teacher's head (`weight`, and `bias` and `softcap` if it has them) of a cache of kind `hidden`."""
        return read_tensors(self.folder / HEAD)

    def signals(self, addresses: Sequence[int]) -> Arrays:
        """Return the signals of rows, concatenated.

        sampled: teacher_ids (N, K) and teacher_probs (N, K); topk also teacher_tail (N,); hidden: teacher_hidden (N, D).
        """
        parts = [self._row(address) for address in addresses]
        if self.kind == "hidden":
            return {"teacher_hidden": widened(np.concatenate([part["hidden"] for part in parts]))}
        if self.kind == "topk":
            logs, ids = (np.concatenate([part[name] for part in parts]) for name in ("logs", "ids"))
            probs = np.exp(logs.astype(np.float32))
            tail = np.exp(np.concatenate([part["tail"] for part in parts]).astype(np.float32))
            return {"teacher_ids": ids.astype(np.int64), "teacher_probs": probs, "teacher_tail": tail}
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ("n_ids", "ids", "counts")}
        ids, probs = unpack_sampled(joined, int(self.record["draws"]))
        return {"teacher_ids": ids, "teacher_probs": probs}

    def _row(self, address: int) -> Arrays:
        number, index = divmod(address, ROWS_PER_SHARD)
        arrays, starts, id_starts = self._shard(number)
        labels = slice(int(starts[index]), int(starts[index + 1]))
        if self.kind != "sampled":  # one entry per label; only `sampled` has a varying number of tokens
            return {name: array[labels] for name, array in arrays.items() if name != "n_labels"}
        ids = slice(int(id_starts[labels.start]), int(id_starts[labels.stop]))
        return {"n_ids": arrays["n_ids"][labels], "ids": arrays["ids"][ids], "counts": arrays["counts"][ids]}

    def _read(self, number: int) -> tuple[Arrays, NDArray[np.int64], NDArray[np.int64]]:
        path = self.folder / shard_name(number)
        tensors = read_tensors(path)
        n_rows = min(self.n_rows - number * ROWS_PER_SHARD, ROWS_PER_SHARD)
        if problem := shard_problem(tensors, self.kind, n_rows, int(self.record["vocab_size"])):
            raise ArtifactError(f"`{path}` is damaged: {problem}", "make the cache again")
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        # Where each row's labels start, and (for `sampled`) where each label's tokens start.
        starts = np.concatenate([[0], np.cumsum(arrays["n_labels"], dtype=np.int64)])
        n_ids = arrays.get("n_ids", np.zeros(0))
        return arrays, starts, np.concatenate([[0], np.cumsum(n_ids, dtype=np.int64)])


def widened(hidden_LD: NDArray[Any]) -> NDArray[np.float32]:
    """Convert hidden states to float32; a bfloat16's bits are the upper half of the float32's."""
    if hidden_LD.dtype != np.int16:
        return hidden_LD.astype(np.float32, copy=False)
    return (hidden_LD.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


PARTS = {
    "sampled": {"n_ids": 1, "ids": 1, "counts": 1},
    "topk": {"ids": 2, "logs": 2, "tail": 1},
    "hidden": {"hidden": 2},
}
"""The tensors of a shard by kind, with their number of dimensions."""


def shard_problem(tensors: Mapping[str, Tensor], kind: str, n_rows: int, vocab_size: int) -> str:
    """Return the problem with a shard's tensors, or an empty string: they are indexed by each other."""
    dimensions = {"n_labels": 1, **PARTS[kind]}
    found = {name: tensor.ndim for name, tensor in tensors.items()}
    if found != dimensions:
        return f"its tensors have the dimensions {found}, not {dimensions}"
    n_labels = tensors["n_labels"]
    if n_labels.is_floating_point() or len(n_labels) != n_rows or (n_rows and int(n_labels.min()) < 0):
        return f"its `n_labels` are not those of {n_rows} rows"
    total = int(n_labels.long().sum())
    per_label = "n_ids" if kind == "sampled" else next(iter(PARTS[kind]))
    if len(tensors[per_label]) != total or (kind == "topk" and tensors["logs"].shape != tensors["ids"].shape):
        return f"it has signals of {len(tensors[per_label])} labels, not {total}"
    if kind == "topk" and len(tensors["tail"]) != total:
        return f"it has tails of {len(tensors['tail'])} labels, not {total}"
    if kind == "sampled":
        n_ids = int(tensors["n_ids"].long().sum())
        if not n_ids == len(tensors["ids"]) == len(tensors["counts"]) or (total and int(tensors["n_ids"].min()) < 1):
            return "its labels, ids and counts do not match"
    ids = tensors.get("ids")
    if ids is not None and ids.numel() and not 0 <= int(as_array(ids).min()) <= int(as_array(ids).max()) < vocab_size:
        return f"it has an id that is not in the vocabulary of {vocab_size}"
    return ""


def manifest_problem(record: Mapping[str, Any]) -> str:
    """Return the problem with a manifest, or an empty string."""
    if record.get("kind") not in KINDS:
        return f"`kind` is {record.get('kind')!r}"
    counts = ["n_rows", "n_labels", "vocab_size", *(["draws"] if record["kind"] == "sampled" else [])]
    for name in counts:
        if type(record.get(name)) is not int or record[name] < 0:
            return f"`{name}` is {record.get(name)!r}"
    files, identity = record.get("files"), record.get("identity")
    if not isinstance(identity, dict) or not isinstance(files, dict):
        return "it has no `identity` or no `files`"
    n_shards = -(-record["n_rows"] // ROWS_PER_SHARD)
    if n_shards > len(files):  # before their names are made: a count may be anything
        return f"it lists {len(files)} files, but its rows need {n_shards}"
    expected = {shard_name(number) for number in range(n_shards)}
    expected |= {HEAD} if record["kind"] == "hidden" else set()
    if set(files) != expected:
        return f"it lists {len(files)} files, but its rows need {len(expected)}"
    is_complete = all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
        for entry in files.values()
    )
    return "" if is_complete else "a file has no `sha256` or no `bytes`"

"""What a teacher said of every label of a corpus, on disk: safetensors shards of rows, and a manifest.

A record's address is its row in the packed corpus, so that order, batch size and number of processes are no matter. Shards
appear whole or not at all, and say themselves what they are of and what their content's sha256 is, so that going on never
trusts what it finds. The manifest, written last, has the sha256 of each file.

Kinds: `sampled` holds draws from the teacher's distribution as token and count, `topk` the likeliest tokens with their
logarithms and the mass of all others, `hidden` the states under the teacher's head beside the head itself.
Source of the first: Anshumann et al. 2025, arXiv:2503.16870.
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
from llmctl.files import write_json
from llmctl.formats.safetensors import read_header, read_tensors, tensor_bytes, write_safetensors

KINDS = ("sampled", "topk", "hidden")
ROWS_PER_SHARD = 256
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
VERSION = 2
OPEN_SHARDS = 64
"""Shards whose pages stay mapped."""

Arrays = dict[str, NDArray[Any]]


def shard_name(number: int) -> str:
    """Return the file of a shard."""
    return f"signals-{number:05d}.safetensors"


def id_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the narrowest type that holds a token."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def pack_sampled(draws_LN: NDArray[np.int64], vocab_size: int) -> Arrays:
    """Return draws (L, n) as how many tokens each label has, the tokens, and how often each was drawn."""
    ordered = np.sort(draws_LN, axis=1)
    is_new = np.ones(ordered.shape, dtype=bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(is_new.ravel())
    counts = np.diff(np.append(starts, ordered.size))
    return {
        "n_ids": is_new.sum(axis=1).astype(np.uint8),
        "ids": ordered[is_new].astype(id_dtype(vocab_size)),
        "counts": counts.astype(np.uint8),
    }


def unpack_sampled(arrays: Arrays, n_draws: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return tokens (L, K) and their shares (L, K), padded with nothing of a token that is there."""
    n_ids = arrays["n_ids"].astype(np.int64)
    width = int(n_ids.max(initial=1))
    filled = np.arange(width) < n_ids[:, None]
    ids = np.zeros((len(n_ids), width), dtype=np.int64)
    shares = np.zeros((len(n_ids), width), dtype=np.float32)
    ids[filled], shares[filled] = arrays["ids"], arrays["counts"] / np.float32(n_draws)
    return np.where(filled, ids, ids[:, :1]), shares


def write_shard(folder: Path, number: int, n_labels: Sequence[int], arrays: Arrays, made_of: Mapping[str, Any]) -> None:
    """Write the signals of a shard's rows; `n_labels` are those of each row, `made_of` what a manifest will say."""
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    tensors["n_labels"] = torch.tensor(n_labels, dtype=torch.int32)
    metadata = {
        "made_of": json.dumps({"version": VERSION, **made_of}, sort_keys=True),
        "sha256": content_sha256(tensors),
    }
    write_safetensors(folder / shard_name(number), tensors, metadata)


def finished_labels(folder: Path, number: int) -> list[int] | None:
    """Return how many labels each row of a shard has; None if the shard is not there, or not as it was written."""
    path = folder / shard_name(number)
    try:
        tensors = read_tensors(path)
        if content_sha256(tensors) != read_header(path).metadata.get("sha256"):
            return None
        return [int(count) for count in tensors["n_labels"]]
    except (NotFoundError, ArtifactError, KeyError):
        return None


def check_begun(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a folder that holds signals of something else, finished or not.

    Raises: UsageError naming what differs, with both values.
    """
    for path in sorted(folder.glob("signals-*.safetensors")):
        try:
            there = json.loads(read_header(path).metadata.get("made_of", "{}"))
        except (ArtifactError, ValueError):
            continue  # a damaged one is made again
        if differing := differences(flat(there), flat({"version": VERSION, **made_of})):
            raise UsageError(
                f"the signals in `{folder}` are of something else: {differing}", "choose another folder with -o"
            )


def flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Return what signals are of in one level, with the types that JSON has."""
    told = json.loads(json.dumps(made_of))
    return {**told, **told.pop("identity", {})}


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return what of `wanted` is not so, as a text with both values; empty if all is."""
    odd = [name for name in wanted if there.get(name) != wanted[name]]
    return "; ".join(f"{name} {str(there.get(name))[:16]}, not {str(wanted[name])[:16]}" for name in odd)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Return an array as it is stored: 16 bits of a hidden state, which NumPy has no type for, are bfloat16."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if array.ndim == 2 and array.dtype == np.int16 else tensor


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a stored tensor as an array over the same memory: bfloat16 as its 16 bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def write_manifest(folder: Path, record: Mapping[str, Any], n_shards: int) -> None:
    """Note what the shards are, with the sha256 of each; from here on they can be used."""
    names = [shard_name(number) for number in range(n_shards)]
    names += [HEAD] if record["kind"] == "hidden" else []
    files = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    write_json(folder / MANIFEST, {"version": VERSION, **record, "files": files})


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SignalStore:
    """A cache of signals that is complete and whole."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder, self.record = folder, record
        self.kind, self.n_rows = str(record["kind"]), int(record["n_rows"])
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._read)

    @classmethod
    def open(cls, folder: Path) -> "SignalStore":
        """Open a cache and check every file of it.

        Raises: NotFoundError if there is none or it was not finished; ArtifactError naming a damaged file.
        """
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            has_shards = any(folder.glob("signals-*.safetensors"))
            what = f"`{folder}` is not finished" if has_shards else f"`{folder}` holds no teacher signals"
            raise NotFoundError(
                what, "llmctl distill cache TEACHER -d DATA -o FOLDER makes and finishes one"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"`{folder / MANIFEST}` is damaged: {error}", "make the cache again") from error
        if not isinstance(record, dict) or record.get("version") != VERSION:
            raise ArtifactError(f"`{folder / MANIFEST}` is of another version", "make the cache again")
        if problem := manifest_problem(record):
            raise ArtifactError(f"`{folder / MANIFEST}` is damaged: {problem}", "make the cache again")
        for name, told in record["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != told["bytes"] or sha256(path) != told["sha256"]:
                raise ArtifactError(
                    f"`{path}` is damaged: it is not what was written",
                    "llmctl distill cache with the same settings and folder makes it again, and nothing else",
                )
        return cls(folder, record)

    @property
    def n_labels(self) -> int:
        """Labels with signals."""
        return int(self.record["n_labels"])

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each label, the head of `hidden` left out."""
        total = sum(told["bytes"] for name, told in self.record["files"].items() if name != HEAD)
        return total / max(1, self.n_labels)

    def head(self) -> dict[str, Tensor]:
        """Return the teacher's head, `weight` and maybe `bias`, of a cache of hidden states."""
        return read_tensors(self.folder / HEAD)

    def signals(self, addresses: Sequence[int]) -> Arrays:
        """Return the signals of rows, one after the other.

        sampled: teacher_ids (N, K) and teacher_probs (N, K); topk also teacher_tail (N,); hidden: teacher_hidden (N, D).
        """
        parts = [self._row(address) for address in addresses]
        if self.kind == "hidden":
            return {"teacher_hidden": widened(np.concatenate([part["hidden"] for part in parts]))}
        if self.kind == "topk":
            logs, ids = (np.concatenate([part[name] for part in parts]) for name in ("logs", "ids"))
            shares = np.exp(logs.astype(np.float32))
            tail = np.exp(np.concatenate([part["tail"] for part in parts]).astype(np.float32))
            return {"teacher_ids": ids.astype(np.int64), "teacher_probs": shares, "teacher_tail": tail}
        joined = {name: np.concatenate([part[name] for part in parts]) for name in ("n_ids", "ids", "counts")}
        ids, shares = unpack_sampled(joined, int(self.record["draws"]))
        return {"teacher_ids": ids, "teacher_probs": shares}

    def _row(self, address: int) -> Arrays:
        number, place = divmod(address, ROWS_PER_SHARD)
        arrays, starts, id_starts = self._shard(number)
        labels = slice(int(starts[place]), int(starts[place + 1]))
        if self.kind != "sampled":
            return {name: array[labels] for name, array in arrays.items() if name != "n_labels"}
        ids = slice(int(id_starts[labels.start]), int(id_starts[labels.stop]))
        return {"n_ids": arrays["n_ids"][labels], "ids": arrays["ids"][ids], "counts": arrays["counts"][ids]}

    def _read(self, number: int) -> tuple[Arrays, NDArray[np.int64], NDArray[np.int64]]:
        tensors = read_tensors(self.folder / shard_name(number))
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        starts = np.concatenate([[0], np.cumsum(arrays["n_labels"], dtype=np.int64)])
        n_ids = arrays.get("n_ids", np.zeros(0))
        return arrays, starts, np.concatenate([[0], np.cumsum(n_ids, dtype=np.int64)])


def widened(hidden_LD: NDArray[Any]) -> NDArray[np.float32]:
    """Return hidden states in float32: the 16 bits of a bfloat16 are its upper half."""
    if hidden_LD.dtype != np.int16:
        return hidden_LD.astype(np.float32, copy=False)
    return (hidden_LD.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def manifest_problem(record: Mapping[str, Any]) -> str:
    """Return what is wrong with a manifest, or an empty string."""
    if record.get("kind") not in KINDS:
        return f"`kind` is {record.get('kind')!r}"
    counts = ["n_rows", "n_labels", "vocab_size", *(["draws"] if record["kind"] == "sampled" else [])]
    for name in counts:
        if type(record.get(name)) is not int or record[name] < 0:
            return f"`{name}` is {record.get(name)!r}"
    files, identity = record.get("files"), record.get("identity")
    if not isinstance(identity, dict) or not isinstance(files, dict):
        return "it has no `identity` or no `files`"
    wanted = {shard_name(number) for number in range(-(-record["n_rows"] // ROWS_PER_SHARD))}
    wanted |= {HEAD} if record["kind"] == "hidden" else set()
    if set(files) != wanted:
        return f"it names {len(files)} files, not the {len(wanted)} of its rows"
    sound = all(isinstance(told, dict) and {"sha256", "bytes"} <= told.keys() for told in files.values())
    return "" if sound else "a file has no `sha256` or no `bytes`"

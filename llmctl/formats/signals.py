"""What a teacher said of every label of a corpus, on disk: safetensors shards of rows, and a manifest.

A record's address is its row in the packed corpus, so that order, batch size and number of processes are no matter. Shards
appear whole or not at all; the manifest, written last, has the sha256 of each.

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

from llmctl.errors import ArtifactError, NotFoundError
from llmctl.files import write_json
from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

KINDS = ("sampled", "topk", "hidden")
ROWS_PER_SHARD = 256
MANIFEST = "manifest.json"
HEAD = "head.safetensors"
VERSION = 1
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


def write_shard(folder: Path, number: int, n_labels: Sequence[int], arrays: Arrays, identity: str) -> None:
    """Write the signals of a shard's rows; `n_labels` are those of each row."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors["n_labels"] = torch.tensor(n_labels, dtype=torch.int32)
    write_safetensors(folder / shard_name(number), tensors, {"identity": identity})


def has_shard(folder: Path, number: int, identity: str) -> bool:
    """Tell whether a shard is there, of the same making."""
    path = folder / shard_name(number)
    return path.exists() and read_header(path).metadata.get("identity") == identity


def write_manifest(folder: Path, record: Mapping[str, Any], n_shards: int) -> None:
    """Note what the shards are, with the sha256 of each; from here on they can be used."""
    names = [shard_name(number) for number in range(n_shards)]
    names += [HEAD] if (folder / HEAD).exists() else []
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
        except (OSError, ValueError) as error:
            raise ArtifactError(f"`{folder / MANIFEST}` is damaged: {error}", "make the cache again") from error
        if not isinstance(record, dict) or record.get("version") != VERSION or record.get("kind") not in KINDS:
            raise ArtifactError(f"`{folder / MANIFEST}` is of another version", "make the cache again")
        for name, told in record["files"].items():
            path = folder / name
            if not path.exists() or path.stat().st_size != told["bytes"] or sha256(path) != told["sha256"]:
                raise ArtifactError(
                    f"`{path}` is damaged: it is not what was written",
                    f"delete it and {folder / MANIFEST}, then make the cache again: the other files stay",
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
            return {"teacher_hidden": np.concatenate([part["hidden"] for part in parts])}
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
        narrow = {
            name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in tensors.items()
        }
        arrays = {name: tensor.numpy() for name, tensor in narrow.items()}
        starts = np.concatenate([[0], np.cumsum(arrays["n_labels"], dtype=np.int64)])
        n_ids = arrays.get("n_ids", np.zeros(0))
        return arrays, starts, np.concatenate([[0], np.cumsum(n_ids, dtype=np.int64)])

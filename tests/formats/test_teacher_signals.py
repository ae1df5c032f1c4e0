"""Signals on disk: what is packed comes back, and what is not as it was written is refused or not counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.formats import teacher_signals as signals
from llmctl.formats.teacher_signals import (
    ROWS_PER_SHARD,
    SignalStore,
    check_begun,
    finished_labels,
    pack_sampled,
    shard_name,
    unpack_sampled,
    widened,
    write_manifest,
    write_shard,
)

N_ROWS = ROWS_PER_SHARD + 20
RECORD = {"n_rows": N_ROWS, "vocab_size": 90_000, "identity": {"teacher": "abc", "seq_len": 8}}


def labels_of(row: int) -> int:
    return row % 5  # some rows have none


def row_draws(row: int, n_draws: int = 6) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 90_000, (labels_of(row), n_draws)) // (1 + row % 3 * 30_000)


def write(folder: Path, kind: str) -> dict:
    """Write a cache of every kind whose values tell where they are from."""
    record = {"kind": kind, **RECORD, **({"draws": 6} if kind == "sampled" else {})}
    for number in range(2):
        rows = range(number * ROWS_PER_SHARD, min(N_ROWS, (number + 1) * ROWS_PER_SHARD))
        counts = [labels_of(row) for row in rows]
        if kind == "sampled":
            arrays = pack_sampled(np.concatenate([row_draws(row) for row in rows]), 90_000)
        else:
            values = np.concatenate([np.full(labels_of(row), row) for row in rows])
            arrays = {"hidden": np.stack([values, -values], 1).astype(np.float32)}
            if kind == "topk":
                arrays = {
                    "ids": abs(arrays["hidden"]).astype(np.uint32),
                    "logs": -abs(arrays["hidden"]).astype(np.float16),
                }
                arrays["tail"] = np.full(len(values), -1, dtype=np.float16)
        write_shard(folder, number, counts, arrays, record)
    if kind == "hidden":
        signals.write_safetensors(folder / signals.HEAD, {"weight": torch.zeros(3, 2)}, {})
    write_manifest(folder, record | {"n_labels": sum(map(labels_of, range(N_ROWS)))}, 2)
    return record


@given(st.lists(st.lists(st.integers(0, 300), min_size=7, max_size=7), max_size=9))
def test_draws_come_back_as_their_histogram(draws):
    draws_LN = np.array(draws, dtype=np.int64).reshape(-1, 7)
    packed = pack_sampled(draws_LN, 301)
    assert packed["ids"].dtype == np.uint16
    assert packed["counts"].dtype == packed["n_ids"].dtype == np.uint8
    ids, shares = unpack_sampled(packed, 7)
    found = np.zeros((len(draws_LN), 301))
    np.add.at(found, (np.arange(len(ids))[:, None], ids), shares)
    expected = np.stack([np.bincount(row, minlength=301) / 7 for row in draws_LN]) if len(draws_LN) else found
    assert found == pytest.approx(expected, abs=1e-6)


def test_ids_are_as_wide_as_the_vocabulary_needs():
    assert signals.id_dtype(2**16) is np.uint16
    assert signals.id_dtype(2**16 + 1) is np.uint32
    assert pack_sampled(np.array([[70_000, 70_000]]), 90_000)["ids"].tolist() == [70_000]


def test_all_draws_of_one_token_or_all_different():
    for draws in (np.full((1, 255), 3), np.arange(255)[None]):
        ids, shares = unpack_sampled(pack_sampled(draws, 300), 255)
        assert shares.sum() == pytest.approx(1)
        assert len(np.unique(ids)) == len(np.unique(draws))


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden"])
def test_rows_come_back_in_any_order(tmp_path, kind):
    write(tmp_path, kind)
    store = SignalStore.open(tmp_path)
    order = np.random.default_rng(0).permutation(N_ROWS).tolist()
    together = store.signals(order)
    starts = np.cumsum([0, *map(labels_of, order)])
    assert store.n_labels == starts[-1]
    for place, row in enumerate(order):
        own = slice(starts[place], starts[place + 1])
        if kind == "hidden":
            assert (together["teacher_hidden"][own] == [row, -row]).all()
        elif kind == "topk":
            assert together["teacher_tail"][own] == pytest.approx(np.exp(-1), rel=1e-3)
            assert (together["teacher_ids"][own, 0] == row).all()
        else:
            for label, drawn in enumerate(row_draws(row)):
                ids, shares = (together[name][own][label] for name in ("teacher_ids", "teacher_probs"))
                counts = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
                assert {i: round(s * 6) for i, s in zip(ids, shares, strict=True) if s} == counts
    assert store.bytes_per_token > 0


def test_bfloat16_keeps_its_bits(tmp_path):
    states = torch.randn(labels_of(3) + labels_of(4), 8).bfloat16()
    write_shard(tmp_path, 0, [3, 4], {"hidden": signals.as_array(states)}, {"kind": "hidden"})
    stored = signals.read_tensors(tmp_path / shard_name(0))["hidden"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(torch.from_numpy(widened(signals.as_array(stored))), states.float())


def test_equal_signals_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "sampled")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_every_damaged_byte_is_seen(tmp_path):
    """Of a shard that is gone on with as well as of a finished cache."""
    write(tmp_path, "sampled")
    path = tmp_path / shard_name(1)
    whole = path.read_bytes()
    assert finished_labels(tmp_path, 1) == [labels_of(row) for row in range(ROWS_PER_SHARD, N_ROWS)]
    for place in np.random.default_rng(0).integers(0, len(whole), 40).tolist():
        data = bytearray(whole)
        data[place] ^= 4
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=path.name):
            SignalStore.open(tmp_path)
    path.write_bytes(whole[:-1])
    assert finished_labels(tmp_path, 1) is None
    path.write_bytes(whole[:-9] + bytes(9))
    assert finished_labels(tmp_path, 1) is None
    path.unlink()
    assert finished_labels(tmp_path, 1) is None
    with pytest.raises(ArtifactError, match=path.name):
        SignalStore.open(tmp_path)


def test_a_manifest_that_lacks_something_is_named(tmp_path):
    write(tmp_path, "sampled")
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    first = shard_name(0)
    broken = [{name: value for name, value in record.items() if name != key} for key in record]
    broken += [
        {**record, "kind": "all"},
        {**record, "n_rows": "many"},
        {**record, "n_rows": 10_000},
        {**record, "draws": -1},
        {**record, "files": {first: record["files"][first]}},
        {**record, "files": {**record["files"], first: {"bytes": 1}}},
        {**record, "files": {"../outside": record["files"][first], first: record["files"][first]}},
    ]
    for text in (*map(json.dumps, broken), "[]", "{", "\x00", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            SignalStore.open(tmp_path)
    path.unlink()
    with pytest.raises(NotFoundError, match="is unfinished"):
        SignalStore.open(tmp_path)
    with pytest.raises(NotFoundError, match="is no teacher cache"):
        SignalStore.open(tmp_path / "elsewhere")


def test_signals_of_something_else_are_known_by_their_shards(tmp_path):
    record = write(tmp_path, "sampled")
    check_begun(tmp_path, record)
    check_begun(tmp_path / "empty", record)
    with pytest.raises(UsageError, match="seq_len 8, not 9"):
        check_begun(tmp_path, {**record, "identity": {"teacher": "abc", "seq_len": 9}})
    with pytest.raises(UsageError, match="draws 6, not 7"):
        check_begun(tmp_path, {**record, "draws": 7})
    (tmp_path / shard_name(0)).write_bytes(b"damaged")  # made again: no reason to refuse
    check_begun(tmp_path, record)


def test_counts_of_a_manifest_are_not_believed(tmp_path):
    write(tmp_path, "sampled")
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for count in (2**62, 2**31):
        path.write_text(json.dumps(manifest | {"n_rows": count}))
        with pytest.raises(ArtifactError, match="its rows need"):
            SignalStore.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"), [("sampled", "n_ids"), ("sampled", "ids"), ("topk", "tail"), ("topk", "ids")]
)
@pytest.mark.parametrize("harm", ["shorter", "other", "gone"])
def test_shards_whose_tensors_do_not_match_are_damage(tmp_path, kind: str, name: str, harm: str):
    from llmctl.files import file_sha256
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    write(tmp_path, kind)
    path = tmp_path / "signals-00000.safetensors"
    tensors = {key: tensor.clone() for key, tensor in read_tensors(path).items()}
    if harm == "gone":
        tensors.pop(name)
    elif harm == "shorter":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name] = tensors[name].flatten()[: len(tensors[name]) // 2].reshape(-1, 1, 1)
    write_safetensors(path, tensors, read_header(path).metadata)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"][path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="signals-00000"):
        SignalStore.open(tmp_path).signals([0])

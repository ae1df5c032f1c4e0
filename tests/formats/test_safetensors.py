"""Headers are never believed; what is written is what the format's own library reads, and equal content equal bytes."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmctl.errors import ArtifactError, NotFoundError
from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "half": torch.ones(3, 1, dtype=torch.float16),
    "double": torch.tensor(3.25, dtype=torch.float64),
    "ids": torch.tensor([[1], [2**40]]),
    "small": torch.tensor([-1, 2, 3], dtype=torch.int8),
    "true": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(12.0).view(3, 4).t(),
}


def file_of(header: object, n_bytes: int = 0, *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(n_bytes)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": file_of({}, length=1000),
    "header of a terabyte": file_of({}, length=2**40),
    "header of 2**64 - 1 bytes": file_of({}, length=2**64 - 1),
    "no header": file_of(b""),
    "not JSON": file_of(b"{,}"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "a list": file_of([]),
    "deep nesting": file_of(b'{"a":' + b"[" * 100_000),
    "a number of 5000 digits": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "duplicate tensor": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', 4),
    "duplicate key inside": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "metadata not strings": file_of({"__metadata__": {"a": 1}}),
    "metadata a list": file_of({"__metadata__": []}),
    "entry not an object": file_of({"a": 3}),
    "entry lacks the shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "unknown dtype": file_of({"a": entry("F33")}, 4),
    "dtype a list": file_of({"a": entry(["F32"])}, 4),
    "negative shape": file_of({"a": entry(shape=[-1])}, 4),
    "shape of floats": file_of({"a": entry(shape=[1.0])}, 4),
    "shape of truths": file_of({"a": entry(shape=[True])}, 4),
    "shape overflows": file_of({"a": entry(shape=[2**62, 2**62])}, 4),
    "long hostile shape": file_of({"a": entry(shape=[2**62] * 10_000)}, 4),
    "wrong size": file_of({"a": entry(shape=[2])}, 4),
    "half a byte": file_of({"a": entry("F4", [3], [0, 1])}, 1),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 4])}, 4),
    "offsets backwards": file_of({"a": entry(shape=[0], offsets=[4, 0])}, 4),
    "offsets past the end": file_of({"a": entry(offsets=[4, 8])}, 4),
    "overlap": file_of({"a": entry(offsets=[0, 4]), "b": entry(offsets=[0, 4])}, 4),
    "partial overlap": file_of({"a": entry(shape=[2], offsets=[0, 8]), "b": entry(offsets=[4, 8])}, 8),
    "hole": file_of({"a": entry(offsets=[0, 4]), "b": entry(offsets=[8, 12])}, 12),
    "hole at the beginning": file_of({"a": entry(offsets=[4, 8])}, 8),
    "bytes left over": file_of({"a": entry()}, 5),
    "truncated": file_of({"a": entry()}, 3),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        read_header(path)
    with pytest.raises(ArtifactError):
        read_tensors(path)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_byte_is_read_or_refused_but_never_crashes(place, byte, cut, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"format": "pt"})
    data = bytearray(path.read_bytes())
    where = int(place * len(data))
    data[where] = byte
    path.write_bytes(data[:where] if cut else data)
    try:
        names = read_header(path).tensors
    except ArtifactError:
        return
    assert set(read_tensors(path)) == set(names)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        read_header(tmp_path / "nowhere.safetensors")
    with pytest.raises(ArtifactError, match="folder"):
        read_header(tmp_path)
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {})
    with pytest.raises(ArtifactError, match="no tensor `z`"):
        read_tensors(tmp_path / "x.safetensors", ["a", "z"])


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, TENSORS, {"format": "pt", "名": "値"})
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, theirs, {"format": "pt"})
    for read in (load_file(ours), read_tensors(ours), read_tensors(theirs)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in read.items():
            assert tensor.dtype == TENSORS[name].dtype
            assert torch.equal(tensor, TENSORS[name])
    assert read_header(ours).metadata == {"format": "pt", "名": "値"}
    assert set(read_tensors(ours, ["a"])) == {"a"}
    header = read_header(ours)
    widths = {name: TENSORS[name].element_size() for name in TENSORS}
    (n_header,) = struct.unpack("<Q", ours.read_bytes()[:8])
    assert all((8 + n_header + place.begin) % widths[name] == 0 for name, place in header.tensors.items())


def test_equal_content_is_equal_bytes_in_every_process(tmp_path):
    write_safetensors(tmp_path / "a", TENSORS, {"format": "pt", "x": "1", "y": "2"})
    reordered = dict(reversed(list(TENSORS.items())))
    write_safetensors(tmp_path / "b", reordered, {"y": "2", "x": "1", "format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    program = """
import sys, torch
from pathlib import Path
from llmctl.formats.safetensors import write_safetensors
write_safetensors(Path(sys.argv[1]), {"w": torch.arange(4.0)}, {name: name for name in set("abcdefgh")})
"""
    for name in ("c", "d"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="a pipe or a device"):
        read_header(tmp_path / "m.safetensors")


def test_a_single_element_is_written_at_any_stride(tmp_path):
    path = tmp_path / "one.safetensors"
    write_safetensors(path, {"one": torch.arange(6, dtype=torch.int32).reshape(3, 2)[1:2, 1:2].T}, {})
    assert read_tensors(path, ["one"])["one"].tolist() == [[3]]

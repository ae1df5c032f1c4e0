"""GGUF: headers are never believed, weights come out as the package has them, tokenizers give the same ids."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmctl.errors import ArtifactError, NotFoundError
from llmctl.formats.gguf.container import BLOCKS, dequantize, map_file, read_gguf_header
from llmctl.formats.gguf.model import gguf_config, gguf_state, half_split
from llmctl.formats.gguf.tokenizer import adds_bos, tokenizer_files

gguf = pytest.importorskip("gguf", reason="pip install gguf")

METADATA = {
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 8,
}
SHAPES = {
    "token_embd.weight": (8, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


def write_gguf(path: Path, *, metadata=None, shapes=None, architecture="llama", kind="F32") -> Path:
    """Write a tiny model with the format's own package; None removes a key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng = np.random.default_rng(0)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, shape in (SHAPES if shapes is None else shapes).items():
        tensor = rng.standard_normal(shape).astype(np.float32)
        if kind == "F32" or len(shape) == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_block_sizes_are_the_packages():
    for number, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == tuple(block)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_are_those_of_the_packages_own_reader(kind, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", kind=kind)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    data = map_file(path)
    assert header.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = dequantize(data, header.tensors[tensor.name])
        assert np.array_equal(found, expected.reshape(found.shape))


def test_fused_tensors_are_split(tmp_path):
    """Phi-3: queries, keys and values in one tensor, gate and up in another; its settings are also those of `llama`."""
    shapes = {name: shape for name, shape in SHAPES.items() if not name.startswith(("blk.0.attn_", "blk.0.ffn_"))}
    kept = ("attn_norm", "attn_output", "ffn_norm", "ffn_down")
    shapes |= {f"blk.0.{name}.weight": SHAPES[f"blk.0.{name}.weight"] for name in kept}
    shapes |= {"blk.0.attn_qkv.weight": (64, 32), "blk.0.ffn_up.weight": (128, 32)}
    metadata = {key.replace("llama.", "phi3."): value for key, value in METADATA.items()}
    path = write_gguf(tmp_path / "m.gguf", architecture="phi3", metadata=metadata, shapes=shapes)
    header = read_gguf_header(path)
    state = gguf_state(header, gguf_config(header))
    fused = gguf.quants.dequantize(*tensor_of(path, "blk.0.attn_qkv.weight"))
    parts = [state[f"model.layers.0.self_attn.{part}_proj.weight"].numpy() for part in "qkv"]
    assert [len(part) for part in parts] == [32, 16, 16]
    assert np.array_equal(np.concatenate(parts), fused)
    assert len(state["model.layers.0.mlp.gate_proj.weight"]) == 64


def tensor_of(path: Path, name: str):
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return tensor.data, tensor.tensor_type


def test_rows_of_queries_and_keys_are_put_half_a_head_apart():
    rows = np.arange(16, dtype=np.float32)[:, None]
    assert half_split(rows, 2)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


def test_parts_and_the_other_byte_order_are_named(tmp_path):
    part = write_gguf(tmp_path / "m-00001-of-00002.gguf", metadata={"split.count": 2})
    with pytest.raises(ArtifactError, match="one of the 2 parts"):
        gguf_config(read_gguf_header(part))
    data = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    data[4:8] = data[4:8][::-1]
    part.write_bytes(data)
    with pytest.raises(ArtifactError, match="big-endian"):
        read_gguf_header(part)


def test_begin_tokens_are_llama_cpps_where_the_file_is_silent():
    assert adds_bos({"model": "llama"})
    assert adds_bos({"model": "gpt2", "pre": "llama-bpe"})
    assert not adds_bos({"model": "gpt2", "pre": "qwen2"})


def test_a_token_that_is_there_twice_is_refused():
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "[PAD]", "[PAD]"]}
    with pytest.raises(ArtifactError, match=r"\[PAD\]' twice, with the ids 1 and 2"):
        tokenizer_files(metadata, 3, 8)


def test_config_and_state(tmp_path):
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", metadata={"llama.rope.freq_base": 500.0}))
    config = gguf_config(header)
    assert (config.n_kv_heads, config.head_dim, config.vocab_size, config.norm_eps) == (2, 8, 8, 1e-05)
    assert (config.tie_embeddings, config.rope_theta) == (True, 500.0)
    state = gguf_state(header, config)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_qwen3_has_norms_of_queries_and_keys_and_rows_as_ours(tmp_path):
    metadata = {key.replace("llama", "qwen3"): size for key, size in METADATA.items()}
    metadata["qwen3.attention.layer_norm_rms_epsilon"] = 1e-6
    shapes = SHAPES | {"blk.0.attn_q_norm.weight": (8,), "blk.0.attn_k_norm.weight": (8,)}
    path = write_gguf(tmp_path / "m.gguf", architecture="qwen3", metadata=metadata, shapes=shapes)
    config = gguf_config(read_gguf_header(path))
    assert (config.qk_norm, config.n_kv_heads, config.norm_eps) == (True, 2, 1e-6)
    state = gguf_state(read_gguf_header(path), config)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert np.array_equal(state["model.layers.0.self_attn.k_proj.weight"], stored["blk.0.attn_k.weight"])
    assert np.array_equal(state["model.layers.0.self_attn.q_norm.weight"], stored["blk.0.attn_q_norm.weight"])
    with pytest.raises(ArtifactError, match="attn_q_norm"):
        gguf_config(read_gguf_header(write_gguf(tmp_path / "n.gguf", architecture="qwen3", metadata=metadata)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"metadata": {"llama.expert_count": 8}}, "expert_count"),
        ({"metadata": {"llama.block_count": 2}}, "blk.1"),
        ({"metadata": {"llama.block_count": 2**31 - 1}}, "layers"),
        ({"metadata": {"llama.block_count": None}}, "block_count"),
        ({"metadata": {"llama.attention.head_count": "4"}}, "head_count"),
        ({"metadata": {"llama.feed_forward_length": 32}}, "ffn_gate"),
        ({"metadata": {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}}, "rotates 4 of 8"),
        ({"shapes": SHAPES | {"rope_freqs.weight": (4,)}}, "rope_freqs"),
        ({"shapes": SHAPES | {"blk.0.attn_q.bias": (32,)}}, "attn_q.bias"),
        ({"shapes": {"output_norm.weight": (32,)}}, "token_embd"),
    ],
)
def test_what_is_not_read_is_refused_by_name(changes, message, tmp_path):
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf", **changes))
    with pytest.raises(ArtifactError, match=message):
        gguf_config(header)


def as_architecture(name: str, **metadata: Any) -> dict[str, Any]:
    """Return the metadata under the keys of another architecture."""
    own = {key.replace("llama.", f"{name}."): size for key, size in METADATA.items()}
    return own | {f"{name}.{key.replace('__', '.')}": number for key, number in metadata.items()}


@pytest.mark.parametrize(("key", "named"), [("attention__scale", "attention.scale"), ("logit_scale", "logit_scale")])
def test_a_factor_of_granite_that_is_not_positive_is_named(key, named, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", architecture="granite", metadata=as_architecture("granite", **{key: -0.5}))
    with pytest.raises(ArtifactError, match=f"`{named}` '-0.5'"):
        gguf_config(read_gguf_header(path))


@pytest.mark.parametrize(("stored", "missing"), [("short", "long"), ("long", "short")])
def test_divisors_for_one_length_only_are_refused(stored, missing, tmp_path):
    shapes = {name: shape for name, shape in SHAPES.items() if not name.startswith(("blk.0.attn_", "blk.0.ffn_"))}
    shapes |= {f"rope_factors_{stored}.weight": (4,)}
    path = write_gguf(tmp_path / "m.gguf", architecture="phi3", metadata=as_architecture("phi3"), shapes=shapes)
    header = read_gguf_header(path)
    ones = np.ones(4, np.float32).tobytes()
    data, begin = bytearray(path.read_bytes()), header.tensors[f"rope_factors_{stored}.weight"].begin
    data[begin : begin + 16] = ones
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"no tensor `rope_factors_{missing}"):
        gguf_config(header)


def test_an_architecture_that_is_no_text_is_refused(tmp_path):
    header = read_gguf_header(write_gguf(tmp_path / "m.gguf"))
    with pytest.raises(ArtifactError, match=r"architecture `\['llama'\]`"):
        gguf_config(replace(header, metadata={**header.metadata, "general.architecture": ["llama"]}))


def test_the_number_of_token_types_is_that_of_the_tensor(tmp_path):
    metadata = as_architecture("bert", attention__layer_norm_epsilon=1e-5) | {"tokenizer.ggml.token_type_count": 3}
    path = write_gguf(
        tmp_path / "m.gguf",
        architecture="bert",
        metadata=metadata,
        shapes={"token_embd.weight": (8, 32), "token_types.weight": (2, 32)},
    )
    with pytest.raises(ArtifactError, match=r"`tokenizer.ggml.token_type_count` '3'"):
        gguf_config(read_gguf_header(path))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(n_tensors: int, n_values: int, rest: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def value(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HOSTILE = {
    "empty": b"",
    "another magic": b"GGML" + bytes(100),
    "version 1": head(0, 0, version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "cut in the counts": head(0, 0)[:20],
    "more tensors than bytes": head(2**63, 0),
    "more values than bytes": head(0, 2**60, bytes(100)),
    "string past the end": head(0, 1, struct.pack("<Q", 2**50) + bytes(20)),
    "key not UTF-8": head(0, 1, struct.pack("<Q", 1) + b"\xff" + bytes(20)),
    "unknown type": head(0, 1, value("a", 99, bytes(20))),
    "endless array": head(0, 1, value("a", 9, struct.pack("<IQ", 0, 2**60)) + bytes(20)),
    "endless array of strings": head(0, 1, value("a", 9, struct.pack("<IQ", 8, 2**60)) + bytes(20)),
    "array of arrays": head(0, 1, value("a", 9, struct.pack("<IQ", 9, 1)) + bytes(40)),
    "key twice": head(0, 2, value("a", 0, b"1") + value("a", 0, b"2") + bytes(20)),
    "no dimensions": head(1, 0, tensor("a", (), 0, 0) + bytes(64)),
    "five dimensions": head(1, 0, tensor("a", (1,) * 5, 0, 0) + bytes(64)),
    "tensor twice": head(2, 0, tensor("a", (1,), 0, 0) * 2 + bytes(64)),
    "tensors that share bytes": head(2, 0, tensor("a", (8,), 0, 0) + tensor("b", (8,), 0, 16) + bytes(96)),
    "huge shape": head(1, 0, tensor("a", (2**60, 2**60), 0, 0) + bytes(64)),
    "past the end": head(1, 0, tensor("a", (1000,), 0, 0) + bytes(64)),
    "offset past the end": head(1, 0, tensor("a", (1,), 0, 2**63) + bytes(64)),
    "rows of part of a block": head(1, 0, tensor("a", (33,), 8, 0) + bytes(200)),
    "unknown weight format": head(1, 0, tensor("a", (32,), 77, 0) + bytes(200)),
    "alignment zero": head(0, 1, value("general.alignment", 4, bytes(4)) + bytes(20)),
    "alignment a string": head(0, 1, value("general.alignment", 8, text("x")) + bytes(20)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ArtifactError, match=r"x\.gguf"):
        read_gguf_header(path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_byte_is_read_or_refused_but_never_crashes(place, byte, cut, tmp_path):
    path = tmp_path / "x.gguf"
    if not path.exists():
        write_gguf(path)
    original = path.read_bytes()
    data = bytearray(original)
    where = int(place * min(len(data), 1200))
    data[where] = byte
    (tmp_path / "y.gguf").write_bytes(data[:where] if cut else data)
    try:
        header = read_gguf_header(tmp_path / "y.gguf")
        gguf_state(header, gguf_config(header))
    except ArtifactError:
        return


def test_a_missing_file(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere\.gguf"):
        read_gguf_header(tmp_path / "nowhere.gguf")


def test_plain_weights_need_no_package(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    program = """
import sys
sys.modules["gguf"] = None
from pathlib import Path
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.tokenizer import adds_bos, tokenizer_files
from llmctl.formats.gguf.model import gguf_config, gguf_state
from llmctl.errors import MissingExtraError
for name in sys.argv[1:]:
    header = read_gguf_header(Path(name))
    try:
        print(len(gguf_state(header, gguf_config(header))))
    except MissingExtraError as error:
        print(error, error.hint, error.exit_code)
"""
    quantized = write_gguf(tmp_path / "q.gguf", kind="Q8_0")
    command = [sys.executable, "-c", program, str(path), str(quantized)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["12", "the weight format Q8_0 needs the package `gguf` pip install gguf 7"]


def test_a_sentencepiece_tokenizer_gives_the_same_ids(shared_data):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared_data / "models" / "stories260K"
    header = read_gguf_header(folder / "gguf" / "stories260K-q4_1.gguf")
    files = tokenizer_files(header.metadata, 512, 512)
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(files["tokenizer.model"])
    published = sentencepiece.SentencePieceProcessor(model_file=str(folder / "hf" / "tokenizer.model"))
    assert (pieces.bos_id(), pieces.eos_id(), pieces.unk_id(), pieces.pad_id()) == (1, 2, 0, -1)
    rows = json.loads((folder / "reference.json").read_text())["tokenization"]
    for row in rows:
        assert pieces.encode(row["text"]) == row["ids_without_bos"] == published.encode(row["text"])
        assert pieces.decode(row["ids_without_bos"]) == row["decoded"]
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is True


def test_texts_are_split_at_user_defined_tokens(shared_data):
    """The ids are llama.cpp's: tests/interop/test_gguf.py compares more."""
    from llmctl.tokenizer.load import tokenizer_from_files

    header = read_gguf_header(shared_data / "models" / "stories260K" / "gguf" / "stories260K-q4_1.gguf")
    tokens = [*header.metadata["tokenizer.ggml.tokens"][:-1], "<|user|>"]
    types = [*header.metadata["tokenizer.ggml.token_type"][:-1], 4]
    changed = header.metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for has_prefix, after in ((True, [403]), (False, [441, 416, 331])):
        files = tokenizer_files(changed | {"tokenizer.ggml.add_space_prefix": has_prefix}, 512, 512)
        tokenizer = tokenizer_from_files(files)
        assert tokenizer.encode("<|user|>Once") == [511, *after]
        assert tokenizer.encode("Once<|user|>Once") == [*after, 511, *after]


GPT2 = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "Ġ", "1", "2", "12"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
}


def test_a_byte_level_tokenizer_splits_as_its_pre_tokenizer_says():
    tokenizers = pytest.importorskip("tokenizers")

    def ids(changes: dict, content: str) -> list[int]:
        files = tokenizer_files(GPT2 | changes, 8, 16)
        assert files["chat_template.jinja"] == b"{{ messages }}"
        return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()).encode(content).ids

    assert ids({}, "ab 12<|end|>") == [3, 4, 5, 6, 0]
    assert ids({"tokenizer.ggml.pre": "gpt-2"}, "12ab") == [7, 3]
    assert ids({"tokenizer.ggml.add_bos_token": True}, "ab") == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens for an embedding of 8 rows"),
        ({"tokenizer.ggml.tokens": None}, "0 tokens"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "pre-tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges"),
        ({"tokenizer.ggml.bos_token_id": 99}, "bos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_tokenizers_that_are_not_read_are_refused_by_name(changes, message):
    with pytest.raises(ArtifactError, match=message):
        tokenizer_files(GPT2 | changes, 8, 16)

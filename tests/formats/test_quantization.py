import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.errors import ArtifactError
from llmctl.formats.artifact import Artifact, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.quantization import EMBEDDING, linear_modules, part_shapes, read_schemes, write_schemes
from llmctl.quant.methods import nearest
from llmctl.quant.schemes import SCHEMES, Scheme
from llmctl.quant.weight import packed

FAMILIES = ("decoder", "encoder", "encoder_decoder")


def quantized(source: Path, out: Path, scheme: Scheme, *, embedding: Scheme | None = SCHEMES["int8"]) -> Path:
    artifact = read_artifact(source)
    state = artifact.state()
    schemes = dict.fromkeys(linear_modules(artifact.config), scheme)
    if embedding:
        schemes[EMBEDDING] = embedding
    for name, each in schemes.items():
        codes = nearest(state.pop(f"{name}.weight"), each)
        state |= {f"{name}.{part}": tensor for part, tensor in packed(codes, each).items()}
    state.pop("lm_head.weight", None)
    return write_artifact(out, artifact.config, state, files=artifact.files, provenance={}, schemes=schemes)


@pytest.mark.parametrize("name", ["int8", "w8a8", "int6", "int5", "int4", "int4-sym", "int3", "int2"])
def test_schemes_survive_config_json(models: dict[str, Path], name: str) -> None:
    config = read_artifact(models["decoder"]).config
    scheme = replace(SCHEMES[name], group=SCHEMES[name].group and 32)  # the width of the tiny model
    schemes = dict.fromkeys(linear_modules(config), scheme) | {EMBEDDING: Scheme(8)}
    text = json.loads(json.dumps({"quantization_config": write_schemes(schemes, config)}))
    assert read_schemes(text, config, "here") == schemes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_model_in_few_bits_computes_what_its_weights_multiplied_out_do(
    models: dict[str, Path], tmp_path: Path, family: str, bits: int
) -> None:
    path = quantized(models[family], tmp_path / "small", Scheme(bits, 0, symmetric=bits == 8))
    loaded, floats = load_model(path, packed=True), read_artifact(path).state()
    plain = load_model(models[family]).model
    plain.load_state_dict(floats)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    more = {"decoder_input_ids_BT": ids} if family == "encoder_decoder" else {}
    with torch.inference_mode():
        found, expected = loaded.model(ids, **more), plain(ids, **more)
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_survive_going_through_one_file_and_back(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    path = quantized(models[family], tmp_path / "small", SCHEMES["int8"])
    assert run(["export", str(path), "--to", "single", "-o", str(tmp_path / "one.safetensors")]) == 0
    assert run(["export", str(tmp_path / "one.safetensors"), "--to", "hf", "-o", str(tmp_path / "again")]) == 0
    first, last = (read_artifact(tmp_path / name) for name in ("small", "again"))
    assert first.schemes == last.schemes
    a, b = first.packed_state(), last.packed_state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_not_read_is_named(models: dict[str, Path]) -> None:
    config = read_artifact(models["decoder"]).config
    good = write_schemes(dict.fromkeys(linear_modules(config), SCHEMES["int8"]), config)
    group = good["config_groups"]["group_0"]
    for change, named in [
        ({"quant_method": "gptq"}, "gptq"),
        ({"format": "marlin-24"}, "marlin-24"),
        ({"config_groups": {"a": group | {"format": "nvfp4-pack-quantized"}}}, "nvfp4"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"a": group | {"weights": group["weights"] | {"num_bits": 16}}}}, "num_bits"),
        ({"config_groups": {"a": group | {"weights": group["weights"] | {"type": "float"}}}}, "float"),
        ({"config_groups": {"a": group | {"input_activations": {"num_bits": 4}}}}, "input_activations"),
        ({"config_groups": {"a": group | {"weights": group["weights"] | {"strategy": "group", "group_size": 7}}}}, "7"),
        ({"config_groups": {"a": group | {"targets": ["re:("]}}}, "re:"),
        ({"config_groups": {"a": group | {"targets": ["re:(([a-z._0-9]+)+)+$x"]}}}, "forever"),
        ({"config_groups": {"a": group | {"targets": 7}}}, "targets"),
        ({"config_groups": {"a": group | {"targets": ["re:a{4294967296}"]}}}, "repeats"),
        ({"ignore": ["re:(.*.*)*x"]}, "forever"),
    ]:
        with pytest.raises(ArtifactError, match=named):
            read_schemes({"quantization_config": good | change}, config, "here")


@pytest.mark.parametrize("scheme", [Scheme(4, 64, symmetric=False), *SCHEMES.values()])
def test_the_tensors_of_a_matrix_take_what_the_scheme_says(scheme: Scheme) -> None:
    widths = {
        "weight_packed": 32,
        "weight_scale": scheme.scale_bits,
        "weight_zero_point": 32,
        "weight_scale_exponent": 8,
    }
    shapes = part_shapes(scheme, (96, 128))
    bits = sum(width * math.prod(shapes[name]) for name, width in widths.items() if name in shapes)
    assert bits == scheme.size_bits(96, 128)


def groups_of(artifact: Artifact) -> list[dict[str, Any]]:
    return list(artifact.hf["quantization_config"]["config_groups"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_in_eight_bits_are_ours_and_survive(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    scheme = Scheme(5, 16, symmetric=False, scale_bits=8)
    first = read_artifact(quantized(models[family], tmp_path / "small", scheme))
    assert "llmctl-pack-quantized" in {group["format"] for group in groups_of(first)}
    name = next(name for name in first.schemes if "layers." in name)
    entries = {part: first.tensors[f"{name}.{part}"][2].dtype for part in ("weight_scale", "weight_scale_exponent")}
    assert entries == {"weight_scale": "U8", "weight_scale_exponent": "I8"}
    original = read_artifact(models[family]).state()[f"{name}.weight"].float()
    state = first.packed_state()
    meant = nearest(original, scheme).grid.scales_OG
    assert torch.equal(state[f"{name}.weight_scale"].float(), meant)

    # For others scales are written out, and mean the same.
    assert run(["export", str(tmp_path / "small"), "--to", "hf", "-o", str(tmp_path / "wide")]) == 0
    last = read_artifact(tmp_path / "wide")
    assert {group["format"] for group in groups_of(last)} == {"pack-quantized", "int-quantized"}
    assert {each.scale_bits for each in last.schemes.values()} == {16}
    wide = last.packed_state()
    assert state.keys() == wide.keys()
    assert all(torch.equal(state[key], wide[key]) for key in state)


@pytest.mark.parametrize("name", ["w8a8", "int8"])
def test_codes_are_read_from_bytes_and_from_words(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Other tools write either; what is packed here was written in bytes."""
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    path = quantized(models["decoder"], tmp_path / "small", SCHEMES[name])
    first, file = read_artifact(path), path / "model.safetensors"
    header, text = read_header(file), json.loads((path / "config.json").read_text())
    found = {key: tensor.clone() for key, tensor in read_tensors(file, header.tensors).items()}
    assert found["model.embed_tokens.weight"].dtype == torch.int8
    assert torch.equal(found.pop("lm_head.weight_scale"), found["model.embed_tokens.weight_scale"])
    packed_state = first.packed_state()
    for module in first.schemes:
        codes = found.pop(f"{module}.weight", None)
        if codes is not None:
            found[f"{module}.weight_packed"] = packed_state[f"{module}.weight_packed"].clone()
            found[f"{module}.weight_shape"] = torch.tensor(codes.shape)
    for group in text["quantization_config"]["config_groups"].values():
        del group["format"]
    text["quantization_config"]["format"] = "pack-quantized"
    write_safetensors(file, found, header.metadata | {"llmctl.config": json.dumps(text)})
    last = read_artifact(path)
    assert first.schemes == last.schemes
    assert all(torch.equal(tensor, last.packed_state()[key]) for key, tensor in packed_state.items())


def test_bytes_of_another_kind_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    path = quantized(models["decoder"], tmp_path / "small", SCHEMES["w8a8"]) / "model.safetensors"
    header, name = read_header(path), "model.layers.0.self_attn.q_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in read_tensors(path, header.tensors).items()}
    for wrong, match in ((tensors[name].float(), "wrong dtype"), (tensors[name][:-1].clone(), "wrong shape")):
        write_safetensors(path, tensors | {name: wrong}, header.metadata)
        with pytest.raises(ArtifactError, match=match):
            read_artifact(path)


def test_a_damaged_packed_tensor_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    path = quantized(models["decoder"], tmp_path / "small", SCHEMES["int8"])
    text = json.loads((path / "config.json").read_text())
    text["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    header = read_header(path / "model.safetensors")
    tensors = {
        name: tensor.clone() for name, tensor in read_tensors(path / "model.safetensors", header.tensors).items()
    }
    write_safetensors(path / "model.safetensors", tensors, header.metadata | {"llmctl.config": json.dumps(text)})
    with pytest.raises(ArtifactError, match="wrong shape"):
        read_artifact(path)


@pytest.mark.parametrize("sizes", [[2**40, 2**40], [0, 0], [-1, 5], [32, 31]])
def test_the_sizes_in_a_file_are_not_believed(models: dict[str, Path], tmp_path: Path, sizes: list[int]) -> None:
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    path = quantized(models["decoder"], tmp_path / "q", Scheme(4, 16)) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    name = next(name for name in tensors if name.endswith("weight_shape"))
    tensors[name] = torch.tensor(sizes)
    write_safetensors(path, tensors, read_header(path).metadata)
    with pytest.raises(ArtifactError, match=name):
        read_artifact(path).state()


def with_scales(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rewrite the scales of a model in a dtype, as numbers that bfloat16 does not represent, and return them."""
    from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors

    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(file).items()}
    names = [name for name in tensors if name.endswith("weight_scale")]
    scales = {name: tensors[name].to(dtype) * (1 + 2**-9 - 2**-10) for name in names}
    assert all(not torch.equal(each.bfloat16().to(dtype), each) for each in scales.values())
    write_safetensors(file, tensors | scales, read_header(file).metadata)
    return scales


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(3, 16, symmetric=False)], ids=["int4", "int3-zeros"])
def test_scales_of_other_dtypes_are_exact(
    models: dict[str, Path], tmp_path: Path, scheme: Scheme, family: str, dtype
) -> None:
    """The logits are those of the weights dequantized in float32, also after conversions of the model."""
    path = quantized(models[family], tmp_path / "small", scheme, embedding=scheme)
    scales = with_scales(path, dtype)
    loaded, plain = load_model(path, packed=True), load_model(path, packed=False)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    more = {"decoder_input_ids_BT": ids} if family == "encoder_decoder" else {}
    with torch.inference_mode():
        found, expected = loaded.model(ids, **more), plain.model(ids, **more)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    state = loaded.model.to(torch.bfloat16).state_dict()
    assert all(same_bits(state[name], each) for name, each in scales.items())
    if loaded.model.config.tie_embeddings:
        assert loaded.model.lm_head.weight_scale is loaded.model.model.embed_tokens.weight_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["w8a8", "int8", "int4-sym"])
def test_scales_keep_their_bytes(models: dict[str, Path], tmp_path: Path, name: str, dtype, capsys) -> None:
    """Through import and export; an 8-bit embedding's scales are stored twice."""
    from llmctl.formats.safetensors import read_tensors

    path = quantized(models["decoder"], tmp_path / "small", SCHEMES[name])
    scales = with_scales(path, dtype)
    assert run(["import", str(path), "-o", str(tmp_path / "in")]) == 0
    assert run(["export", str(tmp_path / "in"), "--to", "hf", "-o", str(tmp_path / "out")]) == 0
    for folder in ("in", "out"):
        found = read_tensors(tmp_path / folder / "model.safetensors")
        assert all(same_bits(found[name], each) for name, each in scales.items())
    assert "bfloat16" not in capsys.readouterr().err

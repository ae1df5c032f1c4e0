"""Models in and out: the maths stays, the origin is noted, and what goes round comes back byte for byte."""

import json

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.converting.convert import export_model, import_model
from llmctl.errors import ArtifactError, NotFoundError, OutputError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.load import find_tokenizer
from tests.support.spm import folder_files


@pytest.fixture
def folder(tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=30, d_model=16, n_layers=2, n_heads=2))
    initialize(model, 2)
    return write_artifact(
        tmp_path / "source", model.config, model.state_dict(), files={"vocab.txt": b"a\nb\n"}, provenance={"a": 1}
    )


def test_single_and_folder_go_round_byte_for_byte(folder, tmp_path):
    single = export_model(folder, tmp_path / "x.safetensors", to="single")
    back = export_model(single, tmp_path / "back", to="hf")
    assert single.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_the_form_must_fit_the_name(folder, tmp_path):
    for to, name in (("single", "x"), ("hf", "x.safetensors"), ("onnx", "x")):
        with pytest.raises(UsageError, match=to):
            export_model(folder, tmp_path / name, to=to)
    export_model(folder, tmp_path / "x", to="hf")
    with pytest.raises(OutputError, match="already exists"):
        export_model(folder, tmp_path / "x", to="hf")
    export_model(folder, tmp_path / "x", to="hf", force=True)


def test_a_model_can_be_exported_onto_itself(folder):
    before = (folder / "model.safetensors").read_bytes()
    export_model(folder, folder, to="hf", force=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_dtype_is_kept_unless_asked_for(folder, tmp_path):
    kept = read_artifact(import_model(folder, tmp_path / "kept"))
    rounded = read_artifact(import_model(folder, tmp_path / "rounded", dtype="bfloat16"))
    assert (kept.dtype, rounded.dtype) == ("F32", "BF16")
    name = "model.norm.weight"
    assert torch.equal(rounded.state()[name], kept.state()[name].bfloat16().float())
    assert read_artifact(import_model(tmp_path / "rounded", tmp_path / "again")).dtype == "BF16"
    with pytest.raises(UsageError, match="float8"):
        import_model(folder, tmp_path / "other", dtype="float8")


def test_the_origin_is_noted_and_equal_imports_are_equal_bytes(folder, tmp_path):
    one, two = (import_model(folder, tmp_path / name / "m.safetensors") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    provenance = read_artifact(one).provenance
    assert provenance["a"] == 1
    assert list(provenance["imported"]["weights"]) == ["model.safetensors"]
    assert len(provenance["imported"]["weights"]["model.safetensors"]) == 64


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"vocab.txt": b"[PAD]\na\n[MASK]\n"}, 2),
        ({"tokenizer.json": json.dumps({"added_tokens": [{"content": "<mask>", "id": 7}]}).encode()}, 7),
        ({"tokenizer.json": b"["}, -1),
        ({}, -1),
        (folder_files("XLMRoberta"), 136),
    ],
    ids=range(5),
)
def test_an_encoders_mask_token_is_found(files, expected, tmp_path):
    model = LanguageModel(ModelConfig(vocab_size=160, d_model=16, n_layers=1, n_heads=2, family="encoder"))
    out = write_artifact(tmp_path / "m", model.config, model.state_dict(), files=files, provenance={})
    assert read_artifact(import_model(out, tmp_path / "imported")).config.mask_id == expected


def test_gguf_and_folder_of_the_same_model_agree(shared_data, tmp_path):
    models = shared_data / "models" / "stories260K"
    whole = read_artifact(import_model(models / "hf", tmp_path / "hf"))
    gguf = read_artifact(import_model(models / "gguf" / "stories260K-f32.gguf", tmp_path / "m.safetensors"))
    assert gguf.config == whole.config
    assert all(torch.equal(gguf.state()[name], tensor) for name, tensor in whole.state().items())
    assert gguf.files.keys() == whole.files.keys()


def test_what_cannot_be_read_leaves_nothing(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError):
        import_model(tmp_path / "bad.gguf", tmp_path / "out")
    with pytest.raises(NotFoundError):
        import_model(tmp_path / "nowhere.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_weights_that_are_no_numbers_are_named(folder, tmp_path, caplog):
    source = read_artifact(folder)
    state = source.state()
    state["model.norm.weight"][:2] = float("nan")
    broken = write_artifact(tmp_path / "broken", source.config, state, files=source.files, provenance={})
    import_model(broken, tmp_path / "m")
    assert f"2 of the {len(state['model.norm.weight'])} weights of `model.norm.weight`" in caplog.text


def test_an_import_without_a_tokenizer_says_so(folder, tmp_path, caplog):
    import_model(folder, tmp_path / "unreadable")
    assert "the tokenizer of" in caplog.text
    assert "no `[UNK]`" in caplog.text
    caplog.clear()
    (folder / "vocab.txt").unlink()
    source = read_artifact(folder)
    bare = write_artifact(tmp_path / "bare", source.config, source.state(), files={}, provenance={})
    import_model(bare, tmp_path / "m")
    assert f"no tokenizer among the files of `{bare}`" in caplog.text


@pytest.mark.parametrize("to", ["single", "hf"])
def test_the_files_and_the_class_of_a_published_tokenizer_are_kept(to, tmp_path):
    files = folder_files("T5")
    bare = {name: data for name, data in files.items() if name != "tokenizer_config.json"}
    model = LanguageModel(ModelConfig(vocab_size=250, d_model=16, n_layers=1, n_heads=2, family="encoder_decoder"))
    initialize(model, 0)
    source = write_artifact(tmp_path / "source", model.config, model.state_dict(), files=bare, provenance={})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tokenizer_class": "T5Tokenizer"}))
    header_free = tmp_path / "published"
    header_free.mkdir()
    for path in source.iterdir():
        data = path.read_bytes()
        (header_free / path.name).write_bytes(without_header(data) if path.suffix == ".safetensors" else data)
    out = export_model(
        import_model(header_free, tmp_path / "imported"), tmp_path / f"out{'.safetensors' * (to == 'single')}", to=to
    )
    tokenizer = find_tokenizer(read_artifact(out).files)
    assert tokenizer.sha256 == find_tokenizer(files).sha256


def without_header(data: bytes) -> bytes:
    """Return a safetensors file without its metadata, as others write it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]

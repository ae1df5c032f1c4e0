"""Artifacts: written whole, read back equal, self-contained in one file, and never believed when they do not fit."""

import json
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, LlmctlError, NotFoundError, OutputError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.generation_settings import end_ids
from llmctl.formats.safetensors import read_header, write_safetensors
from llmctl.model.transformer import LanguageModel, initialize

FILES = {"tokenizer.model": b"\x00\xff piece", "tokenizer_config.json": "{“a”: 1}".encode()}
PROVENANCE = {"recipe": "abc", "数据": ["x", 1]}


def make(**fields) -> LanguageModel:
    settings = {"vocab_size": 30, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_positions": 32, "eos_id": 2}
    model = LanguageModel(ModelConfig(**(settings | fields)))
    initialize(model, 4)
    return model


def write(out: Path, model: LanguageModel | None = None, **options) -> Path:
    model = model or make()
    options = {"files": FILES, "provenance": PROVENANCE} | options
    return write_artifact(out, model.config, model.state_dict(), **options)


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_what_is_written_is_read_back(name, tmp_path):
    model = make()
    out = write(tmp_path / name, model)
    assert out == tmp_path / name
    artifact = read_artifact(out)
    assert artifact.config == model.config
    assert artifact.architecture == "LlamaForCausalLM"
    assert artifact.provenance == PROVENANCE
    assert {key: artifact.files[key] for key in FILES} == FILES
    assert json.loads(artifact.files["generation_config.json"]) == {"eos_token_id": 2}
    other = LanguageModel(artifact.config)
    other.load_state_dict(artifact.state())
    ids = torch.arange(10)[None]
    assert torch.equal(other(ids), model(ids))


def test_a_copy_of_the_weights_alone_is_the_whole_model(tmp_path):
    out = write(tmp_path / "run")
    copy = Path(shutil.copy(out / "model.safetensors", tmp_path / "teacher.safetensors"))
    alone, whole = read_artifact(copy), read_artifact(out)
    assert (alone.config, alone.files, alone.provenance) == (whole.config, whole.files, whole.provenance)
    assert (out / "config.json").read_text() == read_header(copy).metadata["llmctl.config"]
    assert read_header(copy).metadata["format"] == "pt"
    assert write(tmp_path / "single.safetensors").read_bytes() == copy.read_bytes()


def test_equal_content_is_equal_bytes(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", files=dict(reversed(FILES.items())))
    names = sorted(path.name for path in a.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", *sorted(FILES)]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    again = read_artifact(a)
    c = write_artifact(
        tmp_path / "c", again.config, again.stored_state(), files=again.files, provenance=again.provenance
    )
    assert all((a / name).read_bytes() == (c / name).read_bytes() for name in names)


def test_a_tied_head_is_stored_once(tmp_path):
    assert "lm_head.weight" not in read_header(write(tmp_path / "m") / "model.safetensors").tensors
    state = read_artifact(tmp_path / "m").state()
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    untied = write(tmp_path / "u", make(tie_embeddings=False)) / "model.safetensors"
    assert "lm_head.weight" in read_header(untied).tensors


def test_dtypes_on_disk_and_in_memory(tmp_path):
    model = make().to(torch.bfloat16)
    artifact = read_artifact(write(tmp_path / "m", model))
    assert artifact.dtype == "BF16"
    assert artifact.hf["dtype"] == artifact.hf["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in artifact.state().values()} == {torch.float32}
    assert {tensor.dtype for tensor in artifact.state(torch.float64).values()} == {torch.float64}
    assert {tensor.dtype for tensor in artifact.stored_state().values()} == {torch.bfloat16}


def test_nothing_is_replaced_without_force(tmp_path):
    for name in ("m", "m.safetensors"):
        out = write(tmp_path / name)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(OutputError, match="already exists") as caught:
            write(out, make(n_layers=1))
        assert "-f" in caught.value.hint
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        write(out, make(n_layers=1), force=True)
        assert read_artifact(out).config.n_layers == 1
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", force=True)


def test_a_run_folder_keeps_what_else_is_in_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "vocab.txt").write_text("of another model")
    write(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    assert read_artifact(tmp_path).config == make().config
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"stale")
    write(tmp_path, force=True)
    assert not list(tmp_path.glob("model*stale")) + list(tmp_path.glob("model-*")) + list(tmp_path.glob("*.index.json"))
    assert not (tmp_path / "vocab.txt").exists()


def test_a_disk_that_takes_no_more_leaves_no_folder(tmp_path):
    program = """
import resource, sys
from pathlib import Path
from llmctl.config import ModelConfig
from llmctl.errors import OutputError
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel
model = LanguageModel(ModelConfig(vocab_size=300, d_model=64))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_artifact(Path(sys.argv[1]), model.config, model.state_dict(), files={}, provenance={})
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "file too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, *, tensors=None, **metadata) -> Path:
    """Write the model's file again with other tensors or metadata; None removes a key."""
    from llmctl.formats.safetensors import read_tensors

    header = {**read_header(path).metadata, **{key.replace("_", "."): value for key, value in metadata.items()}}
    content = {name: tensor.clone() for name, tensor in read_tensors(path).items()} if tensors is None else tensors
    write_safetensors(path, content, {key: value for key, value in header.items() if value is not None})
    return path


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    path = write(tmp_path / "m.safetensors")
    state = make().state_dict()
    state.pop("lm_head.weight")
    cases = {
        "missing: `model.norm.weight`": {key: value for key, value in state.items() if key != "model.norm.weight"},
        "unexpected: `model.extra`": state | {"model.extra": torch.zeros(1)},
        r"wrong shape: `model.norm.weight \(3,\), not \(16,\)`": state | {"model.norm.weight": torch.zeros(3)},
        "wrong dtype: `model.norm.weight I8`": state | {"model.norm.weight": torch.zeros(16, dtype=torch.int8)},
        "has 0 tensors": {},
    }
    for message, tensors in cases.items():
        rewrite(path, tensors=tensors)
        with pytest.raises(ArtifactError, match=message):
            read_artifact(path)
    rewrite(path, tensors=state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    read_artifact(path)  # a copy of a tied head is no contradiction


@pytest.mark.parametrize(
    "metadata",
    [
        {"llmctl_config": "{"},
        {"llmctl_config": "[]"},
        {"llmctl_config": "[" * 100_000},
        {"llmctl_config": "{}"},
        {"llmctl_config": '{"architectures": ["LlamaForCausalLM"]}'},
        {"llmctl_files": "7"},
        {"llmctl_files": json.dumps({"a": "not base64!"})},
        {"llmctl_files": json.dumps({"a": 7})},
        {"llmctl_provenance": "nothing"},
        *(
            {"llmctl_files": json.dumps({name: b64encode(b"x").decode()})}
            for name in (
                "../a",
                "/etc/a",
                "..",
                "a\\b",
                "config.json",
                "",
                "train.py",
                ".bashrc",
                "TOKENIZER.JSON",
                ".",
            )
        ),
    ],
)
def test_hostile_metadata_is_refused(metadata, tmp_path):
    path = rewrite(write(tmp_path / "m.safetensors"), **metadata)
    with pytest.raises(ArtifactError):
        read_artifact(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json", "config.json"])
def test_no_file_is_replaced_without_force(name, tmp_path):
    (tmp_path / name).write_text("the user's own")
    with pytest.raises(OutputError, match=f"contains `{name}`"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "the user's own"
    (tmp_path / name).unlink()
    for other in ("train.py", "vocab.txt", "model-00001-of-00002.safetensors"):
        (tmp_path / other).write_text("the user's own")
    write(tmp_path)  # beside them there is room, and nothing of the user's is stale
    assert (tmp_path / "train.py").exists()
    assert (tmp_path / "vocab.txt").exists()
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
    write(tmp_path, force=True)


def test_a_dangling_link_is_not_written_through(tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        write(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_config_of_a_billion_layers_costs_nothing(tmp_path):
    path = write(tmp_path / "m.safetensors")
    config = json.loads(read_header(path).metadata["llmctl.config"]) | {"num_hidden_layers": 2**31 - 1}
    with pytest.raises(ArtifactError, match="layers"):
        read_artifact(rewrite(path, llmctl_config=json.dumps(config)))


def test_a_table_of_a_billion_positions_costs_nothing(tmp_path):
    path = write(tmp_path / "m.safetensors", make(positions="sinusoidal"))
    config = json.loads(read_header(path).metadata["llmctl.config"]) | {"max_positions": 10**9}
    with pytest.raises(ArtifactError, match="max_positions` is 1000000000"):
        read_artifact(rewrite(path, llmctl_config=json.dumps(config)))


def test_a_configuration_that_contradicts_itself_is_a_damaged_artifact(tmp_path):
    path = write(tmp_path / "m.safetensors", make(n_experts=4, n_active_experts=2))
    config = json.loads(read_header(path).metadata["llmctl.config"]) | {"num_experts_per_tok": 5}
    with pytest.raises(ArtifactError, match=r"m\.safetensors.* is 5, not 1 to 4"):
        read_artifact(rewrite(path, llmctl_config=json.dumps(config)))


def test_weights_without_a_configuration(tmp_path):
    path = rewrite(write(tmp_path / "m.safetensors"), llmctl_config=None)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        read_artifact(path)


def test_the_header_goes_before_the_files_beside_it(tmp_path):
    out = write(tmp_path / "m")
    (out / "config.json").write_text("{}")
    assert read_artifact(out).config == make().config


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "best.ckpt"])
def test_pickles_are_refused(name, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(b"\x80\x04")
    (tmp_path / "m" / "config.json").write_text("{}")
    for path in (tmp_path / "m", tmp_path / "m" / name):
        with pytest.raises(ArtifactError, match="pickle") as caught:
            read_artifact(path)
        assert "safetensors" in caught.value.hint


def test_what_is_not_there(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        read_artifact(tmp_path)


def shard(folder: Path) -> dict:
    """Turn a written folder into two shards with an index, as published models have; return the index."""
    from llmctl.formats.safetensors import read_tensors

    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file, part in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
    return {"weight_map": {name: file for file, part in parts.items() for name in part}}


def test_shards_are_read_and_their_index_is_not_believed(tmp_path):
    model = make()
    folder = write(tmp_path / "m", model)
    index = shard(folder)
    where = folder / "model.safetensors.index.json"
    where.write_text(json.dumps(index))
    state = read_artifact(folder).state()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert read_artifact(folder).files["tokenizer.model"] == FILES["tokenizer.model"]
    first = next(iter(index["weight_map"]))
    hostile = [
        {"weight_map": index["weight_map"] | {first: "../outside.safetensors"}},
        {"weight_map": index["weight_map"] | {first: "three.safetensors"}},
        {"weight_map": index["weight_map"] | {"model.other": "one.safetensors"}},
        {"weight_map": {}},
        {"weight_map": [1]},
        [],
    ]
    for obj in hostile:
        where.write_text(json.dumps(obj))
        with pytest.raises(LlmctlError):
            read_artifact(folder)


def test_encoders_have_no_generation_config(tmp_path):
    out = write(tmp_path / "m", make(family="encoder", mask_id=3))
    assert not (out / "generation_config.json").exists()
    assert json.loads((out / "config.json").read_text())["mask_token_id"] == 3


BERT = {
    "family": "encoder", "norm": "layernorm", "norm_position": "post", "gated": False, "attention_bias": True,
    "mlp_bias": True, "positions": "learned", "embedding_norm": True, "n_token_types": 2, "activation": "gelu",
    "head_transform": True, "logits_bias": True,
}  # fmt: skip
PAIR = {
    "family": "encoder_decoder", "n_decoder_layers": 2, "decoder_start_id": 2, "norm": "layernorm",
    "norm_position": "post", "gated": False, "attention_bias": True, "mlp_bias": True, "logits_bias": True,
}  # fmt: skip
HEADS = {
    "LlamaForCausalLM": ({}, "lm_head.weight", "model.embed_tokens.weight"),
    "Qwen3ForCausalLM": ({"qk_norm": True}, "lm_head.weight", "model.embed_tokens.weight"),
    "GPT2LMHeadModel": (
        {"norm": "layernorm", "gated": False, "attention_bias": True, "mlp_bias": True, "positions": "learned"}
        | {"activation": "gelu_tanh"},
        "lm_head.weight",
        "transformer.wte.weight",
    ),
    "BertForMaskedLM": (BERT, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "BartForConditionalGeneration": (
        PAIR | {"positions": "learned", "position_offset": 2, "embedding_norm": True},
        "lm_head.weight",
        "model.shared.weight",
    ),
    "MarianMTModel": (PAIR | {"positions": "sinusoidal"}, "lm_head.weight", "model.shared.weight"),
    "LlmctlForLanguageModel": ({"positions": "none"}, "lm_head.weight", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_that_is_not_the_embedding_is_kept(architecture, tmp_path, caplog):
    fields, head, embedding = HEADS[architecture]
    model = make(**fields)
    path = write(tmp_path / "m.safetensors", model)
    artifact = read_artifact(path)
    assert artifact.architecture == architecture
    assert artifact.config.tie_embeddings
    published = artifact.family.to_published(model.state_dict(), model.config)
    rewrite(path, tensors=published | {head: published[embedding].clone()})
    assert read_artifact(path).config.tie_embeddings  # a copy
    assert not caplog.messages
    other = torch.randn(30, 16)
    rewrite(path, tensors=published | {head: other})
    artifact = read_artifact(path)
    assert not artifact.config.tie_embeddings
    assert torch.equal(artifact.state()["lm_head.weight"], other)
    assert f"has a `{head}` of its own" in caplog.text
    again = write_artifact(tmp_path / "again", artifact.config, artifact.state(), files={}, provenance={})
    assert torch.equal(read_artifact(again).state()["lm_head.weight"], other)
    assert not json.loads((again / "config.json").read_text()).get("tie_word_embeddings", False)


def test_an_untied_bert_computes_with_the_bias_of_its_decoder(tmp_path):
    model = make(**BERT, tie_embeddings=False)
    path = write(tmp_path / "m.safetensors", model)
    artifact = read_artifact(path)
    published = artifact.family.to_published(model.state_dict(), model.config)
    own, bias = torch.randn(30), "cls.predictions.bias"
    assert bias not in published
    rewrite(path, tensors=published | {"cls.predictions.decoder.bias": own, bias: torch.randn(30)})
    assert torch.equal(read_artifact(path).state()["lm_head.bias"], own)
    # Files of older versions of ours have only the other name.
    published.pop("cls.predictions.decoder.bias")
    rewrite(path, tensors=published | {bias: own})
    assert torch.equal(read_artifact(path).state()["lm_head.bias"], own)


def test_a_list_of_end_tokens_is_kept(tmp_path):
    folder = write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 7, 9]}
    (folder / "generation_config.json").unlink()
    rewrite(folder / "model.safetensors", llmctl_config=json.dumps(config), llmctl_files="{}")
    artifact = read_artifact(folder)
    assert end_ids(artifact.config, artifact.files) == [2, 7, 9]
    again = write_artifact(tmp_path / "again", artifact.config, artifact.state(), files=artifact.files, provenance={})
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]


def test_old_spellings_and_bare_files(tmp_path):
    bert = make(
        family="encoder", norm="layernorm", norm_position="post", gated=False, attention_bias=True, mlp_bias=True,
        positions="learned", embedding_norm=True, n_token_types=2, activation="gelu", head_transform=True,
        logits_bias=True,
    )  # fmt: skip
    gpt2 = make(
        norm="layernorm", gated=False, attention_bias=True, mlp_bias=True, positions="learned", activation="gelu_tanh"
    )

    def tensorflow(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    def bare(name: str) -> str:
        return name.removeprefix("transformer.")

    cases = [
        ("BertForMaskedLM", bert, tensorflow, "bert.pooler.dense.weight"),
        ("GPT2LMHeadModel", gpt2, bare, "h.0.attn.bias"),
    ]
    for architecture, model, spell, ignored in cases:
        path = write(tmp_path / f"{architecture}.safetensors", model)
        artifact = read_artifact(path)
        assert artifact.architecture == architecture
        published = artifact.family.to_published(model.state_dict(), model.config)
        old = {spell(name): tensor for name, tensor in published.items()}
        assert old.keys() != published.keys()
        rewrite(path, tensors=old | {ignored: torch.ones(1, 4)})
        state = read_artifact(path).state()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "chat_template.jinja"])
def test_a_link_does_not_carry_another_file_into_a_model(name, tmp_path):
    folder = write(tmp_path / "m")
    index = shard(folder)  # without a header that holds the files
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read_artifact(folder)
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="outside its folder"):
        read_artifact(folder)


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path):
    folder = write(tmp_path / "m")
    index = shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert read_artifact(snapshot).files == read_artifact(folder).files

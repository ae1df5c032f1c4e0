"""PEFT's format by itself: what goes out comes back, what it says of itself is exact, and nothing read is trusted."""

import json
import re
from pathlib import Path

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, LlmctlError, NotFoundError, OutputError
from llmctl.formats.adapter import (
    ADAPTER_WEIGHTS,
    Adapter,
    fit,
    identity,
    is_adapter,
    read_adapter,
    read_parts,
)
from llmctl.formats.adapter_names import LowRank, architecture_of, compiled, from_pattern, target_modules
from llmctl.formats.adapter_write import write_adapter
from llmctl.formats.artifact import ADAPTER_CONFIG, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.safetensors import read_header, read_tensors, write_safetensors
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel, initialize
from tests.families.test_table import CONFIGS, SHAPE

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head_dense")


def config_of(architecture: str) -> ModelConfig:
    return LanguageModel(ModelConfig(**(SHAPE | CONFIGS[architecture][0]))).config


def random_parts(config: ModelConfig, leaves=LINEAR, *, rank: int = 2, dora: bool = False) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(3)
    return {
        name.removesuffix(".weight"): LowRank(
            6.0,
            torch.randn(rank, shape[1], generator=generator),
            torch.randn(shape[0], rank, generator=generator),
            torch.rand(shape[0], generator=generator) if dora else None,
        )
        for name, shape in parameter_shapes(config).items()
        if name.rpartition(".")[0].rpartition(".")[2] in leaves and name.endswith(".weight")
    }


def write(out: Path, config: ModelConfig, parts: dict[str, LowRank], **options) -> Path:
    weights = {name: torch.ones(shape) for name, shape in parameter_shapes(config).items()}
    head = {name: tensor for name, tensor in weights.items() if name.startswith("classifier")}
    settings = {"weights": weights, "base": "../base", "base_sha256": "", "provenance": {"猫": 1}, **options}
    return write_adapter(out, architecture_of(config), parts, head, **settings)


def same(a: dict[str, LowRank], b: dict[str, LowRank]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].a_RI, part.a_RI)
        and torch.equal(a[name].b_OR, part.b_OR)
        and a[name].alpha == part.alpha
        and (a[name].magnitude_O is None) == (part.magnitude_O is None)
        and (part.magnitude_O is None or torch.equal(a[name].magnitude_O, part.magnitude_O))
        for name, part in b.items()
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_goes_out_comes_back(architecture, dora, tmp_path):
    config = config_of(architecture)
    parts = random_parts(config, dora=dora)
    files = {"chat_template.jinja": "{{ 猫 }}".encode()}
    out = write(tmp_path / "a", config, parts, files=files, dropout=0.25)
    adapter = read_adapter(out)
    back, head = read_parts(adapter, architecture_of(config))
    assert same(back, parts)
    assert set(head) == {name for name in parameter_shapes(config) if name.startswith("classifier")}
    assert (adapter.dora, adapter.dropout, adapter.base, adapter.provenance) == (dora, 0.25, "../base", {"猫": 1})
    assert adapter.files == files
    assert is_adapter(out)
    written = write(tmp_path / "b", config, parts, files=files, dropout=0.25)
    assert all((written / name).read_bytes() == (out / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


CHOICES = [LINEAR, ("q_proj", "v_proj"), ("down_proj",), ("o_proj",)]


@pytest.mark.parametrize(
    ("architecture", "leaves"),
    [*((name, leaves) for name in CONFIGS for leaves in CHOICES), ("BertForMaskedLM", ("head_dense",))],
)
def test_target_modules_select_by_their_ends_what_was_chosen_and_nothing_else(architecture, leaves):
    config = config_of(architecture)
    known = architecture_of(config)
    chosen = {p.path for p in known.linears if any(m.rpartition(".")[2] in leaves for m in p.modules)}
    assert chosen
    targets = target_modules(known, chosen)
    paths = [stored.name.rpartition(".")[0] for stored in known.family.layout(config)]
    paths += ["pooler.dense", "bert.pooler.dense", "lm_head", "cls.predictions.decoder"]
    paths += [path.rpartition(".")[0] for path in paths]
    selected = {path for path in paths if any(path == t or path.endswith("." + t) for t in targets)}
    assert selected == chosen
    if architecture == "LlamaForCausalLM":
        assert set(targets) <= set(LINEAR)


def test_names_are_short_where_they_can_be_and_whole_where_they_must():
    known = architecture_of(config_of("BertForMaskedLM"))
    ends = {"attention.self.query": "query", "intermediate.dense": "intermediate.dense"}
    for end, short in ends.items():
        assert target_modules(known, {p.path for p in known.linears if p.path.endswith(end)}) == [short]
    chosen = {p.path for p in known.linears if p.modules[0].endswith("down_proj")}
    assert target_modules(known, chosen) == sorted(chosen)
    both = chosen | {p.path for p in known.linears if p.modules[0].endswith("o_proj")}
    assert target_modules(known, both) == ["output.dense"]


GPT2 = "GPT2LMHeadModel"


def test_layers_that_share_one_are_stacked_block_by_block(tmp_path):
    config = config_of(GPT2)
    parts = random_parts(config, ("q_proj", "v_proj", "down_proj"))
    out = write(tmp_path / "a", config, parts)
    values = json.loads((out / ADAPTER_CONFIG).read_text())
    assert values["target_modules"] == ["c_attn", "mlp.c_proj"]
    assert (values["r"], values["lora_alpha"]) in ((2, 6), (4, 12))
    assert values["fan_in_fan_out"]
    tensors = read_tensors(out / ADAPTER_WEIGHTS)
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    a, b = tensors[key.format("A")], tensors[key.format("B")]
    q, v = parts["model.layers.1.self_attn.q_proj"], parts["model.layers.1.self_attn.v_proj"]
    whole = torch.cat([q.b_OR @ q.a_RI, torch.zeros(16, 16), v.b_OR @ v.a_RI])
    torch.testing.assert_close(b @ a, whole)


def test_a_fused_adapter_made_elsewhere_is_split_exactly(tmp_path):
    config = config_of(GPT2)
    out = write(tmp_path / "a", config, random_parts(config, ("q_proj",), dora=True))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in read_tensors(out / ADAPTER_WEIGHTS).items()
    }
    rewrite(out, tensors=tensors)
    parts, _ = read_parts(read_adapter(out), architecture_of(config))
    prefix = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    a, b = tensors[prefix + "A.weight"], tensors[prefix + "B.weight"]
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    assert torch.equal(torch.cat([parts[name].b_OR @ parts[name].a_RI for name in names]), b @ a)
    assert torch.equal(torch.cat([parts[name].magnitude_O for name in names]), tensors[prefix + "magnitude_vector"])
    assert {parts[name].alpha for name in names} == {6.0}


def rewrite(folder: Path, *, tensors=None, metadata=None, **values) -> Path:
    """Write an adapter again with other tensors, metadata or settings; `...` removes one."""
    file = folder / ADAPTER_WEIGHTS
    kept = read_header(file).metadata if metadata is None else metadata
    content = {name: tensor.clone() for name, tensor in read_tensors(file).items()} if tensors is None else tensors
    write_safetensors(file, content, kept)
    settings = json.loads((folder / ADAPTER_CONFIG).read_text()) | values
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps({key: value for key, value in settings.items() if value is not ...})
    )
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    config = config_of("LlamaForCausalLM")
    return write(tmp_path / "a", config, random_parts(config, ("q_proj", "down_proj")))


def check(folder: Path, config: ModelConfig | None = None) -> Adapter:
    adapter = read_adapter(folder)
    fit(adapter, architecture_of(config or config_of("LlamaForCausalLM")))
    return adapter


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"peft_type": "IA3"}, "`peft_type` 'IA3'"),
        ({"peft_type": ...}, "`peft_type` 'None'"),
        ({"task_type": "TOKEN_CLS"}, "`task_type` 'TOKEN_CLS'"),
        ({"bias": "all"}, "`bias` 'all'"),
        ({"r": 0}, "`r` '0'"),
        ({"r": 3}, "its rank is 3"),
        ({"r": True}, "`r` 'True'"),
        ({"r": "2"}, "`r` '2'"),
        ({"lora_alpha": None}, "`lora_alpha` 'None'"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` 'inf'"),
        ({"lora_alpha": 10**400}, "`lora_alpha` '1000"),
        ({"lora_alpha": 1e300}, "`lora_alpha` '1e"),
        ({"lora_dropout": 1.0}, "`lora_dropout` '1.0'"),
        ({"use_dora": True}, "has no `magnitude`"),
        ({"use_dora": "yes"}, "`use_dora` 'yes'"),
        ({"use_rslora": 1}, "`use_rslora` '1'"),
        ({"rank_pattern": {"q_proj": 3}}, "its rank is 3"),
        ({"rank_pattern": [1]}, "`rank_pattern` '[1]'"),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern has `q_proj` 'much'"),
        ({"alpha_pattern": {"(a+)+": 2}}, "alpha_pattern` has the key `(a+)+`"),
        ({"rank_pattern": {"q_proj\\": 2}}, "rank_pattern` has the key `q_proj\\`"),
        ({"layers_to_transform": [0]}, "`layers_to_transform` '[0]'"),
        ({"lora_bias": True}, "`lora_bias` 'True'"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices` '[1, 2]'"),
        ({"layer_replication": [[0, 1]]}, "`layer_replication`"),
        ({"base_model_name_or_path": 7}, "`base_model_name_or_path` '7'"),
        ({"something_new": {"on": True}}, "`something_new`"),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(values, part, folder):
    check(folder)
    rewrite(folder, **values)
    with pytest.raises(ArtifactError) as caught:
        read_parts(read_adapter(folder), architecture_of(config_of("LlamaForCausalLM")))
    assert str(folder) in str(caught.value)
    assert part in str(caught.value)


def test_settings_that_change_nothing_are_passed_over(folder):
    kept = {"peft_version": "9.9", "revision": "main", "target_modules": "all-linear", "inference_mode": False}
    more = {"loftq_config": {}, "something_new": None, "another": False, "exclude_modules": ["k_proj"]}
    check(rewrite(folder, **kept, **more))


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("base_model.model.", "model.", "does not start with"),
        ("q_proj.lora_A", "q_proj.lora_embedding_A", "lora_embedding_A"),
        ("q_proj.lora_A", "w_pack.lora_A", "has no `a`"),
        ("q_proj", "w_pack", "`model.layers.0.self_attn.w_pack`, which is not an adaptable layer of the base"),
        ("model.layers.0.self_attn.q_proj", "lm_head", "`lm_head`"),
        ("layers.1.mlp", "layers.7.mlp", "layers.7"),
        ("model.layers.0.mlp.down_proj.lora_A.weight", "model.embed_tokens.weight", "embed_tokens"),
    ],
)
def test_tensors_that_are_not_of_the_base_are_named(old, new, part, folder):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    changed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    if "embed_tokens" in new:
        changed = tensors | {f"base_model.model.{new}": torch.zeros(40, 16)}
    rewrite(folder, tensors=changed)
    with pytest.raises(ArtifactError, match=re.escape(part)):
        check(folder)


@pytest.mark.parametrize(
    ("shape", "part"),
    [((2, 17), "has 17 inputs and 16 outputs"), ((3, 16), "its rank is 2"), ((2, 16, 1), "its rank is 2")],
)
def test_shapes_that_do_not_fit_are_named(shape, part, folder):
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(folder, tensors=tensors | {key: torch.zeros(shape)})
    with pytest.raises(ArtifactError, match=part) as caught:
        check(folder)
    assert "layers.0.self_attn.q_proj" in str(caught.value)


def test_a_head_of_another_shape_or_of_no_head_is_refused(tmp_path):
    config = config_of("BertForSequenceClassification")
    out = write(tmp_path / "a", config, random_parts(config, ("q_proj",)))
    check(out, config)
    with pytest.raises(ArtifactError, match=r"the full parameters .*`bert\.pooler\.dense\.weight`"):
        check(out, config_of("BertForMaskedLM"))
    tensors = {name: tensor.clone() for name, tensor in read_tensors(out / ADAPTER_WEIGHTS).items()}
    rewrite(out, tensors=tensors | {"base_model.model.classifier.weight": torch.zeros(9, 16)})
    with pytest.raises(ArtifactError, match=r"`classifier.weight` has the shape \(9, 16\)"):
        check(out, config)


def test_numbers_that_are_no_floats_and_files_that_are_damaged_are_refused(folder):
    tensors = {name: tensor.to(torch.int8) for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    rewrite(folder, tensors=tensors)
    with pytest.raises(ArtifactError, match="dtype I8"):
        check(folder)
    rewrite(folder, tensors={})
    with pytest.raises(ArtifactError, match="no tensor"):
        check(folder)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="not a safetensors file, but text"):
        check(folder)
    for text in ("{", "[]", "[" * 100_000):
        (folder / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(ArtifactError, match="adapter_config"):
            check(folder)


@pytest.mark.parametrize("metadata", [{"llmctl.ranks": "[]"}, {"llmctl.ranks": "{"}, {"llmctl.provenance": "7"}])
def test_hostile_metadata_is_refused(metadata, folder):
    rewrite(folder, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"llmctl\."):
        read_parts(
            adapter := read_adapter(folder), architecture_of(config_of("LlamaForCausalLM"))
        ) and adapter.provenance


@pytest.mark.parametrize("ranks", [{"q": 2, "k": -4, "v": 8}, {"q": 1e9}, {"q": 3, "k": 3}, {"q": True}, {"q": "2"}])
def test_ranks_of_the_header_are_not_believed(ranks, tmp_path):
    config = config_of(GPT2)
    parts = random_parts(config, ("q_proj", "k_proj", "v_proj"))
    out = write(tmp_path / "a", config, parts)
    said = {f"model.layers.0.self_attn.{leaf}_proj": rank for leaf, rank in ranks.items()}
    rewrite(out, metadata={"llmctl.ranks": json.dumps(said)})
    back, _ = read_parts(read_adapter(out), architecture_of(config))
    for name, part in parts.items():
        torch.testing.assert_close(back[name].b_OR @ back[name].a_RI, part.b_OR @ part.a_RI)
        assert back[name].alpha / back[name].rank == part.alpha / part.rank


def test_pickles_and_missing_files_are_refused(folder):
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").rename(folder / "other")
    with pytest.raises(NotFoundError, match=ADAPTER_WEIGHTS):
        read_adapter(folder)
    (folder / "other").rename(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).unlink()
    assert is_adapter(folder)
    with pytest.raises(NotFoundError, match=ADAPTER_CONFIG):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "path", "matches"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.my_q_proj", False),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.1.q_proj", "model.layers.11.q_proj", False),
        (r"^model\.layers\.\d\.q_proj", "model.layers.3.q_proj", True),
        (".*q_proj", "model.layers.3.q_proj", True),
        ("k_proj", "model.layers.3.q_proj", False),
    ],
)
def test_patterns_match_as_they_do_in_peft(key, path, matches):
    assert (from_pattern(compiled({key: 3}, ""), path) == 3) == matches


@pytest.mark.parametrize("key", ["(a|a)*b", "a**", ".*.*.*x", "a?" * 60, "[a]+[b]+", "", "q" * 500, "a{1,9}{1,9}"])
def test_patterns_that_could_take_forever_are_refused(key):
    with pytest.raises(ArtifactError, match="the key"):
        compiled({key: 3}, "adapter_config.json")


def test_nothing_is_replaced_unasked(folder):
    config = config_of("LlamaForCausalLM")
    parts = random_parts(config, ("v_proj",))
    with pytest.raises(OutputError, match="already exists"):
        write(folder, config, parts)
    write(folder, config, parts, force=True)
    assert same(read_parts(read_adapter(folder), architecture_of(config))[0], parts)
    (folder / "model.safetensors").write_bytes(b"")
    assert not is_adapter(folder)
    with pytest.raises(OutputError, match="it contains a model"):
        write(folder, config, parts, force=True)


def test_an_adapter_is_written_into_a_folder_that_is_there(tmp_path):
    config = config_of("LlamaForCausalLM")
    (tmp_path / "run.json").write_text("{}")
    out = write(tmp_path, config, random_parts(config))
    assert is_adapter(out)
    assert (out / "run.json").exists()


def test_the_identity_is_that_of_the_weights_however_they_lie(tmp_path):
    def make(name: str, seed: int = 0, **provenance) -> Path:
        model = LanguageModel(ModelConfig(**SHAPE, tie_embeddings=False))
        initialize(model, seed)
        return write_artifact(tmp_path / name, model.config, model.state_dict(), files={}, provenance=provenance)

    first = make("a")
    shards = make("b")
    tensors = {name: tensor.clone() for name, tensor in read_tensors(shards / "model.safetensors").items()}
    names = sorted(tensors)
    for number in range(2):
        write_safetensors(shards / f"{number}.safetensors", {name: tensors[name] for name in names[number::2]}, {})
    (shards / "model.safetensors").unlink()
    index = {"weight_map": {name: f"{number}.safetensors" for number in range(2) for name in names[number::2]}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    said = [identity(read_artifact(path).tensors) for path in (first, make("c", note="x" * 999), shards)]
    assert len(set(said)) == 1
    assert identity(read_artifact(make("d", seed=1)).tensors) not in said


def test_errors_are_ours_whatever_is_in_the_file(folder):
    data = (folder / ADAPTER_WEIGHTS).read_bytes()
    for cut in range(0, len(data), 97):
        (folder / ADAPTER_WEIGHTS).write_bytes(data[:cut])
        with pytest.raises(LlmctlError):
            check(folder)

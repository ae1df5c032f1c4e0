"""Adapters on models: on and off, added up, found from their folder, refused on another base."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.adapters import apply_adapters, load_adapter, save_adapter
from llmctl.artifacts.find import announce, resolve_model
from llmctl.artifacts.load import load_model
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import AdapterConfig, ModelConfig
from llmctl.converting.convert import export_model, import_model
from llmctl.errors import ArtifactError, NotFoundError, OutputError, UsageError
from llmctl.formats.artifact import ADAPTER_CONFIG, read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.lora import adapter_modules, adapter_state, add_adapters, merge_adapters
from llmctl.model.transformer import LanguageModel, initialize

ALL = AdapterConfig().targets
KINDS = {
    "decoder": {"tie_embeddings": False},
    "gpt2": {"positions": "learned", "norm": "layernorm", "gated": False, "attention_bias": True, "mlp_bias": True},
    "native": {"positions": "sinusoidal", "attention_windows": (0, 4)},
    "encoder": {"family": "encoder"},
    "encoder_decoder": {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0},
}
IDS = torch.arange(18).reshape(2, 9)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_base(out: Path, *, seed: int = 0, **fields) -> Path:
    shape = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_positions": 32, "init_std": 0.3}
    model = LanguageModel(ModelConfig(**shape, **fields))
    initialize(model, seed)
    return write_artifact(
        out, model.config, model.state_dict(), files={"special_tokens_map.json": b"{}"}, provenance={"base": 1}
    )


def make_adapter(base: Path, out: Path, *, seed: int = 1, targets=ALL, alpha: float = 4, dora=False, **options) -> Path:
    loaded = load_model(base)
    add_adapters(loaded.model, rank=2, alpha=alpha, targets=targets, dora=dora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(loaded.model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    options = {"provenance": {"seed": seed}, **options}
    return save_adapter(loaded.model, out, base=loaded.artifact, **options)


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    if model.config.n_labels:
        return model.classify(IDS)
    inputs = {"decoder_input_ids_BT": IDS} if model.config.family == "encoder_decoder" else {}
    return model.eval()(IDS, **inputs)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_use_an_adapter_gives_the_same_model(kind, dora):
    base = make_base(Path("base"), **KINDS[kind])
    folder = make_adapter(base, Path("adapter"), dora=dora)
    unmerged = load_model(base)
    names = load_adapter(unmerged, folder)
    assert sorted(names) == sorted(adapter_modules(unmerged.model))
    expected = logits(unmerged.model)
    plain = load_model(base)
    before = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    applied = apply_adapters(plain, [str(folder)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.model.state_dict().items())
    merge_adapters(unmerged.model)
    exported = export_model(folder, Path("whole"), to="hf")
    imported = import_model(folder, Path("whole.safetensors"))
    for model in (
        applied.model,
        load_model(folder).model,
        load_model(folder / "adapter_model.safetensors").model,
        load_model(exported).model,
        load_model(imported).model,
    ):
        state = model.state_dict()
        for name, tensor in unmerged.model.state_dict().items():
            # DoRA takes norms of rows, whose sums depend on where in memory a row begins: on some processors by a bit.
            torch.testing.assert_close(state[name], tensor, rtol=3e-7 if dora else 0, atol=0)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert read_artifact(exported).provenance == {
        "base": 1,
        "adapters": [{"name": "adapter", "weight": 1.0, "seed": 1}],
    }
    assert read_artifact(exported).files.keys() == read_artifact(base).files.keys()
    assert read_artifact(exported).architecture == read_artifact(base).architecture


@pytest.mark.parametrize("kind", KINDS)
def test_several_are_added_each_times_its_weight(kind):
    base = make_base(Path("base"), **KINDS[kind])
    one, two = make_adapter(base, Path("one")), make_adapter(base, Path("two"), seed=2, targets=("q_proj",), alpha=3)
    plain, loaded = load_model(base).model.state_dict(), load_model(base)
    changed = apply_adapters(loaded, [str(one), "two=0.5"]).model.state_dict()
    deltas = [{name: load_model(path).model.state_dict()[name] - plain[name] for name in plain} for path in (one, two)]
    for name, tensor in plain.items():
        torch.testing.assert_close(changed[name], tensor + deltas[0][name] + 0.5 * deltas[1][name], atol=1e-6, rtol=0)
    assert any((changed[name] - tensor - deltas[0][name]).abs().max() > 1e-3 for name, tensor in plain.items())
    gone = apply_adapters(loaded, [f"{one}=-1", str(one)]).model.state_dict()
    assert all(torch.allclose(gone[name], tensor, atol=1e-6) for name, tensor in plain.items())
    assert apply_adapters(loaded, []) is loaded


def test_bfloat16_is_rounded_once():
    base = make_base(Path("base"))
    folder = make_adapter(base, Path("adapter"))
    half = load_model(folder, dtype="bfloat16").model.state_dict()
    assert all(torch.equal(half[n], tensor.bfloat16()) for n, tensor in load_model(folder).model.state_dict().items())
    applied = apply_adapters(load_model(base, dtype="bfloat16"), [str(folder)]).model
    assert {parameter.dtype for parameter in applied.parameters()} == {torch.bfloat16}


def test_a_model_does_not_take_an_adapters_place_unasked():
    folder = make_adapter(make_base(Path("base")), Path("adapter"))
    with pytest.raises(OutputError, match="`adapter` already exists"):
        export_model(folder, folder, to="hf")


def test_tied_weights_stay_tied():
    base = make_base(Path("base"))
    model = apply_adapters(load_model(base), [str(make_adapter(base, Path("a")))]).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_base_is_refused():
    base = make_base(Path("base"))
    folder = make_adapter(base, Path("adapter"))
    other = load_model(make_base(Path("other"), seed=5))
    for use in (lambda: apply_adapters(other, ["adapter"]), lambda: load_adapter(other, folder)):
        with pytest.raises(ArtifactError, match="trained on weights other than those of `other`") as caught:
            use()
        assert caught.value.hint == "use its own base, `../base`"
    shutil.rmtree("base")
    Path("other").rename("base")
    with pytest.raises(ArtifactError, match="trained on weights other than those of `base`") as caught:
        load_model(folder)
    assert "changed since" in caught.value.hint


def test_the_base_is_found_from_the_adapter_or_from_here_or_in_full(home, monkeypatch):
    base = make_base(Path("models/base"))
    folder = make_adapter(base, Path("runs/0001-a"))
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert values["base_model_name_or_path"] == "../../models/base"
    monkeypatch.chdir(home / "models")
    load_model(home / "runs/0001-a")
    away = make_adapter(home / "models/base", home / "runs/0002-b")
    assert json.loads((away / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == str(home / "models/base")
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    load_model(away)
    (away / ADAPTER_CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": "models/base"}))
    with pytest.raises(NotFoundError, match="`models/base`, the base of the adapter") as caught:
        load_model(away)
    assert "-m BASE --adapter" in caught.value.hint
    monkeypatch.chdir(home)
    load_model(away)
    (away / ADAPTER_CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(NotFoundError, match="does not name its base"):
        load_model(away)


def test_a_link_to_the_base_is_followed_when_it_is_named():
    base = make_base(Path("runs/0001-a"))
    Path("runs/latest").symlink_to("0001-a")
    folder = make_adapter(base.parent / "latest", Path("adapter"))
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "../runs/0001-a"


def test_an_adapter_of_an_adapter_and_one_that_is_its_own_base():
    base = make_base(Path("base"))
    one = make_adapter(base, Path("one"))
    two = make_adapter(one, Path("two"), seed=2)
    load_model(two)
    with pytest.raises(ArtifactError, match="weights other"):
        apply_adapters(load_model(base), [str(two)])
    values = json.loads((one / ADAPTER_CONFIG).read_text()) | {"base_model_name_or_path": "../two"}
    (one / ADAPTER_CONFIG).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="its own base"):
        load_model(two)


def test_lengths_and_heads_are_not_added_up():
    base = make_base(Path("base"))
    make_adapter(base, Path("lora"))
    make_adapter(base, Path("dora"), dora=True)
    loaded = load_model(base)
    for names, part in (
        (["dora", "lora"], "which cannot be combined"),
        (["dora=0.5"], "so its weight must be 1, not 0.5"),
    ):
        with pytest.raises(UsageError, match=f"`dora` is a DoRA adapter, {part}"):
            apply_adapters(loaded, names)
    with_head = make_base(Path("classifier"), n_labels=3, pooling="last")
    for name in ("first", "second"):
        make_adapter(with_head, Path(name), targets=("q_proj",))
    with pytest.raises(UsageError, match="both contain a classification head"):
        apply_adapters(load_model(with_head), ["first", "second"])
    with pytest.raises(UsageError, match="contains a classification head, so its weight must be 1"):
        apply_adapters(load_model(with_head), ["first=2"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_becomes_a_classifier(kind):
    base = make_base(Path("base"), **KINDS[kind])
    config = load_model(base).model.config
    head = {"n_labels": 3, "pooling": "mean", "pooled_activation": "tanh", "labels": ("no", "yes", "猫")}
    model = LanguageModel(ModelConfig(**{**vars(config), **head}))
    initialize(model, 3)
    body = load_model(base).model.state_dict()
    model.load_state_dict({name: body.get(name, tensor) for name, tensor in model.state_dict().items()})
    add_adapters(model, rank=2, alpha=4, targets=ALL)
    for tensor in adapter_state(model).values():
        tensor.add_(0.1)
    folder = save_adapter(model, Path("adapter"), base=read_artifact(base), provenance={})
    for loaded in (load_model(folder), apply_adapters(load_model(base), ["adapter"])):
        assert loaded.model.config == model.config
        torch.testing.assert_close(logits(loaded.model), logits(model.eval()), atol=1e-5, rtol=1e-5)
    exported = export_model(folder, Path("whole.safetensors"), to="single")
    assert load_model(exported).model.config == model.config
    torch.testing.assert_close(logits(load_model(exported).model), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="is a classifier, which cannot generate"):
        apply_adapters(load_model(base), ["adapter"], able="generate")
    with pytest.raises(ArtifactError, match="`adapter`"):  # whose head a language model lacks
        load_adapter(load_model(base), folder)


def test_what_is_beside_an_adapter_goes_before_what_is_beside_its_base():
    base = make_base(Path("base"))
    files = {"chat_template.jinja": "{{ 猫 }}".encode(), "special_tokens_map.json": b"{ }"}
    folder = make_adapter(base, Path("adapter"), files=files)
    for artifact in (read_model(folder), apply_adapters(load_model(base), [str(folder)]).artifact):
        assert artifact.files.items() >= files.items()
        assert "generation_config.json" in artifact.files


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("adapter=much", "`much`"),
        ("adapter=nan", "`nan`"),
        ("adapter=", "``"),
        ("base", "not an adapter folder"),
        ("", "empty"),
    ],
)
def test_names_that_cannot_be_are_refused(name, part):
    base = make_base(Path("base"))
    make_adapter(base, Path("adapter"))
    with pytest.raises(UsageError, match=part):
        apply_adapters(load_model(base), [name])
    with pytest.raises(NotFoundError, match="`nowhere`"):
        apply_adapters(load_model(base), ["nowhere=2"])


def test_an_adapter_is_found_like_a_model(home, monkeypatch):
    base = make_base(Path("base"))
    folder = make_adapter(base, Path("runs/0001-a"))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "family": "decoder", "finished": "1"}))
    for name in (None, "0001", "latest", "runs/0001-a"):
        assert resolve_model(name, able="generate").path == folder
    assert "an adapter for `../../base`" in announce(resolve_model(None, able="generate"))
    same = make_adapter(base, Path("a=b"))
    assert apply_adapters(load_model(base), [str(same)]).artifact.path == same
    assert apply_adapters(load_model(base), ["0001=2"]).artifact.path == folder
    monkeypatch.chdir(folder)
    assert resolve_model(None, able="any").path == Path()
    load_model(Path())


def test_adapters_are_checked_without_torch():
    make_adapter(make_base(Path("base")), Path("adapter"))
    code = (
        "import sys; from pathlib import Path; from llmctl.artifacts.with_adapters import read_model; "
        "from llmctl.artifacts.adapters import base_of; read_model(Path('adapter')); base_of(['adapter']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0

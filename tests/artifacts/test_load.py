"""Which model a command means: the order, the names, and the errors that say how to get one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.find import announce, default_file, nothing_found, resolve_model
from llmctl.artifacts.load import Loaded, is_bare, load_model, without_weights
from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.runs.folder import runs_folder


def model(family: str = "decoder", **fields) -> LanguageModel:
    made = LanguageModel(ModelConfig(family=family, vocab_size=330, d_model=16, n_layers=1, n_heads=2, **fields))
    initialize(made, 0)
    return made


def write(path: Path, made: LanguageModel, files: dict[str, bytes] | None = None) -> Path:
    return write_artifact(path, made.config, made.state_dict(), files=files or {}, provenance={})


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    return tmp_path


def add_run(name: str, family: str, status: str = "finished", finished: str = "2026-01-01") -> Path:
    path = write(Path("runs") / name, model(family))
    (path / "run.json").write_text(json.dumps({"status": status, "family": family, "finished": finished}))
    return path


def test_nothing_says_how_to_make_one(home):
    for able, hint in (("generate", "llmctl pretrain"), ("fill", "--objective mlm")):
        with pytest.raises(NotFoundError, match="no model") as caught:
            resolve_model(None, able=able)
        assert hint in caught.value.hint


def test_the_order(home, monkeypatch):
    write(home / "chosen", model())
    default_file().parent.mkdir(parents=True)
    default_file().write_text(f"{home / 'chosen'}\n")
    assert resolve_model(None, able="generate").path == home / "chosen"
    run = add_run("0001-a", "decoder")
    assert resolve_model(None, able="generate").path == run
    (home / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert resolve_model(None, able="generate").path == Path()
    monkeypatch.setenv("LLMCTL_MODEL", str(home / "chosen"))
    assert resolve_model(None, able="generate").path == home / "chosen"
    assert resolve_model("runs/0001-a", able="generate").path == run


def test_only_finished_runs_that_can_are_taken(home):
    wanted = add_run("0001-a", "decoder", finished="2026-01-01")
    add_run("0002-b", "encoder", finished="2026-01-02")
    add_run("0003-c", "decoder", status="running")
    (Path("runs") / "0004-d").mkdir()
    (Path("runs") / "0004-d" / "run.json").write_text("{broken")
    found = resolve_model(None, able="generate")
    assert found.path == wanted
    assert "newest run" in announce(found)
    assert resolve_model(None, able="fill").path.name == "0002-b"
    assert resolve_model("latest", able="any").path.name == "0002-b"


def test_a_run_begun_elsewhere_is_the_latest_too(home):
    """What `llmctl runs` lists is what `latest` means: folders of any name, in `runs/` or begun with `-o` beside it."""
    from llmctl.runs.folder import note_elsewhere
    from llmctl.runs.history import list_runs

    add_run("0001-a", "decoder", finished="2026-01-01")
    named = add_run("named", "decoder", finished="2026-01-02")
    assert resolve_model("latest", able="any").path == named
    elsewhere = add_run("../out", "encoder", finished="2026-01-03").resolve()
    assert resolve_model("latest", able="any").path == named
    note_elsewhere(elsewhere)
    assert resolve_model("latest", able="any").path == Path("out")
    assert resolve_model(None, able="generate").path == named
    assert {run.path for run in list_runs()[0]} == {Path("runs/0001-a"), named, Path("out")}


def test_an_encoder_never_serves_generate(home):
    add_run("0001-a", "encoder")
    with pytest.raises(NotFoundError, match="encoder") as caught:
        resolve_model(None, able="generate")
    assert "llmctl fill" in caught.value.hint


def test_names_and_prefixes(home):
    first, second = add_run("0001-x-a", "decoder"), add_run("0011-x-b", "decoder")
    assert resolve_model("0001", able="generate").path == first
    assert resolve_model("0011-x", able="generate").path == second
    with pytest.raises(UsageError, match="more than one"):
        resolve_model("00", able="generate")
    with pytest.raises(NotFoundError, match="0007"):
        resolve_model("0007", able="generate")


def test_runs_are_found_from_below_and_elsewhere(home, monkeypatch):
    add_run("0001-a", "decoder")
    (home / "sub" / "deep").mkdir(parents=True)
    monkeypatch.chdir(home / "sub" / "deep")
    assert runs_folder().resolve() == home / "runs"
    monkeypatch.setenv("LLMCTL_RUNS", str(home / "other"))
    assert runs_folder() == home / "other"


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "relative"])
def test_loading_gives_the_same_logits(home, positions: str):
    made = model(positions=positions)
    loaded = load_model(write(home / "m", made))
    ids = torch.arange(10)[None]
    assert torch.equal(loaded.model(ids), made.eval()(ids))
    assert not loaded.model.training


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_loading_does_not_import_torchs_compiler(home, family: str):
    path = write(home / "m", model(family, positions="relative", attention_scale=1.0, tie_embeddings=False))
    code = (
        "import sys; from pathlib import Path; from llmctl.artifacts.load import load_model; "
        "load_model(Path(sys.argv[1])); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code, str(path)], check=False).returncode == 0


def test_a_model_without_weights_has_their_shapes(home):
    made = model(n_token_types=2, positions="learned", query_layer=True)
    empty = without_weights(made.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_a_tokenizer_that_does_not_fit_is_refused(home, text_tokenizer):
    small = LanguageModel(ModelConfig(vocab_size=100, d_model=16, n_layers=1, n_heads=2))
    path = write(home / "m", small, text_tokenizer.files())
    with pytest.raises(ArtifactError, match="100"):
        load_model(path)


@pytest.mark.parametrize(("option", "value"), [("dtype", "int3"), ("device", "tpu")])
def test_unknown_places_and_precisions_are_refused(home, option: str, value: str):
    path = write(home / "m", model())
    with pytest.raises(UsageError, match=value):
        load_model(path, **{option: value})


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere/0001", "**", "[a", "../0001"])
def test_names_of_nothing_are_not_found_whatever_they_look_like(home, name: str):
    add_run("0001-a", "decoder")
    with pytest.raises(NotFoundError) as caught:
        resolve_model(name, able="generate")
    assert f"`{name}`" in str(caught.value)


def test_an_empty_name_never_means_another_model(home, monkeypatch):
    add_run("0001-a", "decoder")
    with pytest.raises(UsageError, match="empty"):
        resolve_model("", able="generate")
    monkeypatch.setenv("LLMCTL_MODEL", "")
    assert resolve_model(None, able="generate").path.name == "0001-a"


def test_a_run_is_named_with_or_without_its_folder(home):
    run, longer = add_run("0001-a", "decoder"), add_run("0001-a-b", "decoder")
    (Path("runs") / "latest").symlink_to("0001-a-b")
    for name in ("runs/0001-a", "0001-a"):
        assert resolve_model(name, able="generate").path == run
    assert resolve_model("runs/0001-a-", able="generate").path == longer
    assert resolve_model("runs/latest", able="generate").path.resolve() == longer.resolve()


def test_a_default_that_is_gone_says_so(home):
    default_file().parent.mkdir(parents=True)
    default_file().write_text("/gone/away\n")
    with pytest.raises(NotFoundError, match="/gone/away") as caught:
        resolve_model(None, able="generate")
    assert "llmctl use" in caught.value.hint


def test_weights_in_parts_in_this_directory_count(home):
    (home / "model.safetensors.index.json").write_text("{}")
    assert resolve_model(None, able="any").path == Path()


def test_a_record_that_is_no_object_is_passed_over(home):
    run = add_run("0001-a", "decoder")
    (add_run("0002-b", "decoder") / "run.json").write_text("[1]")
    assert resolve_model(None, able="generate").path == run


def test_the_announcement_counts_parameters(home):
    made = model()
    path = write(home / "m", made)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert f"named, {count / 1000:.3g}k parameters" in announce(resolve_model(str(path), able="any"))
    (path / "model.safetensors").write_bytes(b"damaged")
    assert announce(resolve_model(str(path), able="any")) == f"model: {path} (named)"


@pytest.mark.parametrize(
    ("family", "able", "said"), [("encoder", "generate", "an encoder"), ("decoder", "fill", "a decoder")]
)
def test_models_that_cannot_are_refused_before_their_weights_are_read(home, family: str, able: str, said: str):
    path = write(home / "m", model(family))
    with pytest.raises(UsageError, match=f"{said} model, which cannot {able}"):
        load_model(path, able=able)  # type: ignore[arg-type]
    add_run("0001-a", family)
    assert f"is {said} model" in str(nothing_found(able))  # type: ignore[arg-type]


def test_a_model_without_a_classification_head_says_how_to_train_one(home):
    path = write(home / "m", model("encoder"))
    with pytest.raises(UsageError, match="is an encoder model without a classification head, which") as caught:
        load_model(path, able="classify")
    assert caught.value.hint.startswith(f"`llmctl finetune {path} DATA --task classify` trains one")
    write(home / "e", model("encoder"))
    (home / "e" / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"has no `model\.safetensors`: it"):
        load_model(home / "e")


def test_ours_begin_with_bos_whatever_is_said(tmp_path, text_tokenizer):
    made = model()
    files = {"tokenizer_config.json": b'{"add_bos_token": false}'}
    assert Loaded(made, text_tokenizer, Artifact(tmp_path, "", made.config, files, {})).frame.before


@pytest.mark.parametrize(("head", "is_without"), [({}, True), ({"head_transform": True, "logits_bias": True}, False)])
def test_a_bare_encoder_is_known_by_its_class(head, is_without, tmp_path):
    bert = {"norm": "layernorm", "norm_position": "post", "embedding_norm": True, "gated": False, "activation": "gelu"}
    bert |= {"attention_bias": True, "mlp_bias": True, "n_token_types": 2}
    loaded = load_model(write(tmp_path / "m", model("encoder", **bert, **head)), device="cpu")
    assert loaded.artifact.architecture.startswith("RoFormer")  # whose name has the "For" of a head in it
    assert is_bare(loaded.artifact) is is_without

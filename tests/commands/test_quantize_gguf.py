"""`llmctl quantize --to gguf`: a file whose blocks are chosen by data, at most as large as asked for."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from llmctl.cli import run
from llmctl.converting.convert import read_gguf
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.gguf.container import read_gguf_header
from llmctl.formats.gguf.model import gguf_codes, gguf_config, gguf_state
from llmctl.formats.gguf.write import TYPES
from llmctl.jobs import quantize as module
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES

pytest.importorskip("gguf", reason="pip install gguf")

TINY = [
    "--set", "train.seq_len=48", "--set", "data.split=blank", "--set", "train.device=cpu",
    "--set", "weights.calibration_rows=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" * 3 for i in range(60))
    Path("text.txt").write_text(text, encoding="utf-8")
    return tmp_path


def quantize(source: Path, *more: str, out: str = "small.gguf") -> int:
    return run(["quantize", str(source), "--to", "gguf", "--calib", "text.txt", *TINY, "-q", "-f", "-o", out, *more])


@pytest.fixture(scope="module")
def wide(models, tmp_path_factory) -> Path:
    """Return a tiny model with rows of 256, which K-quants need."""
    source = read_artifact(models["decoder"])
    model = LanguageModel(replace(source.config, d_model=256, d_ff=256, n_layers=1, init_std=0.15))
    initialize(model, 1)
    folder = tmp_path_factory.mktemp("wide") / "model"
    return write_artifact(folder, model.config, model.state_dict(), files=source.files, provenance={})


def learned(source: Path, *more: str, steps: int = 12, out: str = "small.gguf") -> int:
    options = ["--method", "learned", "--steps", str(steps), "--set", "optim.lr=0.002", "--set", "train.dtype=float32"]
    return quantize(source, *options, *more, out=out)


def report(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)["report"]


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl", "q5_1", "q8_0"])
def test_codes_chosen_by_data_are_nearer_to_the_model_than_the_nearest(teachers, capsys, kind):
    kl = {}
    for method in ("nearest", "guided"):
        assert quantize(teachers["decoder"], "--type", kind, "--method", method, "--json") == 0
        found = report(capsys)
        assert found["gguf"]["proof"]["tensors_equal"] > 0
        assert found["models"]["after"]["bytes"] == Path("small.gguf").stat().st_size
        kl[method] = found["models"]["after"]["kl"]
    assert 0 < kl["guided"] < kl["nearest"]


@pytest.mark.parametrize("kind", [kind for kind, row in TYPES.items() if row.block in BLOCK_SCHEMES])
def test_trained_scales_are_nearer_to_the_model_than_the_chosen_ones(wide, capsys, kind):
    assert learned(wide, "--type", kind, "--json") == 0
    found = report(capsys)
    assert found["models"]["after"]["kl"] < found["models"]["chosen"]["kl"]
    assert found["models"]["after"]["bytes"] == Path("small.gguf").stat().st_size
    assert found["gguf"]["proof"]["tensors_equal"] > 0
    blocks = {name: tensor.block.name for name, tensor in read_gguf_header(Path("small.gguf")).tensors.items()}
    assert blocks["blk.0.ffn_down.weight"] == TYPES[kind].block


def test_codes_stay_and_only_scales_in_the_layers_are_trained(wide, capsys):
    assert learned(wide, "--type", "q4_K", out="run") == 0
    found = []
    for path in ("run/parts/chosen.gguf", "run/model.gguf"):
        header = read_gguf_header(Path(path))
        config = gguf_config(header)
        found.append((gguf_codes(header, config), gguf_state(header, config)))
    (chosen, before), (trained, after) = found
    assert all(torch.equal(codes.codes_OI, trained[name][1].codes_OI) for name, (_, codes) in chosen.items())
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {f"{name}.weight" for name in chosen if "layers." in name}


@pytest.mark.parametrize("is_unproven", [False, True], ids=["", "before the chosen file was verified"])
def test_an_interrupted_training_goes_on_to_the_same_bytes(wide, monkeypatch, capsys, is_unproven):
    assert learned(wide, "--type", "q4_K", "--set", "train.save_every=3", out="whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "part_of", partial(stopping, module.part_of))
        assert learned(wide, "--type", "q4_K", "--set", "train.save_every=3", out="halves") == 130
    assert not Path("halves/model.gguf").exists()
    if is_unproven:
        Path("halves/parts/chosen.json").unlink()
    assert run(["quantize", "--resume", "halves", "-q"]) == 0
    assert Path("halves/model.gguf").read_bytes() == Path("whole/model.gguf").read_bytes()
    assert Path("halves/parts/chosen.gguf").read_bytes() != Path("whole/model.gguf").read_bytes()


def stopping(part_of, *arguments):
    """Return a part that is interrupted halfway."""
    part = part_of(*arguments)

    def make():
        objective = part.objective()
        forward = objective.forward

        def stop(batch):
            if objective.training and objective.progress >= 0.5:
                os.kill(os.getpid(), signal.SIGINT)
            return forward(batch)

        objective.forward = stop
        return objective

    return replace(part, objective=make)


def test_scales_of_mixed_types_are_trained_within_the_size(wide, capsys):
    assert quantize(wide, "--type", "q4_K", "--json") == 0
    target = report(capsys)["models"]["after"]["bytes"]
    assert learned(wide, "--target-size", f"{target / 1000}kB", "--json") == 0
    found = report(capsys)
    assert found["gguf"]["type"] == "mixed"
    assert len(found["gguf"]["tensors"]) > 2
    assert found["models"]["after"]["bytes"] <= target
    assert found["models"]["after"]["kl"] < found["models"]["chosen"]["kl"]


@pytest.mark.parametrize("kind", ["q4_K", "q2_K", "iq4_nl", "q8_0"])
@pytest.mark.parametrize("model", ["wide", "decoder"])
def test_a_dry_run_names_the_bytes_of_the_file(wide, teachers, capsys, model, kind):
    source = wide if model == "wide" else teachers[model]
    assert quantize(source, "--type", kind, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)["file_bytes"]
    assert quantize(source, "--type", kind, "--dry-run") == 0
    assert f"file         {told:,} bytes" in capsys.readouterr().out
    assert quantize(source, "--type", kind, "--method", "nearest") == 0
    assert Path("small.gguf").stat().st_size == told


def test_a_dry_run_of_mixed_types_names_the_most_bytes(wide, capsys):
    assert quantize(wide, "--target-size", "1MB", "--dry-run") == 0
    assert "file         at most 1,000,000 bytes" in capsys.readouterr().out


def test_a_run_folder_holds_the_bytes_of_a_file_once(teachers):
    assert quantize(teachers["decoder"], "--type", "q4_0", out="guided") == 0
    assert Path("guided/model.gguf").samefile("guided/parts/chosen.gguf")
    assert learned(teachers["decoder"], "--type", "q4_0", out="trained", steps=2) == 0
    assert Path("trained/model.gguf").samefile("trained/parts/learned.gguf")
    assert quantize(teachers["decoder"], "--type", "q4_0", out="small.gguf") == 0
    path = next(path for path in Path("runs").glob("*/model.gguf") if not path.parent.is_symlink())
    assert not Path("small.gguf").samefile(path)  # others may change it in place


def test_what_is_measured_is_what_is_in_the_file(teachers, capsys):
    assert quantize(teachers["decoder"], "--type", "iq4_nl", out="run") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == Path("run/model.gguf")
    _, state, _, _ = read_gguf(path)
    assert run(["import", str(path), "-o", "back", "-q"]) == 0
    assert run(["evaluate", "back", "-d", "text.txt", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    blocks = {name: tensor.block.name for name, tensor in read_gguf_header(path).tensors.items()}
    assert blocks["blk.0.ffn_down.weight"] == "IQ4_NL"


def test_types_are_mixed_within_a_size(teachers, capsys):
    sizes, kl = (72, 90), []
    assert quantize(teachers["decoder"], "--type", "q8_0", "--json") == 0
    whole = report(capsys)["models"]["after"]["bytes"]
    for share in sizes:
        target = whole * share // 100
        assert quantize(teachers["decoder"], "--target-size", f"{target / 1000}kB", "--json") == 0
        found = report(capsys)
        assert found["gguf"]["type"] == "mixed"
        assert 0.85 * target < found["models"]["after"]["bytes"] <= target
        kl.append(found["models"]["after"]["kl"])
        tensors = read_gguf_header(Path("small.gguf")).tensors
        for layer in range(2):  # multiplied as one
            names = [f"blk.{layer}.attn_{part}.weight" for part in "qkv"]
            assert len({tensors[name].block for name in names}) == 1
    assert kl[1] < kl[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--type", "q9_0"], "--type takes q8_0"),
        (["--type", "f16"], "f16 is not quantized"),
        (["--type", "mixed"], "mixed needs"),
        (["--type", "q4_0", "--target-size", "1MB"], "exclude each other"),
        (["--target-size", "1kB"], "smallest possible"),
        (["--type", "Q4_K_M"], "did you mean q4_K?"),
        (["--type", ""], "is empty"),
        (["--bits", "2"], "`--bits 2` has no effect"),
        (["--scheme", "w8a8"], "w8a8"),
        (["--type", "q4_0", "--method", "hqq"], "hqq"),
        (
            ["--type", "q4_0", "--method", "learned", "--set", "weights.learn=weights"],
            "trains the scales under fixed codes",
        ),
        (["--type", "q4_0", "--target-bpw", "4.5"], "--target-bpw"),
        (["--type", "q4_0", "-o", "small.safetensors"], "X.gguf"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(teachers, capsys, options, message):
    assert quantize(teachers["decoder"], *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("small.gguf").exists()
    assert not Path("runs").exists()


def test_other_commands_write_no_such_file(teachers, capsys):
    calls = {
        "--type": ["quantize", str(teachers["decoder"]), "--type", "q4_0"],
        "is not supported": ["quantize", str(teachers["decoder"]), "--to", "onnx"],
        "X.safetensors": ["pretrain", "--steps", "1", "-q", "-o", "m.gguf"],
        "WordPiece": ["quantize", str(teachers["bert"]), "--to", "gguf", "--calib", "text.txt"],
        "encoder-decoder": ["quantize", str(teachers["encoder_decoder"]), "--to", "gguf", "--calib", "text.txt"],
    }
    for message, call in calls.items():
        assert run(call) in (1, 2, 4), message
        assert message in capsys.readouterr().err
    assert not Path("m.gguf").exists()


def test_export_chooses_codes_on_a_text_too(teachers, capsys):
    call = ["export", str(teachers["decoder"]), "--to", "gguf", "--type", "q4_0", "--calib", "text.txt", "-o", "m.gguf"]
    assert run([*call, "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["path"] == "m.gguf"
    assert record["bytes"] == Path("m.gguf").stat().st_size
    assert run(call) == 8  # it exists
    assert run([*call[:3], "hf", *call[6:]]) == 2
    assert "--calib" in capsys.readouterr().err


def test_a_model_without_whole_blocks_is_refused(tmp_path, capsys):
    shape = {"d_model": 36, "n_heads": 2, "d_ff": 52, "n_layers": 1}
    sets = [part for key, value in shape.items() for part in ("--set", f"model.{key}={value}")]
    assert run(["pretrain", "text.txt", "--steps", "1", "-q", "-o", "odd", *TINY[:4], *sets]) == 0
    for options in (["--type", "q4_0"], ["--target-size", "100kB"]):
        assert quantize(Path("odd"), *options) == 2
        assert "nothing can be quantized" in capsys.readouterr().err


def test_a_replaced_run_leaves_no_other_model(teachers, capsys):
    assert (
        run(["quantize", str(teachers["decoder"]), "--bits", "8", "--calib", "text.txt", *TINY, "-q", "-o", "both"])
        == 0
    )
    assert quantize(teachers["decoder"], "--type", "q4_0", out="both") == 0
    assert not Path("both/model.safetensors").exists()
    assert run(["generate", "-m", "both", "a"]) == 3
    assert "llmctl import both/model.gguf -o MODEL" in capsys.readouterr().err
    assert (
        run(
            [
                "quantize",
                str(teachers["decoder"]),
                "--bits",
                "8",
                "--calib",
                "text.txt",
                *TINY,
                "-q",
                "-f",
                "-o",
                "both",
            ]
        )
        == 0
    )
    assert not Path("both/model.gguf").exists()


def test_outputs_that_are_not_finite_are_refused(teachers, tmp_path, capsys):
    source = read_artifact(teachers["decoder"])
    state = source.state()
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = 3e38
    state["model.layers.0.mlp.up_proj.weight"][:] *= 1e6
    huge = write_artifact(tmp_path / "huge", source.config, state, files=source.files, provenance={})
    assert quantize(huge, "--type", "q4_0") == 4
    assert "outputs" in capsys.readouterr().err
    assert run(["export", str(huge), "--to", "gguf", "--type", "f32", "-o", "h.gguf"]) == 4
    assert "outputs are not finite" in capsys.readouterr().err
    assert not Path("h.gguf").exists()

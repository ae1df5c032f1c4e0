"""`llmctl quantize` as its users call it: all families, all schemes, what the results are good for, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from llmctl.cli import run
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.parameters import count

TINY = [
    "--set", "train.seq_len=48", "--set", "data.split=blank", "--set", "train.device=cpu",
    "--set", "weights.calibration_rows=8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "\n\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" * 3 for i in range(60)), encoding="utf-8"
    )
    return tmp_path


def quantize(source: Path, *more: str, out: str = "small") -> int:
    return run(["quantize", str(source), "--calib", "text.txt", *TINY, "-q", "-o", out, *more])


def report(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)["report"]


@pytest.mark.parametrize("family", ["decoder", "encoder", "bert", "encoder_decoder"])
def test_every_family_gets_smaller_and_stays_what_it_was(teachers, capsys, family):
    off, figure = {}, "loss" if family == "bert" else "kl"  # a bare encoder predicts nothing: its states are compared
    for bits in (8, 4, 3):
        assert quantize(teachers[family], "--bits", str(bits), "--json", "-f") == 0
        sides = report(capsys)["models"]
        assert sides["after"]["bytes"] < sides["before"]["bytes"]
        assert sides["before"][figure] == pytest.approx(0, abs=1e-5)
        off[bits] = sides["after"][figure]
    assert off[8] < off[4] < off[3]
    assert off[8] < 0.01


@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int6", "int5", "int4", "int4-sym", "int3", "int2"])
def test_the_size_on_disk_is_what_the_bits_say(teachers, capsys, scheme):
    assert quantize(teachers["decoder"], "--scheme", scheme, "--json") == 0
    artifact = read_artifact(Path("small"))
    bits = {"int8": 8, "w8a8": 8, "int6": 6, "int5": 5, "int4": 4, "int4-sym": 4, "int3": 3, "int2": 2}[scheme]
    inner = {name: each for name, each in artifact.schemes.items() if "layers." in name}
    assert {each.bits for each in inner.values()} == {bits}
    shapes = {name: read_artifact(teachers["decoder"]).tensors[f"{name}.weight"][2].shape for name in artifact.schemes}
    theory = sum(each.size_bits(*shapes[name]) for name, each in artifact.schemes.items()) / 8
    packed = sum(
        entry.end - entry.begin
        for name, (_, _, entry) in artifact.tensors.items()
        if name.rpartition(".")[0] in artifact.schemes and not name.endswith((".weight_shape", ".bias"))
    )
    assert theory <= packed <= 1.02 * theory
    assert report(capsys)["models"]["after"]["bytes"] == sum(
        entry.end - entry.begin for _, _, entry in artifact.tensors.values()
    )


@pytest.mark.parametrize("method", ["nearest", "clip", "weighted", "hqq", "awq", "gptq", "awq-gptq", "guided"])
def test_methods_leave_a_model_in_four_bits(teachers, capsys, method):
    assert quantize(teachers["decoder"], "--bits", "4", "--method", method, "--json") == 0
    assert 0 < report(capsys)["models"]["after"]["kl"] < 0.5


def test_what_sees_the_data_is_nearer_to_the_model(teachers, capsys):
    kl = {}
    for method in ("nearest", "gptq"):
        assert quantize(teachers["decoder"], "--bits", "3", "--method", method, "--json", "-f") == 0
        kl[method] = report(capsys)["models"]["after"]["kl"]
    assert kl["gptq"] < kl["nearest"]


def test_the_result_goes_through_every_verb(teachers, capsys):
    assert quantize(teachers["decoder"], "--bits", "4", out="small.safetensors") == 0
    assert quantize(teachers["encoder"], "--bits", "8", out="masks") == 0
    assert quantize(teachers["encoder_decoder"], "--bits", "8", out="pairs") == 0
    capsys.readouterr()
    assert run(["generate", "the good cat", "-m", "small.safetensors", "-n", "4", "-t", "0", "-q"]) == 0
    assert run(["fill", "the good <mask> sat", "-m", "masks", "-q"]) == 0
    assert run(["generate", "the good cat", "-m", "pairs", "-n", "4", "-q"]) == 0
    assert capsys.readouterr().out
    assert run(["evaluate", str(teachers["decoder"]), "small.safetensors", "-d", "text.txt", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert rows[0]["n_parameters"] == rows[1]["n_parameters"]
    assert run(["inspect", "small.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"]["model.layers.0.self_attn.q_proj"]["bits"] == 4
    tiny = ["--set", "train.seq_len=48", "--set", "data.split=blank", "--steps", "2", "-q"]
    assert run(["finetune", "small.safetensors", "text.txt", "--task", "text", *tiny, "-o", "tuned"]) == 0
    assert run(["distill", "small.safetensors", "-d", "text.txt", *tiny, "-o", "student"]) == 0
    assert run(["export", "small.safetensors", "--to", "hf", "-o", "folder"]) == 0


def test_a_model_without_data_takes_the_embedded_corpus_and_says_so(teachers, capsys):
    out = ["-o", "small", "--set", "train.seq_len=48", "--set", "weights.calibration_rows=4"]
    assert run(["quantize", str(teachers["decoder"]), "--bits", "8", *out]) == 0
    assert "no --data" in capsys.readouterr().err


def test_a_gate_is_missed_and_the_model_is_there(teachers, capsys):
    assert quantize(teachers["decoder"], "--bits", "2", "--method", "nearest", "--max-drop", "0.0001%") == 10
    assert "perplexity" in capsys.readouterr().err
    assert Path("small/model.safetensors").exists()


def test_the_report_takes_a_few_rows_of_all(teachers, capsys):
    """The original runs once for all of it: what is said of it is the same as of the same rows alone."""
    sides = []
    for tokens in ("0", "96"):
        assert (
            quantize(teachers["decoder"], "--bits", "8", "-f", "--json", "--set", f"weights.report_tokens={tokens}")
            == 0
        )
        sides.append(report(capsys)["models"])
    every, few = sides
    assert few["before"]["n_labels"] == few["after"]["n_labels"] <= 96 < every["before"]["n_labels"]
    assert few["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert few["before"]["agreement"] == every["before"]["agreement"] == 1
    assert few["after"]["kl"] > 0


@pytest.mark.parametrize("options", [["--bits", "4"], ["--bits", "8"], ["--target-bpw", "4.5", "--bits", "4"]])
def test_a_dry_run_names_memory_and_time_and_leaves_nothing(teachers, capsys, here, options):
    before = set(here.rglob("*"))
    assert quantize(teachers["decoder"], *options, "--dry-run", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    memory = record["memory_bytes"]
    assert memory.pop("peak") == sum(memory.values())
    assert memory["weights"] == 4 * record["parameters"] == 4 * count(read_artifact(teachers["decoder"]).config)
    assert record["calibration_tokens"] == (0 if options == ["--bits", "8"] else 8 * 48)
    assert record["seconds"]["total"] > 0
    assert set(here.rglob("*")) == before
    assert quantize(teachers["decoder"], *options, "--dry-run") == 0
    assert "peak" in capsys.readouterr().out


def test_equal_settings_are_equal_bytes(teachers):
    for name in ("one", "two"):
        assert quantize(teachers["decoder"], "--bits", "4", out=f"{name}.safetensors") == 0
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_modules_can_be_kept(teachers):
    assert (
        quantize(teachers["decoder"], "--bits", "4", "--embedding", "float", "--set", "weights.keep=model.layers.0.*")
        == 0
    )
    schemes = read_artifact(Path("small")).schemes
    assert schemes
    assert all(name.startswith("model.layers.1.") for name in schemes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "7"], "--bits 7"),
        (["--scheme", "int4", "--bits", "4"], "`--bits 4` and `--scheme int4` set the same thing"),
        (["--scheme", "int7"], "int7"),
        (["--bits", "4", "--group", "24"], "groups of 24 do not divide the 32 inputs"),
        (["--bits", "4", "--method", "magic"], "magic"),
        (["--bits", "4", "--set", "weights.scale_bits=6"], "`weights.scale_bits` is 6, it must be 0, 8 or 16"),
        (["--bits", "8", "--set", "weights.scale_bits=8"], "`weights.scale_bits` 8 needs a scheme with groups"),
        (["--bits", "4", "--set", "weights.keep=*"], "nothing is left"),
        (["--bits", "4", "--set", "weights.calibration_rows=0"], "calibration_rows"),
        (["--bits", "4", "--max-drop", "much"], "much"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(teachers, capsys, options, message):
    assert quantize(teachers["decoder"], *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("small").exists()


def test_a_model_in_few_bits_is_refused_with_what_to_name(teachers, capsys):
    assert quantize(teachers["decoder"], "--bits", "8", out="once") == 0
    assert quantize(Path("once"), "--bits", "4") == 2
    assert "already quantized" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(teachers, capsys, bad):
    artifact = read_artifact(teachers["decoder"])
    state = artifact.state()
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].clone()
    state[name][0, 0] = bad
    write_artifact(Path("bad"), artifact.config, state, files=artifact.files, provenance={})
    assert quantize(Path("bad"), "--bits", "8") == 4
    assert name in capsys.readouterr().err
    assert not Path("small/model.safetensors").exists()


def test_too_little_text_to_calibrate_on_is_refused(teachers, capsys):
    Path("text.txt").write_text("")
    assert quantize(teachers["decoder"], "--bits", "4") == 2
    assert capsys.readouterr().err


def test_nothing_is_computed_again_with_other_numbers(teachers):
    """What the model computes is what its codes mean, in the file as in memory."""
    from llmctl.artifacts.load import load_model

    assert quantize(teachers["decoder"], "--bits", "4") == 0
    loaded = load_model(Path("small"), packed=True)
    plain = load_model(teachers["decoder"]).model
    plain.load_state_dict(read_artifact(Path("small")).state())
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = loaded.model(ids), plain(ids)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_trains_on_a_base_in_four_bits(teachers, capsys, method):
    assert quantize(teachers["decoder"], "--bits", "4", out="base") == 0
    capsys.readouterr()
    tiny = ["--set", "train.seq_len=48", "--set", "data.split=blank", "--set", "optim.lr=0.01", "--steps", "12", "-q"]
    tuned = ["finetune", "base", "text.txt", "--task", "text", "--method", method, "--dtype", "float32", *tiny]
    assert run([*tuned, "-o", "adapter", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["n_trained"] < 0.6 * found["n_parameters"]
    assert run([*tuned, "-o", "merged", "--set", "merge=true"]) == 0
    texts = []
    for model in ("adapter", "merged"):
        capsys.readouterr()
        assert run(["evaluate", model, "-d", "text.txt", "--json", "-q"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["models"][0]["figures"]["loss"])
    assert texts[0] == pytest.approx(texts[1], abs=1e-4)
    answers = []
    for model in (["merged"], ["base", "--adapter", "adapter"]):
        capsys.readouterr()
        assert run(["generate", "the good cat", "-n", "6", "-t", "0", "-q", "-m", *model]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_bits_are_shared_out_within_a_target(teachers, capsys, family):
    kl = {}
    for target in ("3.5", "5"):
        assert quantize(teachers[family], "--target-bpw", target, "--json", "-f") == 0
        found = report(capsys)
        assert found["bits_per_weight_layers"] <= float(target)
        kl[target] = found["models"]["after"]["kl"]
    assert kl["5"] < kl["3.5"]
    bits = {scheme.bits for name, scheme in read_artifact(Path("small")).schemes.items() if "layers." in name}
    assert len(bits) > 1


def test_a_size_is_kept(teachers, capsys):
    assert quantize(teachers["decoder"], "--target-size", "30kB", "--json") == 0
    assert 25_000 < report(capsys)["models"]["after"]["bytes"] <= 30_500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bpw", "1"], "the smallest possible is"),
        (["--target-size", "1kB"], "the smallest possible is"),
        (["--target-size", "small"], "is not a size"),
        (["--target-bpw", "4", "--target-size", "1MB"], "exclude each other"),
        (["--target-bpw", "4", "--scheme", "w8a8"], "w8a8"),
        (["--method", "learned", "--scheme", "w8a8"], "w8a8"),
        (["--bits", "4", "--set", "weights.learn=weights"], "learned"),
    ],
)
def test_targets_that_cannot_be_are_told(teachers, capsys, options, message):
    assert quantize(teachers["decoder"], *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("small/model.safetensors").exists()


@pytest.mark.parametrize("learn", ["scales", "weights"])
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_codes_are_learned_and_what_is_measured_is_what_is_written(teachers, capsys, family, learn):
    rate = {"scales": "0.01", "weights": "0.001"}[learn]
    learned = ["--bits", "2", "--method", "learned", "--steps", "30", "--set", f"optim.lr={rate}", "--json"]
    learned += ["--set", f"weights.learn={learn}"]
    assert quantize(teachers[family], *learned, "--set", "train.dtype=float32", out="one.safetensors") == 0
    found = report(capsys)["models"]
    assert found["after"]["kl"] < found["chosen"]["kl"]
    if family == "encoder_decoder":
        return  # whose task by itself is spans, which `evaluate` does not know
    task = [] if family == "decoder" else ["--task", "mask"]
    losses = []
    for name in ("one.safetensors", str(teachers[family])):
        assert run(["evaluate", name, "-d", "text.txt", *task, "--json", "-q"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["models"][0]["figures"]["loss"])
    assert abs(losses[0] - losses[1]) < 0.6  # two bits of random weights


def test_what_is_learned_in_bfloat16_is_reported_without_its_rounding(teachers, capsys):
    learned = ["--bits", "4", "--method", "learned", "--steps", "2", "--json", "--set", "train.dtype=bfloat16"]
    assert quantize(teachers["decoder"], *learned, out="one.safetensors") == 0
    found = report(capsys)["models"]
    plain = ["--bits", "4", "--json", "--set", "train.dtype=float32"]
    assert quantize(teachers["decoder"], *plain, out="two.safetensors") == 0
    wanted = report(capsys)["models"]
    assert found["before"]["loss"] == pytest.approx(wanted["before"]["loss"], rel=1e-6)
    for name in ("loss", "kl"):
        assert found["chosen"][name] == pytest.approx(wanted["after"][name], rel=1e-4)


def test_codes_stay_where_only_scales_learn(teachers, capsys):
    options = ["--bits", "4", "--set", "train.dtype=float32", "--json"]
    assert quantize(teachers["decoder"], *options, "--method", "guided", out="chosen.safetensors") == 0
    assert quantize(teachers["decoder"], *options, "--method", "learned", "--steps", "4", out="tuned.safetensors") == 0
    capsys.readouterr()
    chosen, tuned = (read_artifact(Path(f"{name}.safetensors")).packed_state() for name in ("chosen", "tuned"))
    assert chosen.keys() == tuned.keys()
    moved = {name for name, tensor in chosen.items() if not torch.equal(tensor, tuned[name])}
    assert moved
    assert all(name.endswith(".weight_scale") and "embed" not in name for name in moved)


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_training_through_the_rounding_writes_what_was_trained(teachers, capsys, family):
    tiny = ["--set", "train.seq_len=48", "--set", "data.split=blank", "--set", "optim.lr=0.003", "--steps", "16", "-q"]
    tuned = ["finetune", str(teachers[family]), "text.txt", "--task", "text", "--qat", "int4", "--json"]
    assert run([*tuned, *tiny, "--set", "train.dtype=float32", "-o", "small.safetensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["loss"] < found["before"]["loss"]
    artifact = read_artifact(Path("small.safetensors"))
    assert {scheme.bits for name, scheme in artifact.schemes.items() if "layers." in name} == {4}
    if family == "decoder":
        assert run(["evaluate", "small.safetensors", str(teachers[family]), "-d", "text.txt", "--json", "-q"]) == 0
        rows = json.loads(capsys.readouterr().out)["models"]
        assert rows[0]["figures"]["loss"] < rows[1]["figures"]["loss"]


def test_training_through_the_rounding_is_of_all_weights(teachers, capsys):
    refused = ["finetune", str(teachers["decoder"]), "text.txt", "--qat", "int4", "--method", "lora", "-o", "x"]
    assert run([*refused, "--task", "text"]) == 2
    assert "--qat" in capsys.readouterr().err


def test_groups_that_do_not_divide_are_said(tmp_path, capsys, models):
    from dataclasses import replace

    from llmctl.formats.artifact_write import write_artifact
    from llmctl.model.transformer import LanguageModel, initialize

    given = read_artifact(models["decoder"])
    model = LanguageModel(replace(given.config, d_model=36, n_heads=3, n_kv_heads=3, head_dim=12, d_ff=96))
    initialize(model, 0)
    odd = write_artifact(tmp_path / "odd", model.config, model.state_dict(), files=given.files, provenance={})
    assert run(["quantize", str(odd), "--calib", "text.txt", *TINY, "--bits", "4", "-o", "small"]) == 0
    assert "have 36 inputs, which groups of 32 do not divide: one scale a row" in capsys.readouterr().err
    assert run(["quantize", str(models["decoder"]), "--calib", "text.txt", *TINY, "--bits", "8", "-o", "s8"]) == 0
    assert "do not divide" not in capsys.readouterr().err


def test_a_run_that_only_quantized_is_shown_with_its_report(tmp_path, capsys, models):
    assert run(["quantize", str(models["decoder"]), "--calib", "text.txt", *TINY, "--bits", "8", "-q"]) == 0
    capsys.readouterr()
    assert run(["runs", "show", "latest"]) == 0
    out = capsys.readouterr().out
    assert "no metrics yet" not in out
    assert "missing" not in out
    assert "steps       -" in out
    lines = out[out.index("report\n") :].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["model", "before", "after"]


@pytest.mark.parametrize("family", ["decoder", "bert"])
def test_tensors_with_the_padding_of_codes_fit_a_target_size(teachers, capsys, family):
    before = sum(entry.end - entry.begin for _, _, entry in read_artifact(teachers[family]).tensors.values())
    for fraction in (0.25, 0.2):
        size = round(fraction * before)
        assert quantize(teachers[family], "--target-size", f"{size / 1000}kB", "--json", "-f") == 0
        assert report(capsys)["models"]["after"]["bytes"] <= size

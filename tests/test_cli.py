"""The command line as a person meets it: errors with exit codes, streams that stay clean, nothing that hangs."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl import __version__
from llmctl.cli import COMMANDS, report, run
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.errors import OutputError, UsageError
from llmctl.files import writing
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer
from tests.support.warm import WARM, Process

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with a decoder, an encoder and an encoder-decoder of random weights."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a list of strings 中文，诗。"] * 20, TokenizerConfig(vocab_size=330))
    for family in ("decoder", "encoder", "encoder_decoder"):
        extra = {"positions": "relative", "attention_scale": 1.0, "activation": "gelu_tanh", "tie_embeddings": False}
        shape = ModelConfig(
            family=family,  # type: ignore[arg-type]
            vocab_size=tokenizer.vocab_size,
            d_model=32,
            n_layers=1,
            n_heads=2,
            max_positions=40,
            bos_id=2,
            eos_id=3,
            pad_id=0,
            mask_id=4,
            decoder_start_id=0,
            init_std=0.3,
            **(extra if family == "encoder_decoder" else {}),
        )
        model = LanguageModel(shape)
        initialize(model, 0)
        write_artifact(folder / family, model.config, model.state_dict(), files=tokenizer.files(), provenance={})
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys, *arguments: str, stdin: bytes | None = None, monkeypatch=None) -> tuple[int, str, str]:
    if stdin is not None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    status = run(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def shell(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "llmctl", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False, timeout=120)


def test_version_and_help(capsys):
    assert __version__.encode() in shell("--version").stdout
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        status, out, err = call(capsys, *arguments)
        assert (status, err) == (0, "")
        assert "llmctl pretrain" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(capsys, name: str):
    status, out, err = call(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"llmctl {name}" in out
    assert "Examples" in out
    assert call(capsys, name, "-h")[1] == out


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["pretain"], 2, ["`pretain`", "llmctl pretrain"]),
        (["--nonsense"], 2, ["`--nonsense`"]),
        (["generate", "--temprature", "1"], 2, ["--temprature", "--temperature"]),
        (["generate", "x", "-n", "many"], 2, ["many"]),
        (["generate", "x"], 3, ["no model", "llmctl pretrain"]),
        (["generate", "x", "-m", "nowhere"], 3, ["`nowhere`"]),
        (["fill", "<mask>"], 3, ["--objective mlm"]),
        (["use"], 3, ["llmctl use"]),
        (["pretrain", "--resume", "0009"], 3, ["0009"]),
        (["pretrain", "--resume", "0009", "--steps", "5"], 3, ["0009"]),
        (["pretrain", "--resume", "auto"], 2, ["-o"]),
        (["pretrain", "--nproc", "0"], 2, ["--nproc 0"]),
        (["pretrain", "--nnodes", "2"], 2, ["--master"]),
        (["pretrain", "--track", "nowhere", "--steps", "1"], 2, ["nowhere", "tensorboard"]),
        (["pretrain", "--batch-size", "many"], 2, ["many"]),
        (["pretrain", "-r", "nowhere.yaml"], 3, ["nowhere.yaml"]),
        (["pretrain", "--set", "train.stepz=3"], 2, ["train.stepz", "train.steps"]),
        (["pretrain", "--objective", "gpt"], 2, ["`gpt`", "clm"]),
        (["pretrain", "nowhere.txt"], 3, ["nowhere.txt"]),
        (["pretrain", "--model", "gpt2-extra", "--dry-run"], 2, ["gpt2-extra"]),
        (["inspect", "nowhere"], 3, ["nowhere"]),
        (["tokenize", "train", "nowhere.txt"], 3, ["nowhere.txt"]),
        (["tokenize", "encode", "--tokenizer", "nowhere"], 3, ["nowhere"]),
        (["tokenize", "encode", "--shard", "5/3"], 2, ["5/3"]),
    ],
)
def test_mistakes_are_answered(capsys, arguments: list[str], status: int, parts: list[str]):
    got, out, err = call(capsys, *arguments)
    assert got == status, err
    assert out == ""
    assert err.startswith("error: ") or "\nerror: " in err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["generate", "x", "-m", "encoder"], ["encoder", "llmctl fill"]),
        (["fill", "<mask>", "-m", "decoder"], ["decoder", "llmctl generate"]),
        (["fill", "no mask", "-m", "encoder"], ["no mask"]),
        (["generate", "a " * 60, "-m", "decoder"], ["40"]),
        (
            ["generate", "x", "-m", "decoder", "-n", "0", "-t", "-1", "--top-p", "0"],
            ["--max-tokens", "--temperature", "--top-p"],
        ),
        (["generate", "1 x", "--ids", "-m", "decoder"], ["x"]),
        (["generate", "99999", "--ids", "-m", "decoder"], ["99999"]),
    ],
)
def test_models_that_cannot_are_named(capsys, monkeypatch, models: Path, arguments: list[str], parts: list[str]):
    monkeypatch.chdir(models)
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    for part in parts:
        assert part in err


@pytest.mark.parametrize("harm", ["cut", "header", "pickle", "empty"])
def test_damaged_models_are_refused(capsys, models: Path, tmp_path, harm: str):
    data = (models / "decoder" / "model.safetensors").read_bytes()
    path = tmp_path / ("m.bin" if harm == "pickle" else "m.safetensors")
    path.write_bytes(
        {"cut": data[:-100], "header": b"\xff" * 8 + data[8:], "pickle": b"\x80\x04K\x01.", "empty": b""}[harm]
    )
    for command in (["generate", "x", "-m"], ["inspect"]):
        status, out, err = call(capsys, *command, str(path))
        assert (status, out) == (4, ""), err
        assert path.name in err


def test_lines_in_are_lines_out(capsys, monkeypatch, models: Path):
    lines = ["a list", "", "中文", "strings of"]
    stdin = "\n".join(lines).encode()
    options = ["-m", str(models / "decoder"), "-n", "8", "-q", "-t", "0"]
    status, out, err = call(capsys, "generate", "-", *options, stdin=stdin, monkeypatch=monkeypatch)
    assert (status, err) == (0, "")
    assert out.count("\n") == 4
    _, records, _ = call(capsys, "generate", "-", "--json", *options, stdin=stdin, monkeypatch=monkeypatch)
    parsed = [json.loads(line) for line in records.split("\n")[:-1]]
    assert [record["prompt"] for record in parsed] == lines
    assert {"i", "prompt", "text", "n_tokens", "finish"} <= parsed[0].keys()
    _, nul, _ = call(capsys, "generate", "-", "-0", *options, stdin="\0".join(lines).encode(), monkeypatch=monkeypatch)
    assert nul.split("\0")[:-1] == [record["text"] for record in parsed]
    single = [call(capsys, "generate", line, *options)[1].removesuffix("\n") for line in lines]
    assert single == [record["text"] for record in parsed]
    _, whole, _ = call(capsys, "generate", "--whole", *options, stdin=b"a\nlist", monkeypatch=monkeypatch)
    assert whole == call(capsys, "generate", "a\nlist", *options)[1]


def test_an_encoder_decoder_answers_too(capsys, models: Path):
    status, out, err = call(
        capsys, "generate", "a list", "-m", str(models / "encoder_decoder"), "--beams", "3", "-n", "5"
    )
    assert status == 0
    assert out.endswith("\n")
    assert err.startswith("model: ")


def test_fill_gives_candidates_or_lines(capsys, monkeypatch, models: Path):
    options = ["-m", str(models / "encoder"), "-q"]
    status, out, _ = call(capsys, "fill", "a <mask> of", "-k", "3", *options)
    assert status == 0
    assert len(out.split("\t")) == 4
    _, out, _ = call(capsys, "fill", "-", *options, stdin=b"a <mask> of\n<mask>\n", monkeypatch=monkeypatch)
    assert out.count("\n") >= 2
    _, out, _ = call(capsys, "fill", "a <mask> of", "--json", *options)
    assert len(json.loads(out)["masks"][0]) == 5


def test_tokenize_is_a_filter(capsys, monkeypatch, models: Path):
    text = "a list of\n\n中文，诗。 x\r\n\ttabs\n"
    options = ["tokenize", "-m", str(models / "decoder")]
    status, ids, _ = call(capsys, *options, stdin=text.encode(), monkeypatch=monkeypatch)
    assert status == 0
    assert len(ids.splitlines()) == 4
    back = shell(*options, "--decode", stdin=ids.encode())
    assert back.stdout.decode() == text
    _, out, _ = call(capsys, *options, "--stats", "--json", stdin=text.encode(), monkeypatch=monkeypatch)
    report_ = json.loads(out)
    assert report_["bytes"] == len(text.replace("\n", "").encode())
    status, _, err = call(capsys, *options, "--decode", stdin=b"1 2\n3 x\n", monkeypatch=monkeypatch)
    assert status == 2
    assert "line 2" in err


@pytest.mark.parametrize("command", [["generate", "-"], ["tokenize"]])
def test_bytes_that_are_no_text_are_named(capsys, monkeypatch, models: Path, command: list[str]):
    options = ["-m", str(models / "decoder")]
    status, _, err = call(capsys, *command, *options, stdin=b"good\nbad\xff\n", monkeypatch=monkeypatch)
    assert status == 2
    assert "byte 8" in err


def test_use_is_remembered(capsys, monkeypatch, models: Path, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert call(capsys, "use", str(models / "decoder"))[:2] == (0, f"{models / 'decoder'}\n")
    assert call(capsys, "use")[1] == f"{models / 'decoder'}\n"
    status, _, err = call(capsys, "generate", "a", "-n", "3")
    assert status == 0
    assert "set by `llmctl use`" in err
    assert call(capsys, "use", "nowhere")[0] == 3


def test_an_idle_open_stdin_does_not_hang(models: Path):
    command = [sys.executable, "-P", "-m", "llmctl", "generate", "a", "-n", "2", "-m", str(models / "decoder")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.wait(timeout=120) == 0


def test_a_closed_pipe_ends_quietly(models: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "llmctl", "tokenize", "-m", str(models / "decoder")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"a list of strings\n" * 200_000)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == -signal.SIGPIPE


@pytest.mark.parametrize("is_shared", [False, True])
def test_training_goes_on_when_nobody_reads_its_progress(tmp_path, is_shared: bool):
    (tmp_path / "a.txt").write_text("a b c\n" * 200)
    tiny = ["--set", "model.n_layers=1", "--set", "model.d_model=16", "--set", "model.n_heads=2", "--seq-len", "16"]
    process = Process(
        [*WARM, "pretrain", "a.txt", "-o", "model", "--steps", "3", "-v", *tiny, "--set", "tokenizer.vocab_size=300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if is_shared else subprocess.PIPE,
        cwd=tmp_path,
    )
    read = process.stdout if is_shared else process.stderr
    read.readline()
    read.close()
    if not is_shared:
        with process.stdout:
            assert process.stdout.read() == "model\n"
    status = process.wait(timeout=120)
    assert status in ((1, 141) if is_shared else (0,))  # a result that nobody reads is another matter
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "model" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("command", [["tokenize"], ["tokenize", "--stats"], ["inspect"], ["presets"]])
def test_light_commands_never_load_torch(models: Path, command: list[str]):
    code = "import sys; from llmctl.cli import run; status = run(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(status)"
    arguments = {
        "tokenize": ["-m", str(models / "decoder")],
        "inspect": [str(models / "decoder")],
    }.get(command[0], [])
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *arguments], input=b"a\n", capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_outputs_are_not_overwritten_unasked(capsys, tmp_path):
    (tmp_path / "kept.safetensors").write_bytes(b"precious")
    for command in (["pretrain", "-o", "kept.safetensors"], ["tokenize", "train", "-o", "kept.safetensors"]):
        status, _, err = call(capsys, *command)
        assert status == 8
        assert "kept.safetensors" in err
    assert (tmp_path / "kept.safetensors").read_bytes() == b"precious"


def test_places_that_cannot_be_written_are_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMCTL_RUNS", str(tmp_path / "file" / "runs"))
    status, out, err = call(capsys, "pretrain", "--steps", "1", "-q")
    assert (status, out) == (8, "")
    assert "file/runs" in err


def test_a_run_in_use_is_busy(capsys, tmp_path):
    from llmctl.runs.folder import create_run

    held = create_run("pretrain", "x")
    (held.path / "recipe.yaml").write_text("train: {steps: 1}\n")
    status, _, err = call(capsys, "pretrain", "--resume", str(held.path))
    assert status == 9
    assert str(held.path) in err
    held.close()


def test_print_config_reads_back(capsys, tmp_path):
    _, out, _ = call(capsys, "pretrain", "--print-config", "--steps", "7", "--model", "mini", "--set", "optim.lr=1e-3")
    (tmp_path / "r.yaml").write_text(out)
    _, again, _ = call(capsys, "pretrain", "-r", "r.yaml", "--print-config")
    strip = [line.split("#")[0].rstrip() for line in again.splitlines()]
    assert strip == [line.split("#")[0].rstrip() for line in out.splitlines()]
    assert "steps: 7" in out


def test_print_config_shows_what_the_model_chooses_and_does_not_pin_it(capsys, tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "the cat\tyes\nthe dog\tno\n" * 9)
    command = ["finetune", str(models / "decoder"), "rows.tsv", "--task", "classify", "--print-config"]
    _, out, _ = call(capsys, *command)
    (tmp_path / "r.yaml").write_text(out)
    lr = next(line for line in out.splitlines() if line.strip().startswith("lr:"))
    assert lr.split("#")[0].strip() == "lr: 0.0"
    assert "[this model: " in lr
    _, direct, _ = call(capsys, *command, "--method", "lora")
    _, again, _ = call(capsys, "finetune", "-r", "r.yaml", "--method", "lora", "--print-config")
    rates = [
        next(line for line in each.splitlines() if line.strip().startswith("lr:")).split("[this model: ")[1]
        for each in (direct, again)
    ]
    assert rates[0] == rates[1]
    assert rates[0] not in lr


def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\n" * 60)
    tiny = ["--set", "model.d_model=32", "--set", "model.n_layers=1", "--set", "model.n_heads=2", "--steps", "2"]
    status, _, err = call(capsys, "pretrain", "a.txt", *tiny, "--set", "train.metric=foo", "--set", "train.seq_len=16")
    assert status == 2
    assert "`train.metric` `foo`" in err
    assert "`loss`" in err
    assert "step 1/" not in err


def test_misspelled_names_of_any_setting_get_a_suggestion(capsys):
    for key, value, meant in (
        ("train.device", "cpuu", "cpu"),
        ("parallel.strategy", "fsdpp", "fsdp"),
        ("model.family", "decodr", "decoder"),
        ("optim.name", "adamww", "adamw"),
    ):
        status, _, err = call(capsys, "pretrain", "--print-config", "--set", f"{key}={value}")
        assert status == 2
        assert f"`{key}` is `{value}`" in err
        assert f"did you mean `{meant}`?" in " ".join(err.split())


def test_a_data_file_in_place_of_the_model_is_named(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    for command in ("finetune", "distill", "quantize", "evaluate"):
        status, _, err = call(capsys, command, str(tmp_path / "rows.jsonl"))
        assert status == 2
        assert "rows.jsonl` is not a model: it is data" in err
        assert "the order is MODEL DATA" in err


def test_data_and_model_swapped_are_told_apart(capsys, tmp_path, models):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a b\n" * 40)
    data, model = str(tmp_path / "texts"), str(models / "decoder")
    for swapped in (
        ["finetune", data, model],
        ["distill", data, "-d", model],
        ["quantize", data, "-d", model],
        ["evaluate", data, "-d", model],
        ["bench", data],
        ["generate", "a", "-m", data],
        ["distill", model, "--student", data],
    ):
        status, _, err = call(capsys, *swapped)
        said = f"`{data}` has no model in it (no `config.json`): it holds `a.txt`"
        assert (status, said in err, "the order is MODEL DATA" in err) == (2, True, True), (swapped, err)
    for given in (
        ["pretrain", model],
        ["finetune", model, model],
        ["distill", model, "-d", f"{model}/model.safetensors"],
        ["evaluate", model, "-d", model],
    ):
        status, _, err = call(capsys, *given)
        assert (status, "is a model, not data" in err) == (2, True), (given, err)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_read_is_not_called_unwritable(capsys, tmp_path, kind: str):
    path = tmp_path / "secret"
    path.mkdir() if kind == "folder" else path.write_text("x")
    error = PermissionError(errno.EACCES, "Permission denied", str(path))
    assert report(error) == 8
    assert "cannot write" in capsys.readouterr().err
    path.chmod(0)
    assert report(error) == 2
    assert f"cannot read `{path}`: permission denied" in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"cannot read `{path}`"), writing(tmp_path / "out"):
        raise error
    with pytest.raises(OutputError, match="cannot write"), writing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "new"))
    path.chmod(0o755)


def test_a_defect_is_reported_without_a_trace_and_with_one_on_demand(capsys, monkeypatch):
    assert report(ValueError("boom")) == 1
    err = capsys.readouterr().err
    assert "boom" in err
    assert "--debug" in err
    assert report(MemoryError()) == 5
    monkeypatch.setattr("llmctl.cli.dispatch", lambda *_: (_ for _ in ()).throw(ValueError("boom")))
    with pytest.raises(ValueError, match="boom"):
        run(["--debug", "presets"])


def shell_line(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `llmctl` is this tree's."""
    code = f'set -o pipefail; llmctl() {{ "{sys.executable}" -m llmctl "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("llmctl presets >&-", 8, "standard output is closed"),
        ("llmctl pretrain --steps 1 >&-", 8, "standard output is closed"),
        ("llmctl tokenize <&-", 2, "no text on standard input"),
        ("llmctl pretrain - --steps 1 <&-", 2, "standard input is closed"),
        ("llmctl presets > /dev/full", 8, "No space left"),
        ("llmctl pretrain --print-config > /dev/full", 8, "No space left"),
    ],
)
def test_standard_streams_that_are_closed_or_full_are_said_to_be(tmp_path, line: str, code: int, message: str):
    done = shell_line(line, tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_closed_messages_do_not_end_a_command(tmp_path):
    done = shell_line("llmctl presets 2>&-", tmp_path)
    assert done.returncode == 0
    assert "tiny" in done.stdout


@pytest.mark.parametrize("line", ["presets", "pretrain --print-config", "pretrain --help", "--help"])
def test_a_closed_pipe_ends_every_command_alike(tmp_path, line: str):
    done = shell_line(f"(llmctl {line}; echo $? >&2) | true", tmp_path)
    assert done.stderr.strip() in ("141", "0"), "0 if all was written before the reader ended"
    # With a reader that is gone before the command begins there is no race.
    command = [sys.executable, "-m", "llmctl", *line.split()]
    code = f"import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.execv({sys.executable!r}, {command!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (141, -13)
    assert done.stderr == ""


def test_an_interruption_while_modules_are_imported_is_clean():
    code = """
import sys
wanted = sys.argv[1]
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
from llmctl.__main__ import main
sys.argv = ["llmctl", "presets"]
main()
"""
    for module in ("llmctl.cli", "typer", "llmctl.commands.presets", "llmctl.runs.closed_pipe"):
        done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n"), module


def test_an_empty_output_is_refused(capsys):
    for arguments in (["pretrain", "-o", ""], ["export", "x", "--out", ""], ["import", "x", "--out="]):
        assert run(arguments) == 2
        assert "`-o` is empty" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_refused_briefly(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["inspect", "a" * 300], ["evaluate", "a" * 300], ["import", "a" * 300, "-o", "x"]):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert "300 characters" in error
        assert len(error) < 200


def test_a_section_is_no_setting(capsys):
    for given, meant in (("train=3", "train.steps"), ("model=tiny", "model.preset")):
        assert run(["pretrain", "--set", given, "--print-config"]) == 2
        assert f"did you mean `{meant}`?" in capsys.readouterr().err

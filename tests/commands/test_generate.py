"""`llmctl generate` in a shell: pipes, interrupts, streams, ids, and the mistakes that are answered with an error."""

import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.commands.generate import write
from llmctl.config import GenerateConfig, ModelConfig, TokenizerConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Prompt, generate
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with decoders of random weights: one as usual, one that never ends, one without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a list of strings 中文，诗。\n\n"] * 20, TokenizerConfig(vocab_size=330))
    for name, fields in {
        "plain": {"eos_id": 3},
        "endless": {"max_positions": 100_000},
        "bare": {"positions": "relative", "family": "encoder_decoder", "attention_scale": 1.0, "decoder_start_id": 1},
    }.items():
        settings = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_positions": 40, "init_std": 0.4, "bos_id": 2}
        if name == "bare":
            settings |= {"activation": "gelu_tanh", "tie_embeddings": False}
        model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **(settings | fields)))
        initialize(model, 0)
        files = {} if name == "bare" else tokenizer.files()
        write_artifact(folder / name, model.config, model.state_dict(), files=files, provenance={})
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(shell):
    """Return a caller of the command: (exit code, stdout, stderr)."""
    return partial(shell, "generate")


def start(*arguments: str, **streams) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "llmctl", "generate", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def test_newlines_and_backslashes_of_a_line_are_escaped_and_can_be_read_back(call, models):
    options = ["-m", str(models / "plain"), "-q", "-n", "30", "-t", "2"]
    stdin = b"".join(b"a list %d\n" % n for n in range(30))
    _, lines, _ = call("-", *options, stdin=stdin)
    _, records, _ = call("-", *options, "--json", stdin=stdin)
    texts = [json.loads(record)["text"] for record in records.split("\n")[:-1]]
    assert any("\n" in text for text in texts)
    assert any("\\" in text for text in texts)
    assert "\r" not in lines

    def read_back(line: str) -> str:
        parts = [part.replace("\\n", "\n").replace("\\r", "\r") for part in line.split("\\\\")]
        return "\\".join(parts)

    assert [read_back(line) for line in lines.split("\n")[:-1]] == texts


def test_a_line_does_not_change_with_the_lines_around_it(call, models):
    options = ["-m", str(models / "plain"), "-q", "-n", "8", "--seed", "4"]
    lines = [b"a", b"", "中文 strings of a list".encode(), b"of"]
    _, together, _ = call("-", *options, stdin=b"\n".join(lines) + b"\n")
    for batch_size in ("1", "3"):
        assert call("-", *options, "--batch-size", batch_size, stdin=b"\n".join(lines))[1] == together
    assert call("-", *options, stdin=b"a\n\n")[1].split("\n")[:2] == together.split("\n")[:2]


def test_an_empty_pipe_is_no_prompt_and_no_answer(call, models):
    assert call("-", "-m", str(models / "plain"), "-q", stdin=b"") == (0, "", "")
    assert call("-m", str(models / "plain"), "-q", stdin=b"") == (0, "", "")


def test_an_empty_pipe_and_an_empty_prompt_are_said(call, models):
    options = ["-m", str(models / "plain"), "-n", "5"]
    status, out, err = call(*options, stdin=b"")
    assert (status, out) == (0, "")
    assert err.endswith("note: standard input is empty, so there is no result\n")
    for given, stdin in ((["", *options], None), (["--whole", *options], b"")):
        status, out, err = call(*given, stdin=stdin)
        assert (status, out) == (0, call("", "-q", *options)[1])
        assert err.endswith("note: the prompt is empty; the model starts a new text\n")
    assert "note:" not in call("-", *options, stdin=b"a\n\n")[2], "a line in is a line out, empty or not"


def test_an_empty_completion_is_explained(call, models):
    options = ["a list", "-m", str(models / "plain"), "-n", "9"]
    texts = {seed: call("-q", *options, "-t", "2", "--seed", str(seed))[1] for seed in range(20)}
    seed, first = next((seed, text[0]) for seed, text in texts.items() if text != "\n")
    options += ["-t", "2", "--seed", str(seed)]
    status, out, err = call(*options, "--stop", first)
    assert (status, out) == (0, "\n")
    assert err.endswith("note: the text began with a stop string, so nothing of it is left\n")
    assert "note:" not in call(*options)[2]
    assert call("-q", *options, "--stop", first)[2] == ""


def test_streaming_gives_the_same_text(call, models):
    options = ["a list", "-m", str(models / "plain"), "-q", "-n", "30", "--stop", "s o"]
    assert call(*options, "--stream") == call(*options, "--no-stream")


def test_ids_in_are_ids_out_with_and_without_a_tokenizer(call, models):
    for name in ("plain", "bare"):
        status, out, _ = call("2 300", "--ids", "-m", str(models / name), "-q", "-n", "5", "-t", "0")
        assert status == 0
        ids = [int(word) for word in out.split()]
        assert 0 < len(ids) <= 5
        _, record, _ = call("2 300", "--ids", "--json", "-m", str(models / name), "-q", "-n", "5", "-t", "0")
        assert json.loads(record)["ids"] == ids
    _, out, _ = call("-", "--ids", "-m", str(models / "bare"), "-q", "-n", "3", stdin=b"5 6\n7\n")
    assert out.count("\n") == 2


def test_a_model_without_a_tokenizer_says_what_it_takes(call, models):
    status, out, err = call("a", "-m", str(models / "bare"), "-q")
    assert (status, out) == (2, "")
    assert "no tokenizer" in err
    assert "--ids" in err


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["a", "-m", ""], 2, "empty"),
        (["a", "-m", "/nowhere/at/all"], 3, "`/nowhere/at/all`"),
        (["a", "-t", "nan"], 2, "`--temperature` is nan"),
        (["a", "-t", "inf"], 2, "`--temperature` is inf"),
        (["a", "--repetition-penalty", "nan"], 2, "`--repetition-penalty` is nan"),
        (["a", "--min-p", "1.5"], 2, "`--min-p` is 1.5"),
        (["a", "--beams", "0"], 2, "`--beams` is 0"),
        (["a", "--kv", "int3"], 2, "`--kv` is int3, it must be one of float, int8"),
        (["a", "--batch-size", "99999999999999999999"], 2, "`--batch-size` is 99999999999999999999"),
        (["a\udcffb"], 2, "byte 1 (0xff)"),
        (["", "--ids"], 2, "prompt 1 is empty"),
        (["a", "--dtype", "int3"], 2, "int3"),
    ],
)
def test_mistakes_are_answered(call, models, arguments: list[str], status: int, part: str):
    named = [] if "-m" in arguments else ["-m", str(models / "plain")]
    got, out, err = call(*arguments, *named)
    assert (got, out) == (status, ""), err
    assert part in err
    assert "this is a bug" not in err


def test_the_prompt_that_is_too_long_is_named_before_any_answer(call, models):
    status, out, err = call("-", "-m", str(models / "plain"), "-q", stdin=b"a\n" + b"b" * 60 + b"\n")
    assert (status, out) == (2, "")
    assert "prompt 2 has" in err
    assert "40" in err


def test_damaged_weights_end_with_an_error_not_with_noise(call, models, tmp_path):
    from llmctl.formats.artifact import read_artifact

    artifact = read_artifact(models / "plain")
    state = {name: tensor * float("nan") for name, tensor in artifact.state().items()}
    write_artifact(tmp_path / "nan", artifact.config, state, files=artifact.files, provenance={})
    status, out, err = call("a", "-m", str(tmp_path / "nan"), "-q")
    assert (status, out) == (4, "")
    assert "not finite" in err


def test_an_interrupt_leaves_what_was_there(models):
    options = ["a list", "-m", str(models / "endless"), "-n", "90000", "-q", "--stream"]
    with start(*options, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=120) == 130
        assert first
        assert rest.endswith(b"\n")
        assert b"Traceback" not in process.stderr.read()


def test_an_interrupt_before_anything_was_shown_shows_it(models, capsys):
    loaded = load_model(models / "endless")
    n_steps = itertools.count()

    def interrupt(*_: object) -> None:
        if next(n_steps) == 8:
            raise KeyboardInterrupt

    loaded.model.model.embed_tokens.register_forward_hook(interrupt)
    config = GenerateConfig(max_tokens=99, temperature=0.0)
    whole = next(generate(load_model(models / "endless"), [Prompt(0, encode_prompt(loaded, "a"))], config)).text
    shape = {"json": False, "null": False, "ids": False, "stream": False}
    for is_record, shown in ((False, True), (True, False)):
        n_steps = itertools.count()
        with pytest.raises(KeyboardInterrupt):
            write(loaded, iter(["a"]), config, is_record=is_record, **shape)
        out = capsys.readouterr().out
        assert bool(out) == shown
        assert whole.startswith(out.removesuffix("\n"))


def test_a_reader_that_leaves_ends_it_quietly(models):
    options = ["a list", "-m", str(models / "endless"), "-n", "90000", "-q", "--stream"]
    with start(*options, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=120) in (-signal.SIGPIPE, 141)
        assert process.stderr.read() == b""


def test_a_line_is_answered_while_the_pipe_stays_open(models):
    options = ["-", "-m", str(models / "plain"), "-n", "3", "-q", "--batch-size", "1"]
    with start(*options, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"a list\n", b"of strings\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait(timeout=120) == 0


def test_the_first_answers_of_a_long_pipe_do_not_wait_for_its_end(models, capsys):
    loaded = load_model(models / "plain")
    n_read = itertools.count()
    asked: list[int] = []

    def lines():
        while (n := next(n_read)) < 60:
            if capsys.readouterr().out:
                asked.append(n)
            yield "a list"

    shape = {"json": False, "null": False, "ids": False, "stream": False, "is_record": True}
    write(loaded, lines(), GenerateConfig(max_tokens=2, batch_size=4), **shape)
    assert asked == [4, 12, 28]


def test_a_terminal_is_not_read(models, monkeypatch, capsys):
    primary, secondary = os.openpty()
    try:
        with os.fdopen(secondary, closefd=False) as terminal:
            monkeypatch.setattr("sys.stdin", terminal)
            assert run(["generate", "-m", str(models / "plain")]) == 2
    finally:
        os.close(primary)
        os.close(secondary)
    err = capsys.readouterr().err
    assert "no prompt" in err
    assert "hint: " in err


def test_the_model_is_named_before_torch_is_loaded(models):
    code = "import sys; sys.modules['torch'] = None; from llmctl.cli import run; sys.exit(run(sys.argv[1:]))"
    for quiet in ([], ["-q"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "generate", "a", "-m", str(models / "plain"), *quiet],
            capture_output=True,
            check=False,
        )
        assert done.stderr.startswith(b"model: ") == (not quiet)
        assert b"torch" in done.stderr


@pytest.mark.parametrize("option", [["--top-k", "4"], ["--repetition-penalty", "1.2"]])
def test_what_a_search_would_ignore_is_refused(call, models, option: list[str]):
    status, out, err = call("a", "-m", str(models / "plain"), "-q", "--beams", "3", *option)
    assert (status, out) == (2, "")
    assert f"`{option[0]}` has no effect" in err


def test_keys_and_values_in_eight_bits_write_lines_too(call, models):
    options = ["-m", str(models / "plain"), "-q", "-n", "8", "-t", "0", "--kv", "int8"]
    status, together, _ = call("-", *options, stdin=b"a\nof strings\n\n")
    assert (status, together.count("\n")) == (0, 3)
    assert call("-", *options, "--batch-size", "1", stdin=b"a\nof strings\n\n")[1] == together


def test_the_names_of_other_tools_are_understood(call, models):
    options = ["a list", "-m", str(models / "plain"), "-q"]
    assert call(*options, "--temp", "0", "--max-new-tokens", "5") == call(*options, "-t", "0", "-n", "5")


def test_the_stories_are_those_of_the_reference(call, shared_data):
    folder = shared_data / "models" / "stories260K"
    for row in json.loads((folder / "reference.json").read_text(encoding="utf-8"))["prompts"]:
        ids = row["greedy_new_ids"]
        options = ["-m", str(folder / "hf"), "-q", "-t", "0", "-n", str(len(ids)), "--json"]
        status, out, _ = call(row["text"], *options)
        assert status == 0
        assert json.loads(out)["ids"] == ids


def test_the_name_of_a_special_token_in_a_prompt_is_noted_once(models, capsys):
    """Text is literal, so a chat prompt written by hand is not what it looks like (B10)."""
    for prompt, is_noted in (("a </s> b", True), ("a list", False), ("a < b", False)):
        assert run(["generate", "-m", str(models / "plain"), "-n", "1", prompt]) == 0
        error = capsys.readouterr().err
        assert ("`</s>` in a text is read as ordinary text" in error) == is_noted
    assert run(["generate", "-q", "-m", str(models / "plain"), "-n", "1", "</s>"]) == 0
    assert capsys.readouterr().err == ""

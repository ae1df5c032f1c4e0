"""`llmctl chat` at a real terminal: answers that stream, interrupts, commands, ways out; scripts; `generate --chat`."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from llmctl.commands.chat import show_answer
from llmctl.config import GenerateConfig, ModelConfig, TokenizerConfig
from llmctl.data.conversations import Message, read_conversations
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.chat import Chat
from llmctl.inference.chat_ids import encode_prompt_chat
from llmctl.inference.chat_template import template_of
from llmctl.inference.generate import Prompt, generate
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer
from tests.support.chats import DEAF, MISTRAL, talk
from tests.support.warm import WARM, Process

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120
FAMILIES = {
    "decoder": {"eos_id": 3},
    "endless": {"max_positions": 100_000},
    "small": {"max_positions": 64, "eos_id": 3},
    "encoder": {"family": "encoder", "mask_id": 4, "tie_embeddings": True},
    "encoder_decoder": {
        "family": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "activation": "gelu_tanh",
        "eos_id": 3,
        "decoder_start_id": 0,
    },
    "bare": {"eos_id": 3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder with models of random weights; `templated` has a template of its own, `bare` no tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["a list of strings 中文，诗。\n\n"] * 20, TokenizerConfig(vocab_size=330))
    for name, fields in (FAMILIES | {"templated": FAMILIES["decoder"]}).items():
        settings = {
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "max_positions": 400,
            "init_std": 0.4,
            "tie_embeddings": False,
            "bos_id": 2,
            "pad_id": 0,
        }
        model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, **(settings | fields)))
        initialize(model, 0)
        # The likeliest token is never a byte that nobody sees, nor, of one model, the end.
        signs = "<" if name == "endless" else "<0x"
        if not model.config.tie_embeddings:
            hidden = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).startswith(signs)]
            model.lm_head.weight.data[hidden] = 0
        files = {} if name == "bare" else tokenizer.files()
        files |= {"chat_template.jinja": MISTRAL.encode()} if name == "templated" else {}
        write_artifact(folder / name, model.config, model.state_dict(), files=files, provenance={})
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(shell):
    """Return a caller of the command line: (exit code, stdout, stderr)."""
    return shell


class Terminal:
    """A process at a pseudo-terminal; `seen` is all that it has shown there."""

    def __init__(self, arguments: list[str], **streams) -> None:
        self.primary, secondary = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = Process(
            [*WARM, "chat", *arguments],
            **({"stdin": secondary, "stdout": secondary, "stderr": secondary} | streams),
            env=environment,
            start_new_session=True,
        )
        os.close(secondary)
        self.seen = ""
        self.raw = b""

    def type(self, text: str) -> None:
        os.write(self.primary, text.encode())

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Read until a text is there and return the place after it."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (place := self.seen.find(text, after)) < 0:
            assert self._read(end - time.monotonic()), f"no `{text}` in:\n{self.seen}"
        return place + len(text)

    def interrupt(self, text: str, *, after: int) -> int:
        """Press Ctrl-C until a text is there, and return the place after it.

        Python's line editor misses an interrupt that comes in the microseconds between a key and the wait for the next.
        """
        for _ in range(PATIENCE_SECONDS):
            self.type("\x03")
            end = time.monotonic() + 1
            while time.monotonic() < end and self.seen.find(text, after) < 0:
                self._read(end - time.monotonic())
            if self.seen.find(text, after) >= 0:
                break
        return self.wait_for(text, after=after)

    def wait_for_growth(self, n_characters: int) -> None:
        """Read until that much more is there."""
        wanted, end = len(self.seen) + n_characters, time.monotonic() + PATIENCE_SECONDS
        while len(self.seen) < wanted:
            assert self._read(end - time.monotonic()), self.seen

    def end(self) -> int:
        """Read to the end and return the exit code."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.primary], [], [], max(seconds, 0))
        data = b""
        if ready:
            with suppress(OSError):  # a terminal that nobody writes to any more
                data = os.read(self.primary, 1 << 16)
        self.raw += data
        self.seen = self.raw.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


@contextmanager
def terminal(*arguments: str, **streams) -> Iterator[Terminal]:
    shown = Terminal(list(arguments), **streams)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()
        if shown.process.stdout is not None:
            shown.process.stdout.close()
        os.close(shown.primary)


def expected(path: Path, *texts: str, n: int = 12, system: str = "") -> list[str]:
    """Return the greedy answers of a model."""
    chat = Chat(load_model(path), GenerateConfig(max_tokens=n, temperature=0.0), system)
    return [chat.ask(text, lambda _: None).text for text in texts]


@pytest.mark.parametrize("name", ["decoder", "templated", "encoder_decoder"])
def test_a_conversation_with_all_its_commands(models, name: str, tmp_path):
    first, second = expected(models / name, "a list", "诗\n\n of")
    with terminal("-m", str(models / name), "-t", "0", "-n", "12") as shown:
        shown.wait_for("model: ")
        at = shown.wait_for("> ")
        assert ("no chat template" in shown.seen) == (name == "decoder")
        assert ("is not trained on chat" in shown.seen) == (name == "encoder_decoder")
        shown.type("a list\n")
        at = shown.wait_for("> ", after=shown.wait_for(first, after=at))
        shown.type('"""\n诗\n\n of\n"""\n')
        at = shown.wait_for("> ", after=shown.wait_for(second, after=at))
        shown.type("/save talk.jsonl\n")
        at = shown.wait_for("> ", after=shown.wait_for("saved to talk.jsonl: 4 messages", after=at))
        shown.type("/save talk.jsonl\n")
        at = shown.wait_for("> ", after=shown.wait_for("`talk.jsonl` already exists", after=at))
        shown.type("/hlep\n")
        at = shown.wait_for("> ", after=shown.wait_for("did you mean `/help`?", after=at))
        shown.type("/help\n")
        at = shown.wait_for("> ", after=shown.wait_for("/system TEXT", after=at))
        shown.type("/reset\n")
        at = shown.wait_for("> ", after=at)
        shown.type("/save other.jsonl\n")
        at = shown.wait_for("> ", after=shown.wait_for("the conversation is empty", after=at))
        shown.type("\n")
        at = shown.wait_for("> ", after=at)
        shown.type("/exit\n")
        assert shown.end() == 0
        assert "Traceback" not in shown.seen
    (found,) = read_conversations([str(tmp_path / "talk.jsonl")])
    assert found.messages == talk("a list", first, "诗\n\n of", second)


def test_the_system_text_can_be_changed(models, tmp_path):
    (answer,) = expected(models / "decoder", "a list", system="中文")
    with terminal("-m", str(models / "decoder"), "-t", "0", "-n", "12", "-s", "of") as shown:
        at = shown.wait_for("> ")
        shown.type("/system\n")
        at = shown.wait_for("> ", after=shown.wait_for("\nof\n", after=at))
        shown.type("/system 中文\n")
        at = shown.wait_for("> ", after=at)
        shown.type("a list\n")
        at = shown.wait_for("> ", after=shown.wait_for(answer, after=at))
        shown.type("/save talk.jsonl\n")
        shown.wait_for("saved", after=at)
    (found,) = read_conversations([str(tmp_path / "talk.jsonl")])
    assert found.messages == talk("a list", answer, system="中文")


def test_ctrl_c_stops_the_answer_and_keeps_it_then_says_how_to_leave(models, tmp_path):
    with terminal("-m", str(models / "endless"), "-n", "90000", "-t", "0") as shown:
        at = shown.wait_for("> ")
        shown.type("a list\n")
        shown.wait_for("a list\n", after=at)
        shown.wait_for_growth(40)
        shown.type("\x03")
        at = shown.wait_for("> ", after=shown.wait_for("(stopped)", after=at))
        shown.type("/save talk.jsonl\n")
        at = shown.wait_for("> ", after=shown.wait_for("2 messages", after=at))
        shown.type("half a mess")
        shown.wait_for("half a mess", after=at)
        at = shown.wait_for("> ", after=shown.interrupt("Ctrl-D or /exit quits", after=at))
        at = shown.wait_for("> ", after=shown.interrupt("Ctrl-D or /exit quits", after=at))
        shown.type("\x04")
        assert shown.end() == 0
        assert "Traceback" not in shown.seen
    (found,) = read_conversations([str(tmp_path / "talk.jsonl")])
    assert [message.role for message in found.messages] == ["user", "assistant"]
    assert len(found.messages[1].content) > 20


def test_an_answer_comes_as_it_is_written(models):
    with terminal("-m", str(models / "endless"), "-n", "90000", "-t", "0", "-q") as shown:
        shown.wait_for("> ")
        shown.type("a list\n")
        for _ in range(3):
            shown.wait_for_growth(30)
        assert shown.process.poll() is None


def test_what_was_typed_comes_back_with_the_arrow(models):
    pytest.importorskip("readline")
    with terminal("-m", str(models / "decoder"), "-t", "0", "-n", "3", "-q") as shown:
        at = shown.wait_for("> ")
        shown.type("/system remember\n")
        at = shown.wait_for("> ", after=at)
        shown.type("\x1b[A")
        at = shown.wait_for("/system remember", after=at)
        shown.type(" me\n")
        at = shown.wait_for("> ", after=at)
        shown.type("/system\n")
        shown.wait_for("remember me", after=at)


def test_a_full_context_and_a_long_message_are_no_end(models):
    with terminal("-m", str(models / "small"), "-t", "0", "-n", "4", "-q") as shown:
        at = shown.wait_for("> ")
        for _ in range(4):
            shown.type("a list\n")
            at = shown.wait_for("\n> ", after=at)
        assert shown.seen.count("the oldest turns no longer fit") == 1
        shown.type("诗" * 90 + "\n")
        at = shown.wait_for("\n> ", after=shown.wait_for("the model's context is 64", after=at))
        shown.type("a\n")
        shown.wait_for("\n> ", after=at)


def test_answers_alone_are_on_stdout(models):
    answers = expected(models / "decoder", "a list", "of")
    with terminal("-m", str(models / "decoder"), "-t", "0", "-n", "12", stdout=subprocess.PIPE) as shown:
        for text in ("a list", "of"):
            shown.wait_for("> ", after=len(shown.seen))
            shown.type(f"{text}\n")
        shown.wait_for("> ", after=len(shown.seen))
        shown.type("\x04")
        assert shown.process.stdout is not None
        assert shown.process.stdout.read() == "".join(f"{answer}\n" for answer in answers)
        assert shown.end() == 0


def test_no_terminal_is_refused_with_what_to_do(models):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "llmctl", "chat", "-m", str(models / "decoder")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(timeout=PATIENCE_SECONDS) == 2  # though nobody closes the pipe
        assert process.stderr is not None
        assert b"generate --chat" in process.stderr.read()


def test_a_script_is_played(call, models, tmp_path):
    answers = expected(models / "decoder", "a list", "诗\n of")
    text = 'a list\r\n\n"""\n诗\n of\n"""\n/save talk.jsonl\n/exit\nnot said\n'
    (tmp_path / "script").write_bytes(text.encode())
    options = ["-m", str(models / "decoder"), "-t", "0", "-n", "12", "-q"]
    status, out, err = call("chat", *options, "--script", "script")
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert "saved to talk.jsonl" in err
    (found,) = read_conversations([str(tmp_path / "talk.jsonl")])
    assert found.messages == talk("a list", answers[0], "诗\n of", answers[1])
    (tmp_path / "talk.jsonl").unlink()
    assert call("chat", *options, "--script", "-", stdin=text.encode())[1] == out


def test_past_tokens_are_held_in_eight_bits_where_that_is_wanted(call, models):
    status, out, _ = call(
        "chat",
        "-m",
        str(models / "decoder"),
        "-t",
        "0",
        "-n",
        "12",
        "-q",
        "--kv",
        "int8",
        "--script",
        "-",
        stdin=b"a list\nof\n",
    )
    held = Chat(load_model(models / "decoder", packed=True), GenerateConfig(max_tokens=12, temperature=0.0, kv="int8"))
    answers = [held.ask(text, lambda _: None).text for text in ("a list", "of")]
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in answers))


def test_a_line_of_a_script_is_answered_while_the_pipe_stays_open(models):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmctl",
        "chat",
        str(models / "encoder_decoder"),
        "-t",
        "0",
        "-n",
        "3",
        "--script",
        "-",
    ]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"a list\n", b"of strings\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
        assert process.wait(timeout=PATIENCE_SECONDS) == 0


def test_an_interrupt_ends_a_script(models, tmp_path):
    (tmp_path / "script").write_text("a list\nof\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmctl",
        "chat",
        "-m",
        str(models / "endless"),
        "-n",
        "90000",
        "-t",
        "0",
        "-q",
        "--script",
        "script",
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.wait(timeout=PATIENCE_SECONDS) == 130
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "script", "status", "part"),
    [
        (["-m", "encoder"], b"a\n", 2, "llmctl fill"),
        (["-m", "bare"], b"a\n", 2, "no tokenizer"),
        (["-m", "decoder"], b"/oops\n", 2, "unknown command `/oops`"),
        (["-m", "decoder"], b"/save\n", 2, "/save talk.jsonl"),
        (["-m", "decoder"], b"a\n/save decoder\n", 8, "`decoder` already exists"),
        (["-m", "decoder"], b"a\xff\n", 2, "byte 1"),
        (["-m", "decoder", "-t", "-1"], b"a\n", 2, "`--temperature` is -1"),
        (["-m", "decoder", "--kv", "int3"], b"a\n", 2, "`--kv` is int3"),
        (["-m", "decoder", "small"], b"a\n", 2, "two models are given"),
        (["-m", "encoder_decoder", "-s", "x"], b"a\n", 2, "has no system prompt"),
        (["nowhere"], b"a\n", 3, "`nowhere`"),
        (["decoder", "--script", "gone"], b"", 3, "`gone`"),
    ],
)
def test_mistakes_are_answered(call, monkeypatch, models, arguments: list[str], script: bytes, status: int, part: str):
    monkeypatch.chdir(models)
    more = [] if "--script" in arguments else ["--script", "-"]
    got, _, err = call("chat", *arguments, "-n", "3", *more, stdin=script)
    assert got == status, err
    assert part in err
    assert "hint: " in err
    assert "this is a bug" not in err


def test_control_characters_do_not_reach_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show_answer("a\x1b[2J\tb\x07\n中\x9b\x7f")
    assert capsys.readouterr().out == r"a\u001b[2J" + "\tb" + r"\u0007" + "\n中" + r"\u009b\u007f"
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    show_answer("a\x1b")
    assert capsys.readouterr().out == "a\x1b"


@pytest.mark.parametrize("name", ["decoder", "templated"])
def test_generate_answers_messages(call, models, name: str):
    loaded = load_model(models / name)
    template = template_of(loaded)
    options = ["--chat", "-m", str(models / name), "-t", "0", "-n", "12", "-q"]
    for system in ("", "用中文。"):
        messages = [*([Message("system", system)] if system else []), Message("user", "a list")]
        prompt = Prompt(0, encode_prompt_chat(template, messages))
        config = GenerateConfig(max_tokens=12, temperature=0.0, stop=("\nUser:\n",) if template.is_plain else ())
        text = next(generate(loaded, [prompt], config)).text.removeprefix(template.shape[0])
        for stream in ("--stream", "--no-stream"):
            assert call("generate", "a list", *options, "-s", system, stream) == (0, f"{text}\n", "")
        _, out, _ = call("generate", "--json", "-", *options, "-s", system, stdin="a list\n诗\n".encode())
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a list", "诗"]
        assert json.loads(out.splitlines()[0])["text"] == text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--system", "x"], "add `--chat`"),
        (["--chat", "--ids"], "`--ids` takes token ids"),
        (["--chat", "-m", "encoder_decoder"], "has no chat template"),
        (["--chat", "-m", "bare"], "no tokenizer"),
    ],
)
def test_what_generate_cannot_put_together_is_named(call, monkeypatch, models, arguments: list[str], part: str):
    monkeypatch.chdir(models)
    status, out, err = call("generate", "a", *(arguments if "-m" in arguments else [*arguments, "-m", "decoder"]))
    assert (status, out) == (2, "")
    assert part in err


def test_a_broken_template_is_named(call, models, tmp_path):
    from llmctl.formats.artifact import read_artifact

    artifact = read_artifact(models / "decoder")
    files = artifact.files | {"chat_template.jinja": b"{% for %}"}
    write_artifact(tmp_path / "broken", artifact.config, artifact.state(), files=files, provenance={})
    for command in (["chat", "--script", "-"], ["generate", "--chat", "-"]):
        status, out, err = call(*command, "-m", "broken", "-q", stdin=b"a\n")
        assert (status, out) == (2, "")
        assert "not valid Jinja" in err


def test_a_system_prompt_that_the_template_leaves_out_is_said(call, models, tmp_path):
    from llmctl.formats.artifact import read_artifact

    artifact = read_artifact(models / "decoder")
    files = artifact.files | {"chat_template.jinja": DEAF.replace("<|im_end|>", "{{ eos_token }}").encode()}
    write_artifact(tmp_path / "deaf", artifact.config, artifact.state(), files=files, provenance={})
    said = "leaves out system messages"
    for system, is_said in (("", False), ("Be a pirate.", True)):
        _, _, err = call("generate", "--chat", "a", "-s", system, "-m", "deaf", "-n", "1", "-q")
        assert (said in err) == is_said
        _, _, err = call("chat", "--script", "-", "-s", system, "-m", "deaf", "-n", "1", "-q", stdin=b"a\n")
        assert (said in err) == is_said
    _, _, err = call("chat", "--script", "-", "-m", "deaf", "-n", "1", "-q", stdin=b"/system Be brief.\na\n")
    assert said in err
    _, _, err = call("generate", "--chat", "a", "-s", "Be brief.", "-m", str(models / "templated"), "-n", "1", "-q")
    assert err == ""

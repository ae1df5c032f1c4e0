"""Control characters of files do not reach a terminal; results in a pipe stay exact."""

import io
import json
import os
import pty
import subprocess
import sys

import pytest

from llmctl.formats.safetensors import write_safetensors
from llmctl.runs.terminal import GuardedStream, guarded, on_one_line, plain

HOSTILE = "\x1b]0;pwned\x07\x1b[31mred\u202eevil\x9b2J\r"


def is_safe(text: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066" for c in text)


def test_controls_are_spelled_out_and_the_rest_stays():
    assert plain("\x1b[2J") == r"\u001b[2J"
    assert plain("a\tb\nc é 中 \u200f\u200d 👩‍💻") == "a\tb\nc é 中 \u200f\u200d 👩‍💻"
    assert is_safe(plain("".join(map(chr, range(0x3000)))))
    assert on_one_line("a\nerror: b\tc") == r"a\nerror: b\tc"
    record = json.dumps({"text": "\x9b\u202e\x7f"}, ensure_ascii=False)
    assert json.loads(plain(record)) == json.loads(record)


def test_a_guarded_stream_is_the_stream_otherwise():
    inner = io.StringIO()
    stream = guarded(inner, always=True)
    print("a\x1b[0m", "b", file=stream)
    stream.write("\rprogress 1\r")
    stream.writelines(["\x07", "c"])
    assert inner.getvalue() == "a\\u001b[0m b\n\rprogress 1\\u000d\\u0007c"
    assert not stream.isatty()
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # how Click tells text streams from binary ones
    assert guarded(inner, always=False) is inner
    assert isinstance(stream, GuardedStream)


def at_a_terminal(*arguments: str) -> str:
    """Run llmctl at a pseudo-terminal and return all that it showed."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llmctl", *arguments], stdin=secondary, stdout=secondary, stderr=secondary
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            data = os.read(primary, 65536)
        except OSError:  # how Linux reports the end
            break
        if not data:
            break
        seen += data
    os.close(primary)
    process.wait()
    return seen.decode().replace("\r\n", "\n")


def test_no_command_shows_a_terminal_what_a_file_hides(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {f"w{HOSTILE}\nfake line": torch.zeros(1)}, {"title": HOSTILE, f"note{HOSTILE}": "x"})
    for command in (["inspect", str(path), "--tensors"], ["inspect", str(path), "--tensors", "--json"]):
        seen = at_a_terminal(*command)
        assert "evil" in seen
        assert is_safe(seen), ascii(seen)
        assert "\nfake line" not in seen
    run = tmp_path / "runs" / "0001-x"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "failed", "error": HOSTILE, "command": f"pretrain{HOSTILE}"}))
    for command in (["runs"], ["runs", "show", str(run)], ["generate", "-m", f"no{HOSTILE}", "x"], [f"x{HOSTILE}"]):
        environment = os.environ.copy()
        os.environ["LLMCTL_RUNS"] = str(run.parent)
        try:
            seen = at_a_terminal(*command)
        finally:
            os.environ.clear()
            os.environ.update(environment)
        assert is_safe(seen), ascii(seen)


def test_what_a_pipe_gets_is_exact(tmp_path):
    text = "a\x1b[2J\x9b b\r\n"
    tokenizer = [sys.executable, "-m", "llmctl", "tokenize"]
    (tmp_path / "a.txt").write_text("some text of words and other words\n" * 50)
    model = str(tmp_path / "t")
    subprocess.run([*tokenizer, "train", "a.txt", "-o", model, "--vocab-size", "300"], cwd=tmp_path, check=True)
    ids = subprocess.run([*tokenizer, "-m", model], input=text.encode(), capture_output=True, check=True).stdout
    decoded = subprocess.run([*tokenizer, "-m", model, "--decode"], input=ids, capture_output=True, check=True).stdout
    assert decoded == text.encode()

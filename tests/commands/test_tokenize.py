"""`llmctl tokenize`: a pure filter, two subcommands that print their folder, and one clear error for whatever is wrong."""

import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.cli import run
from llmctl.data.shards import ShardSet
from llmctl.tokenizer.load import load_tokenizer

TEXT = "The function returns a list of strings.\n    def f(x): return 12\n白日依山盡，黃河入海流。\r\n\n<s>[MASK]\\n🀄"
NO_TORCH = (
    "import sys; from llmctl.cli import run; status = run(sys.argv[1:])\n"
    "assert not {'torch', 'accelerate', 'transformers'} & sys.modules.keys(); sys.exit(status)"
)
NO_TOKENIZERS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tokenizers":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
from llmctl.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with `corpus.txt` and the tokenizer `tok` trained on it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "corpus.txt").write_text(TEXT * 20, newline="")
    assert run(["tokenize", "train", str(folder / "corpus.txt"), "-o", str(folder / "tok"), "--vocab-size", "350"]) == 0
    return folder


def llmctl(*arguments: str, stdin: bytes = b"", code: str = NO_TORCH, **options) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120, **options)


def tokenize(made: Path, *arguments: str, stdin: bytes = b"", **options) -> subprocess.CompletedProcess[bytes]:
    return llmctl("tokenize", "-m", str(made / "tok"), *arguments, stdin=stdin, **options)


@pytest.fixture
def inside(capsysbinary, monkeypatch):
    """Return a caller of the command line in this process: what it imports is looked at where it succeeds."""

    def call(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = run(arguments)
        return subprocess.CompletedProcess(arguments, status, *capsysbinary.readouterr())

    return call


def failed(done: subprocess.CompletedProcess[bytes], status: int, *parts: str) -> None:
    """Check that a command ended with one error of two lines at most that names what it should."""
    error = done.stderr.decode()
    assert done.returncode == status, error
    assert error.count("error: ") == 1, error
    assert "Traceback" not in error
    assert "this is a bug" not in error
    for part in parts:
        assert part in error


def test_the_filter_reverses_byte_for_byte(made):
    ids = tokenize(made, stdin=TEXT.encode())
    assert (ids.returncode, ids.stderr) == (0, b"")
    assert ids.stdout.count(b"\n") == len(TEXT.split("\n"))
    expected = load_tokenizer(made / "tok").encode_batch(TEXT.split("\n"))
    assert [[int(word) for word in line.split()] for line in ids.stdout.split(b"\n")[:-1]] == expected
    back = tokenize(made, "--decode", stdin=ids.stdout)
    assert (back.returncode, back.stdout) == (0, TEXT.encode() + b"\n")


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\n\n\n", b"a", b"a\n", b"\0\n"])
def test_as_many_lines_as_came(inside, made, stdin: bytes):
    if b"\0" in stdin:
        failed(inside("tokenize", "-m", str(made / "tok"), stdin=stdin), 2, "byte 0")
        return
    done = inside("tokenize", "-m", str(made / "tok"), stdin=stdin)
    assert done.stdout.count(b"\n") == len(stdin.splitlines())
    assert inside("tokenize", "-m", str(made / "tok"), "--decode", stdin=done.stdout).stdout == stdin + (
        b"\n" if stdin == b"a" else b""
    )


def test_records_keep_to_one_line_each(made):
    ids = tokenize(made, "--json", stdin=TEXT.encode())
    expected = load_tokenizer(made / "tok").encode_batch(TEXT.split("\n"))
    assert [json.loads(line) for line in ids.stdout.splitlines()] == [{"ids": each} for each in expected]
    newline = " ".join(map(str, load_tokenizer(made / "tok").encode("a\nb")))
    back = tokenize(made, "--decode", "--json", stdin=f"{newline}\n".encode())
    assert json.loads(back.stdout) == {"text": "a\nb"}
    assert back.stdout.count(b"\n") == 1


def test_the_report(made):
    done = tokenize(made, "--stats", "--json", stdin=TEXT.encode())
    report = json.loads(done.stdout)
    assert report["bytes"] == len(TEXT.replace("\n", "").encode())
    assert {"bytes_per_token", "fertility", "unknown_rate", "byte_rate", "tokens"} <= report.keys()
    plain = tokenize(made, "--stats", stdin=TEXT.encode()).stdout.decode()
    assert f"{report['tokens']:,}" in plain
    failed(tokenize(made, "--stats", "--decode"), 2, "--stats", "--decode")


def test_every_form_of_a_tokenizer_gives_the_same_ids(made):
    expected = tokenize(made, stdin=TEXT.encode()).stdout
    for name in ("tokenizer.model", "tokenizer.json"):
        done = llmctl("tokenize", "-m", str(made / "tok" / name), stdin=TEXT.replace("<s>", "").encode())
        assert done.returncode == 0, done.stderr
    assert llmctl("tokenize", "-m", str(made / "tok" / "tokenizer.model"), stdin=TEXT.encode()).stdout == expected


@pytest.mark.parametrize(
    ("stdin", "options", "parts"),
    [
        (b"good\nbad \xff\n", [], ["byte 9", "0xff"]),
        ("好".encode("gb18030"), [], ["byte 0"]),
        (b"5\n6 \xff\n", ["--decode"], ["byte 4"]),
        (b"1 2\n3 x\n", ["--decode"], ["line 2", "`x`"]),
        (b"1 2\n\n3 -4\n", ["--decode"], ["line 3", "`-4`"]),
        (b"350000\n", ["--decode"], ["line 1", "`350000`"]),
        (b"9" * 5000 + b"\n", ["--decode"], ["line 1"]),
    ],
)
def test_input_that_cannot_be_is_named(inside, made, stdin: bytes, options: list[str], parts: list[str]):
    failed(inside("tokenize", "-m", str(made / "tok"), *options, stdin=stdin), 2, *parts)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_tokenizer_is_named(inside, made, tmp_path, name: str, size: int):
    kept = ("tokenizer.model",) if name == "tokenizer.model" else ("tokenizer.json", "tokenizer_config.json")
    for file in kept:
        content = (made / "tok" / file).read_bytes()
        (tmp_path / file).write_bytes(content[:size] if file == name else content)
    done = inside("tokenize", "-m", str(tmp_path), stdin=b"a\n")
    failed(done, 4, name, str(tmp_path))
    assert done.stdout == b""


def test_no_such_tokenizer(inside, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed(inside("tokenize", "-m", str(tmp_path / "nowhere"), stdin=b"a\n"), 3, "nowhere")
    failed(inside("tokenize", "-m", "", stdin=b"a\n"), 2, "empty")
    failed(inside("tokenize", "-m", str(made / "corpus.txt"), stdin=b"a\n"), 2, "is data")
    failed(inside("tokenize", stdin=b"a\n"), 3, "no model")
    failed(inside("tokenize", "trian", "x.txt"), 2, "trian")


def test_without_the_extra_the_error_names_it(made, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((made / "tok" / "tokenizer.json").read_bytes())
    done = llmctl("tokenize", "-m", str(tmp_path), stdin=b"a\n", code=NO_TOKENIZERS)
    failed(done, 7, "tokenizers", "pip install tokenizers")
    assert llmctl("tokenize", "-m", str(made / "tok"), stdin=b"a\n", code=NO_TOKENIZERS).returncode == 0


def test_training_prints_the_folder_and_keeps_what_is_there(made, tmp_path):
    corpus, tok = str(made / "corpus.txt"), str(tmp_path / "new" / "tok")
    options = ["tokenize", "train", corpus, "-o", tok, "--vocab-size", "340"]
    done = llmctl(*options, "--set", "tokenizer.n_sentinels=7", "--model-type", "unigram")
    assert (done.returncode, done.stdout) == (0, f"{tok}\n".encode())
    assert b"smaller than the requested 340" in done.stderr
    first = load_tokenizer(tok)
    assert len(first.sentinel_ids()) == 7
    failed(llmctl(*options), 8, tok)
    assert load_tokenizer(tok).sha256 == first.sha256
    done = llmctl(*options, "-f", "--json")
    record = json.loads(done.stdout)
    assert record == {"tokenizer": tok, "vocab_size": 340, "sha256": load_tokenizer(tok).sha256}
    assert record["sha256"] != first.sha256


@pytest.mark.parametrize(
    ("options", "status", "parts"),
    [
        (["--vocab-size", "20"], 2, ["`tokenizer.vocab_size` 20", "261"]),
        (["--vocab-size", "262"], 2, ["`tokenizer.vocab_size` 262", "need"]),
        (["--vocab-size", "-4"], 2, ["-4"]),
        (["--vocab-size", "9" * 12], 2, ["9" * 12]),
        (["--vocab-size", "many"], 2, ["many"]),
        (["--model-type", "bqe"], 2, ["bqe"]),
        (["--set", "tokenizer.character_coverage=7"], 2, ["character_coverage", "7"]),
        (["--set", "tokenizer.n_sentinels=-1"], 2, ["n_sentinels", "-1"]),
        (["--set", "tokenizer.max_train_bytes=0"], 2, ["max_train_bytes"]),
        (["--set", "tokenizer.n_sentinel=1"], 2, ["n_sentinel", "n_sentinels"]),
    ],
)
def test_settings_that_cannot_be_are_named(inside, made, tmp_path, options: list[str], status: int, parts: list[str]):
    done = inside("tokenize", "train", str(made / "corpus.txt"), "-o", str(tmp_path / "tok"), *options)
    failed(done, status, *parts)
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize(
    ("name", "content", "status", "parts"),
    [
        ("empty.txt", b"", 2, ["empty.txt"]),
        ("blank.txt", b"\n\n\n", 2, ["no text"]),
        ("latin.txt", "é\n".encode("latin-1"), 2, ["latin.txt", "byte 0"]),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", 2, ["picture.png"]),
        ("nul.txt", b"text\0more", 2, ["nul.txt", "byte 4"]),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], 2, ["cut.txt.gz"]),
        ("deep.jsonl", b"[" * 100_000, 2, ["deep.jsonl", "line 1"]),
        ("corpos.txt", None, 3, ["corpos.txt", "corpus.txt"]),
        ("x" * 300, None, 3, ["xxx"]),
    ],
)
def test_text_that_cannot_be_is_named(
    inside, tmp_path, name: str, content: bytes | None, status: int, parts: list[str]
):
    (tmp_path / "corpus.txt").write_text("x")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = inside("tokenize", "train", str(tmp_path / name), "-o", str(tmp_path / "tok"), "--model-type", "char")
    failed(done, status, *parts)
    assert not (tmp_path / "tok").exists()
    assert inside("tokenize", "train", "", "-o", str(tmp_path / "tok")).returncode == 2


def small_files() -> None:
    """Let no file grow over a thousand bytes, as a full disk would not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_a_disk_that_is_full_damages_nothing(made, tmp_path):
    corpus = str(made / "corpus.txt")
    done = llmctl("tokenize", "train", corpus, "-o", str(tmp_path / "tok"), preexec_fn=small_files)
    failed(done, 8, "tok")
    assert not list(tmp_path.iterdir())
    encode = ["tokenize", "encode", corpus, "--tokenizer", str(made / "tok"), "-o", str(tmp_path / "shards")]
    failed(llmctl(*encode, preexec_fn=small_files), 8, "shards")
    assert not list((tmp_path / "shards").iterdir())
    assert llmctl(*encode).returncode == 0
    assert ShardSet.open(tmp_path / "shards").n_documents == 1


def test_a_place_under_a_file_is_named(inside, made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    corpus = str(made / "corpus.txt")
    failed(inside("tokenize", "train", corpus, "-o", str(tmp_path / "file" / "tok")), 8, "file")
    encode = ["tokenize", "encode", corpus, "--tokenizer", str(made / "tok")]
    failed(inside(*encode, "-o", str(tmp_path / "file" / "shards")), 8, "file")


def test_encoding_prints_the_folder_with_its_tokenizer(made, tmp_path):
    out = tmp_path / "shards"
    options = ["tokenize", "encode", str(made / "corpus.txt"), "--tokenizer", str(made / "tok"), "-o", str(out)]
    done = llmctl(*options, "--split", "line")
    assert (done.returncode, done.stdout) == (0, f"{out}\n".encode())
    assert b"documents" in done.stderr
    shards = ShardSet.open(out)
    tokenizer = load_tokenizer(out)
    assert tokenizer.sha256 == shards.manifest["tokenizer_sha256"]
    lines = [line.removesuffix("\r") for line in (TEXT * 20).split("\n") if line.strip()]
    assert [tokenizer.decode(shards.document(i).tolist()) for i in range(shards.n_documents)] == lines
    again = llmctl(*options, "--split", "line", "--json", "-q")
    assert (again.returncode, again.stderr) == (0, b"")
    assert json.loads(again.stdout)["tokens"] == shards.n_tokens
    failed(llmctl(*options), 4, "split")


def test_parts_name_those_that_are_missing(made, tmp_path):
    out = str(tmp_path / "shards")
    options = ["tokenize", "encode", str(made / "corpus.txt"), "--tokenizer", str(made / "tok"), "-o", out, "--json"]
    done = llmctl(*options, "--shard", "1/2")
    assert json.loads(done.stdout) == {"shards": out, "part": "1/2", "complete": False}
    failed(llmctl("tokenize", "encode", "--shard", "2/2", "-o", out, "--tokenizer", str(made / "tok")), 2, "2/2")
    failed(llmctl(*options, "--workers", "-1"), 2, "-1")
    assert json.loads(llmctl(*options, "--shard", "0/2").stdout)["complete"] is True


def test_standard_input_is_a_corpus(made, tmp_path):
    text = (made / "corpus.txt").read_bytes()
    tok, out = str(tmp_path / "tok"), str(tmp_path / "shards")
    assert llmctl("tokenize", "train", "-", "-o", tok, "--vocab-size", "350", stdin=text).returncode == 0
    assert load_tokenizer(tok).sha256 == load_tokenizer(made / "tok").sha256
    encode = ["tokenize", "encode", "-", "--tokenizer", tok, "-o", out]
    assert llmctl(*encode, stdin=text).returncode == 0
    failed(llmctl(*encode, stdin=b"other text\n"), 8, "shards", "pipe")
    failed(llmctl("tokenize", "train", "-", "-o", f"{tok}2", stdin=b"bad \xff"), 2, "stdin", "byte 4")


def test_a_reader_that_leaves_ends_it_quietly(made):
    code = "import sys; from llmctl.__main__ import main; sys.argv[0] = 'llmctl'; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "tokenize", "-m", str(made / "tok")]
    read_end, write_end = os.pipe()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        os.close(read_end)
        _, errors = process.communicate(b"a list of strings\n" * 50_000, timeout=120)
    assert errors == b""
    assert process.returncode == -signal.SIGPIPE

"""Training, encoding and measuring do the whole job on files: nothing half-written, nothing mixed, every line counted."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmctl.config import DataConfig, TokenizerConfig
from llmctl.data import shard_writer
from llmctl.data.shards import Part, ShardSet
from llmctl.errors import ArtifactError, OutputError, UsageError
from llmctl.preparing.tokenize import decode_lines, encode_corpus, encode_lines, measure, train
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import load_tokenizer

TEXT = "The function returns a list of strings.\n    def f(x): return 12\n白日依山盡，黃河入海流。\n"
LINES = ["", " ", "a list", "中文 and strings\r", "\t\tx = 1", "a\\nb", "🀄", "e\u0301" * 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXT * 20 + str(number))
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("made") / "tok"
    return train([str(corpus)], TokenizerConfig(vocab_size=380), DataConfig(), folder, force=False)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("tokenizer")
    for name, content in tokenizer.files().items():
        (place / name).write_bytes(content)
    return str(place)


def encode(
    corpus: Path | str, folder: str, out: Path, *, part: Part | None = None, workers: int = 1, **data
) -> ShardSet:
    shards = encode_corpus(
        [str(corpus)], folder, DataConfig(**data), out, part=part or Part(), workers=workers, say=str
    )
    assert shards is not None
    return shards


def test_a_trained_folder_is_whole_and_the_same_every_time(corpus, tokenizer, tmp_path):
    for name in ("a", "b"):
        train([str(corpus)], TokenizerConfig(vocab_size=380), DataConfig(), tmp_path / name, force=False)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert load_tokenizer(tmp_path / "a").sha256 == tokenizer.sha256
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_what_is_there_stays_until_it_is_replaced(corpus, tmp_path):
    settings = (TokenizerConfig(vocab_size=380), DataConfig())
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, force in (("tok", False), ("file", False), ("file", True), ("file/below", True)):
        with pytest.raises(OutputError, match=name.split("/")[0]):
            train([str(corpus)], *settings, tmp_path / name, force=force)
    with pytest.raises(UsageError):
        train([str(corpus)], TokenizerConfig(vocab_size=3), DataConfig(), tmp_path / "tok", force=True)
    assert [path.name for path in (tmp_path / "tok").iterdir()] == ["mine.txt"]
    made = train([str(corpus)], *settings, tmp_path / "tok", force=True)
    assert load_tokenizer(tmp_path / "tok").sha256 == made.sha256
    assert (tmp_path / "tok" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"


def test_every_document_lies_between_its_ends(corpus, tokenizer, folder, tmp_path):
    shards = encode(corpus, folder, tmp_path)
    texts = [(corpus / f"{number}.txt").read_text() for number in range(4)]
    assert [shards.document(i).tolist() for i in range(4)] == [tokenizer.encode(t, bos=True, eos=True) for t in texts]
    assert [tokenizer.decode(shards.document(i).tolist()) for i in range(4)] == texts
    assert load_tokenizer(tmp_path).sha256 == shards.manifest["tokenizer_sha256"] == tokenizer.sha256


def test_a_folder_is_never_mixed(corpus, folder, tmp_path):
    encode(corpus, folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    other = tmp_path / "tok"
    train([str(corpus)], TokenizerConfig(vocab_size=350), DataConfig(), other, force=False)
    (tmp_path / "more.txt").write_text("more")
    for path, using, settings in (
        (corpus, str(other), {}),
        (tmp_path / "more.txt", folder, {}),
        (corpus, folder, {"split": "line"}),
        (corpus, folder, {"text_key": "other"}),
    ):
        with pytest.raises(ArtifactError, match="out"):
            encode(path, using, tmp_path / "out", **settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_text_of_a_pipe_is_encoded_once(folder, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feed = f"from pathlib import Path; Path({str(pipe)!r}).write_text({TEXT!r})"
    with subprocess.Popen([sys.executable, "-c", feed]):
        shards = encode(pipe, folder, tmp_path / "out")
    assert load_tokenizer(folder).decode(shards.document(0).tolist()) == TEXT
    with subprocess.Popen([sys.executable, "-c", feed]) as writer:
        try:
            with pytest.raises(OutputError, match="pipe"):
                encode(pipe, folder, tmp_path / "out")
        finally:
            writer.kill()  # nobody reads what it has


def test_parts_and_processes_make_the_same_documents(corpus, folder, tmp_path, monkeypatch):
    from llmctl.data import shard_writer as module

    whole = encode(corpus, folder, tmp_path / "whole", split="line")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    encode(corpus, folder, tmp_path / "two", split="line", workers=2)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    for index in range(3):
        parts = encode_corpus(
            [str(corpus)],
            folder,
            DataConfig(split="line"),
            tmp_path / "parts",
            part=Part(index, 3),
            workers=1,
            say=str,
        )
        assert (parts is None) == (index < 2)
    order = [number for index in range(3) for number in range(index, whole.n_documents, 3)]
    assert parts is not None
    assert [parts.document(i).tolist() for i in range(parts.n_documents)] == [whole.document(n).tolist() for n in order]


def test_a_large_file_is_shared_by_processes(corpus, folder, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(TEXT * 400)
    whole = encode(tmp_path / "one.txt", folder, tmp_path / "whole")
    monkeypatch.setattr(shard_writer, "PART_CHARACTERS", 2000)
    monkeypatch.setattr(shard_writer, "BATCH_CHARACTERS", 2000)
    batches: list[list[str]] = []
    batched = shard_writer.batched_by_size

    def recorded(parts):
        for texts, marks in batched(parts):
            batches.append(texts)
            yield texts, marks

    monkeypatch.setattr(shard_writer, "batched_by_size", recorded)
    shared = encode(tmp_path / "one.txt", folder, tmp_path / "shared", workers=2)
    assert len(batches) > 5
    assert whole.n_documents == shared.n_documents == 1
    assert whole.document(0).tolist() == shared.document(0).tolist()


SLOW_RUN = """
    import sys, threading
    from pathlib import Path
    from llmctl.config import DataConfig
    from llmctl.data import shard_writer
    from llmctl.data.shards import Part
    from llmctl.preparing import tokenize

    if __name__ == "__main__":
        corpus, folder, out, workers = sys.argv[1:]
        shard_writer.BATCH_CHARACTERS = 2000
        shard_writer.write_shards.__kwdefaults__["shard_tokens"] = 500
        publish = shard_writer._Writer.publish

        def publish_two(self):
            if len(self.shards) == 2:
                import multiprocessing
                print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                threading.Event().wait()
            publish(self)

        if workers != "whole":
            shard_writer._Writer.publish = publish_two
        tokenize.encode_corpus([corpus], folder, DataConfig(split="line"), Path(out), part=Part(),
                               workers=2 if workers == "2" else 1, say=str)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_encoding_goes_on_and_leaves_nobody_behind(corpus, folder, tmp_path, workers: str):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SLOW_RUN))

    def command(out: str, how: str) -> list[str]:
        return [sys.executable, "-P", str(script), str(corpus), folder, str(tmp_path / out), how]

    subprocess.run(command("whole", "whole"), check=True)
    with subprocess.Popen(command("killed", workers), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # The end of their output is the end of the processes that share it.
        assert process.communicate(timeout=60)[0] == ""
    assert len(children) == (2 if workers == "2" else 0)
    finished = {path.name: path.stat() for path in (tmp_path / "killed").glob("part-*.bin")}
    assert len(finished) == 4
    subprocess.run(command("killed", "whole"), check=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    for name, stat in finished.items():
        now = (tmp_path / "killed" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_lines_go_there_and_back(tokenizer):
    ids = list(encode_lines(tokenizer, LINES * 100))
    assert ids == tokenizer.encode_batch(LINES * 100)
    written = [" ".join(map(str, line)) for line in ids]
    assert list(decode_lines(tokenizer, written)) == LINES * 100


def test_lines_are_read_as_they_are_wanted(tokenizer):
    read = 0

    def lines():
        nonlocal read
        while True:
            read += 1
            yield "a list"

    stream = encode_lines(tokenizer, lines())
    first = [next(stream) for _ in range(10)]
    assert len(first) == 10
    assert read < 100


@pytest.mark.parametrize("word", ["x", "-1", "1.5", "99999", "1" * 5000, "٣", "1,2", "0x1"])
def test_what_is_no_id_is_named(tokenizer, word: str):
    with pytest.raises(UsageError, match=f"line 2 has `{word[:40]}`"):
        list(decode_lines(tokenizer, ["5 6", f"7 {word} 8"]))


def test_the_measures_are_what_they_say(tokenizer):
    report = measure(tokenizer, LINES).to_dict()
    ids = [index for line in tokenizer.encode_batch(LINES) for index in line]
    n_bytes = sum(len(line.encode()) for line in LINES)
    assert (report["lines"], report["bytes"], report["tokens"]) == (len(LINES), n_bytes, len(ids))
    assert report["bytes_per_token"] == pytest.approx(n_bytes / len(ids), abs=1e-4)
    byte_tokens = sum(tokenizer.piece(index).startswith("<0x") for index in ids)
    assert report["byte_rate"] == pytest.approx(byte_tokens / len(ids), abs=1e-6)
    assert byte_tokens >= 4
    assert report["unknown_rate"] == 0
    assert measure(tokenizer, ["one two 中文 x."]).n_words == 6
    assert measure(tokenizer, []).to_dict()["bytes_per_token"] == 0


def test_unknown_words_are_counted(shared_data):
    bert = load_tokenizer(shared_data / "tokenizers" / "bert-en" / "vocab.txt")
    assert measure(bert, ["hello 🀄"]).to_dict()["unknown_rate"] == 0.5

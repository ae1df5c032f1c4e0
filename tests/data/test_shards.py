"""Shards hold exactly the documents, whatever was interrupted, split over hosts or spread over processes."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmctl.config import TokenizerConfig
from llmctl.data import shard_writer as module
from llmctl.data.shard_writer import encode_all, write_shards
from llmctl.data.shards import Part, ShardSet, parse_part
from llmctl.errors import ArtifactError, MemoryLimitError, NotFoundError, OutputError, UsageError
from llmctl.tokenizer.train import train_tokenizer

TEXTS = [f"text {n} " + "x" * (n % 7) for n in range(50)] + ["", "中文"]
IDENTITY = {"tokenizer_sha256": "t", "source_sha256": "s"}


def encode(batch: list[str]) -> list[list[int]]:
    return [[byte + 3 for byte in text.encode()] for text in batch]


def write(folder: Path, texts=TEXTS, **options) -> ShardSet | None:
    settings = {"bos": 1, "eos": 2, "vocab_size": 300, "identity": IDENTITY, "shard_tokens": 100} | options
    return write_shards(folder, texts, encode, **settings)


def expected(text: str) -> list[int]:
    return [1, *encode([text])[0], 2]


def test_documents_come_back_one_by_one_and_joined(tmp_path):
    shards = write(tmp_path)
    assert shards is not None
    assert shards.n_documents == len(TEXTS)
    assert [shards.document(i).tolist() for i in range(len(TEXTS))] == [expected(text) for text in TEXTS]
    joined = list(itertools.chain.from_iterable(map(expected, TEXTS)))
    assert shards.read(0, shards.n_tokens).tolist() == joined
    assert shards.read(95, 210).tolist() == joined[95:210]
    assert len(shards.manifest["shards"]) > 3
    again = ShardSet.open(tmp_path)
    assert again.lengths.tolist() == shards.lengths.tolist()


def test_content_is_the_same_however_it_lies_in_files(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other", shard_tokens=1000)
    moved = write(tmp_path / "moved", [*TEXTS[1:], TEXTS[0]])
    # The same tokens with an end elsewhere are other documents.
    split = write(tmp_path / "split", ["ab", "c"], bos=None, eos=None)
    joined = write(tmp_path / "joined", ["a", "bc"], bos=None, eos=None)
    assert all((one, other, moved, split, joined))
    assert one.content_sha256() == other.content_sha256() != moved.content_sha256()
    assert split.content_sha256() != joined.content_sha256()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_ids_take_the_smallest_type_that_holds_them(tmp_path, vocab_size: int, dtype: str):
    shards = write_shards(
        tmp_path,
        ["a"],
        lambda batch: [[vocab_size - 1] for _ in batch],
        bos=None,
        eos=None,
        vocab_size=vocab_size,
        identity=IDENTITY,
    )
    assert shards is not None
    assert shards.manifest["dtype"] == dtype
    assert shards.document(0).tolist() == [vocab_size - 1]


class StopHereError(Exception):
    pass


def breaking(texts: list[str], after: int):
    for number, text in enumerate(texts):
        if number == after:
            raise StopHereError
        yield text


def test_an_interrupted_encoding_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 40)
    write(tmp_path / "whole")
    with pytest.raises(StopHereError):
        write(tmp_path / "stopped", breaking(TEXTS, 30))
    with pytest.raises(NotFoundError):
        ShardSet.open(tmp_path / "stopped")
    done = {path.name: path.stat().st_ino for path in (tmp_path / "stopped").glob("*.tokens.bin")}
    assert done
    write(tmp_path / "stopped")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    assert all((tmp_path / "stopped" / name).stat().st_ino == inode for name, inode in done.items())


def test_parts_are_merged_by_listing(tmp_path):
    for index in (2, 0):
        assert write(tmp_path, part=Part(index, 3)) is None
        with pytest.raises(ArtifactError, match="lacks"):
            ShardSet.open(tmp_path)
    shards = write(tmp_path, part=Part(1, 3))
    assert shards is not None
    got = [shards.document(i).tolist() for i in range(shards.n_documents)]
    assert got == [expected(text) for index in range(3) for text in TEXTS[index::3]]


def test_another_tokenizer_or_source_is_refused(tmp_path):
    write(tmp_path)
    for key in IDENTITY:
        with pytest.raises(ArtifactError, match=key):
            write(tmp_path, identity=IDENTITY | {key: "other"})
    with pytest.raises(ArtifactError, match="in 1 parts, not 2"):
        write(tmp_path, part=Part(0, 2))


@pytest.mark.parametrize("harm", ["cut", "delete", "manifest", "version"])
def test_damage_is_named(tmp_path, harm: str):
    write(tmp_path)
    tokens = next(iter(sorted(tmp_path.glob("*.tokens.bin"))))
    manifest = next(iter(tmp_path.glob("part-*-of-*.json")))
    if harm == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif harm == "delete":
        tokens.unlink()
    elif harm == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 99}))
    with pytest.raises(ArtifactError):
        ShardSet.open(tmp_path)


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 200)
    tokenizer = train_tokenizer(TEXTS * 5, TokenizerConfig(vocab_size=330))
    one = list(encode_all(TEXTS, tokenizer.encode_batch, 1))
    two = list(map(list, encode_all(TEXTS, tokenizer.encode_batch, 2)))
    assert one == two == tokenizer.encode_batch(TEXTS)


def chunks(text: str, n_characters: int) -> list[str]:
    return [text[start : start + n_characters] for start in range(0, len(text), n_characters)]


def of_parts(batch: list[str]) -> list[list[int]]:
    assert all(len(text) <= 10_000 for text in batch)
    return encode(batch)


def test_a_large_document_is_shared_by_processes(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 8_000)
    monkeypatch.setattr(module, "PART_CHARACTERS", 10_000)
    texts = ["", "a" * 19_000 + "b" * 6_000, "c", "d" * 30_000]
    assert list(map(list, encode_all(texts, of_parts, 2, chunks))) == encode(texts)


def test_no_more_than_a_shard_is_held(tmp_path):
    alive = 0
    most = 0

    def endless():
        nonlocal alive, most
        for number in range(5000):
            alive += 1
            most = max(most, alive)
            yield f"{number:05d}"

    def count(batch: list[str]) -> list[list[int]]:
        nonlocal alive
        alive -= len(batch)
        return encode(batch)

    write_shards(tmp_path, endless(), count, bos=None, eos=None, vocab_size=300, identity=IDENTITY, shard_tokens=50)
    assert most * 5 <= module.BATCH_CHARACTERS + 5
    assert max(int(n) for n in np.diff([0, *[s["n_tokens"] for s in ShardSet.open(tmp_path).manifest["shards"]]])) <= 55


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_a_part_that_cannot_be_is_refused(text: str):
    with pytest.raises(UsageError, match="--shard"):
        parse_part(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", None),
        ("shards", [{"tokens": "../../etc/passwd", "lengths": "x", "n_documents": 1, "n_tokens": 1}]),
        ("shards", [{"tokens": 3}]),
        ("dtype", "object"),
        ("vocab_size", "many"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, key: str, value):
    write(tmp_path)
    path = next(iter(tmp_path.glob("part-*.json")))
    manifest = json.loads(path.read_text())
    for changed in (manifest | {key: value}, {name: manifest[name] for name in manifest if name != key}, [], None):
        path.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match="manifest"):
            ShardSet.open(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "delete", "longer"])
def test_damaged_lengths_are_named(tmp_path, harm: str):
    write(tmp_path)
    path = next(iter(sorted(tmp_path.glob("*.lengths.bin"))))
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if harm == "cut" else path.read_bytes() + bytes([1] + [0] * 7))
    with pytest.raises(ArtifactError, match="part-00000-of-00001-00000"):
        ShardSet.open(tmp_path)


def test_parts_of_different_corpora_are_not_merged(tmp_path):
    write(tmp_path, part=Part(0, 2))
    with pytest.raises(ArtifactError, match="source_sha256"):
        write(tmp_path, part=Part(1, 2), identity=IDENTITY | {"source_sha256": "other"})
    write(tmp_path / "other", part=Part(1, 2), identity=IDENTITY | {"source_sha256": "other"})
    write(tmp_path / "other", part=Part(0, 2), identity=IDENTITY | {"source_sha256": "other"})
    for path in (tmp_path / "other").glob("part-00001-*"):
        path.rename(tmp_path / path.name)
    with pytest.raises(ArtifactError, match="source_sha256"):
        ShardSet.open(tmp_path)


def die(batch: list[str]) -> list[list[int]]:
    os._exit(9)


def test_a_killed_process_is_an_error_and_no_endless_wait(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    with pytest.raises(MemoryLimitError, match="killed"):
        list(encode_all(TEXTS, die, 2))


def test_an_id_that_does_not_fit_is_never_written(tmp_path):
    with pytest.raises(OverflowError):
        write_shards(tmp_path, ["a"], lambda _: [[70_000]], bos=None, eos=None, vocab_size=300, identity=IDENTITY)
    assert not list(tmp_path.glob("*.bin"))


def too_large(batch: list[str]) -> list[list[int]]:
    return [[70_000]] * len(batch)


def test_nor_is_one_of_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1)
    with pytest.raises(OverflowError):
        write_shards(tmp_path, ["a"] * 3, too_large, bos=None, eos=None, vocab_size=300, identity=IDENTITY, workers=2)
    assert not list(tmp_path.glob("*.bin"))
    shards = write_shards(
        tmp_path, ["a"] * 3, too_large, bos=1, eos=None, vocab_size=70_001, identity=IDENTITY, workers=2
    )
    assert shards is not None
    assert shards.document(2).tolist() == [1, 70_000]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file/shards"):
        write(tmp_path / "file" / "shards")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("part_count", value) for value in (float("-inf"), 2**31, 0, -1, 1.0, True, "1", [])),
        *(("part_index", value) for value in (1, -1, 2**31, float("nan"))),
        *(("vocab_size", value) for value in (0, 2**63, 3.5)),
        *(("tokenizer_sha256", value) for value in (None, 7)),
    ],
)
def test_counts_of_a_manifest_are_not_believed(tmp_path, key: str, value):
    write(tmp_path)
    path = next(iter(tmp_path.glob("part-*.json")))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=f"{key} is"):
        ShardSet.open(tmp_path)


def test_a_flipped_id_is_found_with_its_place(tmp_path):
    shards = write(tmp_path)
    assert shards is not None
    shards.verify()
    path = sorted(tmp_path.glob("*.tokens.bin"))[1]
    good = path.read_bytes()
    at = 40
    path.write_bytes(good[:at] + b"\xff\xff" + good[at + 2 :])
    message = f"{path.name}` is damaged at byte {at}: the id 65535 is not in the vocabulary of 300"
    with pytest.raises(ArtifactError, match=message):
        ShardSet.open(tmp_path).verify()
    damaged = ShardSet.open(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        damaged.read(0, damaged.n_tokens)
    with pytest.raises(ArtifactError, match=message):
        [damaged.document(index) for index in range(damaged.n_documents)]
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])  # an id of the vocabulary, but another
    with pytest.raises(ArtifactError, match=f"{path.name}` is damaged: it does not match its sha256"):
        ShardSet.open(tmp_path).verify()


def test_negative_lengths_are_damage(tmp_path):
    write(tmp_path)
    path = next(iter(sorted(tmp_path.glob("*.lengths.bin"))))
    lengths = np.frombuffer(path.read_bytes(), dtype="<i8").copy()
    lengths[:2] += np.array([10_000, -10_000])
    path.write_bytes(lengths.tobytes())
    with pytest.raises(ArtifactError, match="tokens"):
        ShardSet.open(tmp_path)

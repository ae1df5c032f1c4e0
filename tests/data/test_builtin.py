"""The embedded corpus is the same every time, holds no near-duplicates, and survives a bad cache."""

import gzip
import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from llmctl.data import builtin


@pytest.fixture
def small_library(tmp_path, monkeypatch) -> None:
    """Let Python's library be two packages of it: building takes less."""
    paths = sysconfig.get_paths()
    for name in ("email", "json"):
        shutil.copytree(Path(paths["stdlib"]) / name, tmp_path / "library" / name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"stdlib": str(tmp_path / "library")})


@pytest.fixture
def content(small_library) -> dict:
    return builtin.build()


def test_building_is_reproducible(content):
    assert builtin.build() == content


def test_it_is_prose_of_a_useful_size():
    content = builtin.build()
    n_bytes = sum(len(text.encode()) for text in content["documents"])
    assert 500_000 < n_bytes < 8_000_000
    assert len(content["pairs"]) > 1000
    assert all(source and target for source, target in content["pairs"])
    sources = [source for source, _ in content["pairs"]]
    assert len(set(sources)) == len(sources)


def test_near_duplicates_are_gone():
    base = " ".join(f"word{n}" for n in range(60))
    documents = [base, base + " and a little more", "something else entirely " * 5, base.upper()]
    assert builtin.without_near_duplicates(documents) == [documents[1], documents[2]]


def test_a_short_text_inside_a_longer_later_one_is_a_duplicate():
    short = " ".join(f"a{n}" for n in range(60))
    assert short not in builtin.without_near_duplicates([short, f"{short} {' '.join(f'c{n}' for n in range(200))}"])


def test_a_damaged_or_unwritable_cache_costs_nothing_but_time(content, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path))
    assert builtin.corpus() == content
    path = builtin.cache_path()
    assert path.is_file()
    path.write_bytes(path.read_bytes()[:100])
    assert builtin.corpus() == content
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "file"))
    assert builtin.builtin_documents() == content["documents"]
    assert builtin.builtin_provenance()["n_documents"] == len(content["documents"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return x. More.", "Return x."),
        ("Return\n  x!\n\nRest", "Return x!"),
        ("No end", "No end"),
        ("e.g.this stays. Next", "e.g.this stays."),
    ],
)
def test_first_sentences(text: str, sentence: str):
    assert builtin.first_sentence(text) == sentence


def test_a_cache_that_is_damaged_anywhere_is_not_read(content, tmp_path):
    path = tmp_path / "cache.json.gz"
    assert builtin.read_cache(path) is None
    builtin.store(path, content)
    assert builtin.read_cache(path) == json.loads(json.dumps(content))
    whole = path.read_bytes()
    middle = len(whole) // 2
    harms = [
        b"",
        b"nonsense",
        whole[:10] + b"\xff" * 100,
        whole[:middle],
        whole[:middle] + b"\0" * 500 + whole[middle + 500 :],
    ]
    shapes = [[], {"documents": 3, "pairs": []}, {"documents": [3], "pairs": []}, {"documents": [], "pairs": [["a"]]}]
    harms += [gzip.compress(json.dumps(shape).encode()) for shape in shapes] + [gzip.compress(b"[" * 100_000)]
    for harm in harms:
        path.write_bytes(harm)
        assert builtin.read_cache(path) is None


def test_a_cache_and_a_fresh_build_have_the_same_provenance(small_library, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path))
    fresh = builtin.builtin_provenance()
    written = builtin.cache_path().stat()
    assert builtin.builtin_provenance() == fresh
    now = builtin.cache_path().stat()
    assert (now.st_ino, now.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)

"""Files appear whole or not at all, and the file system's refusals are one clear error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.errors import ArtifactError, OutputError
from llmctl.files import (
    atomic_path,
    contents,
    download_hint,
    ensure_writable,
    exposed,
    link_or_copy,
    outside,
    parse_json,
    read_own,
    recognized,
    write_bytes,
    write_json,
)


def test_the_contents_of_a_folder_are_said(tmp_path):
    assert contents(tmp_path) == "it is empty"
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).touch()
    assert contents(tmp_path) == "it holds `a.txt`, `b.txt`, `sub/`"
    (tmp_path / "c.txt").touch()
    assert contents(tmp_path) == "it holds `a.txt`, `b.txt`, `c.txt` and 1 more"


@pytest.mark.parametrize("place", ["/proc/x/y", "/sys/x", "/dev/null", "/dev/no/such"])
def test_a_file_system_of_the_kernel_is_refused(place):
    for write in (lambda path: write_bytes(path, b"x"), ensure_writable):
        with pytest.raises(OutputError, match="holds no files of users"):
            write(Path(place))
    assert not Path("/dev/null").is_file()


def test_a_pipe_is_not_replaced(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="it is a device or a pipe"):
        write_bytes(tmp_path / "pipe", b"x")
    (tmp_path / "inside").symlink_to("/proc")
    with pytest.raises(OutputError, match="`/proc` holds no files of users"):
        write_bytes(tmp_path / "inside" / "x", b"x")
    monkeypatch.chdir(tmp_path)
    write_bytes(Path("/proc/self/cwd/x"), b"x")
    assert (tmp_path / "x").read_bytes() == b"x", "a link there may lead to an ordinary folder"


def test_what_is_written_is_there_and_nothing_else(tmp_path):
    write_bytes(tmp_path / "new" / "a.bin", b"\x00\x01")
    write_json(tmp_path / "b.json", {"名": [1, 2.5, None]})
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\x01"
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"名": [1, 2.5, None]}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "b.json", "new"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def interrupted():
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent
            temporary.write_bytes(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_folder_appears_whole(tmp_path):
    with atomic_path(tmp_path / "folder") as temporary:
        write_bytes(temporary / "a", b"1")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "a").read_bytes() == b"1"


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file/a"):
        write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(OutputError):
        ensure_writable(tmp_path / "file" / "sub")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_bytes(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more_keeps_the_old_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    program = """
import resource, sys
from pathlib import Path
from llmctl.errors import ArtifactError, OutputError
from llmctl.files import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except OutputError as error:
    print(error, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=True)
    assert str(target) in done.stdout
    assert "file too large" in done.stdout
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_long_and_chinese_names_fit(tmp_path):
    for name in ("x" * 255, "名" * 80):
        write_bytes(tmp_path / name, b"1")
        assert (Path(tmp_path) / name).read_bytes() == b"1"
    with pytest.raises(OutputError, match="too long"):
        write_bytes(tmp_path / ("x" * 256), b"1")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_who_else_could_have_written_a_file(tmp_path):
    folder = tmp_path / "a" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    file = folder / "library.so"
    file.write_bytes(b"x")
    file.chmod(0o755)
    assert exposed(file) == ""
    for place in (file, folder, folder.parent):
        mode = place.stat().st_mode
        place.chmod(0o777)
        assert exposed(file) == f"`{place}` can be written by others"
        place.chmod(mode)
    folder.parent.chmod(0o1777)  # as /tmp: others cannot rename what is ours
    assert exposed(file) == ""
    folder.chmod(0o1777)  # but there they could have made it
    assert "can be written by others" in exposed(file)
    folder.chmod(0o700)
    link = tmp_path / "link.so"
    link.symlink_to(file)
    assert exposed(link) == ""
    assert "cannot be checked" in exposed(folder / "nothing")
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        assert exposed(file) == f"`{file}` belongs to user 12345"


def test_links_out_of_a_folder_are_named(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    model = tmp_path / "model"
    model.mkdir()
    (model / "real.json").write_text("{}")
    links = {"inside.json": "real.json", "out.json": secret, "up.json": "../secret", "away.json": "nothing"}
    for name, target in links.items():
        (model / name).symlink_to(target)
    assert read_own(model / "inside.json") == b"{}"
    for name in ("out.json", "up.json"):
        with pytest.raises(ArtifactError, match="secret`, outside its folder"):
            read_own(model / name)
    assert outside(model / "real.json") is None
    (tmp_path / "latest").symlink_to("model")  # a linked folder is the folder
    assert read_own(tmp_path / "latest" / "inside.json") == b"{}"
    (model / "more.json").symlink_to("out.json")  # a link to a link
    with pytest.raises(ArtifactError):
        read_own(model / "more.json")


def test_the_hubs_cache_is_one_folder(tmp_path):
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc" / "onnx"
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "123").write_text("{}")
    (snapshot.parent / "config.json").symlink_to("../../blobs/123")
    (snapshot / "config.json").symlink_to("../../../blobs/123")
    (snapshot / "other.json").symlink_to("../../../../other")
    assert read_own(snapshot.parent / "config.json") == read_own(snapshot / "config.json") == b"{}"
    with pytest.raises(ArtifactError):
        read_own(snapshot / "other.json")


def test_json_of_others_is_bounded():
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert parse_json(b"7") == 7
    assert parse_json("[" * 100 + "]" * 100)
    for text in ("[" * 101 + "]" * 101, "[" * 100_000, "{", "", "9" * 5000, b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE HTML><html>", "web page"),
        (b"PK\x03\x04zip", "zip archive"),
        (b"\x80\x02}q\x00X\x01\x00a", "pickle"),
        (b"\x80\x02\x00\x00\x00\x00\x00\x00{}", None),
        (b"GGUF\x03\x00", "GGUF"),
        ("文本,标签\n".encode(), "text"),
        (b"", None),
        (bytes(16), None),
    ],
)
def test_files_are_recognized_by_their_first_bytes(head, part):
    found = recognized(head)
    assert part in found[0] if part and found else found is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://example.org/a.safetensors", "curl -LO https://example.org/a.safetensors"),
        ("runs/7", ""),
        ("/tmp/x/y", ""),
        ("model", ""),
    ],
)
def test_what_lies_elsewhere_is_fetched_first(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    hint = download_hint(name)
    assert hint.endswith(expected)
    assert bool(hint) == bool(expected)


def test_a_second_name_takes_no_space_where_there_are_hard_links(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    for _ in range(2):  # also where it has the name already
        link_or_copy(source, tmp_path / "name")
        assert (tmp_path / "name").samefile(source)
    monkeypatch.setattr("os.link", refuse)
    link_or_copy(source, tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(source)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def refuse(*_: object) -> None:
    raise PermissionError("no hard links here")
